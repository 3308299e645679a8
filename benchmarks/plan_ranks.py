"""The peak memory that `ekiden plan` predicts for a rank in shards (`--parallel fsdp`), beside real ranks' on a CPU.

    python benchmarks/plan_ranks.py [--cases gpt2-10m:16000:8:2:fp32:adamw ...] [--set field=value ...]

A case is PRESET:VOCABULARY:MICROBATCH:RANKS:PRECISION:OPTIMIZER. Its ranks are forked processes that divide the model with
FSDP over gloo and do steps of two microbatches; measured is what each one had grown by at its worst in the second step (Linux,
VmHWM), with the C library told to give memory back at once. (A run without the exchanges would be no measure: what is
gathered into is then never written to, and memory that was not written to is none.)

The plan is of a GPU's rank, so Ekiden's own kernels are left out of the ranks: give EKIDEN_KERNEL=0 where the CPU has AVX-512.
Weights are drawn whole on every rank before they are divided, as a run does: a machine needs memory for that. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import socket
import tempfile
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ekiden.config import TrainConfig, build_config
from ekiden.modeling.build import build_model
from ekiden.modeling.device import Precision, named_precision
from ekiden.modeling.prepare import prepare_model
from ekiden.planning.sharded import sharded_peak
from ekiden.training.optimizer import build_optimizer
from ekiden.training.sharding import shard_model
from ekiden.training.step import accumulate_gradients, apply_update

CASES = (
    "gpt2-10m:16000:8:2:fp32:adamw",
    "gpt2-10m:16000:8:4:fp32:adamw",
    "gpt2-10m:16000:8:2:fp32:muon",
    "gemma3-tiny:16000:8:2:fp32:muon",
    "gemma3-tiny:16000:8:4:fp32:adamw",
    "gemma3-tiny:16000:8:2:bf16:adamw",
    "gemma3-270m:16000:1:2:fp32:adamw",
)
M_MMAP_THRESHOLD = -3
"""mallopt(3): blocks from this size on are mapped, and unmapped when freed."""


def resident(line: str) -> int:
    """Return VmRSS (now) or VmHWM (at most so far) in bytes."""
    return int(Path("/proc/self/status").read_text().split(f"{line}:")[1].split()[0]) * 1024


def measured_peak(config: TrainConfig, vocab_size: int, precision: Precision, world: int) -> int:
    """Return the bytes that this rank really took at its worst moment."""
    mesh = init_device_mesh("cpu", (world,))
    model, optimizer = built(config, vocab_size, precision, mesh)
    # What libraries keep for products of these sizes (14 MB for GPT-2 10M), and connections, are none of the model's memory.
    step(model, optimizer, config, precision, config.batch_size)
    del model, optimizer
    gc.collect()
    before = resident("VmRSS")
    model, optimizer = built(config, vocab_size, precision, mesh)
    step(model, optimizer, config, precision, config.batch_size)
    gc.collect()
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    step(model, optimizer, config, precision, config.batch_size)
    return resident("VmHWM") - before


def built(config: TrainConfig, vocab_size: int, precision: Precision, mesh: Any) -> tuple[Any, Any]:
    """Return model and optimizer in shards, as a run has them."""
    model = build_model(config, vocab_size, pad_id=0, bos_id=1, eos_id=2, seed=0)
    prepare_model(model, config, torch.device("cpu"), precision, sharded=True)
    shard_model(model, mesh, precision)
    return model, build_optimizer(model, config)


def step(model: Any, optimizer: Any, config: TrainConfig, precision: Precision, microbatch: int) -> None:
    """Do a step of two microbatches that changes no weight."""
    windows = np.zeros((microbatch, config.max_length), dtype=np.int64)
    accumulate_gradients(
        model, [(windows, windows)] * 2, 2 * windows.size, precision, loss_chunk_size=config.loss_chunk_size
    )
    apply_update(optimizer, torch.full((), torch.nan), 0.0, 1.0)


def rank_main(rank: int, world: int, port: int, place: Path, *of_the_step: Any) -> None:
    """Be one rank, and write down what it took."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 * 1024)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    (place / str(rank)).write_text(json.dumps(measured_peak(*of_the_step, world)))
    dist.barrier()


def real_ranks(config: TrainConfig, vocab_size: int, precision: Precision, world: int) -> list[int]:
    """Return what each of `world` forked ranks took."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as place:
        children = []
        for rank in range(world):
            child = os.fork()
            if not child:
                try:
                    rank_main(rank, world, port, Path(place), config, vocab_size, precision)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(1)
            children.append(child)
        ended = [os.waitpid(child, 0)[1] for child in children]
        assert not any(ended), f"ranks ended with {ended}"
        return [json.loads((Path(place) / str(rank)).read_text()) for rank in range(world)]


def settings(case: str, changes: dict[str, str]) -> tuple[TrainConfig, int, Precision, int]:
    """Return what a case says: settings, vocabulary, precision, ranks."""
    preset, vocabulary, microbatch, ranks, name, optimizer = case.split(":")
    config = build_config(preset, batch_size=int(microbatch), optimizer=optimizer, **changes)
    return config, int(vocabulary), named_precision(name), int(ranks)


def row(case: str, changes: dict[str, str], real: list[int]) -> dict[str, Any]:
    """Return predicted and measured bytes of a case."""
    config, vocab_size, precision, world = settings(case, changes)
    peak = sharded_peak(config, vocab_size, precision, config.batch_size, world)
    return {
        "case": case,
        "predicted_mb": round(peak.total / 1e6, 1),
        "during": peak.during,
        "parts_mb": {part: round(size / 1e6, 1) for part, size in peak.parts.items()},
        "measured_mb": [round(size / 1e6, 1) for size in real],
        "predicted_over_measured": round(peak.total / max(real), 3),
    }


def main() -> None:
    """Measure, predict, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", default=CASES)
    parser.add_argument("--set", nargs="*", default=["max_length=256"], help="field=value of TrainConfig")
    options = parser.parse_args()
    changes = dict(pair.split("=", 1) for pair in options.set)
    # All of them before any prediction: a process that has run a backward pass cannot be forked.
    real = [real_ranks(*settings(case, changes)) for case in options.cases]
    rows = []
    for case, found in zip(options.cases, real):
        rows.append(row(case, changes, found))
        print(json.dumps(rows[-1]), flush=True)
    print(
        json.dumps({"benchmark": "plan_ranks", "torch": torch.__version__, "set": options.set, "rows": rows})
    )


if __name__ == "__main__":
    main()
