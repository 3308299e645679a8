"""The chunked loss against plain cross-entropy, and both against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ekiden.modeling import loss as loss_module
from ekiden.modeling.loss import IGNORE, chunk_rows_for, chunked_cross_entropy

N, D, V = 70, 24, 300


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss_module, "MIN_ROWS", 1)


def data(ignored: float = 0.2, scale: float = 1.0, dtype=torch.float32):
    numbers = torch.Generator().manual_seed(4)
    hidden = torch.randn(N, D, generator=numbers) * scale
    weight = torch.randn(V, D, generator=numbers) * 0.3
    targets = torch.randint(V, (N,), generator=numbers)
    targets[torch.rand(N, generator=numbers) < ignored] = IGNORE
    return hidden.to(dtype), weight.to(dtype), targets


def measure(function, hidden, weight, factor=1.0):
    """Return the loss and the gradients of factor x loss, in float64."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = function(hidden, weight)
    (loss * factor).backward()
    return loss.detach().double(), hidden.grad.double() / factor, weight.grad.double() / factor


def plain(targets):
    return lambda h, w: F.cross_entropy((h @ w.T).float(), targets, reduction="sum")


def reference(targets, hidden, weight):
    exact = lambda h, w: F.cross_entropy(h @ w.T, targets, reduction="sum")  # noqa: E731
    return measure(exact, hidden.double(), weight.double())


def error(found, expected):
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_rows", [1, 7, 16, 70, 1000])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_no_less_accurate_than_plain_cross_entropy(dtype, chunk_rows, scale):
    hidden, weight, targets = data(scale=scale, dtype=dtype)
    exact = reference(targets, hidden, weight)
    ours = measure(lambda h, w: chunked_cross_entropy(h, w, targets, chunk_rows), hidden, weight)
    theirs = measure(plain(targets), hidden, weight)
    slack = {torch.float32: 2e-7, torch.bfloat16: 1e-3, torch.float16: 1e-4}[dtype]
    for found, other, expected in zip(ours, theirs, exact):
        assert error(found, expected) <= 1.5 * error(other, expected) + slack


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_fp32_weights(dtype):
    hidden, weight, targets = data()
    exact = reference(targets, hidden, weight)

    def ours(h, w):
        with torch.autocast("cpu", dtype):
            return chunked_cross_entropy(h, w, targets, 16)

    def theirs(h, w):
        with torch.autocast("cpu", dtype):
            return F.cross_entropy(F.linear(h, w).float(), targets, reduction="sum")

    loss, *gradients = measure(ours, hidden, weight)
    other, *other_gradients = measure(theirs, hidden, weight)
    # The products are in 16 bit, whoever computes them; the loss is an fp32 number all the same.
    assert error(loss, exact[0]) <= 1.5 * error(other, exact[0]) + 1e-5
    for found, plain_one, expected in zip(gradients, other_gradients, exact[1:]):
        assert error(found, expected) <= 1.2 * error(plain_one, expected) + 1e-4


def test_loss_is_fp32_and_gradients_have_their_tensors_type():
    hidden, weight, targets = data(dtype=torch.bfloat16)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, targets, 16)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_upstream_gradient_of_a_grad_scaler(dtype):
    # As a trainer has it: fp32 parameters, autocast, the loss divided by the tokens, times 65536.
    hidden, weight, targets = data()
    exact = reference(targets, hidden, weight)

    def ours(h, w):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return chunked_cross_entropy(h, w, targets, 16)

    _loss, *gradients = measure(ours, hidden, weight, factor=65536.0 / N)
    limit = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for found, expected in zip(gradients, exact[1:]):
        assert torch.isfinite(found).all()
        assert error(found, expected) < limit


