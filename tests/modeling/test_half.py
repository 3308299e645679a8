"""Half precision as fp32 products of rounded numbers: what the instructions compute, eager and compiled, in whole models."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ekiden.config import build_config
from ekiden.modeling import device as device_module
from ekiden.modeling import half, kernels
from ekiden.modeling.attention import attention_name
from ekiden.modeling.build import build_model, head_weight, hidden_states
from ekiden.modeling.device import HALVES, has_instructions, in_fp32, named_precision, select_precision
from ekiden.modeling.loss import chunked_cross_entropy
from ekiden.modeling.prepare import prepare_model
from ekiden.training.step import accumulate_gradients

CPU = torch.device("cpu")


@pytest.fixture
def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "has_instructions", lambda dtype: False)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def results(function, *inputs):
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    made = function(*leaves)
    made.backward(numbers(*made.shape, seed=9).to(made.dtype))
    return [made.detach(), *(leaf.grad for leaf in leaves)]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def as_autocast(function, dtype: torch.dtype):
    def run(*inputs):
        with torch.autocast("cpu", dtype):
            return function(*inputs)

    return run


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("turned", [False, True])
def test_a_product_is_autocasts(dtype: torch.dtype, turned: bool) -> None:
    x, weight, bias = numbers(2, 33, 48), numbers(48, 40) / 7, numbers(40)
    if turned:
        weight = weight.t().contiguous().t()
    plain = lambda x, w, b: torch.nn.functional.linear(x, w.t(), b)  # noqa: E731
    exact = results(plain, x.double(), weight.double(), bias.double())
    native = results(as_autocast(plain, dtype), x, weight, bias)
    ours = results(lambda x, w, b: half.product(x.to(dtype), w, b), x, weight, bias)
    for mine, other, expected in zip(ours, native, exact):
        assert mine.dtype == other.dtype
        assert mine.shape == other.shape
        assert error(mine, expected) <= 1.02 * error(other, expected)
        # The same numbers but where a sum lies between two of the type: within one of its steps.
        assert (mine.float() - other.float()).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()
    assert ours[2].stride() == weight.stride()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_attention_is_not_less_exact_than_native(dtype: torch.dtype, masked: bool) -> None:
    query, key, value = (numbers(2, 3, 70, 24, seed=seed) for seed in range(3))
    mask = torch.zeros(70, 70).masked_fill_(torch.ones(70, 70).tril(-9).bool(), -torch.inf)[None, None]

    def native(*tensors):
        given = mask.to(tensors[0].dtype) if masked else None
        return scaled_dot_product_attention(*tensors, given, is_causal=not masked, scale=0.3)

    exact = results(native, *(t.double() for t in (query, key, value)))
    given = [t.to(dtype) for t in (query, key, value)]
    ours = results(lambda *t: half.flash_attention(*t, mask.to(dtype) if masked else None, 0.3), *given)
    for mine, other, expected in zip(ours, results(native, *given), exact):
        assert mine.dtype == dtype
        assert mine.shape == expected.shape
        assert error(mine, expected) <= 1.05 * error(other, expected)


def test_the_operators_keep_their_word() -> None:
    x = numbers(2, 7, 16).bfloat16().requires_grad_()
    weight, bias = numbers(8, 16).t().requires_grad_(), numbers(8).requires_grad_()
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(half.product, (x, weight, bias), test_utils=tests)
    torch.library.opcheck(half.product, (x, weight, None), test_utils=tests)
    query = numbers(1, 2, 9, 16).bfloat16().requires_grad_()
    torch.library.opcheck(half._attention, (query, query, query, None, 0.25), test_utils=tests)


SIZES = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64}


def gradients(preset: str, precision: str, **more):
    """Return a small model's loss and gradients, in fp64 where `precision` is fp64."""
    size = {**SIZES, "num_key_value_heads": 1, "head_dim": 16} if preset == "gemma3-tiny" else SIZES
    config = build_config(
        preset, max_length=70, sliding_window=40, num_hidden_layers=6, initialization="huggingface", **size, **more
    )  # fmt: skip
    model = build_model(config, 96, 0, 2, 1, seed=3)
    for weight in model.parameters():
        weight.data *= 3  # far from where all gradients are small
    arithmetic = named_precision("fp32" if precision == "fp64" else precision)
    if precision == "fp64":
        model.double()
    prepare_model(model, config, CPU, arithmetic)
    ids = torch.randint(3, 96, (2, 70), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", arithmetic.dtype, enabled=arithmetic.dtype in HALVES):
        hidden = hidden_states(model, ids)
        loss = chunked_cross_entropy(hidden.flatten(0, 1), head_weight(model), ids.roll(-1).flatten())
    scale = 1024.0 if precision == "fp16" else 1.0
    (loss * scale / 140).backward()
    return [loss.detach() / 140, *(p.grad / scale for p in model.parameters())], attention_name(model)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("preset", "more"),
    [
        ("gpt2-10m", {}),
        ("gemma3-tiny", {}),
        ("gemma3-tiny", {"activation_checkpointing": True}),
        ("gpt2-10m", {"document_mask": True}),
        pytest.param("gpt2-10m", {"compile": "on"}, marks=pytest.mark.slow),
        pytest.param("gemma3-tiny", {"compile": "on"}, marks=pytest.mark.slow),
    ],
)
def test_a_model_is_not_less_exact_than_natively(
    preset: str, more: dict, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "library", lambda: None)
        exact, _ = gradients(preset, "fp64", **{**more, "compile": "off"})
    monkeypatch.setattr(device_module, "has_instructions", lambda dtype: True)
    native, _ = gradients(preset, precision, **{**more, "compile": "off"})
    monkeypatch.setattr(device_module, "has_instructions", lambda dtype: False)
    ours, _ = gradients(preset, precision, **more)
    mine, theirs = ([error(one, other) for one, other in zip(found, exact)] for found in (ours, native))
    # Of twenty models the sum was 0.88 to 1.07 of the native one's, 0.96 on average; a single weight's is luck.
    assert sum(mine) <= 1.15 * sum(theirs)
    assert max(mine) <= 2 * max(theirs)
    assert sum(mine) > 0.1 * sum(theirs)  # half precision it is


