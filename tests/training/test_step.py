"""The optimizer step: its gradient does not depend on how the batch is cut; bad steps leave the weights alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from ekiden.config import TrainConfig, build_config
from ekiden.modeling.build import build_model
from ekiden.modeling.device import select_precision
from ekiden.training.optimizer import build_optimizer, learning_rate
from ekiden.training.step import accumulate_gradients, apply_update

FP32 = select_precision(torch.device("cpu"), "fp32")


def small(preset: str) -> TrainConfig:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    return build_config(
        preset, hidden_size=16, num_hidden_layers=2, intermediate_size=32, max_length=8, **heads
    )


def batch(count: int, length: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(4, 60, (count, length + 1))


def cut(windows: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    parts = [windows[i : i + size] for i in range(0, len(windows), size)]
    return [(np.ascontiguousarray(p[:, :-1]), np.ascontiguousarray(p[:, 1:])) for p in parts]


@pytest.mark.parametrize("preset", ["gpt2-10m", "gemma3-tiny"])
def test_gradient_and_loss_do_not_depend_on_the_microbatch(preset: str) -> None:
    config = small(preset)
    windows = batch(6)
    results = []
    for size in (6, 4, 1):
        model = build_model(config, 64, 0, 2, 1, seed=1).double()
        loss = accumulate_gradients(model, cut(windows, size), 48, FP32, loss_chunk_size=5)
        results.append((float(loss), torch.cat([p.grad.flatten() for p in model.parameters()])))
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-4, atol=1e-6)


def test_a_step_lowers_the_loss_on_its_own_batch() -> None:
    config = small("gpt2-10m")
    model = build_model(config, 64, 0, 2, 1, seed=1)
    optimizer = build_optimizer(model, config)
    losses = []
    for _ in range(20):
        loss = accumulate_gradients(model, cut(batch(4), 2), 32, FP32)
        losses.append(float(apply_update(optimizer, loss, 1e-2, 1.0).loss))
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("poison", ["gradient", "loss"])
def test_a_step_that_is_not_finite_changes_nothing(poison: str) -> None:
    config = small("gemma3-tiny")
    model = build_model(config, 64, 0, 2, 1, seed=1)
    optimizer = build_optimizer(model, config)
    loss = accumulate_gradients(model, cut(batch(2), 2), 16, FP32)
    apply_update(optimizer, loss, 1e-3, 1.0)
    before = [p.detach().clone() for p in model.parameters()]
    moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
    loss = accumulate_gradients(model, cut(batch(2), 2), 16, FP32)
    if poison == "gradient":
        next(model.parameters()).grad[0, 0] = float("nan")
    else:
        loss = loss * float("inf")
    figures = apply_update(optimizer, loss, 1e-3, 1.0)
    assert float(figures.skipped) == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    now = [value for state in optimizer.state.values() for value in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, now))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weight_decay_is_on_matrices_only(kind: str) -> None:
    """With Muon, only on what it trains: the embedding has none."""
    config = dataclasses.replace(small("gemma3-tiny"), optimizer=kind)
    model = build_model(config, 64, 0, 2, 1, seed=1)
    optimizer = build_optimizer(model, config)
    embedding = model.get_input_embeddings().weight
    for group in optimizer.param_groups:
        for p in group["params"]:
            decays = p.dim() >= 2 and not (kind == "muon" and p is embedding)
            assert group["weight_decay"] == (0.1 if decays else 0.0)


def test_learning_rate_warms_up_and_decays_to_a_tenth() -> None:
    config = build_config(
        "gpt2-10m",
        schedule="cosine",
        optimizer="adamw",
        learning_rate=1.0,
        warmup_steps=10,
        min_learning_rate_ratio=0.1,
    )
    rates = [learning_rate(step, config, 200) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    # A short run spends at most a tenth of itself warming up.
    assert learning_rate(2, config, 20) == pytest.approx(1.0)
