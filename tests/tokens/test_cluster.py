"""The build on a real Dask scheduler with two worker processes, one of which is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# Not "distributed": a folder of these tests has that name, too.
pytest.importorskip("distributed.client", reason="needs dask: pip install 'ekiden[dask]'")

from ekiden.errors import UserError
from ekiden.tokenizer.train import train_tokenizer
from ekiden.tokens import build, cluster, units
from ekiden.tokens.build import preprocess


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("scheduler")
    file = folder / "scheduler.json"
    command = ["-m", "dask", "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--no-show"]
    process = subprocess.Popen(
        [sys.executable, *command, "--scheduler-file", str(file)], stderr=subprocess.DEVNULL, cwd=folder
    )
    try:
        # There, and written to the end.
        while not file.exists() or not file.read_text().rstrip().endswith("}"):
            assert process.poll() is None
            time.sleep(0.05)
        yield json.loads(file.read_text())["address"]
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def tokenizer(language_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.model"
    train_tokenizer([str(language_folder)], str(path), vocab_size=430, model_type="bpe")
    return str(path)


@pytest.fixture
def workers(scheduler: str, tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    command = ["-m", "dask", "worker", scheduler, "--no-nanny", "--nthreads", "2", "--no-dashboard"]
    found = [
        subprocess.Popen(
            [sys.executable, *command, "--local-directory", str(tmp_path / f"dask-{i}")],
            stderr=subprocess.DEVNULL,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for i in range(2)
    ]
    yield found
    for process in found:
        process.kill()
        process.wait()


@pytest.fixture
def long_corpus(language_folder: Path, tmp_path: Path) -> Path:
    """Return the four languages eight times over, so that there is a way on which to kill."""
    root = tmp_path / "corpus"
    for folder in language_folder.iterdir():
        (root / folder.name).mkdir(parents=True)
        text = (folder / "text.jsonl").read_text(encoding="utf-8")
        for i in range(8):
            (root / folder.name / f"{i:02d}.jsonl").write_text(
                text.replace('": "', f'": "{i} '), encoding="utf-8"
            )
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_worker_killed_on_the_way_changes_no_byte(
    scheduler: str,
    workers: list[subprocess.Popen[bytes]],
    long_corpus: Path,
    tokenizer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 4000)
    out, local = tmp_path / "out", tmp_path / "local"
    preprocess([str(long_corpus)], tokenizer, str(local), num_proc=1)
    receipts = out / build.RECEIPTS
    at_the_kill: list[int] = []

    def kill() -> None:
        while not receipts.is_dir() or len(list(receipts.glob("[!.]*"))) < 10:
            time.sleep(0.002)
        workers[0].send_signal(signal.SIGKILL)
        at_the_kill.append(len(list(receipts.glob("[!.]*"))))

    killer = threading.Thread(target=kill, daemon=True)
    with cluster.dask_executor(scheduler, out, [str(long_corpus)]) as executor:
        killer.start()
        dataset = preprocess([str(long_corpus)], tokenizer, str(out), executor=executor)
    killer.join(10)
    planned = sum(len(splits["train"].shards) for splits in dataset.splits.values())
    assert 10 <= at_the_kill[0] < planned
    assert workers[0].wait(10) == -signal.SIGKILL
    assert workers[1].poll() is None
    assert contents(out) == contents(local)


def test_a_worker_that_sees_other_files_is_told_of(
    scheduler: str, workers: list[subprocess.Popen[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(
            UserError,
            match=r"does not see /elsewhere; corpus and output folder must be on a file system that",
        ),
        cluster.dask_executor(scheduler, tmp_path / "out", ["/elsewhere"]),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir() if "probe" in path.name] == []
    monkeypatch.setattr(cluster, "__version__", "99.0")
    with (
        pytest.raises(UserError, match=r"has ekiden .*, this machine 99\.0; install the same"),
        cluster.dask_executor(scheduler, tmp_path / "out", []),
    ):
        pass


def test_nobody_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for address in (f"tcp://127.0.0.1:{port}", "nonsense://x"):
        with (
            pytest.raises(UserError, match="does not answer"),
            cluster.dask_executor(address, tmp_path / "out", []),
        ):
            pass


def test_no_worker_is_one_sentence(scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    with (
        pytest.raises(UserError, match="has no worker"),
        cluster.dask_executor(scheduler, tmp_path / "out", []),
    ):
        pass


@pytest.mark.parametrize("address", ["foo", "10.0.0.5:8786", "tcp://foo", "http://x:1"])
def test_what_is_no_address_makes_no_client(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client of it waits a minute when the program ends."""
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(distributed, "Client", None)
    with (
        pytest.raises(UserError, match=r"does not answer .* such as tcp://"),
        cluster.dask_executor(address, tmp_path, []),
    ):
        pass
