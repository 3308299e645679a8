"""Muon: orthogonal updates in every arithmetic, fused matrices part by part, one optimizer with what AdamW keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import campaign
import pytest
import torch
from torch import nn

from ekiden.config import TrainConfig, build_config
from ekiden.modeling.build import build_model
from ekiden.training import step as step_module
from ekiden.training.loop import train
from ekiden.training.muon import Matrix, Muon, even_out, multiply_dtype, orthogonalize
from ekiden.training.optimizer import block_matrices, build_optimizer, set_learning_rate
from ekiden.training.step import apply_update

FAMILIES = ["gpt2-10m", "gemma3-tiny"]
SHAPE = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 16}
SHAPE |= {"num_hidden_layers": 2, "intermediate_size": 32, "max_length": 8}


def small(preset: str, **more: object) -> TrainConfig:
    return build_config(preset, optimizer="muon", **{**SHAPE, **more})


def with_gradients(preset: str, **more: object) -> tuple[nn.Module, torch.optim.Optimizer]:
    config = small(preset, **more)
    model = build_model(config, 64, 0, 2, 1, seed=1)
    numbers = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=numbers)
    return model, build_optimizer(model, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 48, 96), (1, 96, 48)])
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_singular_values_become_one_whatever_the_arithmetic_and_the_size(dtype, shape, size) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * size
    result = orthogonalize(matrices, dtype)
    values = torch.linalg.svdvals(result)
    assert result.shape == matrices.shape and result.dtype == torch.float32
    assert values.min() > 0.8 and values.max() < 1.2
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    cosine = (result * (u @ v)).sum((-2, -1)) / (result.norm(dim=(-2, -1)) * math.sqrt(48))
    assert cosine.min() > 0.98


def test_a_gradient_of_zeros_moves_nothing() -> None:
    assert not orthogonalize(torch.zeros(2, 4, 6), torch.float16).any()
    assert not even_out(torch.zeros(2, 4, 6)).any()


@pytest.mark.parametrize("shape", [(2, 96, 24), (2, 24, 96), (2, 24, 24)])
def test_all_vectors_along_the_longer_side_move_as_far(shape: tuple[int, int, int]) -> None:
    numbers = torch.Generator().manual_seed(0)
    # Units of very different gradients, one of which has none.
    sizes = torch.logspace(-2, 0, max(shape[1:]))
    sizes[0] = 0
    along = -1 if shape[1] >= shape[2] else -2
    before = orthogonalize(torch.randn(shape, generator=numbers) * sizes.unsqueeze(along), torch.float32)
    after = even_out(before)
    lengths = after.norm(dim=along)
    assert not lengths[:, 0].any()
    torch.testing.assert_close(lengths[:, 1:], lengths[:, 1:2].expand_as(lengths[:, 1:]))
    torch.testing.assert_close(after.norm(dim=(-2, -1)), before.norm(dim=(-2, -1)))
    if shape[1] != shape[2]:
        assert before.norm(dim=along)[:, 1:].max() > 5 * before.norm(dim=along)[:, 1:].min()


def test_the_setting_reaches_the_optimizer() -> None:
    """Rows of the widening matrix of the feed-forward layer, after one step."""
    spreads = []
    for even in (False, True):
        model, optimizer = with_gradients("gemma3-tiny", muon_even=even, weight_decay=0.0)
        weight = model.get_submodule("model.layers.0.mlp.gate_proj").weight
        before = weight.detach().clone()
        optimizer.step()
        moved = (weight.detach() - before).norm(dim=1)
        spreads.append(float(moved.max() / moved.min()))
    assert spreads[1] < 1.01 < spreads[0]


def test_the_arithmetic_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert multiply_dtype(torch.device("cpu")) == torch.float32
    for capability, dtype in [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert multiply_dtype(torch.device("cuda", 0)) == dtype


@pytest.mark.parametrize("preset", FAMILIES)
def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(preset: str) -> None:
    model, optimizer = with_gradients(preset)
    names = {id(p): name for name, p in model.named_parameters()}
    taken = {names[id(m.parameter)] for m in block_matrices(model)}
    assert taken == {
        n for n, p in model.named_parameters() if p.dim() == 2 and (".layers." in n or ".h." in n)
    }
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(names)
    optimizer.step()
    for parameter in model.parameters():
        keys = {"momentum_buffer"} if names[id(parameter)] in taken else {"step", "exp_avg", "exp_avg_sq"}
        assert set(optimizer.state[parameter]) == keys


def test_a_fused_matrix_is_updated_like_its_parts() -> None:
    """GPT-2's [in, 3 * out] against three matrices [out, in]."""
    numbers = torch.Generator().manual_seed(0)
    parts = [nn.Parameter(torch.randn(8, 8, generator=numbers)) for _ in range(3)]
    fused = nn.Parameter(torch.cat([p.detach() for p in parts]).mT.contiguous())
    for part in parts:
        part.grad = torch.randn(8, 8, generator=numbers)
    fused.grad = torch.cat([p.grad for p in parts]).mT
    for matrices in ([Matrix(p) for p in parts], [Matrix(fused, parts=3, transposed=True)]):
        rest = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
        Muon(matrices, rest, lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(
        fused.detach().mT, torch.cat([p.detach() for p in parts]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (16, 16)])
def test_an_update_changes_outputs_by_as_much_whatever_the_shape(shape: tuple[int, int]) -> None:
    """The spectral norm of an update is lr * sqrt(out / in) for a layer that widens, else lr."""
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    Muon([Matrix(weight)], torch.optim.AdamW([nn.Parameter(torch.zeros(1))]), lr=0.02).step()
    norm = torch.linalg.matrix_norm(weight.detach(), 2)
    assert float(norm) == pytest.approx(0.02 * max(1.0, shape[0] / shape[1]) ** 0.5, rel=0.2)


def test_momentum_and_decay_follow_the_formula() -> None:
    numbers = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 6, generator=numbers))
    optimizer = Muon(
        [Matrix(weight)],
        torch.optim.AdamW([nn.Parameter(torch.zeros(1))]),
        0.1,
        momentum=0.9,
        weight_decay=0.5,
    )
    expected, average = weight.detach().clone(), torch.zeros(6, 6)
    for _ in range(3):
        gradient = torch.randn(6, 6, generator=numbers)
        average = 0.9 * average + 0.1 * gradient
        look_ahead = 0.1 * gradient + 0.9 * average
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * orthogonalize(look_ahead[None], torch.float32)[0]
        weight.grad = gradient
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preset", FAMILIES)
def test_a_step_that_is_not_finite_changes_nothing(preset: str) -> None:
    model, optimizer = with_gradients(preset)
    apply_update(optimizer, torch.ones(()), 1e-2, 1.0)
    weights = [p.detach().clone() for p in model.parameters()]
    moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    assert float(apply_update(optimizer, torch.ones(()), 1e-2, 1.0).skipped) == 1
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))
    now = [value for state in optimizer.state.values() for value in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, now))


