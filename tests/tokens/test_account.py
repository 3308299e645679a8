"""Every record read is kept or counted under a reason; a sample of the corpus is of all of it, in its mixture."""

from __future__ import annotations

import gzip
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from ekiden.corpus import documents
from ekiden.errors import UserError
from ekiden.tokenizer.train import train_tokenizer
from ekiden.tokens import units
from ekiden.tokens.build import preprocess
from ekiden.tokens.format import SPLITS, TokenDataset

LONGEST = 200_000


@pytest.fixture(scope="module")
def tokenizer(language_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.model"
    train_tokenizer([str(language_folder)], str(path), vocab_size=430, model_type="bpe")
    return str(path)


def lines_of(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def made_texts(prefix: str, count: int) -> list[str]:
    draw = random.Random(prefix)
    words = ["river", "mill", "चक्की", "व्हांवता", "molen", "wheel", "नदी", "flour"]
    return [f"{prefix} {i} {' '.join(draw.choices(words, k=draw.randrange(5, 60)))}" for i in range(count)]


def write_all_that_is_bad(folder: Path) -> dict[str, int]:
    """Write files with every kind of bad record, and return how many of each reason."""
    folder.mkdir(parents=True)
    bad = [
        b'{"text": "caf\xe9"}', b'{"text": "cut', b'{"text": "\\ud800"}', b'{"body": "x"}', b'{"text": null}',
        b'{"text": 5}', b'{"text": " \\n "}', b"[1, 2]", b"", b"[" * 100_000,
        b'{"text": "' + b"x" * LONGEST + b'"}', b'{"text": "short"}',
    ]  # fmt: skip
    good = lines_of(made_texts("good", 20)).splitlines()
    good.append(good[3])
    (folder / "a.jsonl").write_bytes(b"\n".join([*good, *bad]) + b"\n")
    packed = gzip.compress(lines_of(made_texts("gz", 3000)))
    (folder / "b.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    packed = zstandard.compress(lines_of(made_texts("zst", 3000)))
    (folder / "c.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    (folder / "d.parquet").write_bytes(b"PAR1 and nothing more PAR1")
    parquet.write_table(pyarrow.table({"body": ["x"] * 7}), folder / "e.parquet")
    values = [b"bytes are read as text", b"\xff\xfe", None, b" ", b"y" * LONGEST]
    parquet.write_table(
        pyarrow.table({"text": pyarrow.array(values, pyarrow.binary())}), folder / "f.parquet"
    )
    parquet.write_table(pyarrow.table({"text": [1, 2, 3]}), folder / "g.parquet")
    (folder / "h.txt").write_bytes(b"a text of some length\n\ncaf\xe9 and more of it\n\n" + b"z" * LONGEST)
    return {
        "invalid UTF-8": 3, "invalid JSON": 1, "lone surrogate": 1, "no text field": 8, "text is null": 2,
        "text is not a string": 4, "text is empty": 2, "not a JSON object": 1, "blank line": 1, "nested too deeply": 1,
        "longer than 16 MB": 3, "shorter than 10 characters": 1, "exact duplicate": 1, "damaged compressed file": 2,
        "damaged parquet file": 1,
    }  # fmt: skip


def test_every_reason_in_every_format_and_the_sum_is_what_was_read(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_RECORD_BYTES", LONGEST - 1000)
    monkeypatch.setattr(units, "UNIT_BYTES", 50_000)
    expected = write_all_that_is_bad(tmp_path / "corpus" / "x")
    dataset = preprocess(
        [str(tmp_path / "corpus")],
        tokenizer,
        str(tmp_path / "out"),
        min_length=10,
        dedupe="exact",
        executor=ThreadPoolExecutor(1),
    )
    assert dataset.rejected["x"] == dict(sorted(expected.items()))
    kept = sum(dataset.splits["x"][split].documents for split in SPLITS)
    assert kept > 500
    assert kept + sum(expected.values()) == dataset.description["records_read"]["x"]


def tokens_of(dataset: TokenDataset, language: str) -> int:
    return sum(split.tokens for split in dataset.splits[language].values())


def write_as(folder: Path, kind: str, texts: list[str]) -> None:
    folder.mkdir(parents=True)
    half = len(texts) // 2
    for number, some in enumerate((texts[:half], texts[half:])):
        path = folder / f"{number}{kind}"
        if kind == ".parquet":
            parquet.write_table(pyarrow.table({"id": some, "text": some}), path, row_group_size=300)
        elif kind == ".txt":
            path.write_text("\n\n".join(some), encoding="utf-8")
        else:
            pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[kind]
            path.write_bytes(pack(lines_of(some)))


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt"])
def test_a_sample_has_the_size_asked_for_the_mixture_and_no_favourites(
    kind: str, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 100_000)
    # Late documents are of another kind than early ones, and longer.
    texts = [*made_texts("early", 1500), *(text + " late" * 30 for text in made_texts("other", 1500))]
    for language, count in (("big", 3000), ("small", 3000)):
        write_as(
            tmp_path / "corpus" / language, kind, texts[:count] if language == "big" else texts[1200:1800]
        )
    pool = ThreadPoolExecutor(1)
    whole = preprocess([str(tmp_path / "corpus")], tokenizer, str(tmp_path / "whole"), executor=pool)
    total = {language: tokens_of(whole, language) for language in whole.languages}
    assert total["big"] > 4 * total["small"]
    wanted = sum(total.values()) // 3
    sample = preprocess(
        [str(tmp_path / "corpus")], tokenizer, str(tmp_path / "sample"), wanted, executor=pool
    )
    found = {language: tokens_of(sample, language) for language in sample.languages}
    assert 0.9 < sum(found.values()) / wanted < 1.1
    # 1,000 and 200 documents of about equal length: three standard errors are 8 and 17 %.
    assert abs(found["big"] * 3 / total["big"] - 1) < 0.13
    assert abs(found["small"] * 3 / total["small"] - 1) < 0.25
    decode = sample.tokenizer().decode
    kept = [
        decode(stream.document(i).tolist())
        for split in SPLITS
        for stream in [sample.split("big", split)]
        for i in range(stream.documents)
    ]
    early = sum(text.startswith("early") for text in kept)
    assert 400 < early < 600 and 400 < len(kept) - early < 600
    numbers = [int(text.split()[1]) for text in kept]
    assert (
        650 < sum(numbers) / len(numbers) < 850
    )  # of 0 to 1,499: from the whole of a file, not from its beginning


def test_a_sample_of_more_than_there_is_is_everything(
    language_folder: Path, tokenizer: str, tmp_path: Path
) -> None:
    dataset = preprocess(
        [str(language_folder)], tokenizer, str(tmp_path / "out"), "1B", executor=ThreadPoolExecutor(1)
    )
    assert dataset.description["keep_fraction"] == 1
    assert sum(split.documents for splits in dataset.splits.values() for split in splits.values()) == 240


def test_a_sample_without_a_document_says_so(language_folder: Path, tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"--dataset-size keeps \S+ of the documents, which is not one of them"
    ):
        preprocess(
            [str(language_folder)], tokenizer, str(tmp_path / "out"), 1, executor=ThreadPoolExecutor(1)
        )
