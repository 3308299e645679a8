"""What a run keeps, and how: checkpoints written beside training, `best/` and `final_model/`.

The loop says when; a snapshot is copied at the step boundary and written, hashed and fsynced in the background. A save
that fails costs the new checkpoint, never an old one, and never the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from ekiden.checkpoint.background import BackgroundSaver
from ekiden.checkpoint.store import CheckpointError, CheckpointWriter, replace_folder
from ekiden.errors import UserError
from ekiden.export.huggingface import model_folder_files
from ekiden.progress import say
from ekiden.training.history import History
from ekiden.training.start import Start
from ekiden.training.state import Snapshot


class Saving:
    """The saves of one session; a roll-back, which starts anew from a checkpoint, makes a new one.

    Attributes:
        saved_step: step of the newest checkpoint written or in flight; -1: none, or the last one failed.
    """

    def __init__(self, start: Start, history: History) -> None:
        self.start, self.history = start, history
        self.state, self.store = start.state, start.store
        self.folder_files = model_folder_files(start.state.model, start.tokenizer)
        self.saved_step = start.resumed_from.step if start.resumed_from else -1
        self._saver = BackgroundSaver()

    @property
    def checkpoint(self) -> str | None:
        """Name of the newest checkpoint, or None."""
        return f"step-{self.saved_step:08d}" if self.saved_step >= 0 else None

    def save(self, loss: float | None, wait: bool) -> None:
        """Save the state of this step boundary, beside training unless `wait`.

        Args:
            loss: the last training loss, nats a token, to be shown beside the checkpoint.

        Raises:
            UserError: a weight is not finite; such a state is never written.
        """
        step = self.state.counters.step
        if step != self.saved_step:
            self._saver.wait()
            try:
                snapshot = self.state.snapshot()
            except FloatingPointError as error:
                raise UserError(
                    f"{error}; nothing was saved, go on from the newest checkpoint with a lower --learning-rate"
                ) from None
            self.saved_step = step
            self._saver.submit(self._writing(snapshot, loss))
        if wait:
            self._saver.wait()
        self.check()

    def _writing(self, snapshot: Snapshot, loss: float | None) -> Callable[[], None]:
        """Return the work of writing `snapshot`, to be done in the background."""
        counters = self.state.counters

        def write(writer: CheckpointWriter) -> None:
            for name, content in self.folder_files.items():
                writer.bytes(name, content)
            snapshot.write(writer)

        def save() -> None:
            began = time.perf_counter()
            facts = {"tokens": snapshot.trainer["counters"]["tokens"]}
            if loss is not None and math.isfinite(loss):
                facts["loss"] = loss
            self.store.save(snapshot.step, write, facts)
            counters.save_seconds = max(counters.save_seconds, time.perf_counter() - began)

        return save

    def check(self) -> None:
        """Report what became of the save in the background; one that failed counts as no checkpoint."""
        for error in self._saver.failures():
            self.saved_step = -1
            if not isinstance(error, (CheckpointError, OSError)):
                raise error
            say(f"a checkpoint could not be saved ({error}); training goes on, older checkpoints stay")
            self.history.event("save-failed", self.state.counters.step, problem=str(error))

    def write_model(self, target: Path, loss: float | None) -> None:
        """Write the weights of this step as a Hugging Face folder, replacing the one before it atomically."""
        step = self.state.counters.step
        weights = self.state.weights()

        def write(writer: CheckpointWriter) -> None:
            for name, content in self.folder_files.items():
                writer.bytes(name, content)
            writer.tensors("model.safetensors", weights, metadata={"format": "pt"})

        try:
            replace_folder(target, write, {"step": step, "loss": loss})
        except (CheckpointError, OSError) as error:
            say(f"{target.name}/ could not be written ({error}); training goes on, the one before it stays")
            self.history.event("save-failed", step, problem=str(error), folder=target.name)

    def close(self) -> None:
        """Return when no save is in flight; nothing may be saved after."""
        self._saver.close()
