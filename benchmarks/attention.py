"""Ekiden's attention in C beside PyTorch's flash attention, forward and backward, by threads.

    python benchmarks/attention.py [--threads 1 2 4] [--rounds 9] [--precision fp32|bf16|fp16]

Causal, in turn, the least of all rounds in milliseconds, wall and processor time; shapes are samples x query heads x key/value
heads x tokens x units a head, and a window for ours alone. In half precision PyTorch's is called as Ekiden would call it where
its own does not fit. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable

import torch

from ekiden.modeling import kernels
from ekiden.modeling.attention import run_kernel
from ekiden.modeling.attention_choice import CANDIDATES
from ekiden.modeling.device import named_precision
from ekiden.modeling.host_memory import keep_freed_memory

SHAPES = (
    (8, 8, 8, 512, 32, None),
    (8, 4, 1, 512, 64, None),
    (1, 4, 1, 4096, 64, None),
    (1, 4, 1, 4096, 64, 512),
    (1, 1, 1, 8192, 64, None),
)
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def measured(ways: dict[str, Attend], inputs: list[torch.Tensor], rounds: int) -> dict[str, list[float]]:
    """Return for each way the least wall and processor milliseconds, forward and then backward."""
    *leaves, upstream = inputs
    least = {name: [float("inf")] * 4 for name in ways}
    for _ in range(rounds + 1):
        for name, attend in ways.items():
            times = [(time.perf_counter(), time.process_time())]
            made = attend(*leaves)
            times.append((time.perf_counter(), time.process_time()))
            torch.autograd.grad(made, leaves, upstream)
            times.append((time.perf_counter(), time.process_time()))
            spans = [1e3 * (b - a) for one, two in zip(times, times[1:]) for a, b in zip(one, two)]
            least[name] = [min(pair) for pair in zip(least[name], spans)]
    return {name: [round(value, 1) for value in values] for name, values in least.items()}


def main() -> None:
    """Measure, print a table, and one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    options = parser.parse_args()
    keep_freed_memory()
    dtype = named_precision(options.precision).dtype
    result: dict[str, object] = {"torch": torch.__version__, "precision": options.precision}
    print("shape, threads: wall and CPU ms forward, wall and CPU ms backward")
    for *shape, window in SHAPES:
        batch, heads, groups, length, units = shape
        sizes = [(batch, length, count, units) for count in (heads, groups, groups, heads)]
        inputs = [torch.randn(size).to(dtype).transpose(1, 2).requires_grad_() for size in sizes]
        ways: dict[str, Attend] = {}
        if kernels.attends(torch.device("cpu"), dtype, units):
            ways["own"] = functools.partial(kernels.attention, window=window)
        if window is None:
            ways["pytorch"] = lambda q, k, v: run_kernel(CANDIDATES[0], q, k, v, None)
        for threads in options.threads:
            torch.set_num_threads(threads)
            for name, values in measured(ways, inputs, options.rounds).items():
                key = f"{'x'.join(map(str, shape))}{f' window {window}' if window else ''}, {threads}: {name}"
                result[key] = values
                print(f"{key:<44} {values}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
