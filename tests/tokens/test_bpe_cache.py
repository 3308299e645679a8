"""The BPE cache, which stands in where there is no compiler, gives SentencePiece's ids for every kind of model it takes; a
build takes what there is of the exact encoders, and shards hold SentencePiece's ids."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import model_kinds
import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from model_kinds import unusual

from ekiden.tokenizer.load import SentencePieceTokenizer, Tokenizer, load_tokenizer
from ekiden.tokens import bpe_cache, build, kernel, units, worker
from ekiden.tokens.bpe_cache import BpeCache
from ekiden.tokens.bpe_merges import BpeMerges
from ekiden.tokens.encoders import refusal
from ekiden.tokens.exact import Differs, NotProvable, differing_text

MODELS = model_kinds.BPE_MODELS


@pytest.fixture(scope="module")
def models(sentences: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return model_kinds.trained(MODELS, "bpe", sentences, tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_sentencepieces(name: str, models: dict[str, Path], sentences: list[str]) -> None:
    tokenizer = load_tokenizer(models[name])
    cache = BpeCache(tokenizer)
    texts = [*sentences, *unusual(1500, sentences)]
    for _ in range(2):  # learnt, and known
        for start in range(0, len(texts), 100):
            assert differing_text(cache, tokenizer, texts[start : start + 100]) is None


@pytest.fixture(scope="module")
def caches(models: dict[str, Path]) -> list[tuple[BpeCache, Tokenizer]]:
    tokenizers = [load_tokenizer(models[name]) for name in MODELS]
    return [(BpeCache(tokenizer), tokenizer) for tokenizer in tokenizers]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=5))
def test_any_strings_whatever(caches: list[tuple[BpeCache, Tokenizer]], texts: list[str]) -> None:
    for cache, tokenizer in caches:
        assert differing_text(cache, tokenizer, texts) is None


def test_a_full_cache_forgets_and_stays_right(
    models: dict[str, Path], sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bpe_cache, "_SLOTS", {1: 1 << 5, 2: 1 << 5, 4: 1 << 4, 8: 1 << 4})
    monkeypatch.setattr(bpe_cache, "_POOL_IDS", 64)
    tokenizer = load_tokenizer(models["ours"])
    cache = BpeCache(tokenizer)
    forgotten = []
    forget = cache._forget
    monkeypatch.setattr(cache, "_forget", lambda: (forgotten.append(1), forget()))
    texts = unusual(300, sentences)
    for start in range(0, len(texts), 10):
        assert differing_text(cache, tokenizer, texts[start : start + 10]) is None
    assert len(forgotten) > 3


def test_a_hash_of_no_use_costs_no_id(
    models: dict[str, Path], sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bpe_cache, "_MIX", [np.uint64(0)] * 8)  # every unit has the same hash
    tokenizer = load_tokenizer(models["ours"])
    assert differing_text(BpeCache(tokenizer), tokenizer, unusual(200, sentences)) is None


def test_what_cannot_be_proven_is_refused(
    models: dict[str, Path], tmp_path: Path, sentences: list[str]
) -> None:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(models["ours"].read_bytes())
    proto.normalizer_spec.escape_whitespaces = False
    with pytest.raises(NotProvable, match="spaces are not escaped"):
        BpeCache(SentencePieceTokenizer({"tokenizer.model": proto.SerializeToString()}))
    proto.trainer_spec.model_type = 1
    unigram = SentencePieceTokenizer({"tokenizer.model": proto.SerializeToString()})
    with pytest.raises(NotProvable, match="no SentencePiece BPE model"):
        BpeCache(unigram)


def test_a_wrong_proof_is_found_by_the_comparison(
    models: dict[str, Path], sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    everywhere, but_within_characters = (
        bytes([255]) * 256,
        bytes([255]) * 0x80 + bytes(0x40) + bytes([255]) * 0x40,
    )
    monkeypatch.setattr(bpe_cache, "border_masks", lambda _: (everywhere, but_within_characters))
    monkeypatch.setattr(kernel, "library", lambda: None)
    assert "it gave other ids for" in str(refusal(load_tokenizer(models["ours"]), sentences))


@pytest.fixture
def encoders(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return which encoder every batch of a build went to."""
    asked: list[str] = []
    for kind in (BpeCache, BpeMerges, SentencePieceTokenizer):
        real = kind.encode_batch

        def noted(self: Any, texts: list[str], real: Any = real, name: str = kind.__name__) -> Any:
            asked.append(name)
            return real(self, texts)

        monkeypatch.setattr(kind, "encode_batch", noted)
    worker.worker_cache.cache_clear()
    worker.worker_tokenizer.cache_clear()
    return asked


def ids_of(dataset: Any) -> dict[str, list[list[int]]]:
    return {
        f"{language} {split}": [stream.document(i).tolist() for i in range(stream.documents)]
        for language in dataset.languages
        for split in ("train", "test")
        for stream in [dataset.split(language, split)]
    }


