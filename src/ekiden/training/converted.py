"""Whole checkpoints of Ekiden's that are not this run's own: another run's, or converted to `.json` or `.pt`.

`training.start` calls `open_any` for `--resume-from` and `restore_any` to put the checkpoint back, to the last bit. What
is not whole, and other programs' checkpoints, are `training.foreign`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ekiden.checkpoint.convert import open_tree
from ekiden.checkpoint.folder import Checkpoint
from ekiden.checkpoint.folder_format import WEIGHTS, is_folder, is_folder_tree
from ekiden.checkpoint.lazy import LazyTensor, load_tree
from ekiden.checkpoint.listing import step_folders
from ekiden.checkpoint.manifest import NAME as MANIFEST
from ekiden.checkpoint.strict_json import Damaged, parse_json
from ekiden.errors import UserError
from ekiden.progress import say
from ekiden.training.state import SavedState, TrainingState

STATE, OPTIMIZER = "trainer_state.json", "optimizer.safetensors"


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """A whole checkpoint of Ekiden's that lies in a `.json` or `.pt`; read like `checkpoint.folder.Checkpoint`."""

    path: Path
    step: int
    tree: dict[str, Any]

    def json(self, filename: str) -> Any:
        """Return the value of one of its JSON files.

        Raises:
            UserError: there is no such file, or it is not JSON.
        """
        text = self.tree["files"].get(filename)
        try:
            data = text.encode() if isinstance(text, str) else b""
            return parse_json(data, filename, allow_nan=True)
        except Damaged as damage:
            raise UserError(f"{self.path} is not a whole checkpoint: {damage}; convert it again") from None

    def tensors(self, filename: str) -> dict[str, torch.Tensor]:
        """Return the tensors of one of its safetensors files.

        Raises:
            UserError: there is no such file, or its bytes cannot be read.
        """
        return load_tree(self.lazy(filename))

    def lazy(self, filename: str) -> dict[str, LazyTensor]:
        """Return the tensors of one of its safetensors files, still in the checkpoint.

        Raises:
            UserError: there is no such file.
        """
        tree = self.tree
        held = tree.get("model_state_dict") if filename == WEIGHTS else tree["safetensors"].get(filename)
        if not isinstance(held, dict) or not all(isinstance(value, LazyTensor) for value in held.values()):
            raise UserError(f"{self.path} holds no {filename}; convert it again without --weights-only")
        return held


def open_any(path: Path) -> SavedState | None:
    """Return the checkpoint at `path` where it is a whole one of Ekiden's, in any format; None where it is not.

    Of a run directory it is the newest good checkpoint.

    Raises:
        UserError: nothing is there, or it is damaged or of a format that is not read.
    """
    if path.is_dir() and not is_folder(path) and (path / "checkpoints").is_dir():
        return _newest_of_run(path)
    if (path / MANIFEST).is_file() and (path / STATE).is_file():
        return Checkpoint.open(path)
    if is_folder(path):
        return None
    tree = open_tree(path)
    if not is_folder_tree(tree):
        return None
    files, tensors, step = tree.get("files"), tree.get("safetensors"), tree.get("step")
    if (
        not isinstance(files, dict)
        or STATE not in files
        or not isinstance(tensors, dict)
        or type(step) is not int
    ):
        return None
    checkpoint = ConvertedCheckpoint(path, step, tree)
    state = checkpoint.json(STATE)
    parts = ("config", "counters", "mixture", "identity")
    if not isinstance(state, dict) or not all(isinstance(state.get(part), dict) for part in parts):
        raise UserError(f"{path}: its {STATE} is not a run's; convert the checkpoint's folder again")
    return checkpoint


def _newest_of_run(run: Path) -> Checkpoint | None:
    """Return the newest good checkpoint of a run that may be at work, changing nothing."""
    for folder in step_folders(run / "checkpoints"):
        try:
            return Checkpoint.open(folder)
        except UserError as error:
            say(f"passed over {folder.name}: {error}")
    return None


def restore_any(state: TrainingState, checkpoint: SavedState) -> None:
    """Put `checkpoint` into `state`; one that was converted may have been changed by hand, so it is looked at closer.

    Raises:
        UserError: its tensors are not this model's, or it is not whole.
    """
    if not isinstance(checkpoint, ConvertedCheckpoint):
        state.restore(checkpoint)
        return
    shapes = {name: parameter.shape for name, parameter in state.model.named_parameters()}
    try:
        for full_name, moment in checkpoint.lazy(OPTIMIZER).items():
            key, name = full_name.split("/", 1)
            if tuple(moment.shape) != (() if key == "step" else tuple(shapes[name])):
                raise UserError(
                    f"{checkpoint.path}: {full_name} has the shape {list(moment.shape)}, which is not its weight's; "
                    "convert the checkpoint's folder again, or take its weights alone with --init-from"
                )
        state.restore(checkpoint)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{checkpoint.path} is not a whole checkpoint of this model ({type(error).__name__}: {str(error)[:80]}); "
            "convert the checkpoint's folder again, or take its weights alone with --init-from"
        ) from None
