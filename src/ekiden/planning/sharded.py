"""The peak of a step whose weights are divided among the GPUs of a machine (`parallel: fsdp`), on one of them.

Traced like `planning.trace`, as the first rank of a process group that sends nothing: `training.sharding` divides the
model, and what FSDP gathers, frees and reduces is written down as it does it. Blocks gather and free beside their
neighbours, so the first three of each kind and the last two are run. What it cannot see: that on a GPU the next
block is gathered while one is computed, which takes up to one block's weights more.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from ekiden.config import TrainConfig
from ekiden.modeling.build import blocks, parameter_counts
from ekiden.modeling.device import Precision, named_precision
from ekiden.planning.ledger import (
    BLOCK,
    Ledger,
    Span,
    Tally,
    Watch,
    for_all_blocks,
    watch_blocks,
)
from ekiden.planning.trace import (
    OF_THE_MICROBATCH,
    OF_THE_UPDATE,
    Peak,
    Update,
    attention_of,
    beside_the_one_before,
    keep_few_blocks,
    make_ready,
    materialise,
    meta_model,
    peak_of,
    phases,
    run_microbatch,
    settings_text,
    update_spans,
    without_data,
)
from ekiden.training.sharding import shard_model
from ekiden.training.step import accumulate_gradients


def sharded_peak(
    config: TrainConfig, vocab_size: int, precision: Precision, microbatch: int, world: int
) -> Peak:
    """Return the peak of a step on one of `world` GPUs, which hold a part of every weight, gradient and moment each.

    Raises:
        UsageError: settings of which no model can be built.
    """
    update = _update(settings_text(config, OF_THE_MICROBATCH), vocab_size, world)
    text = settings_text(config, OF_THE_UPDATE)
    spans = _microbatch(text, vocab_size, precision.name, microbatch, world)
    summed = sum(_bytes_of_gradients(group, world) for group in _groups(meta_model(config, vocab_size)))
    tally = Tally(**{**update.standing, "gradients": summed})
    tally.play(beside_the_one_before(spans))
    tally.bytes["gradients"] = update.standing["gradients"]
    tally.play(update.spans)
    return peak_of(tally, update.blocks, update.embedding)


def fully_sharded_peak(
    config: TrainConfig, vocab_size: int, precision: Precision, microbatch: int, world: int
) -> Peak:
    """Return the same with every block, FSDP's own division and two microbatches run: slow, and what is right."""
    model, again = meta_model(config, vocab_size), meta_model(config, vocab_size)
    counts = parameter_counts(model)
    ledger = Ledger()
    with _one_of(world) as mesh, without_data():
        make_ready(model, config, precision, attention_of(model, config, precision))
        shard_model(model, mesh, precision)
        for tensor in [*model.parameters(), *model.buffers()]:
            ledger.add(tensor, "weights")
        windows = np.zeros((microbatch, config.max_length), dtype=np.int64)
        with phases(ledger), Watch(ledger), _resizes(ledger):
            accumulate_gradients(
                model,
                [(windows, windows)] * 2,
                2 * windows.size,
                precision,
                loss_chunk_size=config.loss_chunk_size,
                after=lambda _loss: _count_gradients(model, ledger),
            )
        materialise(again)
        shard_model(again, mesh, named_precision("fp32"))
        update = Update(*update_spans(again, config), *counts)
    of_an_update_before = 2 * BLOCK  # whether it was skipped, and why
    tally = Tally(optimizer=update.standing["optimizer"], backward=of_an_update_before)
    tally.play(ledger.spans)
    tally.bytes |= {"gradients": update.standing["gradients"], "forward": 0, "backward": 0}
    tally.play(update.spans)
    return peak_of(tally, *counts)


def _count_gradients(model: PreTrainedModel, ledger: Ledger) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        ledger.add(parameter.grad, "gradients")


@functools.lru_cache(maxsize=64)
def _microbatch(text: str, vocab_size: int, precision: str, microbatch: int, world: int) -> list[Span]:
    """Return what a microbatch does beside gradients that exist, for all blocks."""
    config = TrainConfig(**json.loads(text))
    model = meta_model(config, vocab_size)
    like = keep_few_blocks(model, first=3, last=2)
    ledger = Ledger()
    with _one_of(world) as mesh, without_data():
        arithmetic = named_precision(precision)
        make_ready(model, config, arithmetic, attention_of(model, config, arithmetic))
        shard_model(model, mesh, named_precision(precision))
        for tensor in [*model.parameters(), *model.buffers()]:
            ledger.add(tensor, "weights")
        for group in _groups(model):
            _give_gradients(group, world, ledger)
        watch_blocks(model, ledger)
        with _resizes(ledger):
            run_microbatch(model, config, microbatch, precision, ledger)
        return for_all_blocks(ledger.spans, like)


@functools.lru_cache(maxsize=16)
def _update(text: str, vocab_size: int, world: int) -> Update:
    """Return what an update of all shards does where there are moments already."""
    config = TrainConfig(**json.loads(text))
    model = meta_model(config, vocab_size)
    counts = parameter_counts(model)
    with _one_of(world) as mesh, without_data():
        _divide(model, mesh)
        with _short_lists():
            return Update(*update_spans(model, config), *counts)


