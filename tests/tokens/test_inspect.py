"""`ekiden corpus inspect`: the figures are those of the shards, the shares and epochs those of training."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner

from ekiden.cli.data import corpus as corpus_command
from ekiden.errors import UsageError, UserError
from ekiden.progress import human_count
from ekiden.tokenizer.train import train_tokenizer
from ekiden.tokens.build import preprocess
from ekiden.tokens.inspect import TEMPERATURES, inspect
from ekiden.tokens.shares import plan_mixture
from ekiden.tokens.worker import worker_processes


@pytest.fixture(scope="module")
def corpus(language_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the four languages, Dutch ten times longer, with two repeated and one bad line in Hindi."""
    root = tmp_path_factory.mktemp("inspected")
    for folder in language_folder.iterdir():
        (root / folder.name).mkdir()
        lines = (folder / "text.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        if folder.name == "dutch":
            lines = [line.replace('": "', f'": "{i} ') for i in range(10) for line in lines]
        if folder.name == "hindi":
            lines += [*lines[:2], "bad\n"]
        (root / folder.name / "a.jsonl").write_text("".join(lines), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def tokenizer(language_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.model"
    train_tokenizer([str(language_folder)], str(path), vocab_size=430, model_type="bpe")
    return str(path)


def test_a_raw_corpus_has_the_figures_of_its_shards(corpus: Path, tokenizer: str, tmp_path: Path) -> None:
    raw = inspect([str(corpus)], tokenizer, num_proc=2).languages
    dataset = preprocess(
        [str(corpus)], tokenizer, str(tmp_path / "shards"), test_split=0, executor=ThreadPoolExecutor(1)
    )
    shards = inspect([str(tmp_path / "shards")]).languages
    assert list(raw) == list(shards) == ["dutch", "english", "hindi", "konkani"]
    for name, language in raw.items():
        split = dataset.splits[name]["train"]
        assert (language.documents, language.bytes, language.tokens) == (
            split.documents,
            split.bytes,
            split.tokens,
        )
        assert (shards[name].documents, shards[name].bytes, shards[name].tokens) == (
            split.documents, split.bytes, split.tokens,
        )  # fmt: skip
        words = sum(
            len(json.loads(line)["text"].split())
            for line in (corpus / name / "a.jsonl").read_text(encoding="utf-8").splitlines()
            if line != "bad"
        )
        assert language.fertility == pytest.approx(split.tokens / words)
        assert shards[name].fertility == pytest.approx(split.tokens / words, rel=0.05)
        assert language.duplicates == (2 if name == "hindi" else 0)
        assert language.rejected == shards[name].rejected == ({"invalid JSON": 1} if name == "hindi" else {})
        assert language.scripts == {
            "DEVANAGARI" if name in ("hindi", "konkani") else "LATIN": language.documents
        }


def test_shares_and_epochs_are_those_of_training(corpus: Path, tokenizer: str) -> None:
    found = inspect([str(corpus)], tokenizer, "1M", num_proc=1)
    sizes = {name: language.tokens or 0 for name, language in found.languages.items()}
    assert list(found.mixtures) == [f"{temperature:g}" for temperature in TEMPERATURES]
    for temperature in TEMPERATURES:
        cells, shares = found.mixtures[f"{temperature:g}"], plan_mixture(sizes, 1, 0, temperature).shares()
        for name, share in shares.items():
            assert cells[name]["share"] == share
            assert cells[name]["epochs"] == pytest.approx(share * 1e6 / sizes[name])
    table = found.describe()
    assert f"share, and epochs of {human_count(1_000_000)} tokens, by --temperature:" in table
    assert "rejected: 1 (invalid JSON)" in table
    equal = next(line for line in table.splitlines() if line.startswith("   0 konkani"))
    assert equal.count("█") == 10  # a quarter of 40


def test_the_command_prints_json_and_draws(corpus: Path, tokenizer: str, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    page = tmp_path / "mixture.html"
    arguments = [
        "inspect",
        str(corpus),
        "--tokenizer",
        tokenizer,
        "--num-proc",
        "1",
        "--json",
        "--plot",
        str(page),
    ]
    result = CliRunner().invoke(corpus_command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    value = json.loads(result.stdout)
    assert value["languages"]["dutch"]["documents"] == 600 and value["unit"] == "tokens"
    html = page.read_text(encoding="utf-8")
    assert "konkani" in html and "epochs" in html
    assert "<script src=" not in html.replace("<script src='data:", "")


def test_what_cannot_be_inspected_is_one_sentence(corpus: Path, tokenizer: str, tmp_path: Path) -> None:
    preprocess([str(corpus)], tokenizer, str(tmp_path / "shards"), executor=ThreadPoolExecutor(1))
    with pytest.raises(UsageError, match="--tokenizer is not for token shards"):
        inspect([str(tmp_path / "shards")], tokenizer)
    with pytest.raises(UsageError, match="--token-budget must be"):
        inspect([str(corpus)], None, "many")
    (tmp_path / "empty" / "x").mkdir(parents=True)
    (tmp_path / "empty" / "x" / "a.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no document"):
        inspect([str(tmp_path / "empty")], num_proc=1)
    with pytest.raises(UsageError, match=r"must name a file ending in \.html"):
        inspect([str(tmp_path / "shards")]).plot("mixture.png")


def test_a_worker_that_dies_is_one_sentence(corpus: Path) -> None:
    with (
        pytest.raises(UserError, match=r"a worker process ended .* lower --num-proc "),
        worker_processes(1, 1) as pool,
    ):
        pool.submit(os._exit, 1).result()
    with pytest.raises(UsageError, match="--num-proc must be at least 1"):
        inspect([str(corpus)], num_proc=0)


def test_a_plot_that_cannot_be_written_is_refused_before_the_corpus_is_read(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        corpus_command, ["inspect", str(tmp_path / "nowhere"), "--plot", "mixture.png"]
    )
    assert "--plot must name a file ending in .html, not mixture.png" in str(result.exception)


def test_a_damaged_shard_is_found_where_that_is_asked(
    corpus: Path, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shards"
    preprocess([str(corpus)], tokenizer, str(out), executor=ThreadPoolExecutor(1))
    files = [*out.rglob("*.bin"), *out.rglob("*.idx")]
    inspect([str(out)], verify=True)
    assert f"{len(files)} files of {out} have the hashes they were written with" in capsys.readouterr().err
    damaged = out / "dutch" / "train-00000.bin"
    data = bytearray(damaged.read_bytes())
    data[1000] ^= 1
    damaged.write_bytes(data)
    inspect([str(out)])
    with pytest.raises(UserError, match=r"dutch/train-00000\.bin is damaged; preprocess again, or copy"):
        inspect([str(out)], verify=True)
    with pytest.raises(UsageError, match="--verify is for a folder of token shards"):
        inspect([str(corpus)], verify=True)