@pytest.mark.parametrize("kind", [BpeMerges, BpeCache])
def test_a_build_takes_it_and_a_refusal_or_a_difference_changes_no_id(
    kind: type[BpeMerges | BpeCache],
    language_folder: Path,
    models: dict[str, Path],
    tmp_path: Path,
    encoders: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 4000)
    if kind is BpeCache:
        monkeypatch.setattr(kernel, "library", lambda: None)
    elif kernel.library() is None:
        pytest.skip("there is no C compiler")

    def built(name: str) -> dict[str, list[list[int]]]:
        encoders.clear()
        out, pool = tmp_path / name, ThreadPoolExecutor(1)
        dataset = build.preprocess(
            [str(language_folder)], str(models["ours"]), str(out), test_split=0.1, executor=pool
        )
        dataset.verify()
        return ids_of(dataset)

    cached = built("cached")
    assert encoders.count(kind.__name__) > 20
    with monkeypatch.context() as patch:
        patch.setattr(build, "refusal", lambda *_: "it is Tuesday")
        assert built("refused") == cached
    assert kind.__name__ not in encoders
    assert f"without the {kind.name}: it is Tuesday" in capsys.readouterr().err
    checked: list[int] = []

    def differ(*_: object) -> None:
        checked.append(1)
        if len(checked) > 8:
            raise Differs("'text'")

    monkeypatch.setattr(worker, "check", differ)
    assert built("differing") == cached
    assert len(checked) > 8
    assert "other ids than SentencePiece for 'text'; building again without it" in capsys.readouterr().err
    assert not list((tmp_path / "differing").rglob("unit-*"))


def train_on(texts: dict[str, list[str]], prefix: Path, **options: Any) -> None:
    """Train PREFIX.model on the lines of all texts."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(
            line for some in texts.values() for text in some for line in text.split("\n") if line
        ),
        model_prefix=str(prefix),
        minloglevel=2,
        **options,
    )


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize("options", ["ours", "defaults"])
def test_shards_hold_sentencepieces_ids_document_by_document(
    model_type: str, options: str, corpora: Path, tmp_path: Path
) -> None:
    import json

    folder = tmp_path / "corpus"
    texts: dict[str, list[str]] = {}
    for language in ("konkani", "hindi", "dutch", "english"):
        lines = (corpora / language / "part-000.jsonl").read_bytes().splitlines(keepends=True)[:12]
        (folder / language).mkdir(parents=True)
        (folder / language / "a.jsonl").write_bytes(b"".join(lines))
        texts[language] = [json.loads(line)["text"] for line in lines]
    train_on(
        texts,
        tmp_path / "m",
        model_type=model_type,
        vocab_size=900,
        num_threads=1,
        max_sentence_length=1 << 20,
        **MODELS[options],
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    dataset = build.preprocess(
        [str(folder)], str(tmp_path / "m.model"), str(tmp_path / "out"), num_proc=2, test_split=0.2
    )
    for language, expected in texts.items():
        found = [ids for split in ("train", "test") for ids in ids_of(dataset)[f"{language} {split}"]]
        around = [processor.encode(text, add_bos=True, add_eos=True) for text in expected]
        assert sorted(found) == sorted(around)


SETTINGS: dict[str, dict[str, Any]] = {"ours": model_kinds.OURS, "defaults": {}}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize("options", SETTINGS)
def test_shards_of_the_corpora_with_a_model_of_16_000_pieces(
    model_type: str, options: str, corpora: Path, tmp_path: Path
) -> None:
    """Every document of the first file of each language; some are so long that a unigram model's sums are set back."""
    import json

    texts = {
        folder.name: [json.loads(line)["text"] for line in sorted(folder.glob("*.jsonl"))[0].open("rb")]
        for folder in sorted(corpora.iterdir())
        if list(folder.glob("*.jsonl"))
    }
    for language, documents in texts.items():
        (tmp_path / "corpus" / language).mkdir(parents=True)
        with (tmp_path / "corpus" / language / "a.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    train_on(
        texts,
        tmp_path / "m",
        model_type=model_type,
        vocab_size=16_000,
        input_sentence_size=100_000,
        num_threads=2,
        **SETTINGS[options],
    )
    dataset = build.preprocess(
        [str(tmp_path / "corpus")], str(tmp_path / "m.model"), str(tmp_path / "out"), num_proc=2, test_split=0
    )
    tokenizer = load_tokenizer(tmp_path / "m.model")
    assert isinstance(tokenizer, SentencePieceTokenizer)
    score, farthest = [tokenizer.processor.get_score(number) for number in range(16_000)], 0.0
    for language, documents in texts.items():
        stream = dataset.split(language, "train")
        assert stream.documents == len(documents)
        for number, ids in enumerate(tokenizer.encode_batch(documents)):
            farthest = min(farthest, sum(score[i] for i in ids.tolist()))
            assert stream.document(number).tolist() == [tokenizer.bos_id, *ids.tolist(), tokenizer.eos_id]
    assert model_type == "bpe" or farthest < -100_000
