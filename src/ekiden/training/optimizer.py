"""The optimizer of a run and its learning rate.

`training.start` builds the optimizer once from the model, `training.loop` asks for learning rate and momentum of every
step; both are pure functions of the settings (and of where a decay was begun), so that nothing of a schedule has to be kept
in a checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ekiden.config import TrainConfig
from ekiden.modeling.build import body
from ekiden.training.compact_adamw import CompactAdamW, OffloadedOptimizer, eight_bit_adamw
from ekiden.training.muon import Matrix, Muon

REFERENCE_WIDTH = 256
"""Width at which `learning_rate` holds for the embedding under Muon."""


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer that the settings name: AdamW for everything, or Muon for the blocks' matrices.

    With Muon, AdamW keeps the rest, and the embedding's rate falls with 1/sqrt(width), as its entries do.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if config.optimizer == "adamw":
        return _adamw(_groups(list(named.values()), config.weight_decay), config)
    matrices = block_matrices(model)
    taken = {id(matrix.parameter) for matrix in matrices}
    others = [p for p in named.values() if id(p) not in taken]
    groups = _groups(others, 0.0)
    for group in groups:
        if group["params"][0].dim() >= 2:
            group["lr_ratio"] = math.sqrt(REFERENCE_WIDTH / config.hidden_size)
    return Muon(
        matrices,
        _adamw(groups, config),
        lr=config.matrix_learning_rate,
        momentum=config.muon_momentum,
        weight_decay=config.weight_decay,
        lr_ratio=config.matrix_learning_rate / config.learning_rate,
        even=config.muon_even,
    )


def _groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups: matrices, with weight decay, and vectors, without."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _adamw(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) of these groups, its moments as the settings say.

    The fused kernel is used on every device: one pass over the memory, no temporaries (`foreach` needs 4 more bytes
    a parameter), and it leaves everything untouched where `optimizer.found_inf` is 1, without asking the host.
    """
    if config.cpu_offload:
        on_host = dataclasses.replace(config, cpu_offload=False)
        return OffloadedOptimizer(groups, lambda copies: _adamw(copies, on_host))
    betas = config.beta1, config.beta2
    if config.optimizer_moments == "8bit":
        return eight_bit_adamw(groups, config.learning_rate, betas, config.adam_epsilon)
    if config.optimizer_moments != "fp32":
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[config.optimizer_moments]
        return CompactAdamW(groups, dtype, config.learning_rate, betas, config.adam_epsilon)
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True
    )


def block_matrices(model: nn.Module) -> list[Matrix]:
    """Return the weight matrices of the decoder's blocks: what Muon trains.

    Not the embedding, the output or the positions, whose rows are looked up and not multiplied with one another.
    """
    decoder = body(model)
    blocks = decoder.h if hasattr(decoder, "h") else decoder.layers
    gpt2 = hasattr(decoder, "h")  # whose Conv1D holds [in, out], and query, key and value in one
    return [
        Matrix(parameter, parts=3 if name.endswith("c_attn.weight") else 1, transposed=gpt2)
        for name, parameter in blocks.named_parameters()  # type: ignore[union-attr]
        if parameter.dim() == 2 and parameter.requires_grad
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its learning rate: `rate`, times the group's `lr_ratio` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_ratio", 1.0)


def momenta(step: int, config: TrainConfig) -> tuple[float, float]:
    """Return Muon's decay of the momentum and AdamW's beta1 at `step` (0-based): lines, then constant.

    Without Muon beta1 is the same at every step.
    """
    part = min(1.0, step / config.muon_momentum_steps) if config.muon_momentum_steps else 1.0
    beta1 = config.beta1
    if config.optimizer == "muon":
        beta1 = config.muon_first_beta1 + part * (config.beta1 - config.muon_first_beta1)
    return config.muon_first_momentum + part * (config.muon_momentum - config.muon_first_momentum), beta1


def set_momenta(optimizer: torch.optim.Optimizer, momentum: float, beta1: float) -> None:
    """Give Muon's group its momentum, and AdamW's groups their beta1.

    AdamW then corrects its mean for a beta1 that was always this one; over a rise of 300 steps that is wrong
    by 0.1 % of the mean at most.
    """
    for group in optimizer.param_groups:
        if "momentum" in group:
            group["momentum"] = momentum
        else:
            group["betas"] = beta1, group["betas"][1]


def learning_rate(
    step: int, config: TrainConfig, max_steps: int, decay: Sequence[float] | None = None
) -> float:
    """Return the learning rate of `step` (0-based) in a run of `max_steps` steps.

    Linear warm-up over `warmup_steps` (at most a tenth of the run; with Muon, whose first steps are no larger than
    its others, a fiftieth), then one of

    * `cosine`: half a cosine down to `min_learning_rate_ratio` of the peak at the last step (Loshchilov & Hutter
      2017, arXiv:1608.03983);
    * `wsd`: the peak, then a line down to that share over the last `decay_ratio` of the run (Hu et al. 2024,
      arXiv:2404.06395; Hägele et al. 2024, arXiv:2405.18392).

    Args:
        decay: (first step, steps, learning rate there) of a decay begun by `--decay-from`: from that step on a line
            down from that rate, whatever the schedule was before.
    """
    floor = config.min_learning_rate_ratio
    if decay and step >= decay[0]:
        first, steps, peak = decay
        return peak * (floor + (1 - floor) * max(0.0, first + steps - step) / steps)
    warmup = min(config.warmup_steps, max_steps // (50 if config.optimizer == "muon" else 10))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "cosine":
        progress = min(1.0, (step - warmup) / max(1, max_steps - 1 - warmup))
        return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    falling = max(1.0, min(config.decay_ratio * max_steps, max_steps - warmup))
    # The last step still moves: its share is one step's part of the line, not 0.
    left = min(1.0, max(0.0, (max_steps - step) / falling))
    return config.learning_rate * (floor + (1 - floor) * left)
