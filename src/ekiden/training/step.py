"""One optimizer step and nothing else: gradients over microbatches, clipping, the update.

The loop gives it batches and takes back the loss; planning can run it on fake tensors and a benchmark can time it.
Nothing in here waits for the device: a step with a non-finite loss or gradient is skipped by the optimizer's own
kernel (`found_inf`), and whoever wants the figures reads them when it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from ekiden.modeling.build import head_weight, hidden_states, inside_forward
from ekiden.modeling.device import Precision
from ekiden.modeling.loss import chunked_cross_entropy
from ekiden.training.feed import on_device
from ekiden.training.optimizer import set_learning_rate

fault_hook: Callable[[int, str], None] | None = None
"""Called with (microbatch index, 'forward' | 'backward') before each; tests raise from it what a device would."""
update_fault_hook: Callable[[], None] | None = None
"""Called before the optimizer's step, for the same."""


@dataclass
class StepFigures:
    """What one step left behind, on the device.

    loss: mean nats a token over the global batch; grad_norm: global norm before clipping; skipped: 1.0 where the
    loss or a gradient was not finite and the weights were left as they were.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor
    skipped: torch.Tensor


def accumulate_gradients(
    model: torch.nn.Module,
    microbatches: Iterable[tuple[np.ndarray, np.ndarray]],
    total_tokens: int,
    precision: Precision,
    scaler: torch.amp.GradScaler | None = None,
    loss_chunk_size: int = 1024,
    first_index: int = 0,
    after: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Add the gradients of all microbatches to the model's parameters and return the mean loss.

    Args:
        microbatches: (inputs, targets), int64, [b, T] each.
        total_tokens: tokens of the global batch. Dividing by it, not by each microbatch's own count, makes the
            gradient independent of how the batch is cut.
        first_index: number of the first microbatch, as `fault_hook` is told; negative: a trial before the first step.
        after: called after each microbatch with its part of the mean loss; it may take the gradients away.

    Returns:
        The loss in nats a token, fp32 scalar on the model's device.
    """
    device = head_weight(model).device
    loss_sum = torch.zeros((), dtype=torch.float32, device=device)
    for index, (input_ids, target_ids) in enumerate(on_device(microbatches, device), first_index):
        if fault_hook:
            fault_hook(index, "forward")
        with torch.autocast(device.type, precision.dtype, enabled=precision.dtype != torch.float32):
            loss = inside_forward(model, summed_loss, model, input_ids, target_ids, loss_chunk_size)
        mean = loss / total_tokens
        if fault_hook:
            fault_hook(index, "backward")
        (scaler.scale(mean) if scaler is not None else mean).backward()
        loss_sum += mean.detach()
        if after:
            after(mean.detach())
    return loss_sum


def summed_loss(
    model: torch.nn.Module, input_ids: torch.Tensor, target_ids: torch.Tensor, chunk: int
) -> torch.Tensor:
    """Return the cross-entropy summed over all tokens, in nats; to be called by `inside_forward`."""
    hidden = hidden_states(model, input_ids)
    return chunked_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]), head_weight(model), target_ids.reshape(-1), chunk
    )


def apply_update(
    optimizer: torch.optim.Optimizer,
    loss: torch.Tensor,
    learning_rate: float,
    max_grad_norm: float,
    scaler: torch.amp.GradScaler | None = None,
) -> StepFigures:
    """Clip the gradients, update the weights and clear the gradients.

    The update is left out, inside the fused kernel, where loss or gradients are not finite; a GradScaler then also
    lowers its scale.
    """
    if scaler is not None:
        scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if max_grad_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm)
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    skipped = (~(torch.isfinite(loss) & torch.isfinite(grad_norm))).float()
    set_learning_rate(optimizer, learning_rate)
    if update_fault_hook:
        update_fault_hook()
    # torch's own protocol between GradScaler and fused optimizers; used for every precision.
    optimizer.grad_scale, optimizer.found_inf = None, skipped  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if scaler is not None:
        # A rank that keeps a part of the gradients has seen an infinity in its own part only.
        for found in scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
            found.copy_(skipped)
        scaler.update()
    return StepFigures(loss, grad_norm, skipped)
