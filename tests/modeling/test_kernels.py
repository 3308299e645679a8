"""Attention and softmax in C against float64, at every edge of their blocks, and what happens without them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ekiden.config import build_config
from ekiden.modeling import device as device_module
from ekiden.modeling import kernels
from ekiden.modeling.attention import OWN, attention_name
from ekiden.modeling.attention_choice import choose_attention
from ekiden.modeling.build import build_model, hidden_states
from ekiden.modeling.device import named_precision
from ekiden.modeling.loss import chunked_cross_entropy
from ekiden.modeling.prepare import prepare_model

CPU, FP32 = torch.device("cpu"), named_precision("fp32")
needed = pytest.mark.skipif(kernels.library() is None, reason="no AVX-512, or no C compiler")


def tensors(
    batch: int, heads: int, groups: int, length: int, units: int, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    numbers = torch.Generator().manual_seed(length + units)
    sizes = [(batch, length, heads, units), (batch, length, groups, units), (batch, groups, length, units)]
    made = [torch.randn(size, generator=numbers, dtype=dtype) for size in (*sizes, sizes[0])]
    return [made[0].transpose(1, 2), made[1].transpose(1, 2), made[2], made[3].transpose(1, 2)]


def plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    position = torch.arange(query.shape[2])
    behind = position[:, None] - position
    mask = (behind >= 0) & (behind < (window or query.shape[2]))
    return scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True)


def results(attend, query, key, value, upstream):
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    made = attend(*leaves)
    made.backward(upstream)
    return [made.detach(), *(leaf.grad for leaf in leaves)]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1.0)).item()


@needed
@pytest.mark.parametrize(
    ("shape", "window", "scaling"),
    [
        ((2, 3, 3, 200, 32), None, None),
        ((1, 4, 1, 130, 64), None, 0.3),
        ((1, 4, 2, 300, 16), 70, None),
        ((1, 2, 2, 257, 128), 64, None),
        ((1, 2, 1, 300, 48), 1, None),
        ((1, 2, 1, 300, 48), 65, None),
        ((1, 2, 1, 64, 32), 300, None),
        ((2, 2, 1, 63, 80), None, None),
        ((1, 1, 1, 1, 32), None, None),
        ((1, 2, 1, 1100, 16), None, None),  # whose keys are divided among tasks
        ((1, 2, 1, 1100, 16), 150, None),
        ((1, 1, 1, 700, 16), 699, None),
    ],
)
def test_attention_is_as_exact_as_plain_arithmetic(shape, window, scaling) -> None:
    *inputs, upstream = tensors(*shape)
    doubles = [tensor.double() for tensor in inputs]
    exact = results(lambda *qkv: plain(*qkv, scaling, window), *doubles, upstream.double())
    theirs = results(lambda *qkv: plain(*qkv, scaling, window), *inputs, upstream)
    ours = results(lambda *qkv: kernels.attention(*qkv, scaling, window), *inputs, upstream)
    for found, other, expected in zip(ours, theirs, exact):
        assert found.shape == expected.shape
        assert error(found, expected) <= 3 * error(other, expected) + 1e-6


@needed
def test_attention_of_scores_far_apart() -> None:
    *inputs, upstream = tensors(1, 2, 2, 150, 32)
    inputs[0] = inputs[0] * 60  # most probabilities are 0, one is 1
    exact = results(lambda *qkv: plain(*qkv, None, None), *(t.double() for t in inputs), upstream.double())
    found = results(lambda *qkv: kernels.attention(*qkv), *inputs, upstream)
    assert all(torch.isfinite(one).all() and error(one, other) < 1e-4 for one, other in zip(found, exact))


@needed
@pytest.mark.parametrize("shape", [(2, 4, 2, 200, 32), (1, 2, 1, 1100, 16)])
def test_no_number_depends_on_the_threads(shape) -> None:
    *inputs, upstream = tensors(*shape)
    before = torch.get_num_threads()
    try:
        both = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            both.append(results(lambda *qkv: kernels.attention(*qkv), *inputs, upstream))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*both))


@needed
def test_a_nan_stays_one() -> None:
    inputs = tensors(1, 1, 1, 70, 32)[:3]
    inputs[1] = inputs[1].clone()
    inputs[1][0, 0, 20, 3] = torch.nan
    found = kernels.attention(*inputs)[0, 0]
    assert torch.isfinite(found[:20]).all()
    assert found[20:].isnan().all()
    hidden = torch.ones(3, 4)
    hidden[1, 1] = torch.nan
    loss = chunked_cross_entropy(hidden, torch.ones(50, 4), torch.tensor([1, 2, 3]))
    assert math.isnan(loss)


@needed
def test_compiled_and_not_the_operator_keeps_its_word() -> None:
    *inputs, _upstream = tensors(1, 2, 1, 70, 16)
    arguments = [tensor.detach().requires_grad_() for tensor in inputs]
    torch.library.opcheck(
        kernels._attention,
        (*arguments, 0.25, 64),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@needed
@pytest.mark.parametrize("preset", ["gpt2-10m", "gemma3-tiny"])
def test_a_model_takes_it_and_its_windows(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}
    if preset == "gemma3-tiny":
        changes |= {"num_key_value_heads": 1, "head_dim": 16}
    config = build_config(
        preset,
        max_length=150,
        sliding_window=40,
        num_hidden_layers=6,
        initialization="huggingface",
        **changes,
    )
    ids = torch.randint(3, 64, (2, 150), generator=torch.Generator().manual_seed(0))

    def states(own: bool, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        if not own:
            monkeypatch.setattr(kernels, "attends", lambda *_: False)
        model = build_model(config, 64, 0, 2, 1, seed=3).to(dtype)
        prepare_model(model, config, CPU, FP32)
        assert ("own" in attention_name(model)) == own
        made = hidden_states(model, ids)
        (made.square() * torch.linspace(0.5, 1.5, made.numel(), dtype=dtype).view_as(made)).sum().backward()
        return [made.detach(), *(p.grad for p in model.parameters())]

    for found, other, exact in zip(states(own=True), states(own=False), states(False, torch.float64)):
        assert error(found, exact) <= 3 * error(other, exact) + 1e-5


@needed
def test_the_decoder_stays_one_graph() -> None:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = build_config("gpt2-10m", max_length=32, hidden_size=32, num_hidden_layers=2, **heads)
    model = build_model(config, 64, 0, 2, 1, seed=3)
    prepare_model(model, config, CPU, FP32)
    ids = torch.zeros(1, 32, dtype=torch.int64)
    found = torch._dynamo.explain(hidden_states)(model, ids)
    assert found.graph_break_count == 0, found.break_reasons


@needed
def test_document_masks_and_types_with_instructions_are_left_to_pytorch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = build_config("gpt2-10m", max_length=64)
    assert choose_attention(config, CPU, FP32).causal == OWN
    assert choose_attention(config, CPU, FP32, boundary=(2, True)).masked != OWN
    for native in (True, False):
        monkeypatch.setattr(device_module, "has_instructions", lambda dtype, native=native: native)
        assert (choose_attention(config, CPU, named_precision("bf16")).causal == OWN) != native


def test_without_a_compiler_pytorch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "library", lambda: None)
    config = build_config("gpt2-10m", max_length=64)
    assert choose_attention(config, CPU, FP32).causal != OWN
    with pytest.raises(RuntimeError, match="AVX-512"):
        kernels.attention(*tensors(1, 1, 1, 8, 16)[:3])
    loss = chunked_cross_entropy(torch.zeros(2, 4), torch.zeros(8, 4), torch.tensor([1, 2]))
    assert loss.item() == pytest.approx(2 * math.log(8))


def test_a_compiler_that_fails_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "OPTIONS", ["-no-such-option"])
    assert kernels.library.__wrapped__() is None
    monkeypatch.undo()
    monkeypatch.setenv("EKIDEN_KERNEL", "0")
    assert kernels.library.__wrapped__() is None
