"""Muon: every step of a matrix is its momentum with all singular values set to about 1.

`training.optimizer` gives it the matrices of the blocks; everything else (embedding, positions, norms, biases) goes
to AdamW, which this optimizer drives as its `rest`. torch.optim.Muon always multiplies in bf16, which GPUs before
compute capability 8.0 have no units for; this one multiplies in what the device is fast at, takes the three parts of
a fused query/key/value matrix each by itself, and keeps torch's found_inf protocol, so that a bad step changes
nothing without asking the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ekiden.training.matrix_exchange import gather_to_owners, local, scatter_from_owners, shard_group

# Amsel, Persson, Musco & Gower 2025, "The Polar Express" (arXiv:2505.16932), algorithm 1: the minimax polynomials of
# five iterations for singular values from 1e-3 of the largest up, with the authors' safety factor of 2 %.
_POLYNOMIALS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
_SAFETY = 1.02
_STACK = 1 << 26
"""Elements of equal matrices handled at a time: 256 MB of fp32 beside the model."""


@dataclass(frozen=True)
class Matrix:
    """A parameter that Muon trains.

    parts: matrices it consists of, side by side in its output dimension (3 for a fused query/key/value). transposed:
    stored as [in, out], as GPT-2's are, not [out, in].
    """

    parameter: nn.Parameter
    parts: int = 1
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of one part."""
        rows, columns = self.parameter.shape
        outputs, inputs = (columns, rows) if self.transposed else (rows, columns)
        return outputs // self.parts, inputs

    def split(self, value: torch.Tensor) -> list[torch.Tensor]:
        """Return the parts of a tensor of the parameter's shape, each [out, in]; views."""
        return list((value.mT if self.transposed else value).chunk(self.parts))

    def join(self, parts: Iterable[torch.Tensor]) -> torch.Tensor:
        """Return the tensor of the parameter's shape that consists of `parts`."""
        whole = torch.cat(list(parts))
        return whole.mT if self.transposed else whole


