"""How the next token is chosen: the settings of a text, and the draw from one row of logits.

`streaming.next_tokens` calls `choose` for every token. Each prompt has a random stream of its own, made from the seed
and the prompt, so that a text never depends on the prompts beside it and training's random state is not touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ekiden.errors import UsageError

FRACTION_BITS = 40
"""Probabilities are summed as whole numbers of 2^-40: such sums are the same in any order, so on any device."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    max_new_tokens: its length at most. temperature: 0 is always the likeliest. top_k: among the k likeliest, 0: all.
    top_p: among the likeliest of this total probability (Holtzman et al. 2020, arXiv:1904.09751).
    min_p: among those at least this share of the likeliest one's probability, 0: all (Nguyen et al. 2024,
    arXiv:2407.01082). repetition_penalty: logits of tokens that occurred are divided by it, multiplied where negative
    (Keskar et al. 2019, arXiv:1909.05858). seed: same seed, same text.
    """

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.1
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < 100, "from 0 to 100"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < 100, "above 0 and below 100"),
        }
        for name, (fine, meaning) in limits.items():
            if not fine:
                raise UsageError(f"--{name.replace('_', '-')} must be {meaning}, not {getattr(self, name)}")


def occurrences(prompts: Sequence[str]) -> list[int]:
    """Return how often each prompt stood in the list before: equal prompts get different texts."""
    counts = dict.fromkeys(prompts, 0)
    numbers = []
    for prompt in prompts:
        numbers.append(counts[prompt])
        counts[prompt] += 1
    return numbers


def prompt_generator(prompt: str, occurrence: int, seed: int) -> torch.Generator:
    """Return the random stream of a prompt, on the CPU: the same wherever the model is."""
    digest = hashlib.sha256(f"{seed}\0{occurrence}\0{prompt}".encode("utf-8", "surrogatepass")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def choose(
    logits: torch.Tensor, seen: torch.Tensor, sampling: Sampling, generators: list[torch.Generator]
) -> list[int]:
    """Return one token for every row of `logits` [b, V].

    Args:
        seen: [b, V], tokens that occurred in the row.
        generators: one a row; each gives one number a call, so that rows do not depend on one another.
    """
    if sampling.repetition_penalty != 1:
        penalised = torch.where(
            logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty
        )
        logits = torch.where(seen, penalised, logits)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1).tolist()
    ordered, tokens = (logits / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ordered, tokens = ordered[:, : sampling.top_k], tokens[:, : sampling.top_k]
    shares = (ordered.softmax(dim=-1).double() * 2**FRACTION_BITS).long()
    totals = shares.cumsum(dim=-1)
    last = _last_kept(shares, totals, sampling)
    draws = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators]).to(
        logits.device
    )
    points = (draws * totals.gather(1, last).double()).long()
    picked = torch.minimum((totals <= points).sum(dim=-1, keepdim=True), last)
    return tokens.gather(1, picked).squeeze(1).tolist()


def _last_kept(shares: torch.Tensor, totals: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return [b, 1], the position of the last token that top_p and min_p keep; the likeliest is always kept.

    Args:
        shares: [b, k], probabilities from the likeliest down; totals: their running sums.
    """
    # The nucleus: as many of the likeliest tokens as it takes to reach top_p.
    wanted = (totals[:, -1:].double() * sampling.top_p).long().clamp(min=1)
    last = (totals < wanted).sum(dim=-1, keepdim=True).clamp(max=totals.shape[1] - 1)
    if sampling.min_p:
        least = (shares[:, :1].double() * sampling.min_p).long().clamp(min=1)
        last = torch.minimum(last, (shares >= least).sum(dim=-1, keepdim=True) - 1)
    return last