# -- shards without FSDP ------------------------------------------------------------------------------------------


def _groups(model: PreTrainedModel) -> list[list[nn.Parameter]]:
    """Return the parameters that FSDP gathers and reduces together: a block's, and those in none."""
    within = [list(block.parameters()) for block in blocks(model)]
    seen = {id(parameter) for group in within for parameter in group}
    return [*within, [parameter for parameter in model.parameters() if id(parameter) not in seen]]


def _elements(parameter: torch.Tensor, world: int) -> int:
    """Return the numbers of a rank's part of `parameter`, which is cut along its rows into equal parts, the last filled up."""
    rows = parameter.shape[0]
    return -(-rows // world) * (parameter.numel() // rows)


def _bytes_of_gradients(group: list[nn.Parameter], world: int) -> int:
    """Return the bytes of a group's gradients on a rank, which lie side by side as they were reduced."""
    return -(-4 * sum(_elements(parameter, world) for parameter in group) // BLOCK) * BLOCK


def _part(memory: torch.Tensor, like: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    """Return the first rank's part, in `memory`, of a tensor as `like`."""
    rows = min(like.shape[0], -(-like.shape[0] // mesh.size()))
    here = memory[: rows * (like.numel() // like.shape[0])].view(rows, *like.shape[1:])
    return DTensor.from_local(here, mesh, [Shard(0)], run_check=False, shape=like.shape, stride=like.stride())


def _give_gradients(group: list[nn.Parameter], world: int, ledger: Ledger) -> None:
    """Let a group in shards have the gradients of a microbatch before."""
    sizes = [_elements(parameter, world) for parameter in group]
    for parameter, memory in zip(group, torch.empty(sum(sizes)).split(sizes)):
        assert isinstance(parameter, DTensor)
        parameter.grad = _part(memory, parameter, parameter.device_mesh)
        ledger.add(parameter.grad, "gradients")


def _divide(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Replace what a model on the meta device has by shards: what `shard_model` leaves of it, twenty times as fast."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in made:
                    memory = torch.empty(_elements(parameter, mesh.size()), dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(_part(memory, parameter, mesh))
                module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@contextlib.contextmanager
def _short_lists(most: int = 16) -> Iterator[None]:
    """Let what is done to lists of tensors be done to `most` at a time.

    It makes and frees the same, and DTensor thinks about a list for a time that grows with the square of its length: of
    an update of 442 weights that was two thirds.
    """

    def in_pieces(real: Any) -> Any:
        def work(*arguments: Any, **settings: Any) -> Any:
            count = len(arguments[0])

            def piece(value: Any, first: int) -> Any:
                listed = isinstance(value, (list, tuple)) and len(value) == count
                return value[first : first + most] if listed else value

            made = [
                real(
                    *(piece(value, first) for value in arguments),
                    **{name: piece(value, first) for name, value in settings.items()},
                )
                for first in range(0, count, most)
            ]
            return None if made[0] is None else [tensor for part in made for tensor in part]

        return work

    names = [name for name in ("_foreach_norm", "_foreach_mul_", "_fused_adamw_") if hasattr(torch, name)]
    before = {name: getattr(torch, name) for name in names}
    try:
        for name, real in before.items():
            setattr(torch, name, in_pieces(real))
        yield
    finally:
        for name, real in before.items():
            setattr(torch, name, real)


# -- a group that sends nothing -----------------------------------------------------------------------------------


class _Sent(dist.Work):
    """An exchange that is over."""

    def wait(self, timeout: Any = None) -> bool:
        return True


class _Silent(dist.ProcessGroup):
    """A rank whose exchanges do nothing at once."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._called = ""

    def getBackendName(self) -> str:
        return SILENT

    def getGroupName(self) -> str:
        return self._called

    def setGroupName(self, name: str) -> None:
        self._called = name

    group_name = property(getGroupName)  # type: ignore[assignment]

    def _set_group_name(self, name: str) -> None:
        self._called = name

    def _exchange(self, *_arguments: Any, **_options: Any) -> dist.Work:
        return _Sent()

    allreduce = _allgather_base = _reduce_scatter_base = alltoall_base = _exchange  # type: ignore[assignment]


SILENT = "ekiden_silent"


def _silent(_store: dist.Store, rank: int, size: int, _timeout: Any) -> dist.ProcessGroup:
    return _Silent(rank, size)


@contextlib.contextmanager
def _one_of(world: int) -> Iterator[DeviceMesh]:
    """Be the first of `world` ranks in a group that sends nothing."""
    if not hasattr(dist.Backend, SILENT.upper()):
        dist.Backend.register_backend(SILENT, _silent, devices=["cpu"])
    dist.init_process_group(SILENT, store=dist.HashStore(), rank=0, world_size=world)
    try:
        yield init_device_mesh("cpu", (world,))
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _resizes(ledger: Ledger) -> Iterator[None]:
    """Count what is made larger or smaller where it lies: what FSDP gathers into, which it keeps, full or empty."""
    resize = torch.UntypedStorage.resize_

    def counted(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        ledger.resize(storage)
        return result

    torch.UntypedStorage.resize_ = counted  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