def multiply_dtype(device: torch.device) -> torch.dtype:
    """Return the arithmetic of the iterations: bf16 where the device has units for it, fp16 on older GPUs.

    On a CPU fp32: without bf16 instructions bf16 is slower there, and the step is the same on every CPU's thread.
    """
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return U V^T (nearly) for every matrix U S V^T, float32 [n, A, B].

    Five polynomial iterations (arXiv:2505.16932) in `dtype`. Every iterate's singular values stay below 1.3 or so,
    which fp16 holds as well as bf16 once the first is divided by its norm in fp32.

    Args:
        matrices: float32 [n, A, B]; a matrix of zeros stays one.
    """
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    norm = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
    x = (wide / (norm * _SAFETY + 1e-20)).to(dtype)
    for a, b, c in _POLYNOMIALS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    result = x.float()
    return result if matrices.shape[-2] <= matrices.shape[-1] else result.mT


def even_out(matrices: torch.Tensor) -> torch.Tensor:
    """Return matrices [n, A, B] with all vectors along the longer side made as long as one another, the whole as long as before.

    An orthogonal matrix that is not square has vectors of length 1 along its shorter side only: along the other, some
    units of a feed-forward layer would move ten times as far as others. (A square one has rows of length 1 only where
    no singular value was too small to be raised.) What Li et al. 2025 (NorMuon, arXiv:2510.05491) do with a running mean
    of those lengths, of this step's alone: nothing to keep.
    """
    along = -1 if matrices.shape[-2] >= matrices.shape[-1] else -2
    even = matrices / torch.linalg.vector_norm(matrices, dim=along, keepdim=True).clamp_min(1e-5)
    before, after = (torch.linalg.vector_norm(m, dim=(-2, -1), keepdim=True) for m in (matrices, even))
    return even * (before / after.clamp_min(1e-5))


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) on matrices, and `rest` on everything else.

    An update is lr * sqrt(max(1, out / in)) * U V^T: it changes the layer's outputs by as much whatever the shape
    (Yang, Simon & Bernstein 2023, arXiv:2310.17813), so that a learning rate found on a narrow model serves a wide
    one. Nesterov momentum, kept as an average; decoupled weight decay.

    Args:
        matrices: what Muon trains. rest: an optimizer of all other parameters. It shares `state` and
            `param_groups` with this one, so that a checkpoint, a learning rate or a GradScaler sees one optimizer.
        lr_ratio: of Muon's groups; whoever sets their `lr` multiplies by it.
        even: every vector along a matrix's longer side moves as far as the others (`even_out`).
    """

    def __init__(
        self,
        matrices: list[Matrix],
        rest: torch.optim.Optimizer,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        lr_ratio: float = 1.0,
        even: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "lr_ratio": lr_ratio}
        super().__init__([m.parameter for m in matrices], defaults)
        self.matrices, self.rest, self.even = matrices, rest, even
        self.param_groups.extend(rest.param_groups)
        rest.state = self.state
        self.grad_scale: torch.Tensor | None = None
        self.found_inf: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; where `found_inf` is 1, leave all as it was."""
        assert closure is None and self.grad_scale is None, "gradients come unscaled"
        self.rest.grad_scale, self.rest.found_inf = None, self.found_inf  # type: ignore[attr-defined]
        self.rest.step()
        group = self.param_groups[0]
        alike: dict[tuple[Any, ...], list[Matrix]] = {}
        for matrix in self.matrices:
            if matrix.parameter.grad is not None:
                key = matrix.shape, matrix.parts, matrix.transposed, matrix.parameter.device
                alike.setdefault(key, []).append(matrix)
        for ((outputs, inputs), parts, *_), matrices in alike.items():
            owners = shard_group(matrices[0].parameter)[1]
            most = max(1, _STACK // (outputs * inputs * parts)) * owners
            for first in range(0, len(matrices), most):
                self._update(matrices[first : first + most], group, max(1.0, outputs / inputs) ** 0.5)

    def _update(self, matrices: list[Matrix], group: dict[str, Any], scale: float) -> None:
        """Update matrices that are alike together: on a GPU a batch of small products costs little more than one.

        Where the parameters are shards, each rank orthogonalises its share of the matrices, whole.
        """
        parameters = [matrix.parameter for matrix in matrices]
        device = parameters[0].device
        good: Any = 1.0 if self.found_inf is None else (self.found_inf == 0).float().to(device)
        updates = [self._direction(parameter, group["momentum"], good) for parameter in parameters]
        like = parameters[0] if isinstance(parameters[0], DTensor) else None
        wholes = gather_to_owners(updates, like) if like is not None else updates
        if wholes:
            parts = [part for whole in wholes for part in matrices[0].split(whole)]
            stacked = orthogonalize(torch.stack(parts), multiply_dtype(device))
            done = iter((even_out(stacked) if self.even else stacked).unbind())
            wholes = [matrices[0].join([next(done) for _ in range(matrices[0].parts)]) for _ in wholes]
        updates = scatter_from_owners(wholes, updates, like) if like is not None else wholes
        decay, rate = 1 - group["lr"] * group["weight_decay"] * good, group["lr"] * scale * good
        for parameter, update in zip(parameters, updates):
            local(parameter).mul_(decay).sub_(update * rate)

    def _direction(self, parameter: nn.Parameter, momentum: float, good: Any) -> torch.Tensor:
        """Take the gradient into the momentum and return Nesterov's look-ahead of it; a bad gradient counts as zero.

        Of a shard, as much as is here.
        """
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        gradient = local(parameter.grad)
        if torch.is_tensor(good):
            gradient = torch.where(good > 0, gradient, 0.0)
        average = local(state["momentum_buffer"])
        average.add_((gradient - average) * ((1 - momentum) * good))
        return torch.lerp(gradient, average, momentum)
