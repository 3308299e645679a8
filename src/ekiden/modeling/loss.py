"""Cross-entropy from hidden states, without the logits ever existing as a whole.

The logits of 4,096 tokens over 262,144 pieces are 4.3 GB in fp32, more than most of the model. Here they exist for
some rows at a time. Where the range of numbers allows (fp32, bf16) the gradient is made beside the loss, in the
forward pass, and multiplied by the upstream gradient in the backward one: three products with the head, as many as
plain cross-entropy has. fp16 has not the range: probabilities below 6e-8 vanish unless they are scaled first, and a
GradScaler's factor is known only in the backward pass, so there the logits are computed a second time.
"""

from __future__ import annotations

from typing import Any

import torch

IGNORE = -100
LOGIT_BYTES = 256 << 20
"""fp32 logits of a chunk at most. Fewer rows make the products slow, more cost memory (CPU, V 262144, 4,096 tokens:
271 MB and 11 s, against 12.6 GB and 17 s for plain cross-entropy; twice the time at a quarter of these bytes)."""
MIN_ROWS = 64
"""Rows a chunk at least: with fewer, each product is a walk through the whole head for little arithmetic."""


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
        ctx.rows, ctx.early = rows, with_gradient and dtype != torch.float16
        operands = hidden.to(dtype), weight.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradients = _Gradients(hidden, weight) if ctx.early else None
        for part in _chunks(hidden.shape[0], rows):
            losses, logit_gradient = _softmax(*operands, targets, part)
            total += losses.sum()
            if gradients:
                gradients.add(logit_gradient, *operands, part)
            del logit_gradient  # or two chunks' would exist at a time
        if gradients:
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
        operands = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        gradients = _Gradients(hidden, weight)
        for part in _chunks(hidden.shape[0], ctx.rows):
            _losses, logit_gradient = _softmax(*operands, targets, part)
            gradients.add(logit_gradient.mul_(upstream), *operands, part)
            del logit_gradient
        return gradients.hidden, gradients.weight, None, None, None, None


class _Gradients:
    """Gradients of hidden states and head; the head's sum over chunks is fp32 (16 bit would lose 2-3 digits)."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor) -> None:
        self.hidden = torch.empty_like(hidden)
        self.weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)

    def add(
        self, logit_gradient: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, part: slice
    ) -> None:
        """Add one chunk's `logit_gradient` [n, V]; `hidden` and `weight` are in the type of the products."""
        rounded = logit_gradient.to(hidden.dtype)
        self.hidden[part] = rounded @ weight
        if hidden.dtype == torch.float32:
            self.weight.addmm_(rounded.T, hidden[part])
        else:
            self.weight += rounded.T @ hidden[part]


def _softmax(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, part: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses [n] of the rows `part` and the gradient of their sum by their logits [n, V], fp32."""
    logits = (hidden[part] @ weight.T).float()
    valid = (targets[part] != IGNORE).unsqueeze(1)
    index = targets[part].clamp(min=0).unsqueeze(1)
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    chosen = logits.gather(1, index)
    exponentials = logits.exp_()
    sums = exponentials.sum(dim=-1, keepdim=True)
    losses = torch.where(valid, sums.log() - chosen, 0.0).squeeze(1)
    gradient = exponentials.mul_(valid / sums)
    gradient.scatter_add_(1, index, -valid.float())
    return losses, gradient


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


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
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    rows = chunk_rows_for(weight.shape[0], chunk_rows)
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with torch.autocast(kind, enabled=False):
        return _ChunkedCrossEntropy.apply(hidden, weight, targets, rows, dtype, with_gradient)
