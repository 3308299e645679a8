"""Cross-entropy from hidden states, without the logits ever existing as a whole.

The logits of 4,096 tokens over 262,144 pieces are 4.3 GB in fp32, more than most of the model. Here they exist for
some rows at a time. Where the range of numbers allows (fp32, bf16) the gradient is made beside the loss, in the
forward pass, and multiplied by the upstream gradient in the backward one: three products with the head, as many as
plain cross-entropy has. fp16 has not the range: probabilities below 6e-8 vanish unless they are scaled first, and a
GradScaler's factor is known only in the backward pass, so there the logits are computed a second time. On a CPU without
instructions for a half-precision type the inputs are rounded to it and all else is fp32 (`modeling.half`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ekiden.modeling.device import in_fp32
from ekiden.modeling.half import autocast_dtype
from ekiden.modeling.kernels import softmax_kernel

IGNORE = -100
LOGIT_BYTES = 256 << 20
"""fp32 logits of a chunk at most. Fewer rows make the products slow, more cost memory (CPU, V 262144, 4,096 tokens:
271 MB and 11 s, against 12.6 GB and 17 s for plain cross-entropy; twice the time at a quarter of these bytes)."""
MIN_ROWS = 64
"""Rows a chunk at least: with fewer, each product is a walk through the whole head for little arithmetic."""


BLOCK_BYTES = 4 << 20
"""fp32 logits that a CPU takes through the softmax at a time: they stay in its cache between the passes, and with fewer
bytes the threads wait for one another more often."""
BLOCK_ROWS = 16
"""Rows a block at least, so that each thread has some."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(h W^T)[target] over rows; d/dz = softmax - onehot, so d/dh = dz W and d/dW = dz^T h."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        rows: int,
        dtype: torch.dtype,
        with_gradient: bool,
    ) -> torch.Tensor:
        """Return the sum of the losses, fp32, a chunk of rows at a time.

        Both gradients are made here, while a chunk's logits exist: the backward pass then only scales them. Not in fp16,
        whose loss scale has to be in the products already: there it makes the logits again.

        Args:
            hidden: [N, D]; weight: [V, D]; targets: int64 [N], IGNORE counts nothing.
            rows: of a chunk. dtype: of the products. with_gradient: whether a backward pass will follow.
        """
        chunks = _Chunks(hidden, weight, targets, rows, dtype)
        ctx.rows, ctx.early = rows, with_gradient and chunks.hidden.dtype != torch.float16
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradients = _Gradients(hidden, weight) if ctx.early else None
        for part, logits in chunks.logits():
            total += softmax_minus_target(logits, targets[part], write=ctx.early).sum()
            if gradients:
                gradients.add(part, logits, chunks)
        if gradients:
            gradients.finish(chunks)
            ctx.save_for_backward(gradients.hidden, gradients.weight)
        elif with_gradient:
            ctx.save_for_backward(hidden, weight, targets)
            ctx.dtype = dtype
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of `hidden` and `weight`, scaled by `upstream` (a scalar)."""
        if ctx.early:
            grad_hidden, grad_weight = ctx.saved_tensors
            # In place: the head's gradient is as large as the head. A second backward pass is refused by autograd.
            return grad_hidden.mul_(upstream), grad_weight.mul_(upstream), None, None, None, None
        hidden, weight, targets = ctx.saved_tensors
        chunks = _Chunks(hidden, weight, targets, ctx.rows, ctx.dtype)
        gradients = _Gradients(hidden, weight)
        for part, logits in chunks.logits():
            softmax_minus_target(logits, targets[part], write=True, factor=upstream)
            gradients.add(part, logits, chunks)
        gradients.finish(chunks)
        return gradients.hidden, gradients.weight, None, None, None, None


class _Chunks:
    """Hidden states [N, d] and head [V, d] in the type of the products, and the logits of some rows at a time.

    Rows whose target is ignored are zeros: whatever their softmax is, it adds nothing to the head's gradient.
    """

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int, dtype: torch.dtype
    ) -> None:
        self.ignored, self.rows = (targets == IGNORE).unsqueeze(1), rows
        self.hidden, self.weight = hidden.to(dtype).masked_fill(self.ignored, 0), weight.to(dtype)
        if in_fp32(hidden.device, dtype):
            self.hidden, self.weight = self.hidden.float(), self.weight.float()

    def logits(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield slices of rows and their logits [n, V], all in the same memory, which is the caller's to change."""
        count = self.hidden.shape[0]
        memory = self.hidden.new_empty((min(self.rows, count), self.weight.shape[0]))
        for part in _slices(count, self.rows, self.hidden):
            yield part, torch.mm(self.hidden[part], self.weight.T, out=memory[: part.stop - part.start])


