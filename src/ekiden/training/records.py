"""The training records of a session, and the proof that a resumed run repeats what the one before it had done.

`training.loop` hands over the figures of each step that is logged; they go into `history.jsonl`. The first step that an
interrupted session had logged, too, is compared with it to the last bit.
"""

from __future__ import annotations

from ekiden.progress import human_count, say
from ekiden.training.history import History
from ekiden.training.memory import memory_bytes
from ekiden.training.optimizer import learning_rate
from ekiden.training.start import Start
from ekiden.training.step import StepFigures


class TrainingRecords:
    """What one session logs of its steps.

    Attributes:
        last_loss: of the newest record, nats a token; None before the first.
    """

    def __init__(self) -> None:
        self.last_loss: float | None = None
        self._compared: bool | None = None
        self._since = (0, 0.0)

    def begin(self, start: Start, history: History) -> None:
        """Go on at the start's step: at the session's beginning, and where it went back to a checkpoint."""
        self.start, self.history = start, history
        if self._compared is None:  # a roll-back repeats its own session's steps, with other data
            self._compared = start.resumed_step is None
        counters = start.state.counters
        self._since = (counters.step, counters.seconds)

    def add(self, figures: StepFigures) -> dict[str, object]:
        """Write the record of the step just done; return the figures to show."""
        config, counters = self.start.state.config, self.start.state.counters
        step, seconds = self._since
        tokens = (counters.step - step) * counters.global_batch * config.max_length
        tokens_per_second = tokens / max(counters.seconds - seconds, 1e-9)
        self._since = (counters.step, counters.seconds)
        loss = self.last_loss = float(figures.loss)
        self.history.add(
            "train",
            counters.step,
            loss=loss,
            learning_rate=learning_rate(counters.step - 1, config, self.start.max_steps, counters.decay),
            grad_norm=float(figures.grad_norm),
            samples=counters.step * counters.global_batch,
            tokens=counters.tokens,
            tokens_per_second=tokens_per_second,
            memory_bytes=memory_bytes(self.start.device),
            seconds=counters.seconds,
        )
        self._compare(counters.step, loss)
        return {"loss": f"{loss:.4f}", "tok/s": human_count(tokens_per_second)}

    def _compare(self, step: int, loss: float) -> None:
        """Compare the first repeated step with what the interrupted session had logged for it, bit for bit."""
        before = self.history.replaced.get(step)
        if self._compared or before is None:
            return
        self._compared = True
        if before == loss:
            say(f"resume verified bit-exact at step {step}")
        elif self.start.notes.get("level") == "L1":
            say(
                f"step {step} is not bit-identical to the interrupted session's: loss {loss!r} now, {before!r} then"
            )
        self.history.event("resume-verified", step, bit_exact=before == loss)
