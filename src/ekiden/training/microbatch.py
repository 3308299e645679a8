"""The largest microbatch that fits, found before the first step where `batch_size` is auto.

`training.stepping` calls `find_microbatch` once in the life of a run on a kind of machine: what was found stands in the
checkpoint's counters, so that a resumed run takes it without trying. A step on tensors without data (what `ekiden plan`
does) says where to begin, and real steps say what fits. On a CPU nothing larger than predicted is tried, since a Linux
that runs out of memory kills the process rather than refuse it some.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from ekiden.config import TrainConfig
from ekiden.modeling.build import head_weight
from ekiden.modeling.device import Precision
from ekiden.progress import say

SHARE = 0.9
"""Of the memory that is free: the rest is for fragments, the copy of a background save and whoever else is there."""
_CGROUP = Path("/sys/fs/cgroup")


def rows_each(global_batch: int, world: int) -> int:
    """Return the samples of a step that the rank with the most of them has."""
    return -(-global_batch // world)


def largest_that_fits(most: int, first: int, grow: bool, fits: Callable[[int], bool]) -> int:
    """Return the largest microbatch up to `most` that `fits`, found by halving and doubling from `first`; 0: none does.

    The result is evened out: as many microbatches as the largest one needs, all of nearly the same size.
    """
    size = max(1, min(most, first))
    refused = most + 1
    while not fits(size):
        if size == 1:
            return 0
        refused, size = size, size // 2
    while grow and size < most and min(2 * size, most) < refused and fits(min(2 * size, most)):
        size = min(2 * size, most)
    return -(-most // -(-most // size))


def predicted_microbatch(
    config: TrainConfig, vocab_size: int, precision: Precision, most: int, room: float, on_cpu: bool = False
) -> int:
    """Return how many samples (1 to `most`) should fit into `room` bytes, weights included.

    The peak is nearly a straight line in the microbatch; two points of it are traced on tensors without data, with the
    kernels of a GPU or (`on_cpu`) of this machine's CPU.
    """
    from ekiden.planning.trace import traced_peak  # planning stands above training, and traces its step

    if most == 1:
        return 1
    few = min(4, most)
    one, several = (traced_peak(config, vocab_size, precision, size, on_cpu) for size in (1, few))
    least = one.total + one.host
    slope = max(1.0, (several.total + several.host - least) / (few - 1))
    return int(max(1, min(most, 1 + (room - least) // slope)))


def free_bytes(device: torch.device, processes: int = 1) -> float:
    """Return the bytes that this process may still take on its device.

    Args:
        processes: training on this machine; on a CPU they share its memory, and a container's or a process's own limit
            may be lower than what the machine has.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = float(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        limit = int((_CGROUP / "memory.max").read_text())
        free = min(free, limit - int((_CGROUP / "memory.current").read_text()))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    own = limit - psutil.Process().memory_info().vms if limit != resource.RLIM_INFINITY else free
    return max(0.0, min(free / processes, own))


def find_microbatch(
    model: PreTrainedModel,
    config: TrainConfig,
    precision: Precision,
    device: torch.device,
    most: int,
    processes: int,
    agree_on_least: Callable[[int], int],
    fits: Callable[[int], bool],
) -> int:
    """Return the largest microbatch that fits on every rank, or 0.

    Args:
        most: samples of a step on one rank. processes: ranks on this machine.
        agree_on_least: returns the smallest of all ranks' numbers.
        fits: tries a step; the same answer on every rank.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    room = SHARE * free_bytes(device, processes) + weights
    vocab_size = head_weight(model).shape[0]
    on_cpu = device.type == "cpu"
    first = agree_on_least(predicted_microbatch(config, vocab_size, precision, most, room, on_cpu))
    found = largest_that_fits(most, first, device.type == "cuda", fits)
    if found:
        say(f"microbatch: {found} samples of {config.max_length} tokens fit ({most} a device and step)")
    return found
