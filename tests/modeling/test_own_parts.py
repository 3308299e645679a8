"""GELU, norms and biases in C, alone and in whole models: the formulas of PyTorch and transformers, to rounding."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from ekiden.config import build_config
from ekiden.modeling import kernels
from ekiden.modeling.build import build_model, hidden_states
from ekiden.modeling.device import named_precision
from ekiden.modeling.own_parts import AddBias, Norm, bias_gelu, column_sums
from ekiden.modeling.prepare import prepare_model

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no AVX-512, or no C compiler")
CPU, FP32 = torch.device("cpu"), named_precision("fp32")


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 2


def with_gradients(function, *inputs):
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    made = function(*leaves)
    made.backward(torch.linspace(-1, 1, made.numel(), dtype=made.dtype).view_as(made))
    return [made.detach(), *(leaf.grad for leaf in leaves)]


def agree(ours, theirs, *inputs) -> None:
    exact = with_gradients(theirs, *(tensor.double() for tensor in inputs))
    plain = with_gradients(theirs, *inputs)
    for found, other, expected in zip(with_gradients(ours, *inputs), plain, exact):
        size = expected.abs().max()
        assert (found - expected).abs().max() <= 3 * (other - expected).abs().max() + 1e-6 * size


@pytest.mark.parametrize("count", [1, 3, 127, 128, 129, 300])
def test_each_is_as_exact_as_pytorch(count: int) -> None:
    x, gain, bias = rows(2, count, 48), rows(48), rows(48) + 1
    agree(bias_gelu, lambda x, b: functional.gelu(x + b, approximate="tanh"), x, bias)
    agree(AddBias.apply, lambda x, b: x + b, x, bias)
    layer = lambda x, w, b: functional.layer_norm(x, (48,), w, b, 1e-5)  # noqa: E731
    agree(lambda x, w, b: Norm.apply(x, w, b, 1e-5), layer, x, gain, bias)
    agree(
        lambda x, w: Norm.apply(x, w, None, 1e-6),
        lambda x, w: functional.rms_norm(x, (48,), w, 1e-6),
        x,
        gain,
    )


def test_gelu_far_out_is_finite_and_nan_stays() -> None:
    x = torch.zeros(1, 16)
    x[0, :7] = torch.tensor([-1e6, -100.0, -30.0, 0.0, 30.0, 1e6, torch.nan])
    made, gradient, _bias = with_gradients(bias_gelu, x, torch.zeros(16))
    assert torch.equal(made[0, :6], torch.tensor([0, 0, 0, 0, 30.0, 1e6]))
    assert torch.isfinite(gradient[0, :6]).all()
    assert made[0, 6].isnan()


def test_sums_do_not_depend_on_the_threads() -> None:
    x = rows(1000, 64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = column_sums(x)
        torch.set_num_threads(3)
        assert torch.equal(one, column_sums(x))
    finally:
        torch.set_num_threads(before)


def test_packed_attention_is_attention() -> None:
    mixed = rows(2, 70, 3 * 32)

    def apart(mixed: torch.Tensor) -> torch.Tensor:
        query, key, value = kernels._unpacked(mixed, 2)
        return kernels.attention(query, key, value).transpose(1, 2).flatten(2)

    together = with_gradients(lambda mixed: kernels.packed_attention(mixed, 2), mixed)
    assert all(torch.equal(one, other) for one, other in zip(together, with_gradients(apart, mixed)))


@pytest.mark.parametrize("compiling", [True, False])
@pytest.mark.parametrize("preset", ["gpt2-10m", "gemma3-tiny"])
def test_a_model_of_them_is_transformers(
    preset: str, compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initialization": "huggingface",
    }
    config = build_config(
        preset,
        max_length=48,
        sliding_window=20,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        **heads,
    )
    ids = torch.randint(3, 64, (2, 48), generator=torch.Generator().manual_seed(0))

    def results(own: bool, dtype: torch.dtype) -> list[torch.Tensor]:
        model = build_model(config, 64, 0, 2, 1, seed=3)
        with torch.no_grad():
            for weight in model.parameters():  # biases and gains too
                weight.add_(torch.linspace(-0.3, 0.3, weight.numel()).view_as(weight))
        model = model.to(dtype)
        if own:
            prepare_model(model, config, CPU, FP32)
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        made = hidden_states(model, ids)
        monkeypatch.undo()
        (made.square() * torch.linspace(0.5, 1.5, made.numel(), dtype=dtype).view_as(made)).sum().backward()
        return [made.detach(), *(p.grad for p in model.parameters())]

    exact = results(False, torch.float64)
    own, plain = (
        [
            float((found - expected).abs().max() / expected.abs().max())
            for found, expected in zip(results(ours, torch.float32), exact)
        ]
        for ours in (True, False)
    )
    # Rounding of a single gradient is a matter of luck; PyTorch's worst are 2e-5 to 1.5e-4 of their largest number.
    assert max(own) <= 2 * max(plain) < 5e-4


def test_another_type_goes_transformers_way() -> None:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = build_config("gpt2-10m", max_length=16, hidden_size=32, num_hidden_layers=2, **heads)
    model = build_model(config, 64, 0, 2, 1, seed=3)
    prepare_model(model, config, CPU, FP32)
    part = model.transformer.h[0]
    x = rows(1, 16, 32)
    single = part.mlp(part.ln_1(x))
    doubled = part.double().mlp(part.ln_1(x.double()))
    assert doubled.dtype == torch.float64
    assert torch.allclose(single.double(), doubled, atol=1e-5)
