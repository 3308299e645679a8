"""The moments of another program's Adam, put to the parameters that they belong to.

torch's optimizers number parameters in the order they were given, and keep no names unless asked. `foreign.take_foreign`
knows the order of the weights; the orders that training scripts use are tried, and one is believed only where every
shape agrees. Otherwise nothing is taken, and the reason is told.
"""

from __future__ import annotations

from typing import Any

import torch

from ekiden.checkpoint.lazy import LazyTensor
from ekiden.training.foreign_weights import Matched
from ekiden.training.muon import Muon
from ekiden.training.state import TrainingState

_MOMENTS = ("exp_avg", "exp_avg_sq")


def take_optimizer(tree: Any, matched: Matched, state: TrainingState) -> str | None:
    """Put the Adam moments in `tree` into the optimizer of `state`; return why not, or None where they were taken."""
    saved = _find(tree, 3)
    if saved is None:
        return "no optimizer was found, so its moments begin at zero"
    nothing = "the optimizer's moments begin at zero: "
    if state.config.optimizer_moments != "fp32":
        return nothing + f"--optimizer-moments {state.config.optimizer_moments} keeps them in another form"
    if matched.zeros:
        return nothing + "its model has no biases"
    try:
        entries = {int(index): entry for index, entry in saved["state"].items()}
        groups = [[int(index) for index in group["params"]] for group in saved["param_groups"]]
    except (KeyError, TypeError, ValueError, AttributeError):
        return nothing + "its form is not that of torch.optim"
    if any(not isinstance(e, dict) or not {"step", *_MOMENTS} <= e.keys() for e in entries.values()):
        return nothing + "it is not Adam's or AdamW's"
    order = _order(saved["param_groups"], groups, matched)
    indices = [index for group in groups for index in group]
    if order is None or len(order) != len(indices) or set(entries) != set(indices):
        return nothing + f"its {len(indices)} parameters cannot be told apart by order"
    by_name = {name: entries[index] for name, index in zip(order, indices)}
    for name, entry in by_name.items():
        for key in _MOMENTS:
            moment = entry[key]
            if not isinstance(moment, LazyTensor) or moment.shape != matched.tensors[name].shape:
                return nothing + f"{key} of {name} has another shape than its weight"
    _fill(by_name, matched, state)
    return None


def _find(tree: Any, depth: int) -> dict[str, Any] | None:
    """Return the first dict with `state` and `param_groups`."""
    if not isinstance(tree, dict):
        return None
    if isinstance(tree.get("state"), dict) and isinstance(tree.get("param_groups"), list):
        return tree
    if depth:
        for value in tree.values():
            if (found := _find(value, depth - 1)) is not None:
                return found
    return None


def _order(groups: list[dict[str, Any]], indices: list[list[int]], matched: Matched) -> list[str] | None:
    """Return our names in the order of the optimizer's parameters.

    Either the names are there (torch keeps them where it was given named parameters), or there is one group in the
    model's order, or two: matrices with weight decay, and vectors without.
    """
    names = list(matched.tensors)
    if all(isinstance(group.get("param_names"), list) for group in groups):
        given = [matched.names.get(name) for group in groups for name in group["param_names"]]
        known = [name for name in given if name in matched.tensors]
        return known if len(set(known)) == len(given) else None
    if len(groups) == 1:
        return names
    matrices = [name for name in names if len(matched.tensors[name].shape) >= 2]
    vectors = [name for name in names if len(matched.tensors[name].shape) < 2]
    lengths = [len(group) for group in indices]
    if lengths == [len(matrices), len(vectors)] and len(matrices) != len(vectors):
        return matrices + vectors
    if lengths == [len(vectors), len(matrices)] and len(matrices) != len(vectors):
        return vectors + matrices
    # Equal in number: the shapes, compared by the caller, tell which comes first.
    return matrices + vectors if lengths == [len(matrices), len(vectors)] else None


@torch.no_grad()
def _fill(by_name: dict[str, dict[str, Any]], matched: Matched, state: TrainingState) -> None:
    parameters = dict(state.model.named_parameters())
    matrices = state.optimizer.matrices if isinstance(state.optimizer, Muon) else []
    muon = {id(matrix.parameter) for matrix in matrices}
    state.optimizer.state.clear()
    for name, entry in by_name.items():
        parameter = parameters[name]
        step = entry["step"].load().item() if isinstance(entry["step"], LazyTensor) else entry["step"]
        kept: dict[str, torch.Tensor] = {
            # AdamW's fused kernel keeps `step` on the parameter's device in fp32.
            "step": torch.tensor(float(step), dtype=torch.float32, device=parameter.device)
        }
        for key in _MOMENTS:
            moment = matched.load(name, entry[key])
            kept[key] = torch.empty_like(parameter).copy_(moment)
        if id(parameter) in muon:
            # An average of gradients like Adam's first moment; its length does not matter to Muon.
            kept = {"momentum_buffer": kept["exp_avg"]}
        state.optimizer.state[parameter] = kept
