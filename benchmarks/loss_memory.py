"""Peak memory of the loss: the chunked cross-entropy against the plain one, forward and backward.

Each runs in a process of its own, whose resident set is watched; what is counted is the highest it rises above the
inputs and the two gradients that either has to leave behind. The last line is one JSON object.

    python benchmarks/loss_memory.py [--vocab 262144] [--tokens 4096] [--width 256] [--precision fp32|bf16]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from ekiden.modeling.loss import chunked_cross_entropy


def measure(kind: str, vocab: int, tokens: int, width: int, dtype: torch.dtype) -> dict[str, float]:
    """Return the peak bytes above inputs and gradients, wall and CPU seconds, and the mean loss in nats of one pass."""
    numbers = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=numbers).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, generator=numbers) * 0.05).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=numbers)
    loss_of = {"chunked": chunked_cross_entropy, "plain": plain_cross_entropy}[kind]
    # Threads, code and buffers that the first call brings are none of the loss's memory.
    small = weight[:512].detach().requires_grad_()
    loss_of(hidden[:64].detach().requires_grad_(), small, targets[:64] % 512).backward()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_bytes()
    began, cpu_began = time.perf_counter(), time.process_time()
    loss = loss_of(hidden, weight, targets) / tokens
    loss.backward()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    gradients = sum(t.grad.numel() * t.grad.element_size() for t in (hidden, weight) if t.grad is not None)
    peak = peak_bytes() - before - gradients
    return {"peak_bytes": peak, "seconds": seconds, "cpu_seconds": cpu_seconds, "loss": loss.item()}


def plain_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return what a causal language model of transformers computes: fp32 logits, whole."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def peak_bytes() -> int:
    """Return the largest resident set since the peak began anew (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    """Measure both, each in its own process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=int, default=262144, help="pieces")
    parser.add_argument("--tokens", type=int, default=4096, help="positions")
    parser.add_argument("--width", type=int, default=256, help="units of a hidden state")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--only", choices=["chunked", "plain"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    if options.only:
        print(json.dumps(measure(options.only, options.vocab, options.tokens, options.width, dtype)))
        return
    results = {}
    for kind in ("chunked", "plain"):
        command = [sys.executable, *sys.argv, "--only", kind]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[kind] = json.loads(output.splitlines()[-1])
        print(kind, results[kind])
    share = results["chunked"]["peak_bytes"] / results["plain"]["peak_bytes"]
    del options.only
    print(json.dumps({**vars(options), **results, "share_of_plain": share}))


if __name__ == "__main__":
    main()
