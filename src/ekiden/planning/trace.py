"""The peak memory of a training step, found by running the real one on tensors that hold no data.

`traced_peak(config, vocab_size, precision, microbatch)` builds the model and its optimizer under PyTorch's
FakeTensorMode (shapes and types, no numbers), does `training.memory.try_step`, which is two microbatches, the update
and an evaluation batch, and counts every byte that was alive at the worst moment, and whose it was.

What it cannot see: the CUDA context, cuBLAS workspaces and what the allocator loses to fragments (`planning.devices`
keeps room for them), and the kernels of another device: attention is traced as the CPU's, which like the GPU's
memory-efficient kernels keeps one number a row.
"""

from __future__ import annotations

import dataclasses
import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ekiden.config import TrainConfig
from ekiden.modeling.attention import document_boundary, planned_attention
from ekiden.modeling.build import build_model, parameter_counts
from ekiden.modeling.device import Precision
from ekiden.modeling.prepare import prepare_model
from ekiden.training import step as step_module
from ekiden.training.memory import try_step
from ekiden.training.optimizer import build_optimizer

BLOCK = 512
"""Bytes that CUDA's caching allocator rounds every tensor up to."""
PARTS = ("weights", "gradients", "optimizer", "forward", "backward", "update")
HOST = "host"


@dataclass
class Peak:
    """Bytes alive at the worst moment.

    Attributes:
        total: all of them. parts: by owner: weights, gradients, optimizer (moments), and what the forward pass, the
            backward pass and the update made for themselves (activations and logits are the forward pass's).
        during: the phase of that moment. host: bytes that `cpu_offload` keeps in the host's memory instead.
        blocks, embedding: parameters.
    """

    total: int
    parts: dict[str, int]
    during: str
    host: int
    blocks: int
    embedding: int


@dataclass
class _Ledger:
    """Running bytes of every living storage by part, and the worst moment so far."""

    living: dict[int, tuple[int, str]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*PARTS, HOST), 0))
    phase: str = "forward"
    worst: int = 0
    worst_host: int = 0
    worst_parts: dict[str, int] = field(default_factory=dict)
    worst_phase: str = ""
    references: dict[int, Any] = field(default_factory=dict)

    def add(self, tensor: torch.Tensor, part: str) -> None:
        """Count the storage of `tensor`, once, as `part`'s; a known one changes hands."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self.living.get(key)
        if known is None:
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            self.references[key] = weakref.ref(storage, lambda _reference: self.remove(key))
        else:
            size = known[0]
            self.bytes[known[1]] -= size
        self.living[key] = size, part
        self.bytes[part] += size
        total = sum(self.bytes[name] for name in PARTS)
        self.worst_host = max(self.worst_host, self.bytes[HOST])
        if total > self.worst:
            self.worst, self.worst_phase = total, self.phase
            self.worst_parts = {name: self.bytes[name] for name in PARTS}

    def remove(self, key: int) -> None:
        """Forget a storage that was freed."""
        size, part = self.living.pop(key)
        self.bytes[part] -= size
        del self.references[key]


class _Watch(TorchDispatchMode):
    """Hands every new storage that an operation returns to the ledger."""

    def __init__(self, ledger: _Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata not in self.ledger.living:
                self.ledger.add(value, self.ledger.phase)
        return result


def traced_peak(config: TrainConfig, vocab_size: int, precision: Precision, microbatch: int) -> Peak:
    """Return the peak of a step with `microbatch` samples of `config.max_length` tokens, on one device.

    Raises:
        UsageError: settings of which no model can be built.
    """
    with torch.device("meta"):
        model = build_model(config, vocab_size, pad_id=0, bos_id=1, eos_id=2, seed=0)
    blocks, embedding = parameter_counts(model)
    ledger = _Ledger()
    deterministic = torch.are_deterministic_algorithms_enabled()
    hook_before = step_module.fault_hook
    try:
        torch.use_deterministic_algorithms(False)  # its fills of new memory are no part of a step's work
        with FakeTensorMode(allow_non_fake_inputs=True):
            materialise(model)
            eager = dataclasses.replace(config, compile="off")
            boundary = document_boundary(model.config) if config.document_mask else None
            attention = planned_attention(config, boundary)
            prepare_model(model, eager, torch.device("cpu"), precision, attention=attention)
            optimizer = build_optimizer(model, config)
            watch_parts(model, optimizer, ledger, config.cpu_offload)
            step_module.fault_hook = lambda _index, phase: setattr(ledger, "phase", phase)
            with _Watch(ledger):
                state = cast(Any, SimpleNamespace(model=model, optimizer=optimizer))
                try_step(state, precision, microbatch, config.max_length, config.loss_chunk_size)
    finally:
        step_module.fault_hook = hook_before
        torch.use_deterministic_algorithms(deterministic)
    return Peak(ledger.worst, ledger.worst_parts, ledger.worst_phase, ledger.worst_host, blocks, embedding)


def materialise(model: nn.Module) -> None:
    """Give every parameter and buffer of a model on the meta device memory of its own on the CPU, ties kept."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    model.tie_weights()  # type: ignore[operator]


def watch_parts(model: nn.Module, optimizer: torch.optim.Optimizer, ledger: _Ledger, on_host: bool) -> None:
    """Count the weights now, gradients and moments as they come; `on_host`: what the update makes is the host's."""
    for tensor in [*model.parameters(), *model.buffers()]:
        ledger.add(tensor, "weights")

    def gradient_made(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        ledger.add(parameter.grad, "gradients")

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(gradient_made)

    def begin_update(*_: Any) -> None:
        ledger.phase = HOST if on_host else "update"

    def end_update(*_: Any) -> None:
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    ledger.add(value, HOST if on_host else "optimizer")
        ledger.phase = "forward"  # the evaluation batch comes next

    optimizer.register_step_pre_hook(begin_update)
    optimizer.register_step_post_hook(end_update)
