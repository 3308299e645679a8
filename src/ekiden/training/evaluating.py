"""What a run measures of its model on the way: losses per language and sample texts, on whichever ranks have to take part.

The loop says when and keeps the figures; `evaluation/` computes them. A model in shards needs all ranks for a forward
pass; otherwise the main one does it while the others wait.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ekiden.errors import UserError
from ekiden.evaluation.loss import evaluate
from ekiden.evaluation.samples import sample_texts
from ekiden.progress import say
from ekiden.training.memory import OutOfMemory, run_within_memory
from ekiden.training.ranks import Ranks
from ekiden.training.sharding import gather_back
from ekiden.training.start import Start

T = TypeVar("T")


class Evaluator:
    """Evaluations and samples of one session's model; every rank calls them at the same step boundaries."""

    def __init__(self, start: Start, ranks: Ranks) -> None:
        self.start, self.state, self.ranks = start, start.state, ranks

    def losses(self, tokens_per_language: int) -> dict[str, Any]:
        """Return `evaluation.loss.evaluate`'s figures on the validation split.

        Args:
            tokens_per_language: how many tokens to look at; 0: all.

        Raises:
            UserError: one sample does not fit in memory.
        """
        return self._once(lambda: self._within_memory(tokens_per_language))

    def samples(self) -> dict[str, Any]:
        """Return texts by language, as `evaluation.samples.sample_texts` does."""
        config, model, dtype = self.state.config, self.state.model, self.start.precision.dtype

        def work() -> dict[str, Any]:
            # Blocks in shards gather half-precision weights, which nothing but autocast multiplies fp32 numbers by.
            half = self.state.sharded and dtype != torch.float32
            with torch.autocast(model.device.type, dtype, enabled=half):
                return sample_texts(
                    model,
                    self.start.tokenizer,
                    self.start.dataset,
                    prompts=config.sample_prompts or None,
                    max_new_tokens=config.sample_tokens,
                    seed=config.seed,
                )

        return self._once(work)

    def _within_memory(self, tokens_per_language: int) -> dict[str, Any]:
        """Evaluate with batches as large as a microbatch, or half of that and half again where they do not fit."""
        config, counters = self.state.config, self.state.counters
        batch_size = counters.microbatch
        while batch_size:
            work = functools.partial(
                evaluate,
                self.state.model,
                self.start.dataset,
                length=config.max_length,
                tokens_per_language=tokens_per_language or None,
                batch_size=batch_size,
                precision=self.start.precision,
                chunk_rows=config.loss_chunk_size,
            )
            result = run_within_memory(work)
            if not isinstance(result, OutOfMemory):
                return result
            if self.state.sharded:
                raise UserError(
                    self.ranks.name(
                        f"out of memory in the evaluation of step {counters.step} with --parallel fsdp, where ranks cannot "
                        f"try again; give a --batch-size below {batch_size} (and more --gradient-accumulation-steps)"
                    )
                )
            say(
                f"out of memory in the evaluation of step {counters.step} with {batch_size} samples at a time"
            )
            batch_size //= 2
        raise UserError(
            f"out of memory evaluating one sample of {config.max_length} tokens; lower --loss-chunk-size"
        )

    def _once(self, work: Callable[[], T]) -> T:
        """Return the main rank's result of `work`; in shards the model needs all ranks to do it."""
        if not self.state.sharded:
            return self.ranks.on_main(work)
        result = work()
        gather_back(self.state.model)
        return self.ranks.from_main(result)