def test_a_grad_scaler_sees_one_optimizer() -> None:
    """Scaled gradients give the unscaled ones' update; an overflow is skipped, lowers the scale, and the next is not."""
    plain, plain_optimizer = with_gradients("gemma3-tiny")
    scaled, optimizer = with_gradients("gemma3-tiny")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for parameter in scaled.parameters():
        parameter.grad *= 1024.0
    scaler.scale(torch.ones(()))
    apply_update(plain_optimizer, torch.ones(()), 1e-2, 1.0)
    apply_update(optimizer, torch.ones(()), 1e-2, 1.0, scaler)
    for a, b in zip(plain.parameters(), scaled.parameters()):
        torch.testing.assert_close(a, b)
    before = [p.detach().clone() for p in scaled.parameters()]
    for parameter in scaled.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    assert float(apply_update(optimizer, torch.ones(()), 1e-2, 1.0, scaler).skipped) == 1
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(a, b) for a, b in zip(before, scaled.parameters()))


def test_learning_rates_of_the_groups_follow_one_schedule_and_the_width() -> None:
    for width, ratio in ((16, 4.0), (64, 2.0)):
        _model, optimizer = with_gradients(
            "gemma3-tiny", hidden_size=width, learning_rate=0.003, matrix_learning_rate=0.02
        )
        set_learning_rate(optimizer, 0.0015)
        matrices, embedding, vectors = (group["lr"] for group in optimizer.param_groups)
        assert (matrices, embedding, vectors) == pytest.approx((0.01, 0.0015 * ratio, 0.0015))


@pytest.mark.parametrize("preset", FAMILIES)
def test_a_resumed_run_is_the_uninterrupted_one(
    settings: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    more = {"optimizer": "muon", "schedule": "wsd", "decay_ratio": 0.5, "initialization": "scaled"}
    train(settings(7, preset, output_dir=tmp_path / "whole", **more))
    backwards = 0

    def stop(index: int, phase: str) -> None:
        nonlocal backwards
        backwards += index >= 0 and phase == "backward"
        if backwards == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(step_module, "fault_hook", stop)
    with pytest.raises(KeyboardInterrupt):
        train(settings(7, preset, output_dir=tmp_path / "parts", **more))
    monkeypatch.setattr(step_module, "fault_hook", None)
    train(settings(7, preset, output_dir=tmp_path / "parts", **more))
    one, two = (campaign.outcome(tmp_path / name) for name in ("whole", "parts"))
    assert one.losses == two.losses and one.weights == two.weights and list(one.losses) == [*range(1, 8)]
    assert min((tmp_path / "parts" / "checkpoints").glob("step-*")).name == "step-00000003"
