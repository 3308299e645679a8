"""preprocess: the same bytes whatever the workers and the kills; every document's ids are the tokenizer's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ekiden.checkpoint import files
from ekiden.errors import UsageError, UserError
from ekiden.tokenizer.load import load_tokenizer
from ekiden.tokens import build, units
from ekiden.tokens.build import preprocess
from ekiden.tokens.format import TokenDataset


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 4000)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def make(corpus: Path, tokenizer: Path, out: Path, **options: object) -> TokenDataset:
    """Build shards; in a thread unless workers are asked for: a process of its own imports for 0.6 s."""
    options = {"test_split": 0.1, **options}
    if "num_proc" in options or "executor" in options:
        return preprocess([str(corpus)], str(tokenizer), str(out), **options)
    with ThreadPoolExecutor(1) as executor:
        return preprocess([str(corpus)], str(tokenizer), str(out), executor=executor, **options)


def test_any_number_of_workers_writes_the_same_bytes(
    language_folder: Path, tiny_tokenizer_path: Path, tmp_path: Path
) -> None:
    for workers in (1, 2, 4):
        make(language_folder, tiny_tokenizer_path, tmp_path / str(workers), num_proc=workers)
    assert len(list((tmp_path / "1" / "hindi").glob("train-*.bin"))) > 1
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "4")


def test_every_document_is_there_with_the_tokenizers_ids(
    language_folder: Path, tiny_tokenizer_path: Path, tmp_path: Path
) -> None:
    dataset = make(language_folder, tiny_tokenizer_path, tmp_path / "out")
    dataset.verify()
    tokenizer = load_tokenizer(tiny_tokenizer_path)
    for language in dataset.languages:
        lines = (language_folder / language / "text.jsonl").read_text(encoding="utf-8").splitlines()
        expected = {(2, *tokenizer.encode(json.loads(line)["text"]), 1) for line in lines}
        found = set()
        for split in ("train", "test"):
            stream = dataset.split(language, split)
            found |= {tuple(stream.document(i).tolist()) for i in range(stream.documents)}
            assert sum(len(stream.document(i)) for i in range(stream.documents)) == stream.tokens
            assert stream.documents > 0
        assert found == expected
    assert dataset.dtype.itemsize == 2
    assert dataset.tokenizer().sha256 == tokenizer.sha256 == dataset.tokenizer_sha256


def test_reading_goes_round_and_over_shard_borders(
    language_folder: Path, tiny_tokenizer_path: Path, tmp_path: Path
) -> None:
    stream = make(language_folder, tiny_tokenizer_path, tmp_path / "out").split("english", "train")
    whole = stream.read(0, stream.tokens).tolist()
    assert stream.read(stream.tokens - 3, 10).tolist() == whole[-3:] + whole[:7]
    assert stream.read(5, 2 * stream.tokens).tolist() == (whole * 3)[5 : 5 + 2 * stream.tokens]


def test_the_split_depends_on_the_documents_alone(
    language_folder: Path, tiny_tokenizer_path: Path, tmp_path: Path
) -> None:
    turned = tmp_path / "turned" / "english"
    turned.mkdir(parents=True)
    lines = (language_folder / "english" / "text.jsonl").read_text(encoding="utf-8").splitlines()
    (turned / "a.jsonl").write_text("\n".join(reversed(lines)) + "\n", encoding="utf-8")
    one = make(language_folder, tiny_tokenizer_path, tmp_path / "one").split("english", "test")
    two = make(turned.parent, tiny_tokenizer_path, tmp_path / "two").split("english", "test")
    assert {one.document(i).tobytes() for i in range(one.documents)} == {
        two.document(i).tobytes() for i in range(two.documents)
    }


def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(
    language_folder: Path, tiny_tokenizer_path: Path, tmp_path: Path
) -> None:
    make(language_folder, tiny_tokenizer_path, tmp_path / "whole")
    script = (
        "import sys, time\n"
        "from ekiden.tokens import build, units\n"
        "units.UNIT_BYTES = 4000\n"
        "if __name__ == '__main__':\n"
        "    from concurrent.futures import ThreadPoolExecutor\n"
        "    real = build.build_unit\n"
        "    def slow(*a):\n"
        "        time.sleep(0.1)\n"
        "        return real(*a)\n"
        "    build.build_unit = slow\n"
        "    build.preprocess([sys.argv[1]], sys.argv[2], sys.argv[3], test_split=0.1, executor=ThreadPoolExecutor(1))\n"
    )
    (tmp_path / "build.py").write_text(script)
    out = tmp_path / "killed"
    command = [sys.executable, tmp_path / "build.py", language_folder, tiny_tokenizer_path, out]
    process = subprocess.Popen([str(part) for part in command], env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (out / build.RECEIPTS).is_dir() or len(list((out / build.RECEIPTS).iterdir())) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "a-file").write_text("")
    with pytest.raises(UserError, match="a-file is not a folder; give the --output-dir"):
        TokenDataset.open(tmp_path / "a-file")
    with pytest.raises(UserError, match="unfinished build"):
        TokenDataset.open(out)
    done = len(list((out / build.RECEIPTS).iterdir()))
    assert done >= 2
    make(language_folder, tiny_tokenizer_path, out)
    assert contents(out) == contents(tmp_path / "whole")


def test_every_record_is_accounted_for(tiny_tokenizer_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus" / "english"
    folder.mkdir(parents=True)
    lines = [b'{"text": "good"}', b"bad", b"", b'{"text": null}', b'{"text": "\xff"}'] * 50
    (folder / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    dataset = make(tmp_path / "corpus", tiny_tokenizer_path, tmp_path / "out")
    kept = sum(dataset.split("english", split).documents for split in ("train", "test"))
    assert kept == 50
    assert dataset.rejected["english"] == {
        "blank line": 50,
        "invalid JSON": 50,
        "invalid UTF-8": 50,
        "text is null": 50,
    }
    assert dataset.description["records_read"]["english"] == 250
    assert "rejected: 50 (invalid JSON)" in dataset.describe()


def test_a_sample_is_of_the_whole_corpus(
    language_folder: Path, tiny_tokenizer_path: Path, tmp_path: Path
) -> None:
    whole = make(language_folder, tiny_tokenizer_path, tmp_path / "whole")
    half = sum(split.tokens for splits in whole.splits.values() for split in splits.values()) // 2
    dataset = make(language_folder, tiny_tokenizer_path, tmp_path / "out", dataset_size=half)
    assert 0.3 < dataset.description["keep_fraction"] < 0.7
    for language in dataset.languages:
        kept = sum(split.documents for split in dataset.splits[language].values())
        assert 10 < kept < 50
    with pytest.raises(UsageError, match="--dataset-size"):
        make(language_folder, tiny_tokenizer_path, tmp_path / "x", dataset_size="lots")


def test_a_finished_build_is_kept_and_another_is_refused(
    language_folder: Path, tiny_tokenizer_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    make(language_folder, tiny_tokenizer_path, out)
    before = contents(out)
    make(language_folder, tiny_tokenizer_path, out)
    assert contents(out) == before
    with pytest.raises(UserError, match="another corpus, tokenizer or setting"):
        make(language_folder, tiny_tokenizer_path, out, test_split=0.2)
    unfinished = tmp_path / "unfinished"
    make(language_folder, tiny_tokenizer_path, unfinished)
    (unfinished / "dataset.json").unlink()
    with pytest.raises(UserError, match="unfinished build of another"):
        make(language_folder, tiny_tokenizer_path, unfinished, test_split=0.2)
    assert list(unfinished.glob("*/train-*.bin"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty"):
        make(language_folder, tiny_tokenizer_path, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_a_full_disk_is_one_sentence_and_leaves_no_dataset(
    language_folder: Path, tiny_tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(operation: str, path: Path) -> None:
        if operation == "write" and path.name.startswith(".dataset.json"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "fault_hook", full)
    with pytest.raises(UserError, match="No space left on device"):
        make(language_folder, tiny_tokenizer_path, tmp_path / "out")
    assert not (tmp_path / "out" / "dataset.json").exists()
    monkeypatch.setattr(files, "fault_hook", None)
    make(language_folder, tiny_tokenizer_path, tmp_path / "out").verify()


def test_what_is_no_folder_is_not_called_a_full_disk(
    language_folder: Path, tiny_tokenizer_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"could not be written .*; give a folder on a writable disk and run"):
        make(language_folder, tiny_tokenizer_path, tmp_path / "file" / "out", num_proc=1)


def test_a_corpus_without_documents_is_one_sentence(tiny_tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus" / "x").mkdir(parents=True)
    (tmp_path / "corpus" / "x" / "a.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="holds no document"):
        make(tmp_path / "corpus", tiny_tokenizer_path, tmp_path / "out")


@pytest.mark.parametrize("damage", ["cut", "missing", "bits", "json", "version"])
def test_damaged_shards_are_refused_by_name(
    language_folder: Path, tiny_tokenizer_path: Path, tmp_path: Path, damage: str
) -> None:
    out = tmp_path / "out"
    dataset = make(language_folder, tiny_tokenizer_path, out)
    shard, description = out / "hindi" / "train-00000.bin", out / "dataset.json"
    data = shard.read_bytes()
    if damage == "cut":
        shard.write_bytes(data[:-1])
    elif damage == "missing":
        shard.unlink()
    elif damage == "bits":
        shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(UserError, match=r"train-00000\.bin is damaged"):
            dataset.verify()
        return
    elif damage == "json":
        description.write_bytes(description.read_bytes()[:-10])
    else:
        description.write_text(description.read_text().replace('"version": 1', '"version": 99'))
    with pytest.raises(UserError, match=r"train-00000\.bin|dataset\.json"):
        TokenDataset.open(out)


def test_units_are_cut_by_sizes_alone(language_folder: Path) -> None:
    from ekiden.corpus.sources import discover

    planned = units.plan_units(discover([str(language_folder)]))
    assert [(u.language, u.number) for u in planned] == sorted((u.language, u.number) for u in planned)
    for language in ("english", "hindi"):
        parts = [p for u in planned if u.language == language for p in u.parts]
        assert parts[0].start == 0 and parts[-1].end == parts[-1].file.size
        assert all(a.end == b.start for a, b in zip(parts, parts[1:]))


def test_the_workers_of_a_killed_build_end_with_it(
    language_folder: Path, tiny_tokenizer_path: Path, tmp_path: Path
) -> None:
    make(language_folder, tiny_tokenizer_path, tmp_path / "whole")
    out, script = tmp_path / "killed", tmp_path / "build.py"
    script.write_text(
        "import sys\n"
        "from ekiden.tokens import build, units\n"
        "units.UNIT_BYTES = 4000\n"
        "if __name__ == '__main__':\n"
        "    build.preprocess([sys.argv[1]], sys.argv[2], sys.argv[3], test_split=0.1, num_proc=2)\n"
    )
    command = [sys.executable, script, language_folder, tiny_tokenizer_path, out]
    process = subprocess.Popen([str(part) for part in command])
    while not list((out / build.RECEIPTS).glob("*")):
        assert process.poll() is None
        time.sleep(0.001)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("this system does not list a process's children in /proc")
    workers = [
        int(pid)
        for pid in children.read_text().split()
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    process.kill()
    process.wait()
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers)
    make(language_folder, tiny_tokenizer_path, out)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("size", ["lots", "", "0", "-5", "inf", "nan", "10MB"])
def test_a_dataset_size_that_is_no_number_of_tokens_is_refused(
    language_folder: Path, tiny_tokenizer_path: Path, tmp_path: Path, size: str
) -> None:
    with pytest.raises(UsageError, match="--dataset-size must be tokens such as"):
        make(language_folder, tiny_tokenizer_path, tmp_path / "out", dataset_size=size)


def test_shards_are_numbered_without_gaps_and_a_kill_while_naming_them_costs_nothing(
    language_folder: Path, tiny_tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"test_split": 0.02}
    whole = make(language_folder, tiny_tokenizer_path, tmp_path / "whole", **options)
    for splits in whole.splits.values():
        for name, split in splits.items():
            assert [shard.name for shard in split.shards] == [
                f"{name}-{i:05d}" for i in range(len(split.shards))
            ]
    assert any(len(splits["test"].shards) < len(splits["train"].shards) for splits in whole.splits.values())
    left = [5]

    def fail(operation: str, path: Path) -> None:
        if operation == "rename" and path.name.startswith("unit-"):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

    monkeypatch.setattr(files, "fault_hook", fail)
    with pytest.raises(KeyboardInterrupt):
        make(language_folder, tiny_tokenizer_path, tmp_path / "out", **options)
    monkeypatch.setattr(files, "fault_hook", None)
    make(language_folder, tiny_tokenizer_path, tmp_path / "out", **options).verify()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_token_that_is_none_names_its_shard(
    language_folder: Path, tiny_tokenizer_path: Path, tmp_path: Path
) -> None:
    """A size tells no flipped bit, and the hashes of 20 GB are not compared at every start."""
    dataset = make(language_folder, tiny_tokenizer_path, tmp_path / "out", num_proc=1)
    file = tmp_path / "out" / dataset.languages[0] / "train-00000.bin"
    damaged = bytearray(file.read_bytes())
    damaged[10:12] = b"\xff\xff"
    file.write_bytes(damaged)
    stream = TokenDataset.open(tmp_path / "out").split(dataset.languages[0], "train")
    assert len(stream.read(6, 50)) == 50
    with pytest.raises(
        UserError, match=r"train-00000\.bin is damaged: token 65535 of a vocabulary of \d+; preproc"
    ):
        stream.read(0, 50)
