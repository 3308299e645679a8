"""Other programs' checkpoints, and those of Ekiden's that are not whole: what fits is taken, and said.

For `--init-from`, and for a `--resume-from` that `training.converted` does not take whole, `take_foreign` puts into the
state what fits, and its report says in one sentence what was taken and what was not. The files are read by
`checkpoint.convert`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ekiden.checkpoint.convert import open_tree
from ekiden.checkpoint.files import read_start
from ekiden.checkpoint.folder_format import is_folder, is_folder_tree, read_folder
from ekiden.checkpoint.lazy import LazyTensor
from ekiden.checkpoint.strict_json import Damaged, parse_json
from ekiden.errors import UserError
from ekiden.export.load import find_model
from ekiden.training.foreign_optimizer import take_optimizer
from ekiden.training.foreign_weights import copy_weights, find_weights, match
from ekiden.training.state import TrainingState

HF_OPTIMIZER, HF_STATE = "optimizer.pt", "trainer_state.json"
_STEP_KEYS = ("step", "global_step", "iter_num", "iteration", "steps", "iter")
_SHAPING = (
    "n_head num_attention_heads num_key_value_heads head_dim activation_function hidden_activation layer_norm_epsilon "
    "rms_norm_eps query_pre_attn_scalar sliding_window layer_types rope_parameters"
).split()


@dataclass
class ForeignReport:
    """What was taken from a checkpoint that is not Ekiden's own, or not whole.

    Attributes:
        weights: number of the model's tensors taken; always all of them. step: steps done there, or None.
        moments: parameters whose optimizer moments were taken. notes: what was not taken or differs, in words.
    """

    path: Path
    weights: int = 0
    step: int | None = None
    moments: int = 0
    notes: list[str] = field(default_factory=list)

    def sentence(self) -> str:
        """Return one line for the user."""
        taken = [f"{self.weights} weights"]
        taken += [f"the optimizer's moments of {self.moments} parameters"] if self.moments else []
        taken += [f"step {self.step}"] if self.step is not None else []
        text = f"taken from {self.path}: {', '.join(taken)}"
        return text + (f"; not taken or different: {'; '.join(self.notes)}" if self.notes else "")


def take_foreign(
    path: str | Path, state: TrainingState, weights_only: bool = False, max_steps: int = 0
) -> ForeignReport:
    """Put the weights at `path` into `state`, and optimizer and step where they are there and fit.

    Args:
        path: `.pt`, `.pth`, `.json`, a folder of safetensors, or a run directory (then its best model).
        weights_only: begin at step 0 with these weights (`--init-from`).
        max_steps: optimizer steps of the whole run; 0: the setting of that name.

    Raises:
        UserError: it does not hold this model's weights; the sentence names the first one that is missing, left over
            or of another shape. The state is as it was then.
    """
    path = Path(path)
    if path.is_dir() and not is_folder(path) and (path / "checkpoints").is_dir():
        path = find_model(path)
    tree = _open(path, weights_only)
    report = ForeignReport(path)
    foreign = find_weights(tree, state.model)
    if foreign is None:
        raise UserError(
            f"{path} holds no weights with names of this model; its names would be such as "
            f"{next(iter(dict(state.model.named_parameters())))}"
        )
    matched = match(path, foreign, state.model)
    _note_config(tree, state, report)
    report.step = None if weights_only else _find_step(tree)
    limit = max_steps or state.config.max_steps
    if report.step is not None and limit and report.step >= limit:
        raise UserError(
            f"{path} has done {report.step} steps, and --max-steps is {limit}; give more steps, or --init-from"
        )
    copy_weights(path, matched, state.model)
    report.weights = len(matched.tensors)
    report.notes += matched.notes
    if weights_only:
        return report
    if is_folder_tree(tree) or list(matched.tensors) == sorted(matched.tensors):
        # safetensors, and some writers of JSON, sort the names; optimizers count in the model's order.
        ours = [name for name, _ in state.model.named_parameters()]
        matched.tensors = {name: matched.tensors[name] for name in ours if name in matched.tensors}
    problem = take_optimizer(tree, matched, state)
    if problem:
        report.notes.append(problem)
    else:
        report.moments = len(state.optimizer.state)
    if report.step is None:
        report.notes.append("no step was found, so the run begins at step 0")
    else:
        report.notes.append("the learning rate goes on from this run's settings")
        state.counters.step = report.step
    return report


def _open(path: Path, weights_only: bool) -> Any:
    """Return what `path` holds; of Hugging Face's Trainer also the optimizer and step that lie beside the weights."""
    if weights_only or not is_folder(path) or not (path / HF_OPTIMIZER).is_file():
        return open_tree(path)
    tree = read_folder(path, weights_only=True)
    tree["optimizer"] = open_tree(path / HF_OPTIMIZER)
    try:
        state = parse_json(read_start(path / HF_STATE, 16 << 20), HF_STATE, allow_nan=True)
    except (OSError, Damaged):
        state = None
    if isinstance(state, dict):
        tree["step"] = state.get("global_step")
    return tree


def _find_step(tree: Any) -> int | None:
    if not isinstance(tree, dict):
        return None
    for key in _STEP_KEYS:
        value = tree.get(key)
        if isinstance(value, LazyTensor) and value.bytes <= 8:
            value = value.load().item()
        if type(value) is int and 0 <= value < 2**40:
            return value
    return None


def _note_config(tree: Any, state: TrainingState, report: ForeignReport) -> None:
    """Note settings that no weight's shape tells, and another tokenizer, where the checkpoint is a folder's."""
    files = tree.get("files") if is_folder_tree(tree) else None
    if not isinstance(files, dict):
        return
    text = files.get("config.json")
    try:
        theirs = parse_json(text.encode(), "config.json") if isinstance(text, str) else {}
    except Damaged:
        theirs = {}
    ours = json.loads(state.model.config.to_json_string(use_diff=False))
    for key in _SHAPING:
        if isinstance(theirs, dict) and key in theirs and key in ours and theirs[key] != ours[key]:
            report.notes.append(f"its {key} is {str(theirs[key])[:60]}, this model's {str(ours[key])[:60]}")
    tokenizer = files.get("tokenizer.model")
    if tokenizer is not None:
        data = tokenizer.encode() if isinstance(tokenizer, str) else tokenizer
        if hashlib.sha256(data).hexdigest() != state.identity.get("tokenizer"):
            report.notes.append("its tokenizer is not the data's, so its tokens mean something else")
