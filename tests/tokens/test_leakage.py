"""No text of the test split is trained on; every document that cleaning leaves out is accounted for."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import pytest

from ekiden.corpus.cleaning import shingle_hashes
from ekiden.errors import UserError
from ekiden.tokenizer.load import load_tokenizer
from ekiden.tokenizer.train import train_tokenizer
from ekiden.tokens import build, dedupe, units
from ekiden.tokens.build import preprocess
from ekiden.tokens.format import SPLITS, TokenDataset

WORDS = [
    f"{a}{b}" for a in ("ka", "mo", "ri", "tel", "vun") for b in ("sa", "dor", "ni", "pel", "gu", "bash")
]


@pytest.fixture(scope="module")
def tokenizer(language_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.model"
    train_tokenizer([str(language_folder)], str(path), vocab_size=430, model_type="bpe")
    return str(path)


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 20_000)


def write(folder: Path, texts: list[str], name: str = "a.jsonl") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (folder / name).write_text("".join(lines), encoding="utf-8")


def made_text(seed: int, length: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def nearly(text: str) -> str:
    words = text.split()
    words[len(words) // 2] = "tsk"
    return " ".join(words)


def texts_of(dataset: TokenDataset, language: str, split: str) -> list[str]:
    tokenizer, stream = dataset.tokenizer(), dataset.split(language, split)
    return [tokenizer.decode(stream.document(i).tolist()) for i in range(stream.documents)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def here() -> Executor:
    """Return an executor in this process: starting another takes longer than these builds."""
    return ThreadPoolExecutor(1)


def balanced(dataset: TokenDataset) -> None:
    for language in dataset.languages:
        kept = sum(split.documents for split in dataset.splits[language].values())
        rejected = sum(dataset.rejected[language].values())
        assert kept + rejected == dataset.description["records_read"][language]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return 300 documents: 150 different ones, 50 of them again, 50 nearly again, 10 short, 40 of another kind."""
    root = tmp_path_factory.mktemp("repeated")
    base = [made_text(i) for i in range(150)]
    rest = base[:50] + [nearly(text) for text in base[50:100]] + [f"short {i}" for i in range(10)]
    rest += [made_text(1000 + i) for i in range(40)]
    random.Random(1).shuffle(rest)
    write(root / "made", base + rest)
    return root


def test_without_being_asked_nothing_is_removed_and_equal_texts_share_a_split(
    corpus: Path, tokenizer: str, tmp_path: Path
) -> None:
    dataset = preprocess([str(corpus)], tokenizer, str(tmp_path / "out"), test_split=0.3, executor=here())
    train, test = (texts_of(dataset, "made", split) for split in ("train", "test"))
    assert len(train) + len(test) == 300
    assert not set(train) & set(test)
    assert len(set(test)) < len(test)
    balanced(dataset)


@pytest.mark.usefixtures("rensa")
@pytest.mark.parametrize("workers", [1, 2])
def test_near_duplicates_go_whatever_the_number_of_workers(
    corpus: Path, tokenizer: str, tmp_path: Path, workers: int
) -> None:
    dataset = preprocess(
        [str(corpus)],
        tokenizer,
        str(tmp_path / "out"),
        test_split=0.3,
        num_proc=workers,
        dedupe="near",
        min_length=20,
    )
    train, test = (texts_of(dataset, "made", split) for split in SPLITS)
    assert sorted(train + test) == sorted(
        [made_text(i) for i in range(150)] + [made_text(1000 + i) for i in range(40)]
    )
    rejected = dataset.rejected["made"]
    assert rejected["exact duplicate"] == 50
    assert rejected["shorter than 20 characters"] == 10
    assert rejected["near duplicate"] + rejected["near duplicate of a test document"] == 50
    assert rejected["near duplicate of a test document"] > 3
    balanced(dataset)
    reference = tmp_path.parent / "near-reference"
    if workers == 1:
        (tmp_path / "out").rename(reference)
    elif reference.exists():
        assert contents(tmp_path / "out") == contents(reference)


