"""Another program's weights, put to this model's by their names, whatever wrappers stand before those.

`foreign.take_foreign` asks: which tensors of a file are the model's, do they all fit, and then to copy them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ekiden.checkpoint.lazy import LazyTensor
from ekiden.errors import UserError

_WRAPPERS = re.compile(r"(^|\.)(?:(?:module|_orig_mod)\.)+")
_BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")
_LINEAR = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


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


def find_weights(tree: Any, model: torch.nn.Module) -> dict[str, LazyTensor] | None:
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


def match(path: Path, foreign: dict[str, LazyTensor], model: torch.nn.Module) -> Matched:
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
def copy_weights(path: Path, matched: Matched, model: torch.nn.Module) -> None:
    """Copy the matched weights into `model`.

    Raises:
        UserError: one is not finite; `model` is as it was then.
    """
    # All are looked at before the first is copied, one at a time: the state stays as it was where one is bad.
    for name, tensor in matched.tensors.items():
        if not torch.isfinite(matched.load(name, tensor)).all():
            raise UserError(f"{path}: {name} holds values that are not finite; take an earlier checkpoint")
    parameters = dict(model.named_parameters())
    for name, tensor in matched.tensors.items():
        parameters[name].copy_(matched.load(name, tensor))
    for name in matched.zeros:
        parameters[name].zero_()
