"""Two things that make a CPU's matrix products slow: half precision without instructions for it, and numbers too small.

    python benchmarks/products.py [--rounds 5]

Products of the size of a vocabulary's head (1,024 rows x 256 x 16,384 pieces), one thread, the best of all rounds: fp32 beside
bf16 as PyTorch does it; of a layer's size (4,096 x 256 x 1,024) in fp32, in bf16 and fp16 as PyTorch does them, and as fp32
products with inputs taken up and the result rounded (fp16 takes seconds); and the gradient of the loss by the hidden states
with a head of standard deviation 0.02 and of 1, where most probabilities are denormal numbers. The last line is one JSON
object, in seconds of processor time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

ROWS, WIDTH, PIECES = 1024, 256, 16384


def best(call: Callable[[], object], rounds: int) -> float:
    """Return the least seconds of processor time of `call`, after one that is not counted."""
    call()
    times = []
    for _ in range(rounds):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return round(min(times), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden, head = torch.randn(ROWS, WIDTH), torch.randn(PIECES, WIDTH)
    result = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        rows, pieces = hidden.to(dtype), head.to(dtype)
        result[f"product_{name}"] = best(lambda rows=rows, pieces=pieces: rows @ pieces.T, options.rounds)
    hidden, layer = torch.randn(4 * ROWS, WIDTH), torch.randn(WIDTH, 4 * WIDTH)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        rows, weight = hidden.to(dtype), layer.to(dtype)
        result[f"layer_{name}"] = best(lambda rows=rows, weight=weight: rows @ weight, options.rounds)
        if dtype != torch.float32:
            call = lambda r=rows, w=weight, d=dtype: (r.float() @ w.float()).to(d)  # noqa: E731
            result[f"layer_{name}_by_fp32"] = best(call, options.rounds)
    hidden = hidden[:ROWS]
    for deviation in (0.02, 1.0):
        probabilities = torch.softmax(hidden @ (head * deviation).T, dim=-1)
        share = (probabilities < torch.finfo(torch.float32).tiny).float().mean().item()
        call = lambda p=probabilities: p @ head  # noqa: E731
        result[f"gradient_head_{deviation}"] = best(call, options.rounds)
        result[f"denormal_or_zero_{deviation}"] = round(share, 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
