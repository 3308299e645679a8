"""The peak memory of a training step, found by running the real one on tensors that hold no data.

`traced_peak(config, vocab_size, precision, microbatch)` builds the model under PyTorch's FakeTensorMode (shapes and
types, no numbers), runs a microbatch forward and backward beside gradients that exist, and an update, and writes down
every byte that comes and goes (`planning.ledger`). Blocks that are alike do alike: the microbatch runs through the first two
of each kind and the last one, and what they did is played back for all. `fully_traced_peak` runs everything, which takes a
minute for the largest models; tests hold one against the other.

What neither can see: the CUDA context, cuBLAS workspaces and what the allocator loses to fragments (`planning.devices`
keeps room for them), and the kernels of another device: for a GPU attention is traced as PyTorch's on a CPU, which like
the GPU's memory-efficient kernels keeps one number a row. For this machine's CPU it is traced as training chooses it there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from ekiden.config import TrainConfig
from ekiden.modeling.attention import Attention, document_boundary
from ekiden.modeling.attention_choice import choose_attention, planned_attention
from ekiden.modeling.build import blocks, body, build_model, parameter_counts
from ekiden.modeling.device import Precision, as_on_a_gpu, named_precision
from ekiden.modeling.prepare import prepare_model
from ekiden.planning.ledger import (
    BLOCK,
    HOST,
    OUTSIDE,
    Ledger,
    Span,
    Tally,
    Watch,
    for_all_blocks,
    watch_blocks,
    watch_gradients,
)
from ekiden.training import step as step_module
from ekiden.training.memory import try_step
from ekiden.training.muon import Matrix, Muon
from ekiden.training.optimizer import build_optimizer
from ekiden.training.step import accumulate_gradients, apply_update

OF_THE_UPDATE = ("optimizer", "optimizer_moments", "cpu_offload")
"""Settings that a microbatch does not see."""
OF_THE_MICROBATCH = ("activation_checkpointing", "loss_chunk_size", "document_mask")
"""Settings that an update does not see."""


@dataclass
class Peak:
    """Bytes alive at the worst moment.

    Attributes:
        total: all of them. parts: by owner: weights, gradients, optimizer (moments), and what the forward pass, the
            backward pass and the update made for themselves (activations and logits are the forward pass's).
        during: the phase of that moment. host: bytes that `cpu_offload` keeps in the host's memory instead.
        blocks, embedding: parameters. estimated: why the step could not be traced as it is; empty: it was.
    """

    total: int
    parts: dict[str, int]
    during: str
    host: int
    blocks: int
    embedding: int
    estimated: str = ""


@dataclass(frozen=True)
class Update:
    """An update of all weights: bytes that stand before it, by part, what it does, and parameters."""

    standing: dict[str, int]
    spans: list[Span]
    blocks: int
    embedding: int


def traced_peak(
    config: TrainConfig, vocab_size: int, precision: Precision, microbatch: int, on_cpu: bool = False
) -> Peak:
    """Return the peak of a step with `microbatch` samples of `config.max_length` tokens, on one device.

    A step's first microbatches need less than its last, which stands beside gradients and moments, and an evaluation
    less than a training pass, which makes gradients of the output matrix as well: neither is run.

    Args:
        on_cpu: with the kernels that training would choose on this machine's CPU, and not a GPU's.

    Raises:
        UsageError: settings of which no model can be built.
    """
    update = _update(settings_text(config, OF_THE_MICROBATCH), vocab_size)
    spans = _microbatch(settings_text(config, OF_THE_UPDATE), vocab_size, precision.name, microbatch, on_cpu)
    tally = Tally(**update.standing)
    tally.play(beside_the_one_before(spans))
    tally.play(update.spans)
    return peak_of(tally, update.blocks, update.embedding)


def beside_the_one_before(spans: list[Span]) -> list[Span]:
    """Return what a step's last microbatch does beside the loss of the one before, until it has its own, and their sum."""
    turn = max(number for number, span in enumerate(spans) if span.phase == "forward") + 1
    before, between, after = {"forward": 3, "backward": 1}, {"forward": -2}, {"forward": -1, "backward": -1}
    return [_scalars(**before), *spans[:turn], _scalars(**between), *spans[turn:], _scalars(**after)]


def meta_counts(config: TrainConfig, vocab_size: int) -> tuple[int, int]:
    """Return the parameters in the blocks, and in the embedding."""
    return _counts(settings_text(config, (*OF_THE_UPDATE, *OF_THE_MICROBATCH)), vocab_size)


@functools.lru_cache(maxsize=64)
def _counts(text: str, vocab_size: int) -> tuple[int, int]:
    return parameter_counts(meta_model(TrainConfig(**json.loads(text)), vocab_size))


def fully_traced_peak(
    config: TrainConfig, vocab_size: int, precision: Precision, microbatch: int, on_cpu: bool = False
) -> Peak:
    """Return the same with every block and every pass of `training.memory.try_step` run: slow, and what is right."""
    ledger = Ledger()
    model = meta_model(config, vocab_size)
    counts = parameter_counts(model)
    attention = attention_of(model, config, precision, on_cpu)
    with without_data(on_cpu):
        make_ready(model, config, precision, attention, on_cpu)
        optimizer = build_optimizer(model, config)
        for tensor in [*model.parameters(), *model.buffers()]:
            ledger.add(tensor, "weights")
        watch_gradients(model, ledger)
        watch_update(optimizer, ledger, config.cpu_offload)
        with phases(ledger), Watch(ledger):
            state = cast(Any, SimpleNamespace(model=model, optimizer=optimizer))
            try_step(state, precision, microbatch, config.max_length, config.loss_chunk_size)
    tally = Tally()
    tally.play(ledger.spans)
    return peak_of(tally, *counts)


def _scalars(**counts: int) -> Span:
    """Return a span in which so many scalars of a part come, or go."""
    return Span(OUTSIDE, "forward", [(-1, part, count * BLOCK) for part, count in counts.items()])


def peak_of(tally: Tally, blocks: int, embedding: int) -> Peak:
    return Peak(tally.worst, tally.worst_parts, tally.worst_phase, tally.worst_host, blocks, embedding)


def settings_text(config: TrainConfig, left_out: tuple[str, ...]) -> str:
    """Return the settings as text, the same for all that differ in nothing that is traced."""
    default = TrainConfig()
    seen = (
        "model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size "
        "sliding_window rope_scaling_factor max_length muon_even".split()
    )
    names = {*seen, *OF_THE_UPDATE, *OF_THE_MICROBATCH} - set(left_out)
    return json.dumps({name: getattr(config if name in names else default, name) for name in sorted(names)})


def run_microbatch(
    model: PreTrainedModel, config: TrainConfig, microbatch: int, precision: str, ledger: Ledger
) -> None:
    """Run one microbatch forth and back, and note what it does in `ledger.spans`."""
    # As the full step has it, which fetches a batch at the end of the one before.
    ledger.spans = [Span(OUTSIDE, "backward")]
    windows = np.zeros((microbatch, config.max_length), dtype=np.int64)
    arithmetic = named_precision(precision)
    with phases(ledger), Watch(ledger):
        accumulate_gradients(
            model, [(windows, windows)], windows.size, arithmetic, loss_chunk_size=config.loss_chunk_size
        )


@functools.lru_cache(maxsize=64)
def _microbatch(
    text: str, vocab_size: int, precision: str, microbatch: int, on_cpu: bool = False
) -> list[Span]:
    """Return what a microbatch does beside gradients that exist, for all blocks."""
    config = TrainConfig(**json.loads(text))
    ledger = Ledger()
    model = meta_model(config, vocab_size)
    attention = attention_of(model, config, named_precision(precision), on_cpu)
    like = keep_few_blocks(model)
    with without_data(on_cpu):
        make_ready(model, config, named_precision(precision), attention, on_cpu)
        stand_before(model, ledger)
        watch_gradients(model, ledger)
        watch_blocks(model, ledger)
        run_microbatch(model, config, microbatch, precision, ledger)
        return for_all_blocks(ledger.spans, like)


@functools.lru_cache(maxsize=16)
def _update(text: str, vocab_size: int) -> Update:
    """Return what an update does where there are moments already."""
    config = TrainConfig(**json.loads(text))
    model = meta_model(config, vocab_size)
    counts = parameter_counts(model)
    with without_data():
        materialise(model)
        return Update(*update_spans(model, config), *counts)


def update_spans(model: PreTrainedModel, config: TrainConfig) -> tuple[dict[str, int], list[Span]]:
    """Return what an update of this model, or of its shards, does where there are moments already: as `as_a_later_one`."""
    ledger = Ledger()
    optimizer = build_optimizer(model, config)
    stand_before(model, ledger)
    kept = watch_update(optimizer, ledger, config.cpu_offload)
    if isinstance(optimizer, Muon):
        take_stacks_once(optimizer)
    before = len(ledger.spans)
    ledger.mark(phase="backward")
    with Watch(ledger):
        apply_update(optimizer, torch.full((), torch.nan), 0.0, 1.0)
    return as_a_later_one(ledger.spans, before, kept)


def take_stacks_once(optimizer: Muon) -> None:
    """Let Muon take one stack of every size and shape, and only make the moments of others like it: they need as much."""
    update = optimizer._update
    seen: set[Any] = set()

    def once(matrices: list[Matrix], group: dict[str, Any], scale: float) -> None:
        key = matrices[0].shape, matrices[0].parts, matrices[0].transposed, len(matrices)
        if key not in seen:
            seen.add(key)
            return update(matrices, group, scale)
        for matrix in matrices:
            optimizer.state[matrix.parameter]["momentum_buffer"] = torch.zeros_like(matrix.parameter)

    optimizer._update = once  # type: ignore[method-assign]


def as_a_later_one(spans: list[Span], before: int, kept: set[int]) -> tuple[dict[str, int], list[Span]]:
    """Return what stands before an update, and the update, as if the moments `kept` by this first one had been there."""
    start = Tally()
    start.play(spans[:before])
    here = {
        number: part for span in spans for number, part, _ in span.events if number in kept
    }  # the last part counts: the optimizer's, or the host's
    sizes = {n: size for span in spans for n, _, size in span.events if n in kept and size > 0}
    for number, part in here.items():
        start.bytes[part] += sizes[number]
    later = [
        Span(span.block, span.phase, [event for event in span.events if event[0] not in kept])
        for span in spans[before:]
    ]
    return start.bytes, later


def keep_few_blocks(model: PreTrainedModel, first: int = 2, last: int = 1) -> list[int]:
    """Leave `model` the `first` blocks of each kind and the `last` of all; return for every block the number of its like.

    The first of a kind is the last in the backward pass, where what its kind shares (rotations of positions) is freed;
    the output of the last one is freed outside of all blocks.
    """
    all_blocks = blocks(model)
    settings: Any = model.config
    kinds = list(getattr(settings, "layer_types", None) or ["alike"] * len(all_blocks))
    of_kind = {kind: [n for n, other in enumerate(kinds) if other == kind] for kind in kinds}
    ends = range(max(0, len(kinds) - last), len(kinds))
    chosen = sorted({*ends, *(number for numbers in of_kind.values() for number in numbers[:first])})
    decoder: Any = body(model)
    setattr(decoder, "h" if hasattr(decoder, "h") else "layers", nn.ModuleList(all_blocks[n] for n in chosen))
    settings.num_hidden_layers = len(chosen)
    if getattr(settings, "layer_types", None):
        settings.layer_types = [kinds[number] for number in chosen]
    return [chosen.index(n if n in chosen else of_kind[kind][first - 1]) for n, kind in enumerate(kinds)]


def stand_before(model: PreTrainedModel, ledger: Ledger) -> None:
    """Count weights, and gradients of microbatches before."""
    for tensor in [*model.parameters(), *model.buffers()]:
        ledger.add(tensor, "weights")
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
        ledger.add(parameter.grad, "gradients")


def meta_model(config: TrainConfig, vocab_size: int) -> PreTrainedModel:
    with torch.device("meta"):
        model = build_model(config, vocab_size, pad_id=0, bos_id=1, eos_id=2, seed=0)
    model.tie_weights()  # transformers 5.0 leaves them untied on the meta device
    return model


def attention_of(
    model: PreTrainedModel, config: TrainConfig, precision: Precision, on_cpu: bool = False
) -> Attention:
    """Return what the layers attend with: a GPU's kernels, or those that are the right ones on this CPU, by trying them."""
    boundary = document_boundary(model.config) if config.document_mask else None
    if on_cpu:
        return choose_attention(config, torch.device("cpu"), precision, boundary)
    return planned_attention(config, boundary)


def make_ready(
    model: PreTrainedModel,
    config: TrainConfig,
    precision: Precision,
    attention: Attention,
    on_cpu: bool = False,
) -> None:
    """Give `model` memory, and make it what training makes of it on a GPU with good kernels, or on this CPU."""
    materialise(model)
    eager = dataclasses.replace(config, compile="off")
    device = torch.device("cpu" if on_cpu else "cuda")  # whose parts are put in; nothing is moved there
    prepare_model(model, eager, device, precision, attention=attention)


@contextlib.contextmanager
def without_data(on_cpu: bool = False) -> Iterator[None]:
    """Make tensors that have no data, for a GPU or this CPU; fills of new memory, no part of a step's work, are left out."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(False)
        with FakeTensorMode(allow_non_fake_inputs=True), nullcontext() if on_cpu else as_on_a_gpu():
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)


@contextlib.contextmanager
def phases(ledger: Ledger) -> Iterator[None]:
    """Mark forward and backward passes as they begin."""
    before = step_module.fault_hook
    step_module.fault_hook = lambda _index, phase: ledger.mark(phase=phase)
    try:
        yield
    finally:
        step_module.fault_hook = before


def materialise(model: PreTrainedModel) -> None:
    """Give every parameter and buffer of a model on the meta device memory of its own on the CPU, ties kept."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    model.tie_weights()


def watch_update(optimizer: torch.optim.Optimizer, ledger: Ledger, on_host: bool) -> set[int]:
    """Mark updates, and count moments as such; `on_host`: what the update makes is the host's.

    Returns:
        The numbers of the storages that moments are in, once an update has been done.
    """
    kept: set[int] = set()

    def begin(*_: Any) -> None:
        ledger.mark(phase=HOST if on_host else "update")

    def end(*_: Any) -> None:
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    kept.add(ledger.add(value, HOST if on_host else "optimizer"))
        ledger.mark(phase="forward")  # the evaluation batch comes next

    optimizer.register_step_pre_hook(begin)
    optimizer.register_step_post_hook(end)
    return kept
