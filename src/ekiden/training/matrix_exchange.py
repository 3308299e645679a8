"""Matrices in shards, each whole for a moment on one rank: for an optimizer that needs whole matrices.

`fully_shard` cuts a matrix along its rows, a block of them on each rank of a group. Of n such matrices, matrix i is
gathered on rank i modulo the ranks and worked on there, and the rows go back: two exchanges in which every rank sends and
receives 1/ranks of all matrices, and an equal share of the work for each. Copies of the shards (hybrid sharding over
machines) do the same beside one another, with nothing sent between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of `tensor`, sharing its memory; an ordinary tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_group(tensor: torch.Tensor) -> tuple[Any, int, int]:
    """Return (process group, ranks in it, this rank's number in it) that hold the shards of `tensor`; (None, 1, 0)."""
    if isinstance(tensor, DTensor):
        for dimension, placement in enumerate(tensor.placements):
            if placement.is_shard():
                group = tensor.device_mesh.get_group(dimension)
                return group, tensor.device_mesh.size(dimension), tensor.device_mesh.get_local_rank(dimension)
    return None, 1, 0


def gather_to_owners(shards: Sequence[torch.Tensor], like: DTensor) -> list[torch.Tensor]:
    """Return the whole of those matrices of which this rank is the owner, in their order.

    Args:
        shards: this rank's rows of each, [rows here, columns]. like: a parameter of the same shape and division.
    """
    group, ranks, rank = shard_group(like)
    rows, columns = _rows(like.shape[0], ranks), like.shape[1]
    owned = len(range(rank, len(shards), ranks))
    counts = [len(range(owner, len(shards), ranks)) for owner in range(ranks)]
    sent = torch.cat(
        [shards[i].reshape(-1) for owner in range(ranks) for i in range(owner, len(shards), ranks)]
    )
    sizes_in, sizes_out = [c * rows[rank] * columns for c in counts], [owned * r * columns for r in rows]
    received = sent.new_empty(sum(sizes_out))
    dist.all_to_all_single(received, sent, sizes_out, sizes_in, group=group)
    parts = [part.view(owned, r, columns) for part, r in zip(received.split(sizes_out), rows)]
    return list(torch.cat(parts, dim=1).unbind())


def scatter_from_owners(
    wholes: Sequence[torch.Tensor], shards: Sequence[torch.Tensor], like: DTensor
) -> list[torch.Tensor]:
    """Return this rank's rows of every matrix; the inverse of `gather_to_owners`.

    Args:
        wholes: what this rank owns. shards: as many as there are matrices, of the shapes to be returned.
    """
    group, ranks, rank = shard_group(like)
    rows, columns = _rows(like.shape[0], ranks), like.shape[1]
    counts = [len(range(owner, len(shards), ranks)) for owner in range(ranks)]
    sizes_in, sizes_out = (
        [len(wholes) * r * columns for r in rows],
        [c * rows[rank] * columns for c in counts],
    )
    first = [sum(rows[:k]) for k in range(ranks)]
    pieces = [whole[begin : begin + r].reshape(-1) for begin, r in zip(first, rows) for whole in wholes]
    sent = torch.cat(pieces) if pieces else shards[0].new_empty(0)
    received = sent.new_empty(sum(sizes_out))
    dist.all_to_all_single(received, sent, sizes_out, sizes_in, group=group)
    result = list(shards)
    for owner, part in enumerate(received.split(sizes_out)):
        for i, piece in zip(range(owner, len(shards), ranks), part.view(counts[owner], rows[rank], columns)):
            result[i] = piece
    return result


def _rows(total: int, ranks: int) -> list[int]:
    """Return how many rows each rank holds: equal blocks, the last ones smaller or empty (as `torch.chunk` cuts)."""
    size = -(-total // ranks)
    return [max(0, min(size, total - k * size)) for k in range(ranks)]
