"""Tokens a second, MFU and peak memory of Ekiden's own training step, on this machine's device.

    python benchmarks/train_speed.py --preset gemma3-1b --vocab-size 64000 --batch-size 4

Random tokens, no input pipeline. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
import torch

from ekiden.config import build_config
from ekiden.modeling.build import body, build_model, parameter_counts
from ekiden.modeling.device import configure_determinism, peak_flops, select_device, select_precision
from ekiden.modeling.flops import flops_per_token
from ekiden.training.memory import memory_bytes
from ekiden.training.optimizer import build_optimizer
from ekiden.training.step import accumulate_gradients, apply_update


def read_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="gpt2-10m")
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], help="field=value of TrainConfig")
    return parser.parse_args()


def main() -> None:
    """Measure, and print one JSON object."""
    options = read_options()
    more = dict(pair.split("=", 1) for pair in options.set)
    if options.max_length:
        more["max_length"] = options.max_length
    config = build_config(options.preset, batch_size=options.batch_size, **more)
    configure_determinism(None)
    device = select_device("auto")
    precision = select_precision(device, options.precision)
    model = build_model(config, options.vocab_size, 0, 2, 1, seed=0).to(device)
    if options.compile:
        body(model).compile()
    optimizer = build_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type) if precision.use_scaler else None
    random = np.random.default_rng(0)
    shape = (options.accumulation, config.batch_size, config.max_length)
    tokens = shape[0] * shape[1] * shape[2]
    ids = random.integers(4, options.vocab_size, (*shape[:2], shape[2] + 1))
    seconds = []
    for step in range(options.steps + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        batches = [(np.ascontiguousarray(b[:, :-1]), np.ascontiguousarray(b[:, 1:])) for b in ids]
        loss = accumulate_gradients(model, batches, tokens, precision, scaler, config.loss_chunk_size)
        figures = apply_update(optimizer, loss, 1e-4, 1.0, scaler)
        last = float(figures.loss)
        if step >= 3:
            seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = peak_flops(name, precision)
    result = {
        "preset": config.preset,
        "device": name,
        "torch": torch.__version__,
        "precision": precision.name,
        "compile": options.compile,
        "vocab_size": options.vocab_size,
        "tokens_per_step": tokens,
        "max_length": config.max_length,
        "tokens_per_s": round(tokens / median),
        "mfu": round(tokens / median * flops_per_token(config, sum(parameter_counts(model))) / peak, 4)
        if peak
        else None,
        "memory_gb": round(memory_bytes(device) / 1e9, 2),
        "loss": last,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
