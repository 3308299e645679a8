"""How long a training step waits for a checkpoint, on this disk and on slow ones.

    python benchmarks/save_stall.py --preset gpt2-10m --slow-mb-per-s 20

The same run, without saves and with one every few steps: written beside training (the default) and with training
waiting; on the disk as it is and with files taking as long to be durable as on a disk of the given speed. Steps
alternate between the settings inside one process, so that a busy machine is busy for all. The last line printed is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from ekiden.checkpoint import files
from ekiden.checkpoint.background import BackgroundWorker
from ekiden.checkpoint.store import CheckpointStore, CheckpointWriter
from ekiden.config import TrainConfig, build_config
from ekiden.modeling.build import build_model
from ekiden.modeling.device import select_device, select_precision
from ekiden.tokens.shares import plan_mixture
from ekiden.training.optimizer import build_optimizer
from ekiden.training.state import Snapshot, TrainingState
from ekiden.training.step import accumulate_gradients, apply_update


def build(config: TrainConfig, vocab_size: int) -> TrainingState:
    """Return a fresh state."""
    model = build_model(config, vocab_size=vocab_size, pad_id=0, bos_id=1, eos_id=2, seed=config.seed)
    model.to(select_device(config.device))  # type: ignore[arg-type]
    mixture = plan_mixture({"text": 10**6}, config.max_length, config.seed, total_samples=1000)
    return TrainingState(config, model, build_optimizer(model, config), None, mixture, {})


def step(state: TrainingState, config: TrainConfig, vocab_size: int, number: int) -> float:
    """Do one optimizer step; return its seconds."""
    device = select_device(config.device)
    generator = np.random.default_rng(number)
    windows = generator.integers(vocab_size, size=(config.batch_size, config.max_length + 1))
    began = time.perf_counter()
    loss = accumulate_gradients(
        state.model,
        [(windows[:, :-1], windows[:, 1:])],
        windows[:, 1:].size,
        select_precision(device, config.precision),
    )
    float(apply_update(state.optimizer, loss, 1e-4, 1.0).loss)
    state.counters.step = number
    return time.perf_counter() - began


def slow_disk(megabytes_per_second: float) -> None:
    """Hold up the fsync of every file as a disk of this speed would; 0: as the disk is."""

    def hook(operation: str, path: Path) -> None:
        if operation == "fsync":
            time.sleep(path.stat().st_size / 1e6 / megabytes_per_second)

    files.fault_hook = hook if megabytes_per_second else None


def measure(
    state: TrainingState, config: TrainConfig, vocab_size: int, options: argparse.Namespace, speed: float
) -> dict[str, float]:
    """Return medians: seconds of a step, of the wait at a save beside training, of one that training waits for."""
    slow_disk(speed)
    plain, beside, stalls, waits, written = [], [], [], [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        store, saver = CheckpointStore(Path(folder) / "checkpoints", keep=2), BackgroundWorker("save")

        def save(snapshot: Snapshot) -> None:
            began = time.perf_counter()

            def write(writer: CheckpointWriter) -> None:
                snapshot.write(writer)

            store.save(snapshot.step, write)
            written.append(time.perf_counter() - began)

        number = state.counters.step
        for _ in range(options.saves):
            for wait in (False, True):
                plain += [step(state, config, vocab_size, number := number + 1) for _ in range(2)]
                began = time.perf_counter()
                snapshot = state.snapshot()
                saver.submit(lambda snapshot=snapshot: save(snapshot))
                if wait:
                    saver.wait()
                (waits if wait else stalls).append(time.perf_counter() - began)
                while saver.busy:
                    beside.append(step(state, config, vocab_size, number := number + 1))
                saver.wait()
                for error in saver.failures():
                    raise error
        size = sum(f.stat().st_size for f in (store.newest() or exit()).path.iterdir())
    median = statistics.median
    return {
        "step_s": median(plain),
        "step_beside_a_save_s": median(beside) if beside else median(plain),
        "stall_s": median(stalls),
        "stall_max_s": max(stalls),
        "stall_waiting_s": median(waits),
        "save_s": median(written),
        "checkpoint_mb": size / 1e6,
    }


def main() -> None:
    """Measure, print a table, and one JSON object last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="gpt2-10m")
    parser.add_argument("--vocab-size", type=int, default=16000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--saves", type=int, default=5, help="of each kind, for each disk")
    parser.add_argument("--slow-mb-per-s", type=float, action="append", help="default: 50 and 20")
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--folder", help="where the checkpoints go; default: the temporary folder")
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    config = build_config(options.preset, batch_size=options.batch_size)
    state = build(config, options.vocab_size)
    for number in range(3):
        step(state, config, options.vocab_size, number)
    results = {}
    for speed in (0.0, *(options.slow_mb_per_s or [50.0, 20.0])):
        name = f"{speed:g} MB/s" if speed else "as it is"
        results[name] = figures = measure(state, config, options.vocab_size, options, speed)
        print(
            f"disk {name:<9}: step {figures['step_s']:.3f} s, waits {figures['stall_s']:.3f} s for a save of "
            f"{figures['checkpoint_mb']:.0f} MB that takes {figures['save_s']:.2f} s beside training "
            f"({figures['stall_waiting_s']:.2f} s where it waits); steps meanwhile {figures['step_beside_a_save_s']:.3f} s"
        )
    parameters = sum(p.numel() for p in state.model.parameters())
    shares = {name: f["stall_s"] / f["step_s"] for name, f in results.items()}
    print(
        json.dumps(
            {
                "preset": options.preset,
                "parameters": parameters,
                "threads": options.num_threads,
                "torch": torch.__version__,
                "stall_share_of_a_step": shares,
                "disks": results,
            }
        )
    )


if __name__ == "__main__":
    main()
