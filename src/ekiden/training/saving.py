"""What a run keeps, and how: checkpoints written beside training, `best/` and `final_model/`.

The loop says when; a snapshot is copied at the step boundary and written, hashed and fsynced in the background. A save
that fails costs the new checkpoint, never an old one, and never the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from ekiden.checkpoint import files
from ekiden.checkpoint.background import BackgroundWorker
from ekiden.checkpoint.convert import write_json_model
from ekiden.checkpoint.manifest import NAME as MANIFEST
from ekiden.checkpoint.mirror import MirrorError
from ekiden.checkpoint.mirror_state import EXTRAS, IDENTITY
from ekiden.checkpoint.mirror_uploader import MirrorUploader
from ekiden.checkpoint.store import Checkpoint, CheckpointError, CheckpointWriter, replace_folder
from ekiden.errors import UserError
from ekiden.export.huggingface import model_folder_files
from ekiden.progress import say
from ekiden.training.history import History
from ekiden.training.ranks import Ranks
from ekiden.training.start import Start
from ekiden.training.state import Snapshot

_SECONDS_BEFORE_WORDS, _SECONDS_BETWEEN_LOOKS = 2.0, 0.2


class Saving:
    """The saves of one session; a roll-back, which starts anew from a checkpoint, makes a new one.

    Every rank calls them at the same step boundaries; the main one writes.

    Attributes:
        saved_step: step of the newest checkpoint written or in flight; -1: none, or the last one failed.
    """

    def __init__(self, start: Start, history: History, ranks: Ranks | None = None) -> None:
        self.start, self.history, self.ranks = start, history, ranks or Ranks()
        self.state, self.store = start.state, start.store
        self.folder_files = model_folder_files(start.state.model, start.tokenizer)
        # A checkpoint that lies elsewhere, or was converted, is none of this run's yet.
        self._newest = start.resumed_from if isinstance(start.resumed_from, Checkpoint) else None
        if self._newest and self.store and self._newest.path.resolve().parent != self.store.folder.resolve():
            self._newest = None
        self.saved_step = self._newest.step if self._newest else -1
        self._saver = BackgroundWorker("checkpoint-save")
        self._uploader: MirrorUploader | None = None
        if start.mirror is not None and start.store is not None:
            extras = {name: history.path.with_name(name) for name in EXTRAS}
            self._uploader = MirrorUploader(start.mirror, extras, start.store.protected)

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
        new = step != self.saved_step
        if self.state.sharded:
            new = self.ranks.from_main(new)  # it alone knows whether a save has failed
        if not self.ranks.main:
            if new and self.state.sharded:
                self.state.snapshot()  # its part of what the main rank gathers
            self.saved_step = step
            return
        if new:
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
        counters, store = self.state.counters, self.store
        assert store is not None

        def write(writer: CheckpointWriter) -> None:
            for name, content in self.folder_files.items():
                writer.bytes(name, content)
            snapshot.write(writer)

        def save() -> None:
            began = time.perf_counter()
            self.history.sync()
            facts = {"tokens": snapshot.trainer["counters"]["tokens"]}
            facts |= {name: snapshot.trainer["identity"][name] for name in IDENTITY}
            if loss is not None and math.isfinite(loss):
                facts["loss"] = loss
            self._newest = store.save(snapshot.step, write, facts)
            counters.save_seconds = max(counters.save_seconds, time.perf_counter() - began)
            self.upload()

        return save

    def upload(self) -> None:
        """Have the newest checkpoint and the run's small files copied to the mirror, where there is one, beside training."""
        if self._uploader is not None and self._newest is not None:
            self._uploader.submit(self._newest)

    def check(self) -> None:
        """Report what became of saves and uploads in the background; a save that failed counts as no checkpoint."""
        for error in self._saver.failures():
            self.saved_step = -1
            if not isinstance(error, (CheckpointError, OSError)):
                raise error
            say(f"a checkpoint could not be saved ({error}); training goes on, older checkpoints stay")
            self.history.event("save-failed", self.state.counters.step, problem=str(error))
        for error in self._uploader.failures() if self._uploader else []:
            if not isinstance(error, MirrorError):
                raise error
            say(f"{error}; training goes on, the next checkpoint is tried again")
            self.history.event("mirror-failed", self.state.counters.step, problem=str(error))

    def write_model(self, target: Path, loss: float | None) -> bool:
        """Write the weights of this step as a Hugging Face folder, replacing the one before it atomically.

        Returns:
            Whether it is there; of the main rank, which alone writes.
        """
        if not self.ranks.main and not self.state.sharded:
            return False
        step = self.state.counters.step
        weights = self.state.weights()
        if not self.ranks.main:
            return False

        def write(writer: CheckpointWriter) -> None:
            for name, content in self.folder_files.items():
                writer.bytes(name, content)
            writer.tensors("model.safetensors", weights, metadata={"format": "pt"})

        try:
            replace_folder(target, write, {"step": step, "loss": loss})
        except (CheckpointError, OSError) as error:
            problem = files.reason(error) if isinstance(error, OSError) else str(error)
            say(
                problem.replace(f"{target.name}/ ", f"{target}/ ", 1)
                + "; checkpoints and models of before stay"
            )
            self.history.event("save-failed", step, problem=problem, folder=target.name)
            return False
        self.write_json(target)
        return True

    def write_json(self, folder: Path) -> None:
        """Write the model in `folder` as JSON beside it where that is wanted and not there yet.

        `best/` becomes `best_model.json`, and `final_model/` `final_model.json`.
        """
        manifest = folder / MANIFEST
        if not self.ranks.main or self.state.config.checkpoint_format != "json" or not manifest.is_file():
            return
        path = folder.with_name(folder.name.removesuffix("_model") + "_model.json")
        try:
            if path.exists() and path.stat().st_mtime_ns > manifest.stat().st_mtime_ns:
                return
            for left in path.parent.glob(f".{path.name}.*.tmp"):
                files.remove_file(left)  # of a killed process
            write_json_model(folder, path)
        except (UserError, OSError) as error:
            problem = files.reason(error) if isinstance(error, OSError) else str(error)
            say(f"{path.name} could not be written ({problem}); {folder.name}/ holds the same")
            self.history.event("save-failed", self.state.counters.step, problem=problem, folder=path.name)

    def close(self, give_up: Callable[[], bool]) -> None:
        """Return when no save is in flight and no upload, or `give_up` says that uploads are not waited for.

        Nothing may be saved after.
        """
        self._saver.wait()
        self._saver.close()
        if self._uploader is None:
            return
        if not self._uploader.wait(_SECONDS_BEFORE_WORDS):
            say(f"copying to mirror {self._uploader.mirror.url}; what is on this disk is whole already")
            while not self._uploader.wait(_SECONDS_BETWEEN_LOOKS):
                if give_up():
                    say("the mirror keeps the step that it had")
                    break
        self._uploader.close()
        self.check()