def test_exact_duplicates_alone(corpus: Path, tokenizer: str, tmp_path: Path) -> None:
    dataset = preprocess(
        [str(corpus)], tokenizer, str(tmp_path / "out"), test_split=0.3, executor=here(), dedupe="exact"
    )
    found = [text for split in SPLITS for text in texts_of(dataset, "made", split)]
    assert len(found) == len(set(found)) == 250
    assert dataset.rejected["made"] == {"exact duplicate": 50}
    assert dataset.description["cleaning"]["dedupe"] == "exact"


def test_texts_that_differ_in_normalisation_are_equal_after_nfc(tokenizer: str, tmp_path: Path) -> None:
    write(tmp_path / "corpus" / "x", ["cafe\u0301 and more words", "caf\u00e9 and more words", "another"])
    plain = preprocess(
        [str(tmp_path / "corpus")], tokenizer, str(tmp_path / "plain"), executor=here(), dedupe="exact"
    )
    assert plain.rejected["x"] == {}
    nfc = preprocess(
        [str(tmp_path / "corpus")],
        tokenizer,
        str(tmp_path / "nfc"),
        executor=here(),
        dedupe="exact",
        nfc=True,
    )
    assert nfc.rejected["x"] == {"exact duplicate": 1}
    assert sorted(t for s in SPLITS for t in texts_of(nfc, "x", s)) == ["another", "caf\u00e9 and more words"]


def test_a_text_in_two_languages_is_not_test_here_and_training_there(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [made_text(i) for i in range(100)]
    write(tmp_path / "corpus" / "big", common + [made_text(1000 + i, 400) for i in range(100)])
    write(tmp_path / "corpus" / "small", common)
    monkeypatch.setattr(units, "TEST_BYTES", 20_000)
    monkeypatch.setattr(units, "MAX_TEST_SPLIT", 0.5)
    out = tmp_path / "out"
    dataset = preprocess([str(tmp_path / "corpus")], tokenizer, str(out), test_split=0.01, executor=here())
    shares = dataset.description["test_split"]
    assert shares["small"] > 2 * shares["big"]
    train, test = (
        {text for language in dataset.languages for text in texts_of(dataset, language, split)}
        for split in SPLITS
    )
    assert len(test) > 10
    assert not train & test
    rejected = dataset.rejected["big"]["test document of another language"]
    assert rejected > 5
    balanced(dataset)
    monkeypatch.setattr(dedupe.Window, "note", lambda *_: None)
    leaky = preprocess([str(tmp_path / "corpus")], tokenizer, str(tmp_path / "leaky"), test_split=0.01, 
                       executor=here())  # fmt: skip
    leaked = set(texts_of(leaky, "big", "train")) & set(texts_of(leaky, "small", "test"))
    assert len(leaked) == rejected


def test_a_sample_is_as_large_as_asked_after_cleaning(tokenizer: str, tmp_path: Path) -> None:
    write(tmp_path / "corpus" / "made", [made_text(i % 300) for i in range(900)])
    whole = preprocess(
        [str(tmp_path / "corpus")], tokenizer, str(tmp_path / "whole"), executor=here(), dedupe="exact"
    )
    tokens = sum(split.tokens for split in whole.splits["made"].values())
    half = preprocess(
        [str(tmp_path / "corpus")],
        tokenizer,
        str(tmp_path / "half"),
        executor=here(),
        dedupe="exact",
        dataset_size=tokens // 2,
    )
    assert 0.4 < sum(split.tokens for split in half.splits["made"].values()) / tokens < 0.6


@pytest.mark.usefixtures("rensa")
@pytest.mark.parametrize("moment", ["sketch", "drop", "receipt"])
def test_a_build_killed_while_cleaning_goes_on(
    corpus: Path, tokenizer: str, tmp_path: Path, moment: str
) -> None:
    options = "test_split=0.3, dedupe='near', min_length=20"
    script = tmp_path / "build.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from ekiden.checkpoint import files\n"
        "from ekiden.tokens import build, dedupe, units\n"
        "units.UNIT_BYTES = 20_000\n"
        "def slowly(*_):\n"
        "    time.sleep(0.05)\n"
        "files.fault_hook = slowly\n"
        "real = dedupe.sketch\n"
        "dedupe.sketch = lambda *a: (slowly(), real(*a))[1]\n"
        f"build.preprocess([sys.argv[1]], sys.argv[2], sys.argv[3], {options}, executor=ThreadPoolExecutor(1))\n"
    )
    out, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, str(script), str(corpus), tokenizer, str(out)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    pattern = {"sketch": "*.sketch", "drop": "*.drop", "receipt": "made-?????"}[moment]
    while not list((out / build.RECEIPTS).glob(pattern)):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "dataset.json").exists()
    for folder in (out, whole):
        preprocess(
            [str(corpus)],
            tokenizer,
            str(folder),
            test_split=0.3,
            executor=here(),
            dedupe="near",
            min_length=20,
        )
    assert contents(out) == contents(whole)


