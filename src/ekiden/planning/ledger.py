"""Every byte that comes and goes while a step runs on tensors without data, and the worst moment of what was written down.

`planning.trace` runs a step under `Watch`; the `Ledger` writes down every storage that is allocated or freed, whose it is
and in which block of the model that happened. A `Tally` plays such events back, each block's as often as the model has
blocks like it, and keeps the worst moment.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ekiden.modeling.build import blocks, body
from ekiden.training.matrix_exchange import local

BLOCK = 512
"""Bytes that CUDA's caching allocator rounds every tensor up to."""
PARTS = ("weights", "gradients", "optimizer", "forward", "backward", "update")
HOST = "host"
OUTSIDE = -1
"""In no block of the model."""

Event = tuple[int, str, int]
"""(number of the storage, part, bytes that came or, negative, went)."""


@dataclass
class Span:
    """What happened between two marks: in `block` (its number, or OUTSIDE), in a phase of the step."""

    block: int
    phase: str
    events: list[Event] = field(default_factory=list)


@dataclass
class Ledger:
    """Every living storage by part, and all that happened so far.

    Attributes:
        living: (number, bytes, part) of each storage, by its address. spans: in order of time.
    """

    living: dict[int, tuple[int, int, str]] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=lambda: [Span(OUTSIDE, "forward")])
    _count: int = 0
    _references: dict[int, Any] = field(default_factory=dict)

    def mark(self, block: int | None = None, phase: str | None = None) -> None:
        """Begin a span; what is not given stays."""
        last = self.spans[-1]
        self.spans.append(
            Span(last.block if block is None else block, last.phase if phase is None else phase)
        )

    @property
    def phase(self) -> str:
        """What the step is doing."""
        return self.spans[-1].phase

    def add(self, tensor: torch.Tensor, part: str) -> int:
        """Count the storage of `tensor`, once, as `part`'s; a known one changes hands. Return its number.

        Of a tensor in shards, what is here.
        """
        storage = local(tensor).untyped_storage()
        key = storage._cdata
        events = self.spans[-1].events
        if key in self.living:
            number, size, before = self.living[key]
            events.append((number, before, -size))
        else:
            number = self._count = self._count + 1
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            self._references[key] = weakref.ref(storage, lambda _reference: self._remove(key))
        self.living[key] = number, size, part
        events.append((number, part, size))
        return number

    def resize(self, storage: torch.UntypedStorage) -> None:
        """Count anew a storage that was made larger or smaller where it lies, as FSDP does."""
        if storage._cdata not in self.living:
            return
        number, before, part = self.living[storage._cdata]
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        if size != before:
            self.living[storage._cdata] = number, size, part
            self.spans[-1].events.append((number, part, size - before))

    def _remove(self, key: int) -> None:
        number, size, part = self.living.pop(key)
        self.spans[-1].events.append((number, part, -size))
        del self._references[key]


class Watch(TorchDispatchMode):
    """Hands every new storage that an operation returns to the ledger, as the phase's."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in (result,) if isinstance(result, torch.Tensor) else tree_iter(result):
            if (
                isinstance(value, torch.Tensor)
                and local(value).untyped_storage()._cdata not in self.ledger.living
            ):
                self.ledger.add(value, self.ledger.phase)
        return result


def watch_blocks(model: nn.Module, ledger: Ledger) -> None:
    """Mark where the forward and the backward pass of every block begin, and where those of the last one end.

    What is computed again in a backward pass (activation checkpointing) stays in the block whose backward pass it is.
    """

    def begin(number: int) -> Callable[..., None]:
        def hook(_block: nn.Module, inputs: tuple[Any, ...]) -> None:
            if ledger.phase != "forward":
                return
            if number == 0 and inputs[0].requires_grad:
                inputs[0].register_hook(lambda _gradient: ledger.mark(OUTSIDE))
            ledger.mark(number)

        return hook

    def end(number: int) -> Callable[..., None]:
        def hook(_block: nn.Module, _inputs: Any, output: Any) -> None:
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            if ledger.phase == "forward" and hidden.requires_grad:
                hidden.register_hook(lambda _gradient: ledger.mark(number))

        return hook

    for number, block in enumerate(blocks(model)):
        block.register_forward_pre_hook(begin(number))
        block.register_forward_hook(end(number))
    decoder: Any = body(model)
    norm = decoder.ln_f if hasattr(decoder, "ln_f") else decoder.norm
    # A block's own span goes on to here: its input is let go of when its output has taken its place.
    norm.register_forward_pre_hook(lambda *_: ledger.mark(OUTSIDE) if ledger.phase == "forward" else None)


def watch_gradients(model: nn.Module, ledger: Ledger) -> None:
    """Count gradients as such as they come."""

    def made(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        ledger.add(parameter.grad, "gradients")

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(made)


class Tally:
    """Bytes by part, and the worst moment so far.

    Attributes:
        bytes: now. worst, worst_parts, worst_phase: at the moment with the most on the device. worst_host: most on the host.
    """

    def __init__(self, **start: int) -> None:
        self.bytes = {**dict.fromkeys((*PARTS, HOST), 0), **start}
        self.worst, self.worst_host, self.worst_phase = 0, 0, ""
        self.worst_parts: dict[str, int] = {}

    def play(self, spans: Iterable[Span]) -> None:
        """Let the events of `spans` happen, one after another."""
        now = self.bytes
        total = sum(now[part] for part in PARTS)
        for span in spans:
            for _, part, size in span.events:
                now[part] += size
                if part == HOST:
                    self.worst_host = max(self.worst_host, now[HOST])
                    continue
                total += size
                if total > self.worst:
                    self.worst, self.worst_phase = total, span.phase
                    self.worst_parts = {name: now[name] for name in PARTS}


def for_all_blocks(spans: list[Span], like: list[int]) -> list[Span]:
    """Return the spans of a step with few blocks as those of one with many.

    What a block leaves to be freed outside of all blocks (weights in half precision, where nothing else keeps them) is
    freed there for all blocks like it.

    Args:
        like: for every block of the large model, the number of the one in the small model that does the same.
    """
    born: dict[int, int] = {}
    for span in spans:
        for number, _, size in span.events:
            if size > 0:
                born.setdefault(number, span.block)
    times = {OUTSIDE: 1, **{block: like.count(block) for block in like}}
    made: list[Span] = []
    passing: list[Span] = []
    for span in [*spans, Span(OUTSIDE, "")]:
        if span.block == OUTSIDE or (passing and passing[-1].phase != span.phase):
            made += _repeated(passing, like)
            passing = []
        if span.block != OUTSIDE:
            passing.append(span)
            continue
        events = [(n, part, size * times[born.get(n, OUTSIDE)]) for n, part, size in span.events]
        made.append(Span(span.block, span.phase, events))
    return made


def _repeated(passing: list[Span], like: list[int]) -> list[Span]:
    """Return one pass through the blocks, up or down, with all of the large model's."""
    if not passing:
        return []
    down = passing[0].block > passing[-1].block
    of = {block: [span for span in passing if span.block == block] for block in {s.block for s in passing}}
    return [span for block in (reversed(like) if down else like) for span in of[block]]