class _Gradients:
    """Gradients of hidden states and head; the head's sum over chunks is fp32 (16 bit would lose 2-3 digits)."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor) -> None:
        self.hidden = torch.empty_like(hidden)
        self.weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)

    def add(self, part: slice, logit_gradient: torch.Tensor, chunks: _Chunks) -> None:
        """Add one chunk's `logit_gradient` [n, V], in the type of the products."""
        if self.hidden.dtype == logit_gradient.dtype:
            torch.mm(logit_gradient, chunks.weight, out=self.hidden[part])
        else:
            self.hidden[part] = logit_gradient @ chunks.weight
        if logit_gradient.dtype == torch.float32:
            self.weight.addmm_(logit_gradient.T, chunks.hidden[part])
        else:
            self.weight += logit_gradient.T @ chunks.hidden[part]

    def finish(self, chunks: _Chunks) -> None:
        """Let positions that are ignored have no gradient."""
        self.hidden.masked_fill_(chunks.ignored, 0)


def softmax_minus_target(
    logits: torch.Tensor, targets: torch.Tensor, write: bool, factor: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the losses [n] of `logits` [n, V] in fp32, 0 where the target is ignored.

    Args:
        write: leave the gradient of the losses' sum by the logits, times `factor`, in their place. It is fp32 until
            then. Without, the logits are lost all the same.
    """
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    kernel = softmax_kernel(logits)
    whole = kernel is not None and logits.dtype == torch.float32
    for part in _slices(logits.shape[0], max(1, logits.shape[0]) if whole else _block_rows(logits), logits):
        block = logits[part].float()  # the logits themselves, where they are fp32
        index = targets[part].clamp(min=0)
        if kernel:
            losses[part] = kernel(block, index, write)
        else:
            losses[part] = _softmax_minus_target(block, index.unsqueeze(1), write)
        if write and factor is not None:
            block.mul_(factor)
        if write and block.dtype != logits.dtype:
            logits[part] = block
    return losses.masked_fill_(targets == IGNORE, 0)


def _softmax_minus_target(block: torch.Tensor, index: torch.Tensor, write: bool) -> torch.Tensor:
    """Return the losses [n] of fp32 logits [n, V] and targets [n, 1], the gradient left in the logits' place if `write`."""
    torch.log_softmax(block, dim=-1, out=block)
    losses = block.gather(1, index).squeeze(1).neg_()
    if write:
        block.exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=torch.float32))
    return losses


def _block_rows(logits: torch.Tensor) -> int:
    """Return how many rows go through the softmax together; each row's figures are the same with any number."""
    rows, vocab = logits.shape
    if logits.device.type != "cpu" or isinstance(logits, FakeTensor):  # where every call costs
        return max(BLOCK_ROWS, -(-rows // 8))
    return max(BLOCK_ROWS, 2 * torch.get_num_threads(), BLOCK_BYTES // (4 * vocab))


def _slices(rows: int, size: int, of: torch.Tensor) -> list[slice]:
    """Return slices of `size` that cover `rows`; where a plan counts the bytes of one, the first, second and last are all."""
    found = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    return [*found[:2], found[-1]] if isinstance(of, FakeTensor) and len(found) > 3 else found


def chunk_rows_for(vocab_size: int, most: int) -> int:
    """Return the rows of a chunk: what LOGIT_BYTES holds, at least MIN_ROWS, never more than `most`."""
    return min(most, max(MIN_ROWS, LOGIT_BYTES // (4 * vocab_size)))


def chunked_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk_rows: int = 1024
) -> torch.Tensor:
    """Return the summed cross-entropy of `targets` under softmax(hidden weight^T), in nats, as an fp32 scalar.

    Args:
        hidden: [N, d]; weight: [V, d]. Under autocast both are taken to its type for the products; softmax, sums and
            the weight's gradient over chunks are fp32.
        targets: [N] int64; positions of -100 count nothing.
        chunk_rows: positions whose logits [chunk_rows, V] exist at one time, at most; fewer for a large vocabulary.
    """
    dtype = autocast_dtype(hidden)
    rows = chunk_rows_for(weight.shape[0], chunk_rows)
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with torch.autocast(hidden.device.type, enabled=False):
        return _ChunkedCrossEntropy.apply(hidden, weight, targets, rows, dtype, with_gradient)
