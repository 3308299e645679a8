"""The launchers: `--devices`, torchrun on one and on two nodes, accelerate, and the Slurm script of the documentation.

Ranks here are whole processes that import torch, so that all of these are slow; `test_ranks` has what the ranks do, forked.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from campaign import Outcome, outcome, settings
from common import small_shards
from ranks import free_port, run_ranks

import ekiden
from ekiden.config import TrainConfig, to_yaml
from ekiden.training.history import read_history
from ekiden.training.loop import train

STEPS = 60
DOCUMENT = Path(__file__).parents[2] / "docs" / "distributed.md"
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONPATH": str(Path(ekiden.__file__).parents[1]),
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainConfig]:
    """Return a maker of settings of a run of two ranks, by the run's name."""
    folder = tmp_path_factory.mktemp("launch")
    shards = small_shards(folder)

    def config(name: str, begins: int = 2, **more: Any) -> TrainConfig:
        batch = {"batch_size": 2, "gradient_accumulation_steps": 8 // 2 // begins}
        options = {"save_steps": 5, "eval_steps": 0, "sample_tokens": 1, "rank_timeout": "30s", **batch}
        return settings("gemma3-tiny", shards, folder / name, STEPS, **options, **more)

    return config


def uninterrupted(config: TrainConfig) -> Outcome:
    """Return what the same run leaves that nothing befalls, of two forked ranks."""
    done = run_ranks(config, 2, Path(config.output_dir).with_suffix(".log"))
    assert done.completed, done.log
    return outcome(Path(config.output_dir))


def rank_processes(of: int, rank: int | None = None) -> list[psutil.Process]:
    """Return the processes below `of` that are ranks, or the one that is `rank`."""
    found = []
    for process in psutil.Process(of).children(recursive=True):
        try:
            number = process.environ().get("RANK")
        except psutil.Error:
            continue
        if number is not None and (rank is None or int(number) == rank):
            found.append(process)
    return found


def wait_for(what: Callable[[], Any], seconds: float = 120.0) -> Any:
    """Return what `what` returns as soon as that is true."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := what():
            return value
        time.sleep(0.02)
    raise AssertionError("it did not come")


def checkpoints(config: TrainConfig) -> list[str]:
    return sorted(path.name for path in (Path(config.output_dir) / "checkpoints").glob("step-*"))


def result(config: TrainConfig) -> dict[str, Any]:
    return json.loads((Path(config.output_dir) / "result.json").read_text())


def recipe(config: TrainConfig) -> str:
    path = Path(config.output_dir).with_suffix(".yaml")
    path.write_text(to_yaml(config))
    return str(path)


@pytest.mark.slow
def test_devices_start_again_after_a_death_and_end_in_the_same_bits(make: Callable[..., TrainConfig]) -> None:
    """From a process with threads of its own, as a notebook's: `--devices 2 --max-restarts 1`, rank 1 killed."""
    config = make("devices", devices=2, max_restarts=1)
    torch.randn(512, 512) @ torch.randn(512, 512)  # torch's threads are there
    killed: list[int] = []

    def kill() -> None:
        wait_for(lambda: checkpoints(config))
        for process in rank_processes(os.getpid(), rank=1):
            process.kill()
            killed.append(process.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    assert train(config).status == "completed"
    killer.join()
    assert len(killed) == 1
    sessions = [r for r in read_history(Path(config.output_dir) / "history.jsonl") if r["kind"] == "event"]
    assert [r["event"] for r in sessions if r["event"] in ("start", "resume")] == ["start", "resume"]
    assert outcome(Path(config.output_dir)) == uninterrupted(make("reference"))


@contextmanager
def started(*commands: list[str], **environment: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Yield processes of `commands`, and end what is left of them."""
    processes = [
        subprocess.Popen(
            command,
            env={**ENVIRONMENT, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for command in commands
    ]
    try:
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_signal_to_the_launcher_stops_all_ranks_with_a_checkpoint(make: Callable[..., TrainConfig]) -> None:
    config = make("signal", devices=2)
    with started([sys.executable, "-m", "ekiden", "train", recipe(config)]) as [launcher]:
        wait_for(lambda: checkpoints(config))
        launcher.send_signal(signal.SIGTERM)
        said, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, said
    left = result(config)
    assert left["status"] == "paused" and left["reason"] == "SIGTERM", said
    assert checkpoints(config)[-1] == left["checkpoint"]


@pytest.mark.slow
def test_ranks_end_when_their_launcher_is_killed(make: Callable[..., TrainConfig]) -> None:
    config = make("orphans", devices=2)
    with started([sys.executable, "-m", "ekiden", "train", recipe(config)]) as [launcher]:
        wait_for(lambda: checkpoints(config))
        ranks = rank_processes(launcher.pid)
        assert len(ranks) == 2
        launcher.kill()
        launcher.wait()
        wait_for(lambda: not any(rank.is_running() for rank in ranks))
    assert result(config)["status"] in ("paused", "completed")


@pytest.mark.slow
def test_two_nodes_start_again_after_the_ranks_of_one_died(make: Callable[..., TrainConfig]) -> None:
    """One restart is enough: it is counted on the node whose rank was killed, and the other's rank is not in the way."""
    config = make("nodes", device="cpu")
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "one"]
    command += ["--max-restarts", "1", "-m", "ekiden", "train", recipe(config)]
    with started(command, command) as nodes:
        wait_for(lambda: checkpoints(config))
        for node in nodes:
            for process in rank_processes(node.pid, rank=1):
                process.kill()
        said = [node.communicate(timeout=170)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert result(config)["status"] == "completed", said
    assert outcome(Path(config.output_dir)) == uninterrupted(make("nodes-reference"))


@pytest.mark.slow
def test_accelerate_starts_two_ranks(make: Callable[..., TrainConfig]) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate: pip install 'ekiden[harness]'")
    config = make("accelerate", device="cpu")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(free_port()), "-m", "ekiden", "train", recipe(config)]
    with started(command) as [launcher]:
        said, _ = launcher.communicate(timeout=170)
    assert launcher.returncode == 0, said
    assert outcome(Path(config.output_dir)) == uninterrupted(make("accelerate-reference"))


FAKE_SRUN = """#!/bin/bash
# Starts the command once a node, and gives the step's tasks what Slurm would: their numbers, and signals.
for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & echo $! >> "$FAKE/tasks"; done
status=0; for task in $(cat "$FAKE/tasks"); do wait $task || status=$?; done
rm "$FAKE/tasks"; exit $status
"""
FAKE_SCONTROL = """#!/bin/bash
case $1 in
  show) for ((i = 0; i < SLURM_NNODES; i++)); do echo 127.0.0.1; done;;
  requeue) echo $2 >> "$FAKE/requeued";;
esac
"""


@pytest.mark.slow
def test_the_slurm_script_of_the_documentation_requeues_until_the_run_is_done(
    make: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """With stand-ins of srun and scontrol: Slurm's signal before the end of the time, requeue, and the rest."""
    [script] = re.findall(r"```\n(#!/bin/bash\n#SBATCH.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert "--signal=USR1@" in script and "--requeue" in script
    config = make("slurm", begins=4)
    words = re.search(r"-m ekiden train (.*?)--max-time", script, re.DOTALL)
    assert words is not None and "--output-dir run" in words[0]
    script = script.replace(words[1], f"{shlex.quote(recipe(config))} ").replace(
        "--nproc-per-node 4", "--nproc-per-node 2"
    )
    script = script.replace("29500", str(free_port())).replace(
        "run/result.json", f"{config.output_dir}/result.json"
    )
    (tmp_path / "job.sh").write_text(script)
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "torchrun").write_text(f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    slurm = {
        "FAKE": str(tmp_path),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }
    with started(["bash", str(tmp_path / "job.sh")], **slurm) as [job]:
        wait_for(lambda: checkpoints(config))
        for task in (tmp_path / "tasks").read_text().split():
            os.kill(int(task), signal.SIGUSR1)
        said, _ = job.communicate(timeout=170)
    assert result(config)["status"] == "paused", said
    assert (tmp_path / "requeued").read_text() == "17\n", said
    with started(["bash", str(tmp_path / "job.sh")], **slurm) as [job]:
        said, _ = job.communicate(timeout=170)
    assert result(config)["status"] == "completed", said
    assert (tmp_path / "requeued").read_text() == "17\n", "a completed run is not requeued"
