"""AdamW in less memory: as good as fp32 moments, untouched by bad steps, and the same on the host."""

from __future__ import annotations

import sys

import pytest
import torch

from ekiden.config import build_config
from ekiden.errors import UsageError, UserError
from ekiden.modeling.build import build_model
from ekiden.training.compact_adamw import CompactAdamW
from ekiden.training.optimizer import build_optimizer

OPTIONS: list[dict[str, object]] = [
    {"optimizer_moments": "bf16"},
    {"optimizer_moments": "fp16"},
    {"optimizer_moments": "8bit"},
    {"cpu_offload": True},
    {"cpu_offload": True, "optimizer_moments": "bf16"},
]


def build(**settings: object):
    settings = {"optimizer": "adamw", **settings}
    if settings.get("optimizer_moments") == "8bit":
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    config = build_config(
        "gpt2-10m", hidden_size=64, num_hidden_layers=1, max_length=8, learning_rate=1e-2, **settings
    )
    model = build_model(config, 128, 0, 2, 1, seed=1)
    return model, build_optimizer(model, config)


def give_gradients(model: torch.nn.Module, step: int, scale: float = 1.0) -> None:
    """Gradients of many magnitudes: from `scale` down to a millionth of it, row by row."""
    random = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        size = 10.0 ** (-6 * torch.rand(parameter.shape[:1], generator=random))
        parameter.grad = (
            scale
            * torch.randn(parameter.shape, generator=random)
            * size.view(-1, *[1] * (parameter.dim() - 1))
        )


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def moved(steps: int, scale: float = 1.0, **settings: object) -> torch.Tensor:
    model, optimizer = build(**settings)
    before = flat(model).clone()
    for step in range(steps):
        give_gradients(model, step, scale)
        optimizer.step()
    return flat(model) - before


@pytest.mark.parametrize(("moments", "limit"), [("bf16", 0.01), ("fp16", 0.002), ("8bit", 0.1)])
@pytest.mark.parametrize("scale", [1.0, pytest.param(1e-6, marks=pytest.mark.slow)])  # 17 s each
def test_the_path_is_that_of_fp32_moments(moments: str, limit: float, scale: float) -> None:
    exact, found = moved(30, scale), moved(30, scale, optimizer_moments=moments)
    assert ((found - exact).norm() / exact.norm()).item() < limit


def test_on_the_host_it_is_the_same_to_the_last_bit() -> None:
    assert torch.equal(moved(5), moved(5, cpu_offload=True))
    assert torch.equal(
        moved(5, optimizer_moments="bf16"), moved(5, optimizer_moments="bf16", cpu_offload=True)
    )


@pytest.mark.parametrize("settings", OPTIONS)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_bad_step_changes_nothing(settings: dict[str, object], steps_before: int) -> None:
    model, optimizer = build(**settings)
    for step in range(steps_before):
        give_gradients(model, step)
        optimizer.step()
    weights = flat(model).clone()
    held = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    give_gradients(model, 9)
    next(model.parameters()).grad[0] = torch.nan
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(flat(model), weights)
    for parameter, state in held.items():
        for name, value in state.items():
            assert torch.equal(optimizer.state[parameter][name], value), name
    assert optimizer.state, "the memory is there after a trial step"


@pytest.mark.parametrize(("moments", "bytes_each"), [("bf16", 4.0), ("fp16", 4.0), ("8bit", 2.03)])
def test_bytes_a_parameter(moments: str, bytes_each: float) -> None:
    model, optimizer = build(optimizer_moments=moments)
    give_gradients(model, 0)
    optimizer.step()
    large = [p for p in model.parameters() if p.numel() >= 4096]
    total = sum(
        v.numel() * v.element_size() for p in large for k, v in optimizer.state[p].items() if "qmap" not in k
    )
    assert total / sum(p.numel() for p in large) == pytest.approx(bytes_each, abs=0.1)


def test_fp16_moments_hold_gradients_of_any_size() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = CompactAdamW([{"params": [parameter]}], torch.float16, 1e-3, (0.9, 0.95), 1e-30)
    for exponent in (-14, -7, 0, 7, 14):
        parameter.grad = torch.full((4,), 10.0**exponent)
        optimizer.step()
        assert torch.isfinite(parameter).all()
        state = optimizer.state[parameter]
        assert state["exp_avg_sq_root"].min() > 0
        assert torch.isfinite(state["exp_avg"]).all()


def test_refusals() -> None:
    with pytest.raises(UsageError, match=r"--beta2 0\.98 or less"):
        build_config("gpt2-10m", optimizer="adamw", optimizer_moments="bf16", beta2=0.999)
    with pytest.raises(UsageError, match="--cpu-offload works with --optimizer adamw"):
        build_config("gpt2-10m", optimizer="muon", cpu_offload=True)


def test_missing_bitsandbytes_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = build_config(
        "gpt2-10m",
        optimizer="adamw",
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        optimizer_moments="8bit",
    )
    with pytest.raises(UserError, match=r"pip install 'ekiden\[bnb\]'"):
        build_optimizer(build_model(config, 64, 0, 2, 1, seed=1), config)
