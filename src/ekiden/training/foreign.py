"""Other programs' checkpoints, and those of Ekiden's that are not whole: what fits is taken, and said.

For `--init-from`, and for a `--resume-from` that `training.converted` does not take whole, `take_foreign` puts into the
state what fits, and its report says in one sentence what was taken and what was not. The files are read by
`checkpoint.convert`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ekiden.checkpoint.convert import open_tree
from ekiden.checkpoint.files import read_start
from ekiden.checkpoint.folder_format import is_folder, is_folder_tree, read_folder
from ekiden.checkpoint.lazy import LazyTensor
from ekiden.checkpoint.strict_json import Damaged, parse_json
from ekiden.errors import UserError
from ekiden.export.load import find_model
from ekiden.training.foreign_optimizer import take_optimizer
from ekiden.training.state import TrainingState

HF_OPTIMIZER, HF_STATE = "optimizer.pt", "trainer_state.json"
_WRAPPERS = re.compile(r"(^|\.)(?:(?:module|_orig_mod)\.)+")
_STEP_KEYS = ("step", "global_step", "iter_num", "iteration", "steps", "iter")
_BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")
_LINEAR = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
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
    foreign = _find_weights(tree, state.model)
    if foreign is None:
        raise UserError(
            f"{path} holds no weights with names of this model; its names would be such as "
            f"{next(iter(dict(state.model.named_parameters())))}"
        )
    matched = _match(path, foreign, state.model)
    _note_config(tree, state, report)
    report.step = None if weights_only else _find_step(tree)
    limit = max_steps or state.config.max_steps
    if report.step is not None and limit and report.step >= limit:
        raise UserError(
            f"{path} has done {report.step} steps, and --max-steps is {limit}; give more steps, or --init-from"
        )
    _copy_weights(path, matched, state.model)
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


# -- weights -----------------------------------------------------------------------------------------------------------


@dataclass
class Matched:
    """Foreign weights by this model's names.

    Attributes:
        tensors: our name -> foreign tensor, in the foreign order. names: foreign name -> ours.
        transposed: our names of matrices that are stored the other way round.
        zeros: our names of biases that the foreign model does not have, which is the same as zero.
    """

    tensors: dict[str, LazyTensor]
    names: dict[str, str]
    transposed: set[str]
    zeros: set[str]
    notes: list[str]

    def load(self, name: str, tensor: LazyTensor) -> torch.Tensor:
        """Return `tensor`, of the shape of our parameter `name`, turned where that is stored the other way round."""
        loaded = tensor.load().detach()
        return loaded.t() if name in self.transposed else loaded


def _find_weights(tree: Any, model: torch.nn.Module) -> dict[str, LazyTensor] | None:
    """Return the dict of tensors in `tree` that has most names of `model`."""
    ours = {name for name, _ in model.named_parameters()}
    best: tuple[int, dict[str, LazyTensor] | None] = (0, None)
    for candidate in _dicts(tree, 3):
        tensors = {str(name): value for name, value in candidate.items() if isinstance(value, LazyTensor)}
        overlap = len(ours & set(_renamed(tensors, ours).values()))
        if overlap > best[0]:
            best = (overlap, tensors)
    return best[1]


def _dicts(tree: Any, depth: int) -> Iterator[dict[Any, Any]]:
    if isinstance(tree, dict):
        yield tree
        if depth:
            for value in tree.values():
                yield from _dicts(value, depth - 1)


def _renamed(names: Any, ours: set[str]) -> dict[str, str]:
    """Return foreign name -> name as this model would have it, with the prefixes added or removed that fit best.

    DataParallel puts `module.` before every name, torch.compile `_orig_mod.`, wrappers and trainers their attribute's
    name; a bare decoder lacks `transformer.` or `model.`.
    """
    cleaned = {name: _WRAPPERS.sub(r"\1", name) for name in names}
    before = {""}
    for name in list(cleaned.values())[:8]:
        parts = name.split(".")
        before |= {".".join(parts[:k]) + "." for k in range(1, min(4, len(parts)))}
    best: dict[str, str] = {}
    count = -1
    for strip in sorted(before, key=len):
        for add in ("", "transformer.", "model."):
            renamed = {name: add + clean.removeprefix(strip) for name, clean in cleaned.items()}
            overlap = len(ours & set(renamed.values()))
            if overlap > count:
                best, count = renamed, overlap
    return best


def _match(path: Path, foreign: dict[str, LazyTensor], model: torch.nn.Module) -> Matched:
    """Return the foreign weights by our names.

    Raises:
        UserError: one is missing, left over, or has another shape.
    """
    parameters = dict(model.named_parameters())
    names = _renamed(foreign, set(parameters))
    tensors = {ours: foreign[name] for name, ours in names.items() if ours in parameters}
    left = {ours: foreign[name] for name, ours in names.items() if ours not in parameters}
    notes: list[str] = []
    _drop_head(path, tensors, left, model)
    buffers = [name for name in left if name.endswith(_BUFFERS)]
    unknown = sorted(left.keys() - set(buffers))
    missing = [name for name in parameters if name not in tensors]
    biases = {name for name in parameters if name.endswith(".bias")}
    zeros = biases if biases and biases == set(missing) else set()
    if zeros:
        notes.append(f"{len(zeros)} biases, which it does not have and which begin at zero")
    elif missing:
        raise UserError(
            f"{path} lacks {missing[0]}{_more(missing)} of this model; give the settings that it was trained with"
        )
    if unknown:
        raise UserError(
            f"{path} holds {unknown[0]}{_more(unknown)}, which this model has not; give the settings that it was "
            "trained with"
        )
    matched = Matched(tensors, names, _transposed(tensors, parameters), zeros, notes)
    for name, tensor in tensors.items():
        shape = tensor.shape[::-1] if name in matched.transposed else tensor.shape
        if shape != tuple(parameters[name].shape):
            raise UserError(
                f"{path}: {name} has the shape {list(shape)}, and this model's {list(parameters[name].shape)}; give the "
                "settings (and the tokenizer) that it was trained with"
            )
    return matched


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _drop_head(
    path: Path, tensors: dict[str, LazyTensor], left: dict[str, LazyTensor], model: torch.nn.Module
) -> None:
    """Take an output head that is the embedding for the embedding.

    Raises:
        UserError: it is another matrix; this model's is tied.
    """
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    name = next(name for name, parameter in model.named_parameters() if parameter is embedding)
    for head in [key for key in left if key.split(".")[-2:] == ["lm_head", "weight"]]:
        tensor = left.pop(head)
        if name not in tensors:
            tensors[name] = tensor
        elif tensor.identity != tensors[name].identity and not torch.equal(
            tensor.load(), tensors[name].load()
        ):
            raise UserError(
                f"{path} has an output head that is not its embedding, and this model's are one matrix; such a model is "
                "not continued"
            )


def _transposed(tensors: dict[str, LazyTensor], parameters: dict[str, torch.nn.Parameter]) -> set[str]:
    """Return the matrices that are stored as nn.Linear's [out, in] where GPT-2's Conv1D is [in, out].

    The widths of `c_attn`, n and 3n, tell which; a square matrix could not.
    """
    for name, tensor in tensors.items():
        if name.endswith("attn.c_attn.weight"):
            turned = tensor.shape != tuple(parameters[name].shape)
            if turned and tensor.shape[::-1] == tuple(parameters[name].shape):
                return {other for other in tensors if other.endswith(_LINEAR)}
    return set()


@torch.no_grad()
def _copy_weights(path: Path, matched: Matched, model: torch.nn.Module) -> None:
    # All are looked at before the first is copied, one at a time: the state stays as it was where one is bad.
    for name, tensor in matched.tensors.items():
        if not torch.isfinite(matched.load(name, tensor)).all():
            raise UserError(f"{path}: {name} holds values that are not finite; take an earlier checkpoint")
    parameters = dict(model.named_parameters())
    for name, tensor in matched.tensors.items():
        parameters[name].copy_(matched.load(name, tensor))
    for name in matched.zeros:
        parameters[name].zero_()


# -- step and settings -------------------------------------------------------------------------------------------------


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
