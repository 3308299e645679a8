"""Running out of memory as something that can be tried, noticed and answered, on any device.

The loop runs forward and backward passes through `run_within_memory` and halves the microbatch where it says so;
before the first step it tries a whole step on throw-away figures, so that most such failures never happen in training.
"""

from __future__ import annotations

import contextlib
import errno
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import psutil
import torch

from ekiden.errors import UserError
from ekiden.modeling.build import head_weight, inside_forward
from ekiden.modeling.device import Precision
from ekiden.modeling.host_memory import give_back
from ekiden.modeling.prepare import uncompiled
from ekiden.training.state import TrainingState
from ekiden.training.step import accumulate_gradients, apply_update, summed_loss

T = TypeVar("T")

OUT_OF_MEMORY = ("out of memory", "can't allocate memory")
"""What CUDA's and the CPU's allocators say (the CPU's is a plain RuntimeError)."""


@dataclass
class OutOfMemory:
    """Work did not fit; `problem` is what the allocator said."""

    problem: str


def run_within_memory(work: Callable[[], T]) -> T | OutOfMemory:
    """Return what `work` returns, or that it ran out of memory, with what it had allocated given back."""
    try:
        return work()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
    # Outside the except block: the traceback would keep the activations alive.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    give_back()
    return OutOfMemory(problem)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` is an allocator's, on any device."""
    if isinstance(error, UserError):
        return False  # already a sentence
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        sign in str(error) for sign in OUT_OF_MEMORY
    )


def try_step(
    state: TrainingState, precision: Precision, microbatch: int, length: int, loss_chunk_size: int
) -> None:
    """Do the work of one step and one evaluation batch, and leave the state exactly as it was.

    Two microbatches: the second one's backward pass stands beside gradients that exist, which is the peak, and beside
    the moments, which a first update makes where there are none yet. Updates are skipped ones: they change nothing.

    Raises:
        torch.OutOfMemoryError, MemoryError, RuntimeError: as the device's allocator does.
    """
    fresh = not state.optimizer.state
    windows = np.zeros((microbatch, length), dtype=np.int64)
    # In training the moments are there before the first forward pass; one sample is enough to make them.
    trials = [(windows[:1], 1), (windows, 2)] if fresh else [(windows, 2)]
    try:
        for batch, count in trials:
            with uncompiled(state.model) if len(batch) < microbatch else contextlib.nullcontext():
                accumulate_gradients(
                    state.model,
                    [(batch, batch)] * count,
                    count * batch.size,
                    precision,
                    loss_chunk_size=loss_chunk_size,
                    first_index=-2,
                )
            not_finite = torch.full((), torch.nan, device=head_weight(state.model).device)
            apply_update(state.optimizer, not_finite, 0.0, 1.0)
        _evaluation_batch(state.model, windows, precision, loss_chunk_size)
    finally:
        state.optimizer.zero_grad(set_to_none=True)
        if fresh:
            state.optimizer.state.clear()


@torch.no_grad()
def _evaluation_batch(model: torch.nn.Module, windows: np.ndarray, precision: Precision, chunk: int) -> None:
    device = head_weight(model).device
    ids = torch.from_numpy(windows).to(device)
    with torch.autocast(device.type, precision.dtype, enabled=precision.dtype != torch.float32):
        inside_forward(model, summed_loss, model, ids, ids, chunk)


def memory_bytes(device: torch.device) -> int:
    """Return the peak bytes allocated on a GPU, or the process's resident bytes on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
