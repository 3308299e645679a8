"""The training loop: the one place where steps, evaluations, saves and stops happen, in that order.

`train(config)` is what `ekiden train` calls and what a notebook imports. It takes settings, reads token shards and
the run directory, and leaves the run directory further along: history, checkpoints, `best/`, and at the end
`final_model/` and `result.json`. Called again with the same settings it goes on where the newest checkpoint is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ekiden.config import TrainConfig, validate
from ekiden.errors import UserError
from ekiden.evaluation.loss import evaluate, format_evaluation
from ekiden.evaluation.samples import sample_texts
from ekiden.progress import Progress, human_count, human_duration, say
from ekiden.training.exact import GradientTree
from ekiden.training.facts import Clock
from ekiden.training.history import History, UnwrittenHistory
from ekiden.training.interruption import REASONS, Interruption
from ekiden.training.launch import launch
from ekiden.training.memory import OutOfMemory, is_out_of_memory, memory_bytes, run_within_memory, try_step
from ekiden.training.optimizer import learning_rate
from ekiden.training.ranks import PeerLost, Ranks
from ekiden.training.rundir import RunDirectory, TrainResult
from ekiden.training.saving import Saving
from ekiden.training.sharding import filled_up, gather_back
from ekiden.training.start import prepare
from ekiden.training.step import StepFigures, accumulate_gradients, apply_update
from ekiden.training.trackers import Trackers
from ekiden.values import parse_duration

if TYPE_CHECKING:
    from ekiden.report.writer import ReportWriter

T = TypeVar("T")


def train(config: TrainConfig) -> TrainResult:
    """Train until the run is complete or has to stop; resume by itself where there is something to resume.

    Where the environment names several ranks (torchrun, accelerate), each of them calls this.

    Returns:
        How this call ended; `result.json` in the run directory says the same.

    Raises:
        UserError: settings, data or checkpoints that no training can use.
    """
    validate(config)
    for name in ("dataset_path", "output_dir"):
        if not getattr(config, name):
            raise UserError(f"--{name.replace('_', '-')} is not set; give a folder")
    if config.devices > 1 and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return launch(config)
    ranks = Ranks.join(config.device, parse_duration(config.rank_timeout, "--rank-timeout") or 60.0)
    try:
        return _train(config, ranks)
    finally:
        ranks.leave()


def _train(config: TrainConfig, ranks: Ranks) -> TrainResult:
    run = RunDirectory(config.output_dir)
    speaks = ranks.main
    with contextlib.ExitStack() as stack:
        try:
            with ranks.watched():
                ranks.on_main(lambda: stack.enter_context(run.lock()))
                interruption = Interruption(
                    run.path if ranks.main else None, parse_duration(config.max_time, "--max-time")
                )
                with interruption.handlers():
                    result = Trainer(config, run, interruption, ranks).run_to_end()
                ranks.barrier()
                return result
        except BaseException as error:
            if isinstance(error, PeerLost):
                speaks = ranks.main or not error.quiet
            if speaks:
                write_failure(run, error)
            if is_out_of_memory(error):
                raise UserError(
                    f"the memory is used up ({error}); lower --max-length or choose a smaller preset, and run again"
                ) from None
            raise


def write_failure(run: RunDirectory, error: BaseException) -> None:
    """Leave `result.json` as failed, with what the checkpoints and the history still hold."""
    names = sorted(path.name for path in run.checkpoints.glob("step-*")) if run.checkpoints.is_dir() else []
    step = int(names[-1].removeprefix("step-")) if names else 0
    run.write_result(
        TrainResult("failed", step, 0, str(error) or type(error).__name__, names[-1] if names else None)
    )


def open_report(run: Path) -> ReportWriter:
    """Return the writer of the run's page; imported here because a report stands above training, and reads it."""
    from ekiden.report.writer import ReportWriter

    return ReportWriter(run)


