"""The training loop: the one place where steps, evaluations, saves and stops happen, in that order.

`train(config)` is what `ekiden train` calls and what a notebook imports. It takes settings, reads token shards and
the run directory, and leaves the run directory further along: history, checkpoints, `best/`, and at the end
`final_model/` and `result.json`. Called again with the same settings it goes on where the newest checkpoint is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ekiden.config import TrainConfig, validate
from ekiden.errors import UserError
from ekiden.evaluation.loss import format_evaluation
from ekiden.progress import Progress, human_duration, say
from ekiden.training.evaluating import Evaluator
from ekiden.training.facts import Clock
from ekiden.training.feed import Later
from ekiden.training.history import History, UnwrittenHistory
from ekiden.training.interruption import REASONS, Interruption
from ekiden.training.launch import launch
from ekiden.training.memory import is_out_of_memory
from ekiden.training.ranks import PeerLost, Ranks
from ekiden.training.records import TrainingRecords
from ekiden.training.rundir import RunDirectory, TrainResult
from ekiden.training.saving import Saving
from ekiden.training.start import prepare
from ekiden.training.step import StepFigures
from ekiden.training.stepping import Stepper
from ekiden.training.trackers import Trackers
from ekiden.values import parse_duration

if TYPE_CHECKING:
    from ekiden.report.writer import ReportWriter


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
                run.write_failure(error)
            if is_out_of_memory(error):
                raise UserError(
                    f"the memory is used up ({error}); lower --max-length or choose a smaller preset, and run again"
                ) from None
            raise


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
        self.records = TrainingRecords()
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
        self.report = open_report(run.path) if config.report and ranks.main else None
        self.step_seconds = 0.0
        self.stopped_for: str | None = None
        self.save_asked = False
        if ranks.main:
            run.write_config(config)

    def _begin(self) -> None:
        """Take up the run where its newest checkpoint is."""
        self.start = prepare(self.config, self.directory, self.ranks)
        self.state, self.counters = self.start.state, self.start.state.counters
        path = self.directory.history
        written = History(path, self.counters.step) if self.ranks.main else None
        last = self.ranks.from_main(written.last if written else None)
        self.history = written or UnwrittenHistory(path, last)
        self.saving = Saving(self.start, self.history, self.ranks)
        self.stepper = Stepper(self.start, self.history, self.directory, self.ranks)
        self.evaluator = Evaluator(self.start, self.ranks)
        self.records.begin(self.start, self.history)
        self.unseen: list[tuple[int, StepFigures, Later]] = []

    # -- the session ------------------------------------------------------------------------------------------

    def run_to_end(self) -> TrainResult:
        """Do the remaining steps; return how the session ended."""
        resumed = self.start.resumed_step is not None
        self.history.event("resume" if resumed else "start", self.counters.step, **self.start.notes)
        try:
            if not resumed or self.start.notes["level"] != "L1":
                self.stepper.try_memory()
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
        last = self.start.max_steps
        progress = Progress(last, "step", "train", initial=self.counters.step)
        try:
            while self.counters.step < last:
                figures = self._one_step()
                shown = self._records(figures) if figures else {}
                progress.update(self.counters.step - progress.done, **shown)
                if figures is None:
                    continue
                self.saving.check()
                reason, save = self._requests()
                self.save_asked |= save
                if (reason or save) and self._look_back():
                    continue
                if reason and self.counters.step < last:
                    return reason
                # Not amid bad steps: a roll-back should go to before them.
                if ("save" in self._due() and self.counters.bad_in_row == 0) or self.save_asked:
                    self.save_asked = False
                    self._save(wait=not self.config.background_save)
        finally:
            progress.close()
        return None

    def _one_step(self) -> StepFigures | None:
        """Do one step and count it; None: the run went back to a checkpoint instead."""
        began = time.perf_counter()
        figures = self.stepper.step()
        if figures is None:
            self._go_back_smaller()
            return None
        self.unseen.append((self.counters.step, figures, Later(figures.skipped)))
        went_back = self._look_back(leave=0 if self._due() else 1)
        seconds = time.perf_counter() - began
        self.step_seconds = max(seconds, 0.9 * self.step_seconds)
        self.clock.add("training", seconds)
        if went_back:
            return None
        self.counters.seconds += seconds
        return figures

    def _look_back(self, leave: int = 0) -> bool:
        """See which steps were skipped, but for the newest `leave`; return True after a roll-back.

        The device works on a step while the host looks at the one before. Nothing is logged, evaluated or saved of a
        step that was not looked at; a roll-back undoes the one that came too late.
        """
        while len(self.unseen) > leave:
            step, figures, skipped = self.unseen.pop(0)
            if not skipped.read():
                self.counters.bad_in_row = 0
            elif self._skipped_step(step, figures):
                return True
        return False

    def _due(self) -> set[str]:
        """Return what is made of this step: "log", "evaluation", "samples", "save"; the last step's end has its own."""
        config, step, last = self.config, self.counters.step, self.start.max_steps
        every = {"log": config.log_steps, "save": config.save_steps}
        if step < last:
            every |= {"evaluation": config.eval_steps, "samples": config.sample_steps}
        always = {"log"} if step in (1, last) else set()
        return always | {name for name, steps in every.items() if steps > 0 and step % steps == 0}

    def _records(self, figures: StepFigures) -> dict[str, object]:
        """Log, evaluate and sample where this step is due; return the figures to show."""
        due = self._due()
        shown = self._log(figures) if "log" in due else {}
        if "evaluation" in due:
            self._evaluate(self.config.eval_tokens)
        if "samples" in due:
            self._samples()
        return shown

    def _requests(self) -> tuple[str | None, bool]:
        """Return why all have to stop (or None), and whether a save is asked for; one rank's reason is enough."""
        own = self.interruption.stop_reason(self._reserve_seconds())
        number = 1 + REASONS.index(own) if own else 0
        agreed, save = self.ranks.agree([number, self.interruption.save_requested()])
        return REASONS[int(agreed) - 1] if agreed else None, bool(save)

    def _reserve_seconds(self) -> float:
        """Time that the next step and the last save need before a deadline, twice over since disks are moody."""
        measured = self.counters.save_seconds or 30.0
        return 2 * (self.step_seconds + measured)

    # -- going back ------------------------------------------------------------------------------------------

    def _go_back_smaller(self) -> None:
        """Go on from the newest checkpoint with the microbatch of now: an update that did not fit left half of itself."""
        step, smaller = self.counters.step + 1, self.counters.microbatch
        self._end_session()
        self._begin()
        self.counters.microbatch_schedule.append([self.counters.step, smaller])
        say(f"the optimizer's update of step {step} did not fit; back at step {self.counters.step}")

    def _skipped_step(self, step: int, figures: StepFigures) -> bool:
        """Count a step whose loss or gradient was not finite; return True after a roll-back.

        A GradScaler's own skips (finite loss, overflowed gradient) are how it finds its scale, and are only recorded.

        Raises:
            UserError: the run rolled back too often.
        """
        config, counters = self.config, self.counters
        loss = float(figures.loss)
        counters.skipped_steps += 1
        self.history.event("skip", step, loss=loss, grad_norm=float(figures.grad_norm))
        if self.state.scaler is not None and math.isfinite(loss):
            return False
        counters.bad_in_row += 1
        say(f"step {step}: loss {loss} or its gradient is not finite; the update was skipped")
        if counters.bad_in_row < config.max_bad_steps:
            return False
        first_bad = step - counters.bad_in_row
        if counters.rollbacks >= config.max_rollbacks:
            raise UserError(
                f"{counters.bad_in_row} steps in a row without a finite loss up to step {step}, after "
                f"{counters.rollbacks} roll-backs; lower --learning-rate or look at the data of these steps"
            )
        self._roll_back(first_bad, counters.bad_in_row)
        return True

    def _roll_back(self, first_bad: int, count: int) -> None:
        """Go back to the newest good checkpoint (or the start) and leave out the batches that failed."""
        before = self.counters
        self._end_session()
        self._begin()
        if self.counters.microbatch > before.microbatch:  # what was larger had not fitted
            self.counters.microbatch_schedule.append([self.counters.step, before.microbatch])
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
        self.start.batches.close()
        self.history.close()

    # -- what is recorded ---------------------------------------------------------------------------------------

    def _log(self, figures: StepFigures) -> dict[str, object]:
        """Write the training record of this step; return the figures to show."""
        shown = self.records.add(figures)
        self.trackers.wake()
        if self.config.save_steps:
            left = self.config.save_steps - self.counters.step % self.config.save_steps
            shown["next checkpoint"] = human_duration(left * self.step_seconds)
        return shown

    def _save(self, wait: bool) -> None:
        assert not self.unseen, "a roll-back may be due"
        with self.clock.span("saving"):
            self.saving.save(self.records.last_loss, wait)

    def _evaluate(self, tokens_per_language: int) -> dict[str, Any]:
        """Evaluate every language, keep the best model so far; return the figures."""
        counters = self.counters
        with self.clock.span("evaluation"):
            result = self.evaluator.losses(tokens_per_language)
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

    def _samples(self) -> None:
        with self.clock.span("samples"):
            texts = self.evaluator.samples()
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
            written = self.saving.write_model(self.directory.final_model, self.counters.best_loss)
        done = f"all {self.start.max_steps} steps are done"
        if not self.ranks.from_main(written):
            problem = "final_model/ could not be written"
            say(f"{done}, but {problem}; make room and run the same command again")
            return self._result("paused", problem)
        say(f"{done}; the model is in {self.directory.final_model}")
        return self._result("completed", "all steps done")

    def _result(self, status: str, reason: str) -> TrainResult:
        return TrainResult(status, self.counters.step, self.counters.tokens, reason, self.saving.checkpoint)
