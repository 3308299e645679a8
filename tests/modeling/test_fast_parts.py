"""GELU and GPT-2's layers with less work: transformers' own formulas, to rounding, compiled or not."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from ekiden.config import build_config
from ekiden.modeling.build import build_model, hidden_states
from ekiden.modeling.fast_parts import TanhGelu, install_fast_parts

IDS = torch.arange(32).reshape(2, 16)


def model(preset: str) -> PreTrainedModel:
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initialization": "huggingface",
    }
    config = build_config(
        preset, hidden_size=16, num_hidden_layers=2, intermediate_size=32, max_length=16, **heads
    )
    made = build_model(config, 64, 0, 2, 1, seed=1)
    with torch.no_grad():
        for weight in made.parameters():  # biases too, which begin at zero
            weight.add_(torch.linspace(-0.5, 0.5, weight.numel()).view_as(weight))
    return made


def states_and_gradients(model: PreTrainedModel) -> list[torch.Tensor]:
    states = hidden_states(model, IDS)
    (states.square() * torch.linspace(0.5, 1.5, states.numel()).view_as(states)).sum().backward()
    found = [states.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("compiling", [True, False])
@pytest.mark.parametrize("preset", ["gpt2-10m", "gemma3-tiny"])
def test_states_and_gradients_are_those_of_transformers(
    preset: str, compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model(preset).double()
    expected = states_and_gradients(made)
    install_fast_parts(made)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    found = states_and_gradients(made)
    assert sum(isinstance(module, TanhGelu) for module in made.modules()) == 2
    assert len(found) == len(expected)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(found, expected))


def test_under_autocast_the_type_is_that_of_addmm(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model("gpt2-10m")
    layer = made.transformer.h[0].mlp.c_fc
    x = torch.linspace(-1, 1, 64).view(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        install_fast_parts(made)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        found = layer(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.allclose(found, expected, rtol=0.02, atol=0.02)


def test_gelu_far_out_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.tensor([-1e6, -100.0, -30.0, 0.0, 30.0, 1e6], requires_grad=True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    y = TanhGelu()(x)
    y.sum().backward()
    assert torch.equal(y.detach(), torch.tensor([0, 0, 0, 0, 30.0, 1e6]))
    assert torch.equal(x.grad, torch.tensor([0, 0, 0, 0.5, 1, 1]))
