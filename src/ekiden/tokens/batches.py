"""Batches for the trainer: the windows of a step's samples, read from the shards ahead of time.

Which samples a step has is arithmetic on the step's number (`tokens.mixture` says where they stand in the
shards); ranks and microbatches only choose who reads which. One thread reads a few steps ahead; what it has
read never changes what comes next, so it can be thrown away, asked for again, or never asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from ekiden.errors import UserError
from ekiden.tokens.format import TokenDataset
from ekiden.tokens.mixture import Mixture

Microbatch = tuple[np.ndarray, np.ndarray]


class Batches:
    """The batches of a run, of one rank.

    Args:
        dataset: the shards that `mixture` was planned for.
        global_batch: samples a step takes, over all ranks; fixed for the whole run.
        read_ahead: steps read before they are asked for; each holds its windows as int64 (64 samples of 1,024
            tokens: 0.5 MB).

    Raises:
        UserError: the shards hold other text than the mixture was planned for.
    """

    def __init__(
        self, dataset: TokenDataset, mixture: Mixture, global_batch: int, read_ahead: int = 2
    ) -> None:
        assert global_batch > 0 and read_ahead >= 0
        self.mixture, self.global_batch, self.read_ahead = mixture, global_batch, read_ahead
        self._streams = [dataset.split(name, "train") for name in mixture.languages]
        for name, stream, tokens in zip(mixture.languages, self._streams, mixture.tokens):
            if stream.tokens != tokens:
                raise UserError(
                    f"--dataset-path holds {stream.tokens:,} training tokens of {name}, but the run began "
                    f"with {tokens:,}; give the shards it began with, or another --output-dir for a new run"
                )
        # One thread: it is the only one that reads, so the streams need no lock.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._windows: dict[tuple[int, int], Future[np.ndarray]] = {}

    def slots(self, step: int, rank: int = 0, world: int = 1) -> tuple[int, int]:
        """Return the samples [first, last) of this rank in `step`: a contiguous slice of the global batch.

        The slices of all ranks, in order, are the samples [step * global batch, (step + 1) * global batch).
        """
        first = step * self.global_batch
        return first + rank * self.global_batch // world, first + (rank + 1) * self.global_batch // world

    def read(self, first: int, last: int) -> np.ndarray:
        """Return the windows of samples [first, last): int64 [last - first, length + 1]."""
        count = self.mixture.length + 1
        windows = np.empty((last - first, count), dtype=np.int64)
        languages, starts, _epochs = self.mixture.locate(np.arange(first, last, dtype=np.uint64))
        for row, language, start in zip(windows, languages.tolist(), starts.tolist()):
            row[:] = self._streams[language].read(start, count)
        return windows

    def prefetch(self, step: int, rank: int = 0, world: int = 1) -> None:
        """Start reading `step` and the steps after it in the background; forget what was read of others."""
        wanted = [self.slots(step + ahead, rank, world) for ahead in range(self.read_ahead + 1)]
        for slots in [slots for slots in self._windows if slots not in wanted]:
            self._windows.pop(slots).cancel()
        for slots in wanted:
            if slots not in self._windows:
                self._windows[slots] = self._reader.submit(self.read, *slots)

    def microbatches(self, step: int, microbatch: int, rank: int = 0, world: int = 1) -> Iterator[Microbatch]:
        """Yield (inputs, targets) of this rank's samples of `step`, in order; meanwhile read the next steps.

        Args:
            microbatch: samples at a time; the last may have fewer.

        Returns:
            int64 arrays [b, length], b <= `microbatch`; a target is the token after its input.

        Raises:
            Whatever reading the shards raised, here and not in the thread; the next call reads again.
        """
        assert microbatch > 0
        self.prefetch(step, rank, world)
        slots = self.slots(step, rank, world)
        try:
            windows = self._windows[slots].result()
        except BaseException:
            self._windows.pop(slots, None)
            raise
        # Kept until another step is asked for: one repeated after running out of memory reads nothing again.
        for begin in range(0, len(windows), microbatch):
            part = windows[begin : begin + microbatch]
            yield np.ascontiguousarray(part[:, :-1]), np.ascontiguousarray(part[:, 1:])

    def close(self) -> None:
        """Stop reading ahead and end the thread; the batches cannot be read after this."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._windows.clear()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
