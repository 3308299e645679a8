"""Batches: the same windows for any ranks and microbatches, read ahead without changing anything."""

from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ekiden.errors import UserError
from ekiden.tokens.batches import Batches
from ekiden.tokens.shares import plan_mixture

LENGTH = 16
TOKENS = {"english": 5_003, "hindi": 1_000, "konkani": 90, "dutch": 7}


class Stream:
    """A token stream in memory whose token at position p of language l is 100,000 l + p."""

    def __init__(self, number: int, tokens: int) -> None:
        self.number, self.tokens = number, tokens
        self.fail_at: int | None = None
        self.reads: list[int] = []
        self.threads: set[int] = set()

    def read(self, start: int, count: int) -> np.ndarray:
        self.reads.append(start)
        self.threads.add(threading.get_ident())
        if self.fail_at is not None and len(self.reads) >= self.fail_at:
            raise OSError(5, "Input/output error")
        return 100_000 * self.number + (start + np.arange(count)) % self.tokens


class Dataset:
    """A dataset in memory."""

    def __init__(self, tokens: dict[str, int] = TOKENS) -> None:
        self.streams = {
            name: Stream(number, count) for number, (name, count) in enumerate(sorted(tokens.items()))
        }

    def split(self, language: str, split: str) -> Stream:
        assert split == "train"
        return self.streams[language]

    @property
    def reads(self) -> int:
        return sum(len(stream.reads) for stream in self.streams.values())


def batches_of(global_batch: int, dataset: Dataset | None = None, **options) -> Batches:
    return Batches(dataset or Dataset(), plan_mixture(TOKENS, LENGTH, 7), global_batch, **options)  # type: ignore[arg-type]


def windows(batches: Batches, step: int, microbatch: int, rank: int = 0, world: int = 1) -> np.ndarray:
    parts = [np.hstack([x, y[:, -1:]]) for x, y in batches.microbatches(step, microbatch, rank, world)]
    return np.concatenate(parts) if parts else np.empty((0, LENGTH + 1), dtype=np.int64)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 10**6))
def test_any_ranks_and_any_microbatch_give_the_batches_of_one(global_batch, microbatch, step):
    with batches_of(global_batch) as alone:
        expected = alone.read(step * global_batch, (step + 1) * global_batch)
    for world in (1, 2, 3, 4, 6, 8):
        parts = []
        for rank in range(world):
            with batches_of(global_batch) as batches:
                parts.append(windows(batches, step, microbatch, rank, world))
        assert (np.concatenate(parts) == expected).all()
        assert max(len(part) for part in parts) - min(len(part) for part in parts) <= 1


@given(st.integers(0, 10**12), st.integers(1, 100), st.integers(1, 9))
def test_slots_of_the_ranks_are_the_steps_samples_in_order(step, global_batch, world):
    with batches_of(global_batch) as batches:
        ends = [batches.slots(step, rank, world) for rank in range(world)]
    assert ends[0][0] == step * global_batch and ends[-1][1] == (step + 1) * global_batch
    assert all(one[1] == other[0] for one, other in pairwise(ends))


def test_a_microbatch_is_windows_of_one_language_each_and_targets_are_the_next_tokens():
    with batches_of(64) as batches:
        shapes = []
        for inputs, targets in batches.microbatches(3, 24):
            shapes.append(inputs.shape)
            assert inputs.dtype == targets.dtype == np.int64
            assert inputs.flags.c_contiguous and targets.flags.c_contiguous
            assert (inputs[:, 1:] == targets[:, :-1]).all()
            assert (inputs // 100_000 == targets // 100_000).all()
    assert shapes == [(24, LENGTH), (24, LENGTH), (16, LENGTH)]


def test_a_window_is_the_text_at_the_place_that_the_mixture_says():
    with batches_of(32) as batches:
        read = np.concatenate([windows(batches, step, 32) for step in range(20)])
    languages, starts, _ = batches.mixture.locate(np.arange(640, dtype=np.uint64))
    assert (read[:, 0] == 100_000 * languages + starts).all()
    sizes = np.array(batches.mixture.tokens)[languages]
    assert (read[:, -1] == 100_000 * languages + (starts + LENGTH) % sizes).all()


# -- reading ahead -------------------------------------------------------------------------------------------


def test_reading_ahead_is_bounded_and_in_one_thread():
    dataset = Dataset()
    with batches_of(8, dataset, read_ahead=3) as batches:
        windows(batches, 0, 8)
        batches.close()
    assert dataset.reads <= 4 * 8
    threads = set().union(*(stream.threads for stream in dataset.streams.values()))
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_what_was_read_ahead_is_used_and_a_repeated_step_reads_nothing_again():
    dataset = Dataset()
    with batches_of(8, dataset, read_ahead=1) as batches:
        first = windows(batches, 0, 8)
        # Running out of memory: the same step again in smaller parts, after only a part was taken.
        next(batches.microbatches(0, 4))
        assert (windows(batches, 0, 3) == first).all()
        for step in range(1, 10):
            windows(batches, step, 8)
        batches.close()
        assert 10 * 8 <= dataset.reads <= 11 * 8


@pytest.mark.parametrize("read_ahead", [0, 1, 5])
def test_jumping_about_gives_what_going_straight_gives(read_ahead):
    with batches_of(8, read_ahead=read_ahead) as batches, batches_of(8, read_ahead=0) as plain:
        for step in (0, 1, 5, 6, 2, 2, 10**9, 3, 4):
            assert (windows(batches, step, 5) == plain.read(step * 8, step * 8 + 8)).all()


def test_prefetch_starts_reading_before_the_step_is_asked_for():
    dataset = Dataset()
    with batches_of(8, dataset, read_ahead=0) as batches:
        batches.prefetch(4)
        batches.close()
    assert dataset.reads == 8


def test_an_error_of_the_reader_surfaces_where_the_batch_is_asked_for_and_goes_when_the_cause_goes():
    dataset = Dataset()
    with batches_of(8, dataset, read_ahead=1) as batches:
        expected = windows(batches, 0, 8)
        windows(batches, 1, 8)
        for stream in dataset.streams.values():
            stream.fail_at = 0
        with pytest.raises(OSError, match="Input/output error"):
            for step in range(2, 5):
                windows(batches, step, 8)
        for stream in dataset.streams.values():
            stream.fail_at = None
        assert (windows(batches, 0, 8) == expected).all()


def test_closing_ends_the_thread_even_when_nobody_finished_reading():
    before = {thread.ident for thread in threading.enumerate()}
    batches = batches_of(8, read_ahead=5)
    next(batches.microbatches(0, 1))
    assert {thread.ident for thread in threading.enumerate()} - before
    batches.close()
    assert not {thread.ident for thread in threading.enumerate()} - before
    batches.close()


def test_more_ranks_than_samples_leave_some_without():
    with batches_of(2) as batches:
        assert sorted(len(windows(batches, 0, 4, rank, 3)) for rank in range(3)) == [0, 1, 1]


def test_shards_of_another_size_than_the_runs_are_refused():
    with pytest.raises(UserError, match=r"91 training tokens of konkani.*90"):
        batches_of(8, Dataset(TOKENS | {"konkani": 91}))
