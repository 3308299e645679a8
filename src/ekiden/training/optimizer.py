"""AdamW and its learning rate.

`training.loop` builds the optimizer once from the model and asks for the learning rate of every step; both are pure
functions of the settings, so that nothing of a schedule has to be kept in a checkpoint.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ekiden.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with decay on matrices only.

    The fused kernel is used on every device: one pass over the memory, no temporaries (`foreach` needs 4 more bytes
    a parameter), and it leaves everything untouched where `optimizer.found_inf` is 1, without asking the host.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def learning_rate(step: int, config: TrainConfig, max_steps: int) -> float:
    """Return the learning rate of `step` (0-based) in a run of `max_steps` steps.

    Linear warm-up over `warmup_steps` (at most a tenth of the run), then a half cosine down to
    `min_learning_rate_ratio` of the peak at the last step (Loshchilov & Hutter 2017, arXiv:1608.03983).
    """
    warmup = min(config.warmup_steps, max_steps // 10)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, max_steps - 1 - warmup))
    floor = config.min_learning_rate_ratio
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
