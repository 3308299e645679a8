"""One step of a run on all its ranks, within the memory that each of them has.

The loop asks for a step; this takes the step's batches, has the gradients added up (`training.step`) and exchanged, and
the weights updated. Where a rank runs out of memory, all of them repeat the step with half the microbatch, so that the
global batch and the order of samples stay what they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

from ekiden.config_checks import AUTO
from ekiden.errors import UserError
from ekiden.modeling.prepare import forget_compiled, uncompiled
from ekiden.progress import say
from ekiden.training.exact import GradientTree
from ekiden.training.history import History
from ekiden.training.memory import OutOfMemory, run_within_memory, try_step
from ekiden.training.microbatch import find_microbatch, rows_each
from ekiden.training.optimizer import learning_rate, momenta, set_momenta
from ekiden.training.ranks import Ranks
from ekiden.training.rundir import RunDirectory
from ekiden.training.sharding import filled_up
from ekiden.training.start import Start
from ekiden.training.state import Counters
from ekiden.training.step import StepFigures, accumulate_gradients, apply_update

T = TypeVar("T")


def no_memory_in_shards(directory: RunDirectory, ranks: Ranks, counters: Counters) -> UserError:
    """Leave word that the next start takes half the microbatch; return the error that ends this one."""
    smaller = max(1, counters.microbatch // 2)
    directory.write_microbatch(smaller)
    return UserError(
        ranks.name(
            f"out of memory at step {counters.step + 1} with --parallel fsdp, where ranks cannot try again; run the same "
            f"command again (or give --max-restarts): it takes microbatches of {smaller}, same global batch"
        )
    )


class Stepper:
    """The steps of one session; a roll-back, which starts anew from a checkpoint, makes a new one."""

    def __init__(self, start: Start, history: History, directory: RunDirectory, ranks: Ranks) -> None:
        self.start, self.history, self.directory, self.ranks = start, history, directory, ranks
        self.state, self.batches = start.state, start.batches
        self.config, self.counters = start.state.config, start.state.counters
        self.tree: GradientTree | None = None

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.counters.global_batch * self.config.max_length

    def try_memory(self) -> None:
        """Find the microbatch that fits before the first step, where nothing can be lost by failing.

        Raises:
            UserError: one sample does not fit.
        """
        if self.config.batch_size == AUTO:
            self._find_microbatch()
        self._within_memory(lambda: self._try(self.counters.microbatch))

    def _try(self, microbatch: int) -> None:
        try_step(
            self.state,
            self.start.precision,
            microbatch,
            self.config.max_length,
            self.config.loss_chunk_size,
        )

    def _find_microbatch(self) -> None:
        """Let the microbatch be the largest one that fits on all ranks.

        Raises:
            UserError: one sample does not fit.
        """
        ranks, counters = self.ranks, self.counters
        problem: tuple[int, str] | None = None

        def fits(size: int) -> bool:
            nonlocal problem
            result = run_within_memory(lambda: self._try(size))
            problem = ranks.first(result.problem if isinstance(result, OutOfMemory) else None)
            return problem is None

        with uncompiled(self.state.model):  # every size would be compiled for its own
            found = find_microbatch(
                self.state.model,
                self.config,
                self.start.precision,
                self.start.device,
                rows_each(counters.global_batch, ranks.world),
                ranks.local_world,
                lambda number: -int(ranks.agree([-number])[0]),
                fits,
            )
        if found != counters.microbatch:
            counters.microbatch_schedule.append([counters.step, max(1, found)])
        if not found:
            self._halve_microbatch(problem)
        self.history.event("microbatch", counters.step, samples=found)

    def step(self) -> StepFigures | None:
        """Do one optimizer step; halve the microbatch and repeat it where a device runs out of memory.

        Gradients are exchanged once, when every rank has all of its own: no rank waits in a collective for one whose
        forward or backward pass fails.

        Returns:
            None where the update itself did not fit: the microbatch is halved, but weights are half changed, and the
            run has to go back to its newest checkpoint.

        Raises:
            UserError: one sample does not fit.
        """
        config, counters = self.config, self.counters
        loss = self._exchanged(self._within_memory(self._gradients))
        rate = learning_rate(counters.step, config, self.start.max_steps, counters.decay)
        set_momenta(self.state.optimizer, *momenta(counters.step, config))
        update = functools.partial(
            apply_update, self.state.optimizer, loss, rate, config.max_grad_norm, self.state.scaler
        )
        figures = run_within_memory(update)
        if isinstance(figures, OutOfMemory) and self.state.sharded:
            self._leave_smaller(figures.problem)
        problem = self.ranks.first(figures.problem if isinstance(figures, OutOfMemory) else None)
        if problem or isinstance(figures, OutOfMemory):
            self._halve_microbatch(problem)
            return None
        counters.step += 1
        counters.tokens += self.tokens_per_step
        return figures

    def _exchanged(self, loss: torch.Tensor) -> torch.Tensor:
        """Sum gradients and `loss` over the ranks; return the loss."""
        if self.tree:
            return self.tree.finish(self.ranks)
        if self.state.sharded:
            self.ranks.sum_([loss])
        else:
            gradients = [p.grad for p in self.state.model.parameters() if p.grad is not None]
            self.ranks.sum_([*gradients, loss])
        return loss

    def _gradients(self) -> torch.Tensor:
        """Add up the gradients of this step's global batch; return its mean loss."""
        counters, ranks = self.counters, self.ranks
        microbatches = self.batches.microbatches(
            counters.data_step(counters.step), counters.microbatch, ranks.rank, ranks.world
        )
        if self.state.sharded:
            largest = -(-counters.global_batch // ranks.world)
            microbatches = filled_up(microbatches, -(-largest // counters.microbatch))
        exact = self.config.elastic_exact
        self.tree = GradientTree(list(self.state.model.parameters())) if exact else None
        return accumulate_gradients(
            self.state.model,
            microbatches,
            self.tokens_per_step,
            self.start.precision,
            self.state.scaler,
            self.config.loss_chunk_size,
            after=self.tree.add if self.tree else None,
        )

    def _within_memory(self, work: Callable[[], T]) -> T:
        """Return what `work` returns on this rank, repeated with half the microbatch on all where one has no memory."""
        while True:
            result = run_within_memory(work)
            if isinstance(result, OutOfMemory) and self.state.sharded:
                self._leave_smaller(result.problem)
            problem = self.ranks.first(result.problem if isinstance(result, OutOfMemory) else None)
            if problem is None and not isinstance(result, OutOfMemory):
                return result
            del result
            self._halve_microbatch(problem)

    def _leave_smaller(self, problem: str) -> None:
        """End the run where one rank has no memory amid exchanges that the others wait in; the next start takes less.

        Raises:
            UserError: always.
        """
        if self.counters.microbatch == 1:
            self._halve_microbatch((self.ranks.rank, problem))
        raise no_memory_in_shards(self.directory, self.ranks, self.counters)

    def _halve_microbatch(self, problem: tuple[int, str] | None) -> None:
        """Make room: half the microbatch, twice the accumulation, the same global batch.

        Args:
            problem: (rank, what its allocator said) of the first rank that has no memory.

        Raises:
            UserError: the microbatch is one sample already.
        """
        counters = self.counters
        rank, words = problem or (self.ranks.rank, "")
        where = f" on rank {rank}" if self.ranks.world > 1 else ""
        self.state.optimizer.zero_grad(set_to_none=True)
        if counters.microbatch == 1:
            raise UserError(
                f"out of memory{where} at step {counters.step + 1} with one sample of {self.config.max_length} tokens; lower "
                "--max-length or choose a smaller preset"
            )
        smaller = counters.microbatch // 2
        say(
            f"out of memory{where} at step {counters.step + 1}: microbatch {counters.microbatch} -> {smaller}, same global "
            "batch"
        )
        self.history.event(
            "oom", counters.step, microbatch=[counters.microbatch, smaller], rank=rank, problem=words
        )
        counters.microbatch_schedule.append([counters.step, smaller])
        forget_compiled(self.state.model)
