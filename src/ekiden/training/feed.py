"""Microbatches on their way to the device, and what a step left there on its way back, without the host waiting.

`training.step` takes its tensors from `on_device`; the loop gives `Later` the flag of a step and reads it a step after.
On a CPU both are the plain thing: `tokens.batches` has read the windows in its thread already, and cutting one
microbatch out of them takes microseconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import torch

from ekiden.tokens.batches import Microbatch

Pair = tuple[torch.Tensor, torch.Tensor]


def on_device(microbatches: Iterable[Microbatch], device: torch.device) -> Iterator[Pair]:
    """Yield (inputs, targets), int64 [b, T] each, on `device`; on a GPU the next ones are copied while these are used."""
    if device.type != "cuda":
        for inputs, targets in microbatches:
            yield torch.from_numpy(inputs), torch.from_numpy(targets)
        return
    yield from one_ahead(microbatches, functools.partial(_begin_copy, device=device))


def one_ahead(
    microbatches: Iterable[Microbatch], begin: Callable[[Microbatch], Callable[[], Pair]]
) -> Iterator[Pair]:
    """Yield every microbatch after the next one's copy has begun.

    Args:
        begin: begins a copy; what it returns is called when the copy is needed.
    """
    copying: Callable[[], Pair] | None = None
    for microbatch in microbatches:
        following = begin(microbatch)
        if copying is not None:
            yield copying()
        copying = following
    if copying is not None:
        yield copying()


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _begin_copy(microbatch: Microbatch, device: torch.device) -> Callable[[], Pair]:
    """Begin to copy to a GPU from page-locked memory, on a stream of its own."""
    stream = _copy_stream(device)
    with torch.cuda.stream(stream):
        inputs, targets = (
            torch.from_numpy(array).pin_memory().to(device, non_blocking=True) for array in microbatch
        )
        copied = stream.record_event()

    def finish() -> Pair:
        """Have the stream that computes wait for the copy; the host does not."""
        computing = torch.cuda.current_stream(device)
        computing.wait_event(copied)
        for tensor in (inputs, targets):
            tensor.record_stream(computing)  # or its memory would be given away while it is read
        return inputs, targets

    return finish


class Later:
    """A flag that a device will have set, to be read when the device has come so far.

    Reading a GPU's number waits for everything that it was given until then; here the number is sent to the host at
    once, and only its own arrival is waited for.
    """

    def __init__(self, flag: torch.Tensor) -> None:
        self._flag, self._arrived = flag, None
        if flag.device.type == "cuda":
            self._flag = torch.empty(flag.shape, dtype=flag.dtype, pin_memory=True)
            self._flag.copy_(flag, non_blocking=True)
            self._arrived = torch.cuda.current_stream(flag.device).record_event()

    def read(self) -> bool:
        """Return whether it is set."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._flag)
