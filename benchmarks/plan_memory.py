"""The peak memory that `ekiden plan` predicts for a training step, beside the one that is measured.

    python benchmarks/plan_memory.py --preset gpt2-10m --vocab-size 16000 --batch-size 8 [--set field=value ...]

On a GPU the measured peak is what PyTorch had allocated; on a CPU it is the growth of the process (Linux), with the C
library told to give memory back at once. Each is the second step, with moments there. The last line is one JSON object.

`--only-trace` measures nothing and says what predicting costs, in this process's CPU seconds: imports, the trace, and with
`--full` the trace that runs every block and every pass, which has to give the same bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ekiden.config import TrainConfig, build_config
from ekiden.modeling.build import build_model
from ekiden.modeling.device import Precision, named_precision, select_device, select_precision
from ekiden.modeling.prepare import prepare_model
from ekiden.planning.trace import fully_traced_peak, traced_peak
from ekiden.training.memory import try_step
from ekiden.training.optimizer import build_optimizer

M_MMAP_THRESHOLD = -3
"""mallopt(3): blocks from this size on are mapped, and unmapped when freed."""


def measured_peak(config: TrainConfig, vocab_size: int, precision: Precision, device: torch.device) -> int:
    """Return the bytes a step really took at its worst moment."""
    if device.type == "cpu":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 * 1024)
    warm(config, vocab_size, precision, device)
    before = resident("VmRSS") if device.type == "cpu" else torch.cuda.memory_allocated(device)
    state = build(config, vocab_size, precision, device)
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    else:
        torch.cuda.reset_peak_memory_stats(device)
    try_step(state, precision, config.batch_size, config.max_length, config.loss_chunk_size)
    return (resident("VmHWM") if device.type == "cpu" else torch.cuda.max_memory_allocated(device)) - before


def build(config: TrainConfig, vocab_size: int, precision: Precision, device: torch.device) -> Any:
    """Return model and optimizer as a run has them."""
    model = build_model(config, vocab_size, pad_id=0, bos_id=1, eos_id=2, seed=0).to(device)  # type: ignore[arg-type]
    prepare_model(model, config, device, precision)
    return SimpleNamespace(model=model, optimizer=build_optimizer(model, config))


def warm(config: TrainConfig, vocab_size: int, precision: Precision, device: torch.device) -> None:
    """Do the same step first: what libraries keep for products of these sizes is none of the model's memory.

    For GPT-2 10M that is 14 MB on a CPU.
    """
    state = build(config, vocab_size, precision, device)
    try_step(state, precision, config.batch_size, config.max_length, config.loss_chunk_size)


def resident(line: str) -> int:
    """Return VmRSS (now) or VmHWM (at most so far) in bytes."""
    return int(Path("/proc/self/status").read_text().split(f"{line}:")[1].split()[0]) * 1024


def main() -> None:
    """Measure, predict, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="gpt2-10m")
    parser.add_argument("--vocab-size", type=int, default=16000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--set", nargs="*", default=[], help="field=value of TrainConfig")
    parser.add_argument("--only-trace", action="store_true")
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    imports = time.process_time()
    changes = dict(pair.split("=", 1) for pair in options.set)
    config = build_config(options.preset, batch_size=options.batch_size, **changes)
    device = select_device("cpu" if options.only_trace else "auto")
    if options.only_trace and options.precision != "auto":
        precision = named_precision(options.precision)  # whatever this machine has
    else:
        precision = select_precision(device, options.precision)
    result = {
        **vars(options),
        "precision": precision.name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "import_cpu_s": round(imports, 2),
    }
    on_cpu = device.type == "cpu" and not options.only_trace
    began = time.process_time()
    if not options.only_trace:
        result["measured_bytes"] = measured_peak(config, options.vocab_size, precision, device)
        began = time.process_time()
    peak = traced_peak(config, options.vocab_size, precision, config.batch_size, on_cpu)
    result |= {
        "trace_cpu_s": round(time.process_time() - began, 2),
        "predicted_bytes": peak.total,
        "predicted_parts": peak.parts,
        "predicted_host_bytes": peak.host,
    }
    if options.full:
        began = time.process_time()
        full = fully_traced_peak(config, options.vocab_size, precision, config.batch_size, on_cpu)
        result |= {"full_trace_cpu_s": round(time.process_time() - began, 2), "same": full == peak}
    if not options.only_trace:
        # On a CPU the host's memory is the device's.
        predicted = peak.total + (peak.host if device.type == "cpu" else 0)
        result["predicted_over_measured"] = predicted / result["measured_bytes"]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