@pytest.mark.usefixtures("rensa")
def test_another_cleaning_is_another_build(corpus: Path, tokenizer: str, tmp_path: Path) -> None:
    preprocess([str(corpus)], tokenizer, str(tmp_path / "out"), executor=here(), dedupe="exact")
    with pytest.raises(UserError, match=r"cleaning was .*'exact'.* then and is .*'near'"):
        preprocess([str(corpus)], tokenizer, str(tmp_path / "out"), executor=here(), dedupe="near")


def test_another_script_in_a_folder_is_told_of(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["नदी पुरानी चक्की के पास से बहती है और दिन भर"] * 9 + ["The river runs past the old mill"]
    write(tmp_path / "corpus" / "hindi", texts * 10)
    dataset = preprocess([str(tmp_path / "corpus")], tokenizer, str(tmp_path / "out"), executor=here())
    told = capsys.readouterr().err
    assert "hindi: warning: 10.0% of the documents are mostly in Latin script" in told
    assert f"{tmp_path / 'corpus' / 'hindi' / 'a.jsonl'}:10, " in told
    assert dataset.description["scripts"]["hindi"] == {"DEVANAGARI": 90, "LATIN": 10}


@pytest.mark.usefixtures("rensa")
def test_real_text_with_copies_leaks_nothing(corpora: Path, tmp_path: Path) -> None:
    texts = [
        json.loads(line)["text"] for line in (corpora / "konkani" / "part-000.jsonl").open(encoding="utf-8")
    ]
    texts = [text for text in texts if len(text) > 300][:250]
    copies = [nearly(text) for text in texts[::3]] + texts[::5]
    write(tmp_path / "corpus" / "konkani", texts + copies)
    model = tmp_path / "k.model"
    train_tokenizer([str(tmp_path / "corpus")], str(model), vocab_size=600, model_type="bpe")
    dataset = preprocess(
        [str(tmp_path / "corpus")],
        str(model),
        str(tmp_path / "out"),
        test_split=0.2,
        num_proc=2,
        dedupe="near",
    )
    train, test = (
        [set(shingle_hashes(text).tolist()) for text in texts_of(dataset, "konkani", split)]
        for split in SPLITS
    )
    assert len(test) > 20
    worst = max(len(a & b) / len(a | b) for a in test for b in train)
    assert worst < 0.9  # the estimate's standard error is 0.035 about 0.8
    rejected = dataset.rejected["konkani"]
    assert sum(rejected.values()) >= len(copies) * 0.95
    assert rejected["near duplicate of a test document"] > 5
    assert load_tokenizer(model).sha256 == dataset.tokenizer_sha256
    balanced(dataset)
