"""fp16: where Gemma 3 overflows is found, and where its product is kept in fp32 it does not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from ekiden.config import TrainConfig, build_config
from ekiden.modeling import device as device_module
from ekiden.modeling.build import build_model, hidden_states
from ekiden.modeling.device import named_precision
from ekiden.modeling.fp16 import power_of_two_above, protect_from_overflow
from ekiden.modeling.prepare import prepare_model
from ekiden.training.optimizer import build_optimizer
from ekiden.training.step import accumulate_gradients, apply_update

FP16, CPU = named_precision("fp16"), torch.device("cpu")
IDS = torch.arange(16).reshape(2, 8)


def config(**changes: object) -> TrainConfig:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "hidden_size": 16}
    shape = {"num_hidden_layers": 2, "intermediate_size": 32, "max_length": 8, **heads}
    return build_config("gemma3-tiny", **{**shape, **changes})


def model(loud: float = 1.0):
    made = build_model(config(), 64, 0, 2, 1, seed=1)
    with torch.no_grad():
        for layer in made.model.layers:
            layer.mlp.gate_proj.weight.mul_(loud)
            layer.mlp.up_proj.weight.mul_(loud)
    return made


@torch.no_grad()
def largest_activations(
    model: PreTrainedModel, input_ids: torch.Tensor, dtype: torch.dtype
) -> dict[str, float]:
    """Return the largest absolute output of every linear layer and norm, by name, in one pass under autocast to `dtype`.

    What is infinite here, or near 65,504 in fp16, is where a model overflows.
    """
    found: dict[str, float] = {}
    hooks = []

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(value, torch.Tensor):
                # max() passes over nan, which must not be passed over here.
                largest = float(torch.nan_to_num(value.float(), nan=torch.inf).abs().max())
                found[name] = max(largest, found.get(name, 0.0))

        return hook

    for name, module in model.named_modules():
        if not list(module.children()) or name.endswith("mlp"):
            hooks.append(module.register_forward_hook(note(name)))
    try:
        with torch.autocast(input_ids.device.type, dtype, enabled=dtype != torch.float32):
            model.model(input_ids=input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def test_the_finder_finds_an_overflow() -> None:
    quiet = largest_activations(model(), IDS, torch.float16)
    assert max(quiet.values()) < 100
    loud = largest_activations(model(loud=5000.0), IDS, torch.float16)
    assert loud["model.layers.0.mlp.gate_proj"] < 65504
    assert loud["model.layers.0.mlp"] == float("inf")
    assert max(largest_activations(model(loud=5000.0), IDS, torch.float32).values()) < float("inf")


def test_a_product_beyond_fp16_stays_exact() -> None:
    made = model(loud=5000.0)
    exact = hidden_states(made, IDS)
    with torch.autocast("cpu", torch.float16):
        assert not torch.isfinite(hidden_states(made, IDS)).all()
        protect_from_overflow(made)
        found = hidden_states(made, IDS)
    assert torch.isfinite(found).all()
    assert ((found - exact).norm() / exact.norm()).item() < 0.01
    assert all(value < float("inf") for value in largest_activations(made, IDS, torch.float16).values())


def test_where_nothing_overflows_protection_changes_nothing_but_rounding() -> None:
    made = model()
    exact = hidden_states(made, IDS)
    with torch.autocast("cpu", torch.float16):
        usual = hidden_states(made, IDS)
        protect_from_overflow(made)
        found = hidden_states(made, IDS)
    assert (found - exact).norm() <= 1.1 * (usual - exact).norm()


@pytest.mark.parametrize("exponent", [8])
def test_scales_are_powers_of_two_by_token(exponent: int) -> None:
    values = torch.tensor([[0.0, 1.0], [256.0, -3.0], [257.0, 1.0], [-1e9, 2.0]])
    scale = power_of_two_above(values, exponent)
    assert scale.flatten().tolist()[:3] == [1.0, 1.0, 2.0]
    assert (values / scale).abs().max() <= 2**exponent
    assert torch.equal(values / scale * scale, values)


def train_steps(
    made: PreTrainedModel, rate: float, batches: Iterable[np.ndarray]
) -> tuple[list[float], int, float]:
    """Take a step with each batch of windows [4, 9]; return losses, steps skipped, and the scale at the end."""
    settings = config(learning_rate=rate, optimizer="adamw")
    optimizer, scaler = build_optimizer(made, settings), torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses, skipped = [], 0
    for windows in batches:
        batch = np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])
        loss = accumulate_gradients(made, [batch], 32, FP16, scaler)
        figures = apply_update(optimizer, loss, rate, 1.0, scaler)
        skipped += int(figures.skipped)
        losses.append(float(figures.loss))
    return losses, skipped, scaler.get_scale()


@pytest.mark.parametrize("loud", [1.0, 3000.0])
def test_gemma_trains_in_fp16_without_a_skipped_step(loud: float) -> None:
    made = model(loud)
    prepare_model(made, config(), CPU, FP16)
    windows = np.random.default_rng(0).integers(4, 64, (4, 9))
    losses, skipped, scale = train_steps(made, 1e-2, [windows] * 12)
    assert (skipped, scale) == (0, 1024.0)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("protected", [True, False])
def test_120_steps_in_fp16_need_the_fp32_islands(protected: bool) -> None:
    """With gate and up projections as large as long training makes them: without the islands no step gets through."""
    made = model(loud=3000.0)
    if protected:
        prepare_model(made, config(), CPU, FP16)
    numbers = np.random.default_rng(0)
    pattern = numbers.integers(4, 64, 24)
    starts = numbers.integers(0, 16, (120 if protected else 5, 4))
    losses, skipped, _scale = train_steps(made, 3e-3, (pattern[s[:, None] + np.arange(9)] for s in starts))
    if not protected:
        assert skipped == 5 and not np.isfinite(losses).any()
        return
    assert skipped == 0 and np.isfinite(losses).all()
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])


@pytest.mark.parametrize("protected", [True, False])
def test_from_scratch_in_fp16_the_islands_decide(protected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the usual start, at a rate that takes the weights in 40 steps to where they overflow; nothing else is made large."""
    monkeypatch.setattr(device_module, "has_instructions", lambda dtype: True)  # else the logits are fp32
    settings = config(hidden_size=64, intermediate_size=256, optimizer="adamw")
    made = build_model(settings, 64, 0, 2, 1, seed=1)
    if protected:
        prepare_model(made, settings, CPU, FP16)
    starts = np.random.default_rng(0).integers(4, 64, (40, 4, 1))
    losses, skipped, scale = train_steps(made, 0.3, ((s + 7 * np.arange(9)) % 60 + 4 for s in starts))
    if not protected:
        assert np.isfinite(losses[:10]).all(), "it begins well"
        assert skipped > 0 and scale < 1024.0 and not np.isfinite(losses[-5:]).any()
        return
    assert (skipped, scale) == (0, 1024.0)
    assert np.mean(losses[-5:]) < 0.4 * losses[0]


def test_gpt2_is_left_as_it_is() -> None:
    made = build_model(build_config("gpt2-10m", hidden_size=16, num_hidden_layers=1), 64, 0, 2, 1, seed=1)
    before = made.transformer.h[0].mlp.forward
    protect_from_overflow(made)
    assert made.transformer.h[0].mlp.forward == before
