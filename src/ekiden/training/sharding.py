"""A model in shards: each rank keeps a part of every weight, gradient and moment (FSDP2, `fully_shard`).

`training.start` restores a state whole, on the CPU, and hands it over here; after that weights are DTensors, gathered
block by block while a pass needs them. Checkpoints are whole again (`training.state` gathers one tensor at a time on the
main rank), so that they load on any number of ranks, and as a Hugging Face folder.

Over several machines the shards are of one machine and the machines hold copies: the slow network then carries each
gradient once, and no weights.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import distribute_tensor
from torch.nn import functional as F

from ekiden.config import TrainConfig
from ekiden.errors import UserError
from ekiden.modeling.build import blocks
from ekiden.modeling.device import Precision
from ekiden.modeling.loss import IGNORE
from ekiden.tokens.batches import Microbatch
from ekiden.training.optimizer import build_optimizer
from ekiden.training.ranks import Ranks
from ekiden.training.state import TrainingState

STATE_BYTES = 16
"""fp32 weight, gradient and AdamW's two moments, a parameter."""
STATE_SHARE = 0.7
"""Of a GPU's memory that whole copies of them may take; the rest is for activations."""


def wants_shards(config: TrainConfig, ranks: Ranks, parameters: int, device: torch.device) -> bool:
    """Return whether weights are sharded (FSDP) and not copied (DDP): as set, and by `auto` where copies do not fit.

    Raises:
        UserError: FSDP with what it cannot do.
    """
    if ranks.world == 1:
        return False
    if config.parallel == "auto":
        if device.type != "cuda":
            return False
        return is_divided_by_itself(config, parameters, torch.cuda.get_device_properties(device).total_memory)
    if config.parallel == "ddp":
        return False
    if config.optimizer_moments != "fp32" or config.cpu_offload:
        raise UserError(
            "--parallel fsdp divides fp32 moments among the GPUs; leave out --optimizer-moments and --cpu-offload, or give "
            "--parallel ddp"
        )
    if config.elastic_exact:
        raise UserError("--elastic-exact sums whole gradients; give --parallel ddp")
    return True


def is_divided_by_itself(config: TrainConfig, parameters: int, memory: int) -> bool:
    """Return whether `parallel: auto` shards a model on several GPUs of `memory` bytes each."""
    compact = config.optimizer_moments != "fp32" or config.cpu_offload
    if config.elastic_exact or compact:
        return False
    return STATE_BYTES * parameters > STATE_SHARE * memory


def shard_state(state: TrainingState, ranks: Ranks, device: torch.device, precision: Precision) -> None:
    """Replace the whole model and moments in `state` by shards of them.

    Args:
        state: on the CPU, the same on all ranks; moments are on the main one.
    """
    moments = [
        [name, key, list(value.shape), str(value.dtype).removeprefix("torch.")]
        for name, parameter in state.model.named_parameters()
        for key, value in state.optimizer.state.get(parameter, {}).items()
    ]
    held = {name: state.optimizer.state.get(p, {}) for name, p in state.model.named_parameters()}
    shard_model(state.model, _mesh(ranks, device), precision)
    state.optimizer = build_optimizer(state.model, state.config)
    parameters: dict[str, Any] = dict(state.model.named_parameters())
    for name, key, shape, dtype in ranks.from_main(moments):
        whole = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        if ranks.main:
            whole.copy_(held[name].pop(key))
        ranks.copy_from_main(whole)
        parameter = parameters[name]
        if shape == list(parameter.shape):
            # Every rank has all of it and keeps its part: nothing more is sent.
            whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        state.optimizer.state[parameter][key] = whole
    state.sharded, state.keeps = True, ranks.main


def _mesh(ranks: Ranks, device: torch.device) -> DeviceMesh:
    machines, rest = divmod(ranks.world, ranks.local_world)
    if machines > 1 and rest == 0 and ranks.local_world > 1:
        names = ("copies", "shards")
        return init_device_mesh(device.type, (machines, ranks.local_world), mesh_dim_names=names)
    return init_device_mesh(device.type, (ranks.world,))


def shard_model(model: nn.Module, mesh: DeviceMesh, precision: Precision) -> None:
    """Shard `model` by block; its forward pass is then entered by `modeling.build.inside_forward`.

    Blocks gather their weights in the precision of the products, as autocast would take them to it; the embedding stays
    fp32, for it makes the residual stream, and fp16 would overflow there. Gradients are summed in fp32.
    """
    half = precision.dtype if precision.dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks(model):
        if half is not None:
            _norms_in_fp32(block)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the tokens of the global batch already: gradients are summed, not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def inside_forward(_model: nn.Module, work: Callable[..., Any], *arguments: Any) -> Any:
        return work(*arguments)

    model.inside_forward = types.MethodType(inside_forward, model)  # type: ignore[assignment]
    register_fsdp_forward_method(model, "inside_forward")


def _norms_in_fp32(block: nn.Module) -> None:
    """Let the layer norms of `block` take gathered weights to fp32, which autocast does on a GPU alone."""
    for norm in block.modules():
        if isinstance(norm, nn.LayerNorm):
            norm.forward = types.MethodType(_layer_norm, norm)  # type: ignore[method-assign]


def _layer_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)


def filled_up(microbatches: Iterator[Microbatch], count: int) -> Iterator[Microbatch]:
    """Yield `count` microbatches, at the end ones that count nothing: all ranks gather weights equally often."""
    for inputs, targets in microbatches:
        yield inputs, targets
        count -= 1
    for _ in range(count):
        yield inputs, np.full_like(inputs, IGNORE)


def gather_back(model: nn.Module) -> None:
    """Free what a pass without a backward one left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
