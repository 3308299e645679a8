"""Cleaning: what goes, what stays, and that the first stays."""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest

from ekiden.corpus import cleaning
from ekiden.corpus.cleaning import (
    EXACT,
    KEPT,
    NEAR,
    NEAR_TEST,
    Cleaner,
    Cleaning,
    Sketches,
    duplicates,
    shingle_hashes,
    signatures,
    sketch,
    sketch_type,
)
from ekiden.corpus.documents import Rejected
from ekiden.corpus.script import ScriptTally, dominant_script
from ekiden.errors import UsageError

WORDS = [
    f"{a}{b}" for a in ("ka", "mo", "ri", "tel", "vun") for b in ("sa", "dor", "ni", "pel", "gu", "bash")
]


def sentence(seed: int, length: int = 80) -> list[str]:
    return random.Random(seed).choices(WORDS, k=length)


def verdicts(texts: list[str], near: bool = True, test: set[int] | None = None, units: int = 1) -> list[int]:
    flags = [i in (test or set()) for i in range(len(texts))]
    size = max(1, -(-len(texts) // units))
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for i in range(0, len(texts) + 1, size):  # the last one may be empty
            paths.append(Path(folder) / str(i))
            paths[-1].write_bytes(sketch(texts[i : i + size], flags[i : i + size], near).tobytes())
        return duplicates(Sketches(paths, sketch_type(near)), near).tolist()


def jaccard(left: str, right: str) -> float:
    a, b = set(shingle_hashes(left).tolist()), set(shingle_hashes(right).tolist())
    return len(a & b) / len(a | b)


def test_the_first_of_equal_documents_stays() -> None:
    assert verdicts(["a", "b", "a", "c", "b", "a"], near=False) == [KEPT, KEPT, EXACT, KEPT, EXACT, EXACT]
    assert verdicts([], near=True) == []


def test_hashes_that_agree_in_one_half_only_are_different_documents() -> None:
    hashes = np.array([[1, 2], [1, 3], [4, 2], [1, 2], [4, 2]], dtype=np.uint64)
    assert sorted(cleaning.repeated(hashes).tolist()) == [3, 4]


@pytest.mark.usefixtures("rensa")
@pytest.mark.parametrize("units", [1, 3, 7])
def test_near_duplicates_go_and_the_first_stays(units: int) -> None:
    base = sentence(1)
    almost = [*base[:40], "tsk", *base[41:]]
    texts = [" ".join(words) for words in (sentence(2), base, sentence(3), almost, sentence(4))]
    texts += [texts[1].upper().replace(" ", "\n \t"), texts[1]]
    assert jaccard(texts[1], texts[3]) > 0.85
    assert verdicts(texts, units=units) == [KEPT, KEPT, KEPT, NEAR, KEPT, NEAR, EXACT]


@pytest.mark.usefixtures("rensa")
def test_documents_that_share_a_half_stay() -> None:
    texts = [" ".join(sentence(1, 40) + sentence(seed, 40)) for seed in range(10, 40)]
    assert max(jaccard(a, b) for a in texts for b in texts if a is not b) < 0.6
    assert verdicts(texts) == [KEPT] * 30


@pytest.mark.usefixtures("rensa")
def test_a_chain_leaves_its_first_document_only() -> None:
    words, texts = sentence(5, 300), []
    for step in range(5):
        texts.append(" ".join(words))
        words[60 * step + 5 : 60 * step + 15] = ["tsk"] * 10
    assert jaccard(texts[0], texts[4]) < 0.8 < min(jaccard(a, b) for a, b in zip(texts, texts[1:]))
    assert verdicts(texts) == [KEPT] + [NEAR] * 4


@pytest.mark.usefixtures("rensa")
def test_what_is_near_a_test_document_is_told_apart() -> None:
    base = " ".join(sentence(1))
    texts = [base, base + " tsk", base + " tsk tsk", " ".join(sentence(2))]
    assert verdicts(texts, test={0, 2}) == [KEPT, NEAR_TEST, NEAR, KEPT]


@pytest.mark.usefixtures("rensa")
def test_similarity_is_estimated_within_its_error() -> None:
    differences = []
    for seed in range(60):
        words = sentence(seed, 200)
        other = list(words)
        for i in random.Random(seed).sample(range(200), seed % 12):
            other[i] = "tsk"
        left, right = " ".join(words), " ".join(other)
        equal = np.mean(signatures([left]).view(np.uint8) == signatures([right]).view(np.uint8))
        differences.append((equal - 1 / 256) / (1 - 1 / 256) - jaccard(left, right))
    assert abs(np.mean(differences)) < 0.02
    assert np.std(differences) < 0.06


@pytest.mark.usefixtures("rensa")
def test_signatures_are_the_same_on_every_machine() -> None:
    texts = ["The river runs past the old mill.", "नदी पुरानी चक्की के पास से बहती है।", "x", "abc " * 20_000]
    found = hashlib.sha256(signatures(texts).astype("<u8").tobytes()).hexdigest()
    assert found == "fef96efdefbf4892f043095d15004033bf89b2261f77f0877042f569516ba03d"
    one_by_one = np.concatenate([signatures([text]) for text in texts])
    assert (one_by_one == signatures(texts)).all()


def test_long_texts_are_shingled_like_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(sentence(1, 300))
    whole = shingle_hashes(text)
    monkeypatch.setattr(cleaning, "_CHUNK", 100)
    assert (shingle_hashes(text) == whole).all()
    assert len(whole) == len(text) - 15
    assert len(set(whole.tolist())) > 0.99 * len({text[i : i + 16] for i in range(len(whole))})


def test_a_crowded_bucket_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "MAX_PIVOTS", 3)
    rng = np.random.default_rng(1)
    rows = rng.integers(0, 256, (50, 128), dtype=np.uint8)
    rows[:, :8] = 7  # one band in common, nothing else
    rows[40] = rows[39]
    bands = rows.view("<u8")
    numbers = np.arange(50)
    first = cleaning.nearly_repeated(numbers, lambda b: bands[:, b], lambda n: rows[n])
    assert first.tolist() == [*range(40), 39, *range(41, 50)]


def test_a_minimum_length_and_nfc() -> None:
    decomposed = "cafe\u0301 d'ici"
    clean = Cleaning(min_length=4, nfc=True).clean
    assert clean(decomposed) == "caf\u00e9 d'ici"
    assert clean("caf\u00e9") == "caf\u00e9"
    with pytest.raises(Rejected, match="shorter than 4 characters"):
        clean("e\u0301e\u0301e\u0301")
    assert Cleaning().clean(decomposed) == decomposed
    for wrong in ({"dedupe": "fuzzy"}, {"min_length": -1}):
        with pytest.raises(UsageError, match=r"--dedupe|--min-length"):
            Cleaning(**wrong)


def test_the_verdicts_count_only_what_passed() -> None:
    cleaner = Cleaner(Cleaning(min_length=2), np.array([KEPT, EXACT, KEPT], dtype=np.uint8))
    seen: list[str] = []
    for text in ("one", "x", "two", "y", "three"):
        try:
            seen.append(cleaner(text, "file", 0))
        except Rejected as reason:
            seen.append(str(reason))
    assert seen == [
        "one",
        "shorter than 2 characters",
        "exact duplicate",
        "shorter than 2 characters",
        "three",
    ]


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("The river runs past the old mill", "LATIN"),
        ("नदी पुरानी चक्की के पास से बहती है", "DEVANAGARI"),
        ("Река течёт мимо старой мельницы", "CYRILLIC"),
        ("川は古い水車小屋のそばを流れています。", "HAN AND KANA"),
        ("12345 67890 --- 12345", None),
        ("नदी पुरानी river", None),
        ("नदी पुरानी चक्की के पास से (mill) बहती है और दिन भर", "DEVANAGARI"),
    ],
)
def test_the_script_of_a_text(text: str, script: str | None) -> None:
    assert dominant_script(text) == script


