"""Cross-entropy from hidden states, without the logits ever existing as a whole.

The logits of 4,096 tokens over 262,144 pieces are 4.3 GB in fp32, more than most of the model. Here they exist for
`chunk_rows` positions at a time and are computed once more in the backward pass: one more product with the head (a
third of the head's cost) instead of gradients made in the forward pass, which come before a GradScaler's factor is
known and underflow in fp16.
"""

from __future__ import annotations

from typing import Any

import torch

IGNORE = -100


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(h W^T)[target] over rows; d/dz = softmax - onehot, so d/dh = dz W and d/dW = dz^T h."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk_rows: int
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        normalizers = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        for rows in _chunks(hidden.shape[0], chunk_rows):
            logits = (hidden[rows] @ weight.T).float()
            normalizers[rows] = torch.logsumexp(logits, dim=-1)
            valid = targets[rows] != IGNORE
            chosen = logits.gather(1, targets[rows].clamp(min=0).unsqueeze(1)).squeeze(1)
            total += torch.where(valid, normalizers[rows] - chosen, 0.0).sum()
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.chunk_rows = chunk_rows
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, targets, normalizers = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        # fp32: chunk sums added in 16 bit would lose 2-3 digits of the head's gradient.
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for rows in _chunks(hidden.shape[0], ctx.chunk_rows):
            grad = (hidden[rows] @ weight.T).float()
            grad.sub_(normalizers[rows].unsqueeze(1)).exp_()
            valid = (targets[rows] != IGNORE).float()
            grad.scatter_add_(1, targets[rows].clamp(min=0).unsqueeze(1), -valid.unsqueeze(1))
            grad.mul_((valid * upstream).unsqueeze(1))
            grad = grad.to(hidden.dtype)
            torch.mm(grad, weight, out=grad_hidden[rows])
            if weight.dtype == torch.float32:
                grad_weight.addmm_(grad.T, hidden[rows])
            else:
                grad_weight += (grad.T @ hidden[rows]).float()
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def chunked_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk_rows: int = 1024
) -> torch.Tensor:
    """Return the summed cross-entropy of `targets` under softmax(hidden weight^T), in nats, as an fp32 scalar.

    Args:
        hidden: [N, d]; weight: [V, d]. Under autocast both are taken to its type for the products; softmax, sums and
            the weight's gradient over chunks are fp32.
        targets: [N] int64; positions of -100 count nothing.
        chunk_rows: positions whose logits [chunk_rows, V] exist at one time.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(kind, enabled=False):
        return _ChunkedCrossEntropy.apply(hidden, weight, targets, chunk_rows)
