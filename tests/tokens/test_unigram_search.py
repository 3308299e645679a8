"""The compiled unigram search gives SentencePiece's ids, also where fp32 rounding decides, with and without kept units."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from model_kinds import MODELS, trained

from ekiden.tokenizer.load import Tokenizer, load_tokenizer
from ekiden.tokens import kernel, unigram_search
from ekiden.tokens.encoders import refusal
from ekiden.tokens.exact import NASTY, NotProvable, differing_text
from ekiden.tokens.unigram_search import UnigramSearch


@pytest.fixture(scope="module")
def searches(
    sentences: list[str], tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[UnigramSearch, Tokenizer]]:
    if kernel.library() is None:
        pytest.skip("there is no C compiler")
    if sentencepiece.__version__ not in unigram_search._VERSIONS:
        pytest.skip(f"the sums of SentencePiece {sentencepiece.__version__} are not known")
    found = trained(MODELS, "unigram", sentences, tmp_path_factory.mktemp("models"))
    tokenizers = [load_tokenizer(path) for path in found.values()]
    return [(UnigramSearch(tokenizer), tokenizer) for tokenizer in tokenizers]


def long_texts(sentences: list[str]) -> list[str]:
    """Return texts whose sums pass the 100,000 and are full of near ties: words cut and joined at random."""
    draw = random.Random(7)
    parts = [word[: draw.randrange(1, 5)] for text in sentences for word in text.split(" ") if word]
    parts += [part for text in NASTY for part in text.split(" ")] + [
        "<think>",
        "two words",
        "\n\n",
        "ab ",
        " ",
    ]
    return ["".join(draw.choices(parts, k=count)) for count in (50, 3000, 40_000)]


def test_ids_are_sentencepieces(
    searches: list[tuple[UnigramSearch, Tokenizer]], sentences: list[str]
) -> None:
    texts = [*sentences, *long_texts(sentences)]
    for search, tokenizer in searches:
        for _ in range(2):  # searched, and kept
            assert differing_text(search, tokenizer, texts) is None
        assert refusal(tokenizer, sentences) is None
    assert any(
        sum(tokenizer.processor.get_score(int(i)) for i in search.encode_batch(texts[-1:])[0]) < -100_000
        for search, tokenizer in searches
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=5), st.integers(0, 40))
def test_any_strings_whatever(
    searches: list[tuple[UnigramSearch, Tokenizer]], texts: list[str], times: int
) -> None:
    for search, tokenizer in searches:
        assert differing_text(search, tokenizer, [*texts, "".join(texts) * times]) is None


def test_few_kept_units_and_none_give_the_same(
    searches: list[tuple[UnigramSearch, Tokenizer]], sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kept in (0, 16):
        monkeypatch.setattr(unigram_search, "_KEPT_UNITS", kept)
        tokenizer = searches[0][1]
        assert (
            differing_text(UnigramSearch(tokenizer), tokenizer, [*sentences, *long_texts(sentences)]) is None
        )


def test_no_compiler_or_another_version_is_a_refusal(
    searches: list[tuple[UnigramSearch, Tokenizer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = searches[0][1]
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "library", lambda: None)
        assert refusal(tokenizer, []) == "there is no C compiler"
    monkeypatch.setattr(unigram_search, "_VERSIONS", ("9.9",))
    with pytest.raises(NotProvable, match="are not known"):
        UnigramSearch(tokenizer)


def test_the_compiled_file_is_kept_and_a_failing_compiler_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel, "library", kernel.library.__wrapped__)
    if kernel.library() is None:
        pytest.skip("there is no C compiler")
    (kept,) = (tmp_path / "ekiden").iterdir()
    written = kept.stat().st_mtime_ns
    assert kernel.library() is not None
    assert kept.stat().st_mtime_ns == written
    monkeypatch.setattr(kernel, "OPTIONS", ["-no-such-option"])
    assert kernel.library() is None