def test_without_our_kernels_it_is_pytorchs_attention_in_fp32(
    without_instructions: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "library", lambda: None)
    called: list[torch.dtype] = []
    flash = half.flash_attention
    monkeypatch.setattr(
        "ekiden.modeling.attention.flash_attention",
        lambda query, *others: called.append(query.dtype) or flash(query, *others),
    )
    found, name = gradients("gemma3-tiny", "bf16")
    assert "own" not in name
    assert set(called) == {torch.bfloat16}
    assert all(torch.isfinite(one).all() for one in found)


def test_what_is_kept_for_the_backward_pass_stays_in_the_type(without_instructions: None) -> None:
    config = build_config("gpt2-10m", max_length=48, num_hidden_layers=2, **SIZES)
    model = build_model(config, 96, 0, 2, 1, seed=3)
    prepare_model(model, config, CPU, named_precision("bf16"))
    kept: list[torch.Tensor] = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with keep, torch.autocast("cpu", torch.bfloat16):
        hidden_states(model, torch.zeros(1, 48, dtype=torch.int64))
    weights = {p.data_ptr() for p in model.parameters()}
    wide = [t for t in kept if t.shape[-1] in (3 * 32, 64) and t.data_ptr() not in weights and t.dim() == 3]
    assert wide
    assert {t.dtype for t in wide} == {torch.bfloat16}


def test_where_the_instructions_are_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "has_instructions", lambda dtype: True)
    config = build_config("gpt2-10m", max_length=64, num_hidden_layers=1, **SIZES)
    model = build_model(config, 96, 0, 2, 1, seed=3)
    prepare_model(model, config, CPU, named_precision("bf16"))
    called = {type(layer.forward).__name__ for layer in model.modules()}
    assert called == {"method"}
    assert not any(getattr(layer.forward, "__func__", None) is half._linear for layer in model.modules())
    assert "own" not in attention_name(model)


def test_a_loss_scale_finds_overflow(without_instructions: None) -> None:
    config = build_config("gpt2-10m", max_length=64, num_hidden_layers=1, **SIZES)
    precision = select_precision(CPU, "fp16")
    model = build_model(config, 96, 0, 2, 1, seed=3)
    prepare_model(model, config, CPU, precision)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(3, 96, (2, 64), generator=torch.Generator().manual_seed(0)).numpy()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    accumulate_gradients(model, [(ids, ids)], ids.size, precision, scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39  # 2**40 is above fp16's numbers: the step was left out


def test_the_processor_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = has_instructions.__wrapped__
    for flag in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, flag, lambda: False)
    monkeypatch.setattr(device_module.platform, "machine", lambda: "x86_64")
    assert not asked(torch.bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert asked(torch.bfloat16) == torch.backends.mkldnn.is_available()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not asked(torch.bfloat16)
    assert not asked(torch.float16)
    assert not in_fp32(torch.device("cuda"), torch.bfloat16)
    assert not in_fp32(CPU, torch.float32)
