"""A small run with a mirror, for the mirror's tests: saves, uploads, and what must hold after any fault."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from checkpoint_faults import folder_step, save

from ekiden.checkpoint.mirror import Mirror, MirrorError, open_mirror
from ekiden.checkpoint.mirror_state import EXTRAS, MirrorState
from ekiden.checkpoint.store import Checkpoint, CheckpointStore

_numbers = itertools.count()


class MirroredRun:
    """A run in `root` whose checkpoints go to the mirror at `url`."""

    def __init__(self, root: Path, url: str) -> None:
        self.root, self.url = root, url
        self.store = CheckpointStore(root / "checkpoints", keep=2)
        self.extras = {name: root / name for name in EXTRAS}
        (root / "config.yaml").write_text("max_steps: 9\n")
        self.mirror = open_mirror(url)

    def save(self, step: int) -> Checkpoint:
        """Save the checkpoint of `step`, with a history up to there."""
        lines = [json.dumps({"kind": "train", "step": i}) for i in range(1, step + 1)]
        (self.root / "history.jsonl").write_text("\n".join(lines) + "\n")
        return save(self.store, step)

    def upload(self, step: int) -> None:
        """Save and upload the checkpoint of `step`."""
        self.mirror.upload(self.save(step), self.extras)

    def standing(self, mirror: Mirror | None = None) -> int:
        """Fetch the newest step of the mirror onto an empty machine, see that every byte is right, and return it."""
        mirror = mirror or open_mirror(self.url)
        state = mirror.newest()
        assert state is not None
        machine = self.root / f"machine-{next(_numbers)}"
        folder = mirror.download(state, machine / "checkpoints", machine)
        assert folder.name == f"step-{state.step:08d}"
        assert folder_step(folder) == state.step
        assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]
        assert (machine / "history.jsonl").read_text().count("\n") == state.step
        assert (machine / "config.yaml").read_bytes() == (self.root / "config.yaml").read_bytes()
        return state.step

    def attempt(self, old: int) -> tuple[int, bool]:
        """Upload step `old` + 1, which may fail; return the step that stands then and whether the upload worked."""
        try:
            self.upload(old + 1)
        except MirrorError:
            return self.standing(), False
        return self.standing(), True


def everything_in(root: Path) -> dict[str, bytes]:
    """Return every file below `root`."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def stored_names(state: MirrorState) -> list[str]:
    """Return where the files of a step stand on the mirror, the object that makes them count last."""
    return [one.stored for one in (*state.files.values(), *state.extras.values())] + [state.commit()[0]]