class Trainer:
    """One session of a run: from the newest checkpoint to the end, or to whatever stops it."""

    def __init__(
        self, config: TrainConfig, run: RunDirectory, interruption: Interruption, ranks: Ranks
    ) -> None:
        self.config, self.directory, self.interruption, self.ranks = config, run, interruption, ranks
        self.clock = Clock()
        self._begin()
        resumed = self.start.resumed_from
        # A run that branches off another's checkpoint is another run to a tracker, too.
        own = resumed is not None and resumed.path.resolve().is_relative_to(run.checkpoints.resolve())
        self.trackers = Trackers(
            config if ranks.main else dataclasses.replace(config, use_wandb=False, trackers=[]),
            run.path,
            self.counters.wandb_run_id if own else None,
        )
        self.counters.wandb_run_id = self.trackers.wandb_run_id or self.counters.wandb_run_id
        self.tree: GradientTree | None = None
        self.report = open_report(run.path) if config.report and ranks.main else None
        self.step_seconds = 0.0
        self.last_loss: float | None = None
        self.stopped_for: str | None = None
        self.verified_resume = self.start.resumed_step is None
        if ranks.main:
            run.write_config(config)

    def _begin(self) -> None:
        """Take up the run where its newest checkpoint is."""
        self.start = prepare(self.config, self.directory, self.ranks)
        self.state, self.batches = self.start.state, self.start.batches
        self.counters = self.state.counters
        path = self.directory.history
        written = History(path, self.counters.step) if self.ranks.main else None
        last = self.ranks.from_main(written.last if written else None)
        self.history = written or UnwrittenHistory(path, last)
        self.saving = Saving(self.start, self.history, self.ranks)

    # -- the session ------------------------------------------------------------------------------------------

    def run_to_end(self) -> TrainResult:
        """Do the remaining steps; return how the session ended."""
        resumed = self.start.resumed_step is not None
        self.history.event("resume" if resumed else "start", self.counters.step, **self.start.notes)
        try:
            if not resumed or self.start.notes["level"] != "L1":
                self._try_memory()
            self.clock.started()
            reason = self.stopped_for = self._steps()
            if reason is None:
                result = self._complete()
            else:
                self._save(wait=True)
                result = self._result("paused", reason)
                say(f"stopped at step {self.counters.step} ({reason}); run the same command again to go on")
            self.history.event(
                "stop",
                self.counters.step,
                status=result.status,
                reason=result.reason,
                seconds=self.clock.reading(),
            )
            if self.ranks.main:
                self.directory.write_result(result)
            self.saving.upload()  # once more: with the last records and the result
            return result
        except Exception as error:
            self.history.event("stop", self.counters.step, status="failed", reason=str(error))
            raise
        finally:
            self._end_session(give_up=self._stop_again)
            self.trackers.close()
            if self.report:
                self.report.finish()

    def _stop_again(self) -> bool:
        """Return whether there is a reason to stop beside the one that the steps ended for, or the time is up."""
        reason = self.interruption.stop_reason(0.0)
        return reason is not None and (reason == "time limit" or reason != self.stopped_for)

    def _steps(self) -> str | None:
        """Train until the last step, or until there is a reason to stop; return the reason."""
        config, counters = self.config, self.counters
        progress = Progress(self.start.max_steps, "step", "train", initial=counters.step)
        interval_seconds, interval_start = 0.0, counters.step
        try:
            while counters.step < self.start.max_steps:
                began = time.perf_counter()
                figures = self._step()
                if figures is None:
                    counters = self.counters
                    progress.update(counters.step - progress.done)
                    interval_seconds, interval_start = 0.0, counters.step
                    continue
                skipped = bool(figures.skipped)
                seconds = time.perf_counter() - began
                self.step_seconds = max(seconds, 0.9 * self.step_seconds)
                counters.seconds += seconds
                self.clock.add("training", seconds)
                interval_seconds += seconds
                if not skipped:
                    counters.bad_in_row = 0
                elif self._skipped_step(figures):
                    counters = self.counters
                    progress.update(counters.step - progress.done)
                    interval_seconds, interval_start = 0.0, counters.step
                    continue
                step = counters.step
                shown: dict[str, object] = {}
                if self._due(config.log_steps) or step == 1 or step == self.start.max_steps:
                    rate = (step - interval_start) * self._tokens_per_step() / max(interval_seconds, 1e-9)
                    shown = self._log(figures, rate)
                    interval_seconds, interval_start = 0.0, step
                if self._due(config.eval_steps) and step < self.start.max_steps:
                    self._evaluate(config.eval_tokens)
                if self._due(config.sample_steps) and step < self.start.max_steps:
                    self._samples()
                progress.update(1, **shown)
                self.saving.check()
                reason, save = self._requests()
                if reason and step < self.start.max_steps:
                    return reason
                # Not amid bad steps: a roll-back should go to before them.
                due = self._due(config.save_steps) and counters.bad_in_row == 0
                if due or save:
                    self._save(wait=not config.background_save)
        finally:
            progress.close()
        return None

    def _requests(self) -> tuple[str | None, bool]:
        """Return why all have to stop (or None), and whether a save is asked for; one rank's reason is enough."""
        own = self.interruption.stop_reason(self._reserve_seconds())
        number = 1 + REASONS.index(own) if own else 0
        agreed, save = self.ranks.agree([number, self.interruption.save_requested()])
        return REASONS[int(agreed) - 1] if agreed else None, bool(save)

    def _due(self, every: int) -> bool:
        return every > 0 and self.counters.step % every == 0

    def _tokens_per_step(self) -> int:
        return self.counters.global_batch * self.config.max_length

    def _reserve_seconds(self) -> float:
        """Time that the next step and the last save need before a deadline, twice over since disks are moody."""
        measured = self.counters.save_seconds or 30.0
        return 2 * (self.step_seconds + measured)

    # -- one step ---------------------------------------------------------------------------------------------

    def _step(self) -> StepFigures | None:
        """Do one optimizer step; halve the microbatch and repeat it where a device runs out of memory.

        Gradients are exchanged once, when every rank has all of its own: no rank waits in a collective for one whose
        forward or backward pass fails.

        Returns:
            None where the update itself did not fit: weights are then half changed, and the run went back to its
            newest checkpoint.
        """
        config, counters = self.config, self.counters
        loss = self._within_memory(self._gradients)
        if self.tree:
            loss = self.tree.finish(self.ranks)
        elif self.state.sharded:
            self.ranks.sum_([loss])
        else:
            gradients = [p.grad for p in self.state.model.parameters() if p.grad is not None]
            self.ranks.sum_([*gradients, loss])
        rate = learning_rate(counters.step, config, self.start.max_steps, counters.decay)
        update = functools.partial(
            apply_update, self.state.optimizer, loss, rate, config.max_grad_norm, self.state.scaler
        )
        figures = run_within_memory(update)
        problem = self.ranks.first(figures.problem if isinstance(figures, OutOfMemory) else None)
        if problem or isinstance(figures, OutOfMemory):
            self._go_back_smaller(problem)
            return None
        counters.step += 1
        counters.tokens += self._tokens_per_step()
        return figures

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
            self._tokens_per_step(),
            self.start.precision,
            self.state.scaler,
            self.config.loss_chunk_size,
            after=self.tree.add if self.tree else None,
        )

    def _leave_smaller(self, problem: str) -> None:
        """End the run where one rank has no memory amid exchanges that the others wait in; the next start takes less.

        Raises:
            UserError: always.
        """
        before = self.counters.microbatch
        if before == 1:
            self._halve_microbatch((self.ranks.rank, problem))
        self.directory.write_microbatch(before // 2)
        raise UserError(
            self.ranks.name(
                f"out of memory at step {self.counters.step + 1} with --parallel fsdp, where ranks cannot try again; run the "
                f"same command again (or give --max-restarts): it takes microbatches of {before // 2}, same global batch"
            )
        )

    def _try_memory(self) -> None:
        """Find the microbatch that fits before the first step, where nothing can be lost by failing."""
        self._within_memory(self._try_step)

    def _try_step(self) -> None:
        config = self.config
        try_step(
            self.state,
            self.start.precision,
            self.counters.microbatch,
            config.max_length,
            config.loss_chunk_size,
        )

    def _go_back_smaller(self, problem: tuple[int, str] | None) -> None:
        """Go on from the newest checkpoint with half the microbatch: an update that did not fit left half of itself."""
        before = self.counters
        self._halve_microbatch(problem)
        smaller = self.counters.microbatch
        self._end_session()
        self._begin()
        self.counters.microbatch_schedule.append([self.counters.step, smaller])
        say(
            f"the optimizer's update of step {before.step + 1} did not fit; back at step {self.counters.step}"
        )

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

    def _skipped_step(self, figures: StepFigures) -> bool:
        """Count a step whose loss or gradient was not finite; return True after a roll-back.

        A GradScaler's own skips (finite loss, overflowed gradient) are how it finds its scale, and are only recorded.

        Raises:
            UserError: the run rolled back too often.
        """
        config, counters = self.config, self.counters
        loss = float(figures.loss)
        counters.skipped_steps += 1
        self.history.event("skip", counters.step, loss=loss, grad_norm=float(figures.grad_norm))
        if self.state.scaler is not None and math.isfinite(loss):
            return False
        counters.bad_in_row += 1
        say(f"step {counters.step}: loss {loss} or its gradient is not finite; the update was skipped")
        if counters.bad_in_row < config.max_bad_steps:
            return False
        first_bad = counters.step - counters.bad_in_row
        if counters.rollbacks >= config.max_rollbacks:
            raise UserError(
                f"{counters.bad_in_row} steps in a row without a finite loss up to step {counters.step}, after "
                f"{counters.rollbacks} roll-backs; lower --learning-rate or look at the data of these steps"
            )
        self._roll_back(first_bad, counters.bad_in_row)
        return True

    def _roll_back(self, first_bad: int, count: int) -> None:
        """Go back to the newest good checkpoint (or the start) and leave out the batches that failed."""
        before = self.counters
        self._end_session()
        self._begin()
        self.counters.skipped_batches = [*before.skipped_batches, [first_bad, count]]
        self.counters.rollbacks, self.counters.skipped_steps = before.rollbacks + 1, before.skipped_steps
        self.history.event(
            "rollback", self.counters.step, first_bad_step=first_bad + 1, batches_left_out=count
        )
        say(
            f"rolled back to step {self.counters.step}; the {count} batches from step {first_bad + 1} on are left out"
        )

    def _end_session(self, give_up: Callable[[], bool] = lambda: False) -> None:
        """Close what `_begin` opens; `give_up` as in `Saving.close`."""
        self.saving.close(give_up)
        self.batches.close()
        self.history.close()

    # -- what is recorded ---------------------------------------------------------------------------------------

    def _log(self, figures: StepFigures, tokens_per_second: float) -> dict[str, object]:
        """Write the training record of this step; return the figures to show."""
        counters = self.counters
        loss = self.last_loss = float(figures.loss)
        self.history.add(
            "train",
            counters.step,
            loss=loss,
            learning_rate=learning_rate(counters.step - 1, self.config, self.start.max_steps, counters.decay),
            grad_norm=float(figures.grad_norm),
            samples=counters.step * counters.global_batch,
            tokens=counters.tokens,
            tokens_per_second=tokens_per_second,
            memory_bytes=memory_bytes(self.start.device),
            seconds=counters.seconds,
        )
        self.trackers.wake()
        self._verify_resume(counters.step, loss)
        shown: dict[str, object] = {"loss": f"{loss:.4f}", "tok/s": human_count(tokens_per_second)}
        if self.config.save_steps:
            left = self.config.save_steps - counters.step % self.config.save_steps
            shown["next checkpoint"] = human_duration(left * self.step_seconds)
        return shown

    def _verify_resume(self, step: int, loss: float) -> None:
        """Compare the first repeated step with what the interrupted session had logged for it, bit for bit."""
        before = self.history.replaced.get(step)
        if self.verified_resume or before is None:
            return
        self.verified_resume = True
        if before == loss:
            say(f"resume verified bit-exact at step {step}")
        elif self.start.notes.get("level") == "L1":
            say(
                f"step {step} is not bit-identical to the interrupted session's: loss {loss!r} now, {before!r} then"
            )
        self.history.event("resume-verified", step, bit_exact=before == loss)

    def _save(self, wait: bool) -> None:
        with self.clock.span("saving"):
            self.saving.save(self.last_loss, wait)

    def _evaluate(self, tokens_per_language: int) -> dict[str, Any]:
        """Evaluate every language, keep the best model so far; return the figures."""
        counters = self.counters
        with self.clock.span("evaluation"):
            result = self._once(lambda: self._evaluate_within_memory(tokens_per_language))
        say(f"step {counters.step} evaluation\n{format_evaluation(result)}")
        loss = result["macro"]["loss"] if result["macro"] else None
        # best/ is not mirrored: on a new machine the best is the best since then.
        none_yet = counters.best_loss is None or not self.ranks.from_main(self.directory.best.is_dir())
        if loss is not None and math.isfinite(loss) and (none_yet or loss < counters.best_loss):
            counters.best_loss = loss
            with self.clock.span("saving"):
                self.saving.write_model(self.directory.best, loss)
        # Recorded last: a session killed before here evaluates this step again, and keeps its model.
        self.history.add("eval", counters.step, **result)
        self.history.event("time", counters.step, seconds=self.clock.reading())
        self.trackers.wake()
        if self.report:
            self.report.request()
        return result

    def _evaluate_within_memory(self, tokens_per_language: int) -> dict[str, Any]:
        """Evaluate with batches as large as a microbatch, or half of that and half again where they do not fit.

        Raises:
            UserError: one sample does not fit.
        """
        batch_size = self.counters.microbatch
        while batch_size:
            work = functools.partial(
                evaluate,
                self.state.model,
                self.start.dataset,
                length=self.config.max_length,
                tokens_per_language=tokens_per_language or None,
                batch_size=batch_size,
                precision=self.start.precision,
                chunk_rows=self.config.loss_chunk_size,
            )
            result = run_within_memory(work)
            if not isinstance(result, OutOfMemory):
                return result
            say(
                f"out of memory in the evaluation of step {self.counters.step} with {batch_size} samples at a time"
            )
            batch_size //= 2
        raise UserError(
            f"out of memory evaluating one sample of {self.config.max_length} tokens; lower --loss-chunk-size"
        )

    def _once(self, work: Callable[[], T]) -> T:
        """Return the main rank's result of `work`; in shards the model needs all ranks to do it."""
        if not self.state.sharded:
            return self.ranks.on_main(work)
        result = work()
        gather_back(self.state.model)
        return self.ranks.from_main(result)

    def _samples(self) -> None:
        make = functools.partial(
            sample_texts,
            self.state.model,
            self.start.tokenizer,
            self.start.dataset,
            prompts=self.config.sample_prompts or None,
            max_new_tokens=self.config.sample_tokens,
            seed=self.config.seed,
        )
        with self.clock.span("samples"):
            texts = self._once(make)
        self.history.add("samples", self.counters.step, languages=texts)
        for language, samples in texts.items():
            say(
                f"step {self.counters.step} sample ({language}): {samples[0]['prompt']} >> {samples[0]['text']}"
            )

    def _complete(self) -> TrainResult:
        """Evaluate, save and export at the last step."""
        already = self.start.resumed_step == self.start.max_steps
        if already and self.ranks.on_main(self.directory.final_model.is_dir):
            for folder in (self.directory.best, self.directory.final_model):
                self.saving.write_json(folder)
            say(f"all {self.start.max_steps} steps are done; raise --max-steps to train on")
            return self._result("completed", "all steps done")
        self._save(wait=True)
        # A session killed between that save and here leaves these to the next one, which does them once.
        if self.history.last.get("eval") != self.counters.step:
            self._evaluate(self.config.eval_tokens)
        if self.history.last.get("samples") != self.counters.step:
            self._samples()
        with self.clock.span("saving"):
            self.saving.write_model(self.directory.final_model, self.counters.best_loss)
        return self._result("completed", "all steps done")

    def _result(self, status: str, reason: str) -> TrainResult:
        return TrainResult(status, self.counters.step, self.counters.tokens, reason, self.saving.checkpoint)
