"""AdamW whose moments take less memory: 16 bits or 8 bits a number, or none of the device's memory at all.

`training.optimizer` chooses one by `optimizer_moments` and `cpu_offload`. All three keep torch's protocol of a
step that is not finite: where `found_inf` is 1 nothing changes. Their states hold tensors by parameter like any
other optimizer's, and `training.state` puts them into checkpoints as they are, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, unset_fake_temporarily
from torch.optim.adamw import adamw

from ekiden.optional import require

_TOP = 2.0**10
"""The largest number of a tensor of moments lies at this in fp16: 64 below its limit, 2**34 above its smallest."""


class CompactAdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) that keeps its moments in bf16 or fp16: 4 bytes a parameter instead of 8.

    The update itself is the fused fp32 kernel's, one parameter at a time. The second moment is kept as its root, which
    needs half the exponents; in fp16 both are kept times a power of two of their own for every tensor.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        dtype: torch.dtype,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.dtype = dtype
        self.grad_scale: torch.Tensor | None = None
        self.found_inf: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; where `found_inf` is 1, leave all as it was."""
        assert closure is None and self.grad_scale is None, "gradients come unscaled"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter] or self._first_state(parameter)
        mean = state["exp_avg"].float() * state["exp_avg_scale"]
        root = state["exp_avg_sq_root"].float() * state["exp_avg_sq_root_scale"]
        square = root.square_()
        adamw(
            [parameter],
            [parameter.grad],  # type: ignore[list-item]
            [mean],
            [square],
            [],
            [state["step"]],
            fused=True,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        self._keep(state, "exp_avg", mean)
        self._keep(state, "exp_avg_sq_root", square.sqrt_())

    def _first_state(self, parameter: torch.Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        for name in ("exp_avg", "exp_avg_sq_root"):
            state[name] = torch.zeros_like(parameter, dtype=self.dtype)
            state[f"{name}_scale"] = torch.ones((), device=parameter.device)
        state["step"] = torch.zeros((), device=parameter.device)
        return state

    def _keep(self, state: dict[str, Any], name: str, value: torch.Tensor) -> None:
        """Round `value` into the state; where the step was a bad one, leave what is there."""
        scale = torch.ones_like(state[f"{name}_scale"])
        if self.dtype == torch.float16:
            # exp2 and log2 of whole numbers: a power of two, so that scaling loses nothing.
            scale = torch.exp2(torch.ceil(torch.log2(value.abs().amax().clamp(min=2.0**-100) / _TOP)))
        rounded = value.div_(scale).to(self.dtype)
        if self.found_inf is not None:
            bad = self.found_inf > 0
            rounded = torch.where(bad, state[name], rounded)
            scale = torch.where(bad, state[f"{name}_scale"], scale)
        state[name].copy_(rounded)
        state[f"{name}_scale"].copy_(scale)


def eight_bit_adamw(
    groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """Return bitsandbytes' AdamW: 2 bytes a parameter, in blocks of 256 (Dettmers et al. 2021, arXiv:2110.02861).

    Parameters of less than 4,096 numbers keep fp32 moments. Its kernels know no `found_inf`, so a bad step is left out
    by the host, which waits for the device once a step.

    Raises:
        UserError: the package is not installed.
    """
    bitsandbytes = require("bitsandbytes", "--optimizer-moments 8bit", extra="bnb")

    class EightBitAdamW(bitsandbytes.optim.AdamW8bit):  # type: ignore[misc,name-defined]
        """bitsandbytes' AdamW with torch's protocol of bad steps."""

        grad_scale: torch.Tensor | None = None
        found_inf: torch.Tensor | None = None

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            """Update every parameter that has a gradient; where `found_inf` is 1, only make the moments' memory."""
            assert closure is None and self.grad_scale is None, "gradients come unscaled"
            if not is_set(self.found_inf):
                # Its kernels take the count of steps as a number, and a checkpoint holds tensors.
                for state in self.state.values():
                    state["step"] = int(state["step"])
                super().step()
                self._count_in_tensors()
                return
            for number, group in enumerate(self.param_groups):
                for index, parameter in enumerate(group["params"]):
                    if parameter.grad is not None and not self.state[parameter]:
                        self.init_state(group, parameter, number, index)
            self._count_in_tensors()

        def fill_qmap(self) -> None:
            """Make the tables of its 256 numbers, with data even where `ekiden plan` has none."""
            with unset_fake_temporarily():
                super().fill_qmap()

        def _count_in_tensors(self) -> None:
            for state in self.state.values():
                state["step"] = torch.tensor(int(state["step"]))

    return EightBitAdamW(groups, lr=lr, betas=betas, eps=eps)


def is_set(flag: torch.Tensor | None) -> bool:
    """Return whether the flag on the device is set; of a tensor without data (`ekiden plan`): True."""
    if flag is None:
        return False
    try:
        return bool(flag > 0)
    except DataDependentOutputException:
        return True


class OffloadedOptimizer(torch.optim.Optimizer):
    """An optimizer whose moments live, and whose arithmetic is done, in the host's memory.

    The device keeps weights and gradients alone: 8 bytes a parameter less with AdamW. Every step moves the gradients
    and weights to the host and the weights back, 12 bytes a parameter over the bus, so it pays where the
    model would not fit otherwise and a step has many microbatches.

    Args:
        groups: of the device's parameters. build: makes the real optimizer from groups of their copies on the host.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        build: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    ) -> None:
        super().__init__(groups, {})
        self.copies = {
            parameter: torch.nn.Parameter(_host_buffer(parameter))
            for group in self.param_groups
            for parameter in group["params"]
        }
        self.inner = build(
            [{**group, "params": [self.copies[p] for p in group["params"]]} for group in self.param_groups]
        )
        for group, made in zip(self.param_groups, self.inner.param_groups):
            group.update({name: value for name, value in made.items() if name != "params"})
        self.grad_scale: torch.Tensor | None = None
        self.found_inf: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; where `found_inf` is 1, leave all as it was."""
        assert closure is None and self.grad_scale is None, "gradients come unscaled"
        self._fetch()
        for group, inner in zip(self.param_groups, self.inner.param_groups):
            inner["lr"] = group["lr"]
        self.inner.found_inf = None if self.found_inf is None else self.found_inf.cpu()  # type: ignore[attr-defined]
        self.inner.grad_scale = None  # type: ignore[attr-defined]
        self.inner.step()
        for parameter, copy in self.copies.items():
            if copy.grad is not None:
                parameter.copy_(copy, non_blocking=True)
                self.state[parameter] = self.inner.state[copy]

    def _fetch(self) -> None:
        """Bring weights, gradients, and a state that was put back from a checkpoint, to the host."""
        cuda = False
        for parameter, copy in self.copies.items():
            if parameter.grad is None:
                copy.grad = None
                continue
            if copy.grad is None:
                copy.grad = _host_buffer(parameter)
            copy.data.copy_(parameter, non_blocking=True)
            copy.grad.copy_(parameter.grad, non_blocking=True)
            cuda |= parameter.is_cuda
            if self.state.get(parameter):
                # A checkpoint was put back on the parameter's device.
                state = {name: value.cpu() for name, value in self.state[parameter].items()}
                self.state[parameter] = self.inner.state[copy] = state
            else:
                self.inner.state.pop(copy, None)
        if cuda:
            torch.cuda.synchronize()


def _host_buffer(parameter: torch.Tensor) -> torch.Tensor:
    """Return memory of the parameter's shape on the host; page-locked where the parameter is on a GPU."""
    return torch.zeros(parameter.shape, dtype=parameter.dtype, pin_memory=parameter.is_cuda)
