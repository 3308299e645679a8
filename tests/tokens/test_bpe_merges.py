"""The compiled BPE merges give SentencePiece's ids, for every kind of model they take, with and without kept units."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_kinds import BPE_MODELS, trained, unusual

from ekiden.tokenizer.load import SentencePieceTokenizer, Tokenizer, load_tokenizer
from ekiden.tokens import bpe_merges, kernel
from ekiden.tokens.bpe_cache import BpeCache
from ekiden.tokens.bpe_merges import BpeMerges
from ekiden.tokens.encoders import encoder_class, refusal
from ekiden.tokens.exact import NORMAL, UNUSED, NotProvable, differing_text

pytestmark = pytest.mark.skipif(kernel.library() is None, reason="there is no C compiler")


def changed(path: Path, change: Callable[[Any], None]) -> SentencePieceTokenizer:
    """Return a model with something else in it."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2
    model = proto.ModelProto()
    model.ParseFromString(path.read_bytes())
    change(model)
    return SentencePieceTokenizer({"tokenizer.model": model.SerializeToString()})


def equal_scores(model: Any) -> None:
    for number, piece in enumerate(model.pieces):
        piece.score = -(number % 3)


def without_letters(model: Any) -> None:
    """Rename half of the letters that are pieces, so that longer pieces have letters that are none."""
    letters = [piece for piece in model.pieces if piece.type == NORMAL and len(piece.piece) == 1]
    for number, piece in enumerate(letters[::2]):
        piece.piece = chr(0x1F600 + number)


@pytest.fixture(scope="module")
def models(sentences: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return trained(BPE_MODELS, "bpe", sentences, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def encoders(models: dict[str, Path]) -> list[tuple[BpeMerges, Tokenizer]]:
    tokenizers = [load_tokenizer(path) for path in models.values()]
    for change in (equal_scores, without_letters):
        tokenizers += [changed(models["ours"], change), changed(models["no byte fallback"], change)]
    return [(BpeMerges(tokenizer), tokenizer) for tokenizer in tokenizers]


def without_cuts(sentences: list[str]) -> list[str]:
    """Return texts of one unit: their words joined, some of them cut, so that many symbols wait in the heap."""
    draw = random.Random(7)
    parts = [word[: draw.randrange(1, 9)] for text in sentences for word in text.split(" ") if word]
    return ["".join(draw.choices(parts, k=count)) for count in (5, 12, 50, 3000, 30_000)]


def test_ids_are_sentencepieces(encoders: list[tuple[BpeMerges, Tokenizer]], sentences: list[str]) -> None:
    texts = [*sentences, *unusual(1500, sentences), *without_cuts(sentences)]
    for merges, tokenizer in encoders:
        assert encoder_class(tokenizer) is BpeMerges
        for _ in range(2):  # merged, and kept
            assert differing_text(merges, tokenizer, texts) is None
        assert refusal(tokenizer, sentences[:20]) is None


LETTERS = st.text(
    "aeiorstn the\u0915\u0930\u094d\u093e\u0902 \u0928\u0939 \u2581\u00e9\U0001f600", max_size=80
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(LETTERS, st.text(max_size=30)), max_size=5), st.integers(0, 40))
def test_any_strings_whatever(
    encoders: list[tuple[BpeMerges, Tokenizer]], texts: list[str], times: int
) -> None:
    for merges, tokenizer in encoders:
        assert differing_text(merges, tokenizer, [*texts, "".join(texts) * times]) is None


def test_few_kept_units_and_a_hash_of_no_use_give_the_same(
    models: dict[str, Path], sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ekiden.tokens import compiled

    tokenizer = load_tokenizer(models["ours"])
    texts = [*sentences, *unusual(200, sentences), *without_cuts(sentences)]
    monkeypatch.setattr(bpe_merges, "_KEPT_UNITS", 4)
    assert differing_text(BpeMerges(tokenizer), tokenizer, texts) is None
    monkeypatch.setattr(compiled, "MIX", compiled.MIX * 0)  # every unit has the same hash
    assert differing_text(BpeMerges(tokenizer), tokenizer, texts) is None


def unused(model: Any) -> None:
    model.pieces[-1].type = UNUSED


def control_letter(model: Any) -> None:
    model.pieces[1].piece = "|"


def score_that_is_none(model: Any) -> None:
    model.pieces[-1].score = float("nan")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (unused, "marked unused"),
        (control_letter, "may stand in a text"),
        (score_that_is_none, "not a number"),
    ],
)
def test_models_of_odd_kinds_are_refused(
    change: Callable[[Any], None], reason: str, models: dict[str, Path]
) -> None:
    tokenizer = changed(models["ours"], change)
    with pytest.raises(NotProvable, match=reason):
        BpeMerges(tokenizer)
    if change is not score_that_is_none:
        with pytest.raises(NotProvable, match=reason):
            BpeCache(tokenizer)
    assert reason in str(refusal(tokenizer, []))
