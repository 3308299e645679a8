"""How fast a model reads and writes on this machine: `ekiden generate --benchmark`.

Runs `streaming.next_tokens`, the loop that every text comes from, on random token ids at several batch and prompt lengths.
Prompt and new tokens stay within the context, so that no text is read anew in the middle of a measurement.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from ekiden.errors import UsageError, UserError
from ekiden.export.load import LoadedModel
from ekiden.generation.batch import out_of_memory
from ekiden.generation.sampling import Sampling, prompt_generator
from ekiden.generation.streaming import context_of, next_tokens
from ekiden.progress import human_count

BATCH_SIZES, PROMPT_LENGTHS = (1, 4, 16), (16, 128, 512)
NEW_TOKENS = 64
REPEATS = 3
"""Of which the median is shown, after one that is not counted."""


@dataclass(frozen=True)
class Measurement:
    """One row of the table; None where the batch did not fit into memory.

    time_to_first_token: seconds, reading the prompts and choosing. prefill: tokens of the prompts a second of that.
    decode: new tokens a second of all rows together, after the first. memory: peak bytes allocated on a GPU, peak
    resident bytes of the process on a CPU.
    """

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    time_to_first_token_seconds: float | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    memory_bytes: int | None = None


def benchmark_generation(
    loaded: LoadedModel,
    sampling: Sampling,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    prompt_lengths: Sequence[int] = PROMPT_LENGTHS,
    repeats: int = REPEATS,
) -> dict[str, Any]:
    """Return {"model", "step", "device", "dtype", "repeats", "rows": [a Measurement each]}.

    Args:
        sampling: its max_new_tokens are written, at most what the context leaves.
        prompt_lengths: tokens; those that leave no room for two new tokens are left out, unless all are: then the
            longest that does is measured.

    Raises:
        UsageError: a batch or prompt length below 1. UserError: the context is too short for anything.
    """
    model, context = loaded.model, context_of(loaded.model)
    if min([*batch_sizes, *prompt_lengths]) < 1:
        raise UsageError("--benchmark-batch-sizes and --benchmark-prompt-lengths must be 1 or more")
    if context < 3:
        raise UserError(f"{loaded.path} has a context of {context} tokens, too short to measure")
    lengths = sorted({length for length in prompt_lengths if length + 2 <= context}) or [context - 2]
    shapes = [(batch, length) for batch in sorted(set(batch_sizes)) for length in lengths]
    measure(
        model, loaded.tokenizer.vocab_size, sampling, *shapes[0], repeats=1
    )  # kernels are chosen and loaded
    rows = [
        measure(model, loaded.tokenizer.vocab_size, sampling, *shape, repeats=repeats) for shape in shapes
    ]
    return {
        "model": str(loaded.path),
        "step": loaded.step,
        "device": device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "repeats": repeats,
        "rows": [asdict(row) for row in rows],
    }


def measure(
    model: PreTrainedModel, vocab_size: int, sampling: Sampling, batch: int, length: int, repeats: int
) -> Measurement:
    """Return the medians of `repeats` runs over random prompts [batch, length]."""
    new_tokens = min(sampling.max_new_tokens, context_of(model) - length)
    draw = torch.Generator().manual_seed(sampling.seed)
    rows = torch.randint(vocab_size, (batch, length), generator=draw).tolist()
    seconds = []
    gc.collect()
    _forget_peak(model.device)
    try:
        for _ in range(repeats):
            seconds.append(_timed(model, rows, sampling, vocab_size, new_tokens))
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return Measurement(batch, length, new_tokens)
    first = statistics.median(first for first, _ in seconds)
    rest = statistics.median(rest for _, rest in seconds)
    return Measurement(
        batch,
        length,
        new_tokens,
        time_to_first_token_seconds=first,
        prefill_tokens_per_second=batch * length / first,
        decode_tokens_per_second=batch * (new_tokens - 1) / rest if new_tokens > 1 else None,
        memory_bytes=_peak(model.device),
    )


def _timed(
    model: PreTrainedModel, rows: list[list[int]], sampling: Sampling, vocab_size: int, new_tokens: int
) -> tuple[float, float]:
    """Return the seconds to the first token of every row, and from there to the last."""
    generators = [prompt_generator("", number, sampling.seed) for number in range(len(rows))]
    _wait(model.device)
    began = time.perf_counter()
    # Without an end of text, so that every row is as long as every other.
    steps = next_tokens(model, rows, sampling, generators, vocab_size, eos_id=None)
    next(steps)
    first = time.perf_counter() - began
    for _ in range(new_tokens - 1):
        next(steps)
    return first, time.perf_counter() - began - first


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """Return what the figures were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def _forget_peak(device: torch.device) -> None:
    """Let the peak begin anew at what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # not Linux
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM


def _peak(device: torch.device) -> int:
    """Return the peak bytes since `_forget_peak`: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # not Linux: what is resident now
        return psutil.Process().memory_info().rss


def format_benchmark(result: dict[str, Any]) -> str:
    """Return the table of what `benchmark_generation` returned."""
    step = f" (step {result['step']})" if result["step"] else ""
    lines = [
        f"{result['model']}{step} on {result['device']}, {result['dtype']}, median of {result['repeats']}",
        f"{'batch':>6}{'prompt':>8}{'new':>6}{'first token':>13}{'prefill':>14}{'decode':>13}{'memory':>11}",
    ]
    for row in result["rows"]:
        line = f"{row['batch_size']:>6}{row['prompt_tokens']:>8}{row['new_tokens']:>6}"
        if row["memory_bytes"] is None:
            lines.append(line + "  does not fit into memory")
            continue
        decode = row["decode_tokens_per_second"]
        line += f"{row['time_to_first_token_seconds'] * 1000:>10.1f} ms"
        line += f"{human_count(row['prefill_tokens_per_second']):>8} tok/s"
        line += f"{'-' if decode is None else human_count(decode):>7} tok/s"
        lines.append(line + f"{row['memory_bytes'] / 1e6:>8.0f} MB")
    return "\n".join(lines)
