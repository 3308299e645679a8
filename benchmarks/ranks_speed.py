"""Throughput of several processes over one, and what a step spends in exchanges, on this machine's cores.

    python benchmarks/ranks_speed.py [--preset gpt2-10m] [--world 2] [--threads 2] [--rounds 3] [--accumulate 4]

Every way does the same global batch on random tokens: one process with as many threads as one of several has, one process
with as many as all of them have together, and then several processes. The ways take turns, round after round, and the
fastest step of each counts: other work on the machine slows all of them. `ddp` exchanges gradients once a step, when all
are there; `torch ddp` is PyTorch's own wrapper, which exchanges them during the last backward pass; `exact` is
--elastic-exact; `fsdp` is fully_shard. Of a step's exchanges, the wait for the slower rank is not counted. Peak memory is of
rank 0, resident, less what it had with the model built and before the first step.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from ekiden.config import TrainConfig, build_config
from ekiden.modeling.build import build_model
from ekiden.modeling.device import configure_determinism, select_precision
from ekiden.training.exact import GradientTree
from ekiden.training.optimizer import build_optimizer
from ekiden.training.ranks import Ranks
from ekiden.training.sharding import shard_model
from ekiden.training.step import accumulate_gradients, apply_update, summed_loss

WAYS = ("one", "one, all threads", "ddp", "torch ddp", "exact", "exact one", "fsdp")


class Summed(nn.Module):
    """The summed loss as a module's forward pass, which PyTorch's wrapper needs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the summed cross-entropy."""
        return summed_loss(self.model, inputs, targets, 1024)


def measure(
    way: str, world: int, config: TrainConfig, options: argparse.Namespace, ranks: Ranks
) -> dict[str, float]:
    """Return seconds of the fastest step, seconds of it in exchanges (where they are apart), and peak MB."""
    device = torch.device("cpu")
    precision = select_precision(device, "fp32")
    model = build_model(config, options.vocabulary, 0, 1, 2, seed=1)
    wrapper: Any = None
    if way == "torch ddp":
        wrapper = nn.parallel.DistributedDataParallel(Summed(model), gradient_as_bucket_view=True)
    if way == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh

        shard_model(model, init_device_mesh("cpu", (world,)), precision)
    optimizer = build_optimizer(model, config)
    rows = config.batch_size
    batches = options.accumulate // world
    generator = np.random.default_rng(ranks.rank)
    windows = generator.integers(0, options.vocabulary, (batches, rows, config.max_length + 1))
    data = [(window[:, :-1].copy(), window[:, 1:].copy()) for window in windows]
    tokens = options.accumulate * rows * config.max_length
    best, best_exchange = float("inf"), 0.0
    before = resident()
    for _ in range(options.steps + 1):
        ranks.barrier()
        began = time.perf_counter()
        exchange = step(way, model, wrapper, data, tokens, precision, optimizer, ranks)
        seconds = time.perf_counter() - began
        if seconds < best:
            best, best_exchange = seconds, exchange
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    return {"seconds": best, "exchange_seconds": best_exchange, "peak_mb": peak, "tokens": tokens}


def step(
    way: str,
    model: nn.Module,
    wrapper: Any,
    data: Any,
    tokens: int,
    precision: Any,
    optimizer: Any,
    ranks: Ranks,
) -> float:
    """Do one optimizer step; return the seconds in exchanges that stand by themselves."""
    tree = GradientTree(list(model.parameters())) if way.startswith("exact") else None
    if wrapper is not None:
        loss = torch.zeros(())
        for index, (inputs, targets) in enumerate(data):
            wrapper.require_backward_grad_sync = index == len(data) - 1
            mean = wrapper(torch.from_numpy(inputs), torch.from_numpy(targets)) / tokens
            (mean * ranks.world).backward()  # the wrapper averages
            loss += mean.detach()
    else:
        loss = accumulate_gradients(model, data, tokens, precision, after=tree.add if tree else None)
    ranks.agree([0, 0])
    began = time.perf_counter()
    if tree:
        loss = tree.finish(ranks)
    elif way == "ddp":
        ranks.sum_([*(p.grad for p in model.parameters() if p.grad is not None), loss])
    else:
        ranks.sum_([loss])
    exchange = time.perf_counter() - began
    apply_update(optimizer, loss, 1e-4, 1.0)
    return exchange


def resident() -> float:
    """Return the resident memory of this process, in MB."""
    import psutil

    return psutil.Process().memory_info().rss / 2**20


def in_ranks(world: int, threads: int, work: Callable[[Ranks], dict[str, float]]) -> dict[str, float]:
    """Return what rank 0 of `world` forked processes returned."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    reader, writer = os.pipe()
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.environ.update(
                    RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world)
                )
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
                configure_determinism(threads)
                ranks = Ranks.join("cpu")
                result = work(ranks)
                if rank == 0:
                    os.write(writer, json.dumps(result).encode())
                ranks.barrier()
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        text = file.read()
    assert all(os.waitpid(child, 0)[1] == 0 for child in children), "a rank failed"
    result: dict[str, float] = json.loads(text)
    return result


def main() -> None:
    """Measure, print a table and the JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="gpt2-10m")
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of a process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of each way in each round, after a first one")
    parser.add_argument("--accumulate", type=int, default=4, help="microbatches of the global batch")
    parser.add_argument("--batch-size", type=int, default=2, help="samples of a microbatch")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=16384)
    options = parser.parse_args()
    config = build_config(options.preset, batch_size=options.batch_size, max_length=options.max_length)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            world = 1 if "one" in way else options.world
            threads = options.threads * (options.world if way == "one, all threads" else 1)
            found[way].append(
                in_ranks(world, threads, lambda ranks, w=way, n=world: measure(w, n, config, options, ranks))
            )
    rows = []
    for way, results in found.items():
        best = min(results, key=lambda result: result["seconds"])
        rate = best["tokens"] / best["seconds"]
        rows.append(
            {
                "way": way,
                "tokens_per_second": round(rate, 1),
                "over_one": round(rate / rows[0]["tokens_per_second"], 2) if rows else 1.0,
                "exchange_share": round(best["exchange_seconds"] / best["seconds"], 3),
                "peak_mb": round(min(result["peak_mb"] for result in results)),
            }
        )
        print(rows[-1])
    facts = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "world": options.world,
    }
    load = os.getloadavg()[0]
    print(json.dumps({"benchmark": "ranks_speed", **facts, **vars(options), "load": load, "rows": rows}))


if __name__ == "__main__":
    main()