def test_another_script_in_a_folder_is_told_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    hindi, english = "नदी पुरानी चक्की के पास से बहती है", "The river runs past the old mill"
    lines = [json.dumps({"text": english if i % 10 == 7 else hindi}) + "\n" for i in range(100)]
    file.write_text("".join(lines))
    whole, later = ScriptTally(), ScriptTally()
    offset = 0
    for i, line in enumerate(lines):
        (whole if i < 50 else later).count(json.loads(line)["text"], str(file), offset)
        offset += len(line)
    whole.add(ScriptTally.from_dict(json.loads(json.dumps(later.as_dict()))))
    [warning] = whole.warnings("hindi")
    assert warning.startswith(
        "hindi: warning: 10.0% of the documents are mostly in Latin script, 90.0% in Devanagari"
    )
    assert f"{file}:8, {file}:18, {file}:28" in warning
    remote = ScriptTally()
    for i in range(100):  # a file that is not on this disk
        remote.count(english if i % 10 == 7 else hindi, "hf://datasets/a/b@c/t.jsonl", 100 * i)
    assert "(see hf://datasets/a/b@c/t.jsonl at byte 700, " in remote.warnings("hindi")[0]
    few = ScriptTally()
    for i in range(1000):
        few.count(english if i < 4 else hindi, str(file), 0)
    assert few.warnings("hindi") == []


def test_the_real_corpora_are_of_one_script_each(corpora: Path) -> None:
    for language, script in (("hindi", "DEVANAGARI"), ("dutch", "LATIN"), ("konkani", "DEVANAGARI")):
        tally = ScriptTally()
        for line in (corpora / language / "part-000.jsonl").open(encoding="utf-8"):
            tally.count(json.loads(line)["text"], language, 0)
        assert tally.documents[script] > 0.99 * sum(tally.documents.values())
        assert tally.warnings(language) == []
