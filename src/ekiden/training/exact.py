"""Gradients summed along one fixed tree, so that 1, 2 and 4 ranks give the same bits (`--elastic-exact`).

Floating-point sums depend on their order. Here the order is a binary tree over the microbatches of the global batch, by
their number in it: two neighbours are added, then two such pairs, and so on. A rank's microbatches are a whole subtree,
which it adds up by itself; the upper levels are exchanges between two ranks, and a + b is b + a to the last bit. The
idea is EasyScale's (Li et al., SC 2023).

The price: log2(microbatches of a rank) + 1 more copies of the gradient, and log2(ranks) exchanges of all of it, one after
the other. `docs/distributed.md` has both measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ekiden.errors import UserError
from ekiden.training.ranks import Ranks

Node = list[torch.Tensor]
"""Gradients of all parameters and, last, the loss: sums over one subtree."""


def check_tree(global_batch: int, microbatch: int, world: int) -> None:
    """Refuse a batch that cannot be summed along one tree by so many ranks.

    Raises:
        UserError: microbatches or ranks are not powers of two, or a rank would have none.
    """
    count, rest = divmod(global_batch, microbatch)
    if rest or count & (count - 1):
        raise UserError(
            f"--elastic-exact needs 1, 2, 4, 8 ... microbatches in the global batch; {global_batch} samples by "
            f"--batch-size {microbatch} are {global_batch / microbatch:g}: give another --batch-size or leave it out"
        )
    if world & (world - 1) or world > count:
        raise UserError(
            f"--elastic-exact sums {count} microbatches on 1, 2, 4 ... {count} ranks, not on {world}; start another number, "
            "or leave it out (the losses are then equal but for the last bits)"
        )


class GradientTree:
    """The sums of one step, of one rank.

    Args:
        parameters: whose `.grad` is taken after each microbatch and set at the end.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        # Like the bits of a counter: level k holds the sum of 2^k microbatches, or nothing.
        self._levels: list[Node | None] = []

    def add(self, loss: torch.Tensor) -> None:
        """Take the gradients of the next microbatch, and its part of the mean loss."""
        node: Node = []
        for parameter in self._parameters:
            assert parameter.grad is not None
            node.append(parameter.grad)
            parameter.grad = None
        node.append(loss.clone())
        for level, held in enumerate(self._levels):
            if held is None:
                self._levels[level] = node
                return
            self._levels[level] = None
            node = _add(held, node)
        self._levels.append(node)

    def finish(self, ranks: Ranks) -> torch.Tensor:
        """Add up over all ranks, set every parameter's gradient, and return the mean loss."""
        *lower, top = self._levels
        assert top is not None and not any(lower), "a rank's microbatches are not a power of two"
        distance = 1
        while distance < ranks.world:
            ranks.add_partner(top, ranks.rank ^ distance)
            distance *= 2
        for parameter, gradient in zip(self._parameters, top):
            parameter.grad = gradient
        return top[-1]


def _add(first: Node, second: Node) -> Node:
    """Return the sum of two nodes, in the memory of the first."""
    return [a.add_(b) for a, b in zip(first, second)]
