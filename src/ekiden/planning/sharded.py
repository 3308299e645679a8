"""The peak of a step whose weights are divided among the GPUs of a machine (`parallel: fsdp`), on one of them.

Traced like `planning.trace`, as the first rank of a process group that sends nothing: `training.sharding` divides the
model, and what FSDP gathers, frees and reduces is written down as it does it. What it cannot see: that on a GPU the next
block is gathered while one is computed, which takes up to one block's weights more.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
from transformers import PreTrainedModel

from ekiden.config import TrainConfig
from ekiden.modeling.build import parameter_counts
from ekiden.modeling.device import Precision, named_precision
from ekiden.planning.ledger import OUTSIDE, Ledger, Span, Tally, Watch, for_all_blocks, watch_blocks
from ekiden.planning.trace import (
    OF_THE_MICROBATCH,
    OF_THE_UPDATE,
    Peak,
    Update,
    keep_few_blocks,
    make_ready,
    materialise,
    meta_model,
    peak_of,
    phases,
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
    tally = Tally(**{**update.standing, "gradients": 0})
    tally.play(_microbatches(text, vocab_size, precision.name, microbatch, world))
    tally.bytes["gradients"] = update.standing["gradients"]
    tally.play(update.spans)
    return peak_of(tally, update.blocks, update.embedding)


@functools.lru_cache(maxsize=64)
def _microbatches(text: str, vocab_size: int, precision: str, microbatch: int, world: int) -> list[Span]:
    """Return what two microbatches do, the second beside the first one's gradients, for all blocks."""
    config = TrainConfig(**json.loads(text))
    model = meta_model(config, vocab_size)
    like = keep_few_blocks(model, first=4, last=3)  # what a block gathers is freed while the next ones run
    ledger = Ledger()
    with _one_of(world) as mesh, without_data():
        make_ready(model, config, named_precision(precision))
        shard_model(model, mesh, named_precision(precision))
        for tensor in [*model.parameters(), *model.buffers()]:
            ledger.add(tensor, "weights")
        watch_blocks(model, ledger)
        ledger.spans = [Span(OUTSIDE, "backward")]
        windows = np.zeros((microbatch, config.max_length), dtype=np.int64)
        with phases(ledger), Watch(ledger), _resizes(ledger):
            accumulate_gradients(
                model,
                [(windows, windows)] * 2,
                2 * windows.size,
                named_precision(precision),
                loss_chunk_size=config.loss_chunk_size,
                after=lambda _loss: _count_gradients(model, ledger),
            )
        return for_all_blocks(ledger.spans, like)


def _count_gradients(model: PreTrainedModel, ledger: Ledger) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        ledger.add(parameter.grad, "gradients")


@functools.lru_cache(maxsize=16)
def _update(text: str, vocab_size: int, world: int) -> Update:
    """Return what an update of all shards does where there are moments already."""
    config = TrainConfig(**json.loads(text))
    model = meta_model(config, vocab_size)
    counts = parameter_counts(model)
    with _one_of(world) as mesh, without_data():
        materialise(model)
        shard_model(model, mesh, named_precision("fp32"))
        return Update(*update_spans(model, config), *counts)


@contextlib.contextmanager
def _one_of(world: int) -> Iterator[DeviceMesh]:
    """Be the first of `world` ranks in a group that sends nothing.

    FSDP's own exchanges are left out: torch 2.10 has none of them for tensors without data.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the group of that kind

    exchanges = {name: getattr(dist, name) for name in ("all_gather_into_tensor", "reduce_scatter_tensor")}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        for name in exchanges:
            setattr(dist, name, lambda *_args, **_settings: None)
        yield init_device_mesh("cpu", (world,))
    finally:
        for name, exchange in exchanges.items():
            setattr(dist, name, exchange)
        dist.destroy_process_group()


@contextlib.contextmanager
def _resizes(ledger: Ledger) -> Iterator[None]:
    """Count what FSDP gathers into, which it keeps and makes large or empty."""
    made, emptied = _fsdp_param.alloc_storage, _fsdp_param.free_storage

    def alloc(tensor: Any) -> None:
        made(tensor)
        ledger.resize(tensor)

    def free(tensor: Any) -> None:
        emptied(tensor)
        ledger.resize(tensor)

    try:
        _fsdp_param.alloc_storage = _fsdp_param_group.alloc_storage = alloc
        _fsdp_param.free_storage = free
        yield
    finally:
        _fsdp_param.alloc_storage = _fsdp_param_group.alloc_storage = made
        _fsdp_param.free_storage = emptied
