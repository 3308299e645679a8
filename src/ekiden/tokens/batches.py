"""Batches for the trainer: the windows of a step's samples, read from the shards ahead of time.

Which samples a step has is arithmetic on the step's number; ranks and microbatches only choose who reads which.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from ekiden.tokens.format import TokenDataset
from ekiden.tokens.mixture import Mixture

Microbatch = tuple[np.ndarray, np.ndarray]


class Batches:
    """The batches of a run.

    Args:
        global_batch: samples a step takes, over all ranks; fixed for the whole run.
    """

    def __init__(self, dataset: TokenDataset, mixture: Mixture, global_batch: int) -> None:
        self.mixture, self.global_batch = mixture, global_batch
        self._streams = [dataset.split(name, "train") for name in mixture.languages]
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._ahead: dict[tuple[int, int], Future[np.ndarray]] = {}

    def slots(self, step: int, rank: int = 0, world: int = 1) -> tuple[int, int]:
        """Return the samples [first, last) of this rank in `step`: a contiguous slice of the global batch."""
        first = step * self.global_batch
        return first + rank * self.global_batch // world, first + (rank + 1) * self.global_batch // world

    def read(self, first: int, last: int) -> np.ndarray:
        """Return the windows of samples [first, last): int64 [last - first, length + 1]."""
        languages, starts, _epochs = self.mixture.locate(np.arange(first, last, dtype=np.uint64))
        count = self.mixture.length + 1
        return np.stack([self._streams[lang].read(int(start), count) for lang, start in zip(languages, starts)])

    def microbatches(self, step: int, microbatch: int, rank: int = 0, world: int = 1) -> Iterator[Microbatch]:
        """Yield (inputs, targets), int64 [b, length] each, b at most `microbatch`; read the next step's meanwhile."""
        first, last = self.slots(step, rank, world)
        ahead = self._ahead.pop((first, last), None)
        self._ahead.clear()
        windows = ahead.result() if ahead is not None else self.read(first, last)
        following = self.slots(step + 1, rank, world)
        self._ahead[following] = self._reader.submit(self.read, *following)
        for begin in range(0, len(windows), microbatch):
            part = windows[begin : begin + microbatch]
            yield np.ascontiguousarray(part[:, :-1]), np.ascontiguousarray(part[:, 1:])