def test_fp16_gradients_below_its_range_live_by_the_scale():
    # 2e-9 a probability: nothing of it is left in fp16 but with the scale in before the rounding.
    hidden = torch.zeros(4, 8)
    hidden[:, 0] = 20.0
    weight = torch.zeros(50, 8)
    weight[0, 0] = 1.0
    targets = torch.zeros(4, dtype=torch.int64)

    def ours(h, w):
        with torch.autocast("cpu", torch.float16):
            return chunked_cross_entropy(h, w, targets, 2)

    _loss, _hidden, grad_weight = measure(ours, hidden, weight, factor=65536.0)
    _loss, _hidden, expected = reference(targets, hidden, weight)
    assert 0 < expected[1, 0] < 1e-6
    assert error(grad_weight[1:], expected[1:]) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_ignored_is_zero_and_not_nan(dtype):
    hidden, weight, _targets = data(dtype=dtype)
    targets = torch.full((N,), IGNORE)
    loss, grad_hidden, grad_weight = measure(
        lambda h, w: chunked_cross_entropy(h, w, targets, 16), hidden, weight
    )
    assert loss == 0
    assert not grad_hidden.any()
    assert not grad_weight.any()


def test_no_rows_at_all():
    hidden, weight, targets = data()
    loss, grad_hidden, grad_weight = measure(
        lambda h, w: chunked_cross_entropy(h, w, targets[:0], 16), hidden[:0], weight
    )
    assert loss == 0
    assert grad_hidden.shape == (0, D)
    assert not grad_weight.any()


def test_same_loss_with_and_without_gradients():
    hidden, weight, targets = data()
    with torch.no_grad():
        quiet = chunked_cross_entropy(hidden, weight, targets, 16)
    loss = chunked_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets, 16)
    assert torch.equal(quiet, loss.detach())
    assert not quiet.requires_grad


def test_second_backward_is_refused():
    hidden, weight, targets = data()
    loss = chunked_cross_entropy(hidden.requires_grad_(), weight, targets, 16)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tied_weight_adds_up_with_its_other_use():
    _hidden, weight, targets = data(ignored=0)
    ids = torch.arange(N) % V

    def both(loss):
        tied = weight.clone().requires_grad_()
        loss(tied[ids], tied).backward()
        return tied.grad

    ours = both(lambda h, w: chunked_cross_entropy(h, w, targets, 16))
    theirs = both(plain(targets))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_logits_of_a_chunk_are_bounded(monkeypatch):
    monkeypatch.setattr(loss_module, "MIN_ROWS", 64)
    assert chunk_rows_for(262144, 1024) == 256
    assert chunk_rows_for(2**22, 1024) == 64
    assert chunk_rows_for(16384, 10_000) == 4096
    assert chunk_rows_for(16384, 1024) == 1024
    largest = []
    inner = loss_module.softmax_minus_target

    def spy(logits, *arguments, **options):
        largest.append(logits.shape[0])
        return inner(logits, *arguments, **options)

    monkeypatch.setattr(loss_module, "softmax_minus_target", spy)
    monkeypatch.setattr(loss_module, "LOGIT_BYTES", 4 * V * 10)
    monkeypatch.setattr(loss_module, "MIN_ROWS", 1)
    hidden, weight, targets = data()
    chunked_cross_entropy(hidden, weight, targets, 1024)
    assert largest == [10] * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_the_softmax_change_nothing(dtype, monkeypatch):
    hidden, weight, targets = data(dtype=dtype)

    def once():
        return measure(lambda h, w: chunked_cross_entropy(h, w, targets, 40), hidden, weight)

    whole = once()
    monkeypatch.setattr(loss_module, "BLOCK_ROWS", 3)
    monkeypatch.setattr(loss_module, "BLOCK_BYTES", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert all(torch.equal(a, b) for a, b in zip(whole, once()))


def test_a_loss_beyond_what_exp_can_hold_is_exact():
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [-300.0], [-5.0]])
    loss = chunked_cross_entropy(hidden, weight, torch.tensor([1]))
    assert loss.item() == pytest.approx(300.0067, abs=1e-4)


def test_what_is_ignored_may_be_anything():
    hidden, weight, targets = data(ignored=0)
    targets[3] = IGNORE
    expected = reference(targets, hidden, weight)
    hidden[3] = torch.nan
    found = measure(lambda h, w: chunked_cross_entropy(h, w, targets, 16), hidden, weight)
    assert all(error(one, other) < 1e-5 for one, other in zip(found, expected))
