"""Attention in training: exact against the plain one, without masks that are not needed, with kernels that were tried."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel

from ekiden.config import TrainConfig, build_config
from ekiden.errors import UserError
from ekiden.modeling.attention import (
    MATH,
    Attention,
    Kernel,
    attention_name,
    document_boundary,
    document_numbers,
    install,
    run_kernel,
)
from ekiden.modeling.attention_choice import CANDIDATES, choose_attention, planned_attention
from ekiden.modeling.build import body, build_model, hidden_states
from ekiden.modeling.device import named_precision
from ekiden.modeling.prepare import checkpoint_activations, prepare_model

CPU, FP32 = torch.device("cpu"), named_precision("fp32")
FLASH = CANDIDATES[0]


def shape(preset: str, length: int, window: int = 16, **more: Any) -> TrainConfig:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2 if preset.startswith("gemma") else 4}
    size = {"hidden_size": 32, "num_hidden_layers": 6, "head_dim": 8, "intermediate_size": 32}
    return build_config(
        preset,
        max_length=length,
        sliding_window=window,
        initialization="huggingface",
        **{**heads, **size, **more},
    )


def made(config: TrainConfig) -> PreTrainedModel:
    """Return a model in fp64 with transformers' own dense attention (its eager one rounds to fp32)."""
    model = build_model(config, 64, 0, 2, 1, seed=3).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)  # scores far from equal
    return model


def tokens(length: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(length))


def states_and_gradients(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    states = hidden_states(model, ids)
    weights = torch.linspace(0.5, 1.5, states.numel(), dtype=states.dtype).view_as(states)
    (states.square() * weights).sum().backward()
    found = [states.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("kernel", [FLASH, Kernel(SDPBackend.FLASH_ATTENTION, False), MATH], ids=str)
@pytest.mark.parametrize(
    ("preset", "length", "window"),
    [
        ("gpt2-10m", 24, 16),
        ("gemma3-tiny", 15, 16),
        ("gemma3-tiny", 16, 16),
        ("gemma3-tiny", 17, 16),
        ("gemma3-tiny", 48, 16),
        ("gemma3-tiny", 45, 7),
        ("gemma3-tiny", 9, 1),
    ],
)
def test_exact_against_dense_attention(preset: str, length: int, window: int, kernel: Kernel) -> None:
    config = shape(preset, length, window)
    model, ids = made(config), tokens(length)
    expected = states_and_gradients(model, ids)
    install(model, Attention(kernel, kernel, config.sliding_window))
    found = states_and_gradients(model, ids)
    assert len(found) == len(expected)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(found, expected))


def test_chunks_under_recomputation_are_the_same_bits() -> None:
    config = shape("gemma3-tiny", 40)
    model, ids = made(config), tokens(40)
    install(model, planned_attention(config))
    plain = states_and_gradients(model, ids)
    checkpoint_activations(model)
    assert all(torch.equal(a, b) for a, b in zip(plain, states_and_gradients(model, ids)))


# -- documents ----------------------------------------------------------------------------------------------------

EOS, BOS = 1, 2


def packed(length: int, *ends: int) -> torch.Tensor:
    """Return two windows of tokens: one with EOS at `ends`, one without any."""
    ids = tokens(length)
    for end in ends:
        ids[0, end] = EOS
    return ids


@pytest.mark.parametrize("kernel", [FLASH, MATH], ids=str)
@pytest.mark.parametrize(("length", "window"), [(15, 16), (45, 16), (45, 7), (48, 16)])
def test_documents_attend_as_if_alone(length: int, window: int, kernel: Kernel) -> None:
    """Gemma 3's positions are relative, so a document is what it would be in a window of its own."""
    model = made(shape("gemma3-tiny", length, window))
    ids = packed(length, 4, 5, 11)  # a document of one token too
    parts = [5, 1, 6, length - 12]
    alone = [hidden_states(model, part) for part in ids[:1].split(parts, dim=1)]
    number = torch.repeat_interleave(torch.arange(4), torch.tensor(parts))
    same = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
    same[0] &= number[:, None] == number
    masks = {"full_attention": same, "sliding_attention": same.triu(1 - window)}
    dense = body(model)(input_ids=ids, attention_mask=masks, use_cache=False).last_hidden_state
    install(model, Attention(kernel, kernel, window, (EOS, True)))
    found = hidden_states(model, ids)
    assert torch.allclose(found, dense, rtol=1e-9, atol=1e-9)
    # Angles of positions are rounded to fp32.
    assert torch.allclose(found[:1], torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)


def test_documents_of_gpt2_keep_their_positions() -> None:
    model, ids = made(shape("gpt2-10m", 24)), packed(24, 9)
    blocked = torch.ones(2, 1, 24, 24, dtype=torch.bool).tril()
    blocked[0, :, 10:, :10] = False
    expected = body(model)(input_ids=ids, attention_mask=blocked, use_cache=False).last_hidden_state
    install(model, Attention(FLASH, FLASH, None, (EOS, True)))
    assert torch.allclose(hidden_states(model, ids), expected, rtol=1e-9, atol=1e-9)


def test_a_document_begins_after_its_end_or_at_its_begin() -> None:
    ids = torch.tensor([[5, BOS, 6, EOS, 7, EOS, EOS, 8]])
    assert document_numbers(ids, EOS, ends=True).tolist() == [[0, 0, 0, 0, 1, 1, 2, 3]]
    assert document_numbers(ids, BOS, ends=False).tolist() == [[0, 1, 1, 1, 1, 1, 1, 1]]
    settings = SimpleNamespace(eos_token_id=EOS, bos_token_id=BOS)
    assert document_boundary(settings) == (EOS, True)
    settings.eos_token_id = None
    assert document_boundary(settings) == (BOS, False)
    settings.bos_token_id = None
    with pytest.raises(UserError, match="--document-mask needs a tokenizer with an EOS or a BOS"):
        document_boundary(settings)


def test_prepare_takes_the_setting() -> None:
    config = shape("gpt2-10m", 16, document_mask=True)
    model = build_model(config, 64, 0, BOS, EOS, seed=3)
    prepare_model(model, config, CPU, FP32)
    assert model.attention == Attention(FLASH, FLASH, None, (EOS, True))


class Operations(TorchDispatchMode):
    """Records every operation, and the shapes of the tensors that it is given and returns."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.masked: list[bool] = []
        self.shapes: set[torch.Size] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        if "scaled_dot_product" in str(func) and "backward" not in str(func):
            self.masked.append((kwargs or {}).get("attn_mask") is not None)
        self.shapes |= {t.shape for t in tree_iter((args, kwargs, result)) if isinstance(t, torch.Tensor)}
        return result


@pytest.mark.parametrize(
    ("preset", "length", "masked"),
    [("gpt2-10m", 64, 0), ("gemma3-tiny", 24, 0), ("gemma3-tiny", 64, 5)],
)
def test_masks_are_small_and_the_device_is_not_asked(preset: str, length: int, masked: int) -> None:
    config = shape(preset, length, window=24)
    model, ids = made(config), tokens(length)
    install(model, planned_attention(config))
    with Operations() as seen:
        states_and_gradients(model, ids)
    # Five of six layers are local; each has its first window without a mask, and the rest with one.
    assert seen.masked.count(True) == masked
    assert seen.masked.count(False) == 6
    assert not any("_local_scalar_dense" in name for name in seen.names)
    assert not any(size[-2:] == (length, length) for size in seen.shapes)


def test_transformers_own_attention_asks_and_makes_masks() -> None:
    """What the test above would find: without the attention installed there are both."""
    config = shape("gemma3-tiny", 64)
    with Operations() as seen:
        states_and_gradients(made(config), tokens(64))
    assert any("_local_scalar_dense" in name for name in seen.names)
    assert any(size[-2:] == (64, 64) for size in seen.shapes)


def test_a_compiled_decoder_has_no_mask_either() -> None:
    config = shape("gemma3-tiny", 24, window=8, num_hidden_layers=1)
    model, ids = made(config), tokens(24)
    install(model, Attention(MATH, FLASH, config.sliding_window))
    expected = states_and_gradients(model, ids)
    sizes: list[torch.Size] = []

    def backend(graph: torch.fx.GraphModule, _examples: Any) -> Any:
        sizes.extend(n.meta["example_value"].shape for n in graph.graph.nodes if _is_tensor(n))
        return graph

    body(model).compile(backend=backend)
    found = states_and_gradients(model, ids)
    assert sizes and not any(size[-2:] == (24, 24) for size in sizes)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(found, expected))


def _is_tensor(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.Tensor)


def test_calls_with_a_cache_or_padding_are_transformers_own() -> None:
    config = shape("gemma3-tiny", 64)
    model, ids = made(config), tokens(24)
    padding = torch.ones_like(ids)
    padding[0, :5] = 0
    with torch.no_grad():
        plain = model(ids, attention_mask=padding).logits
        written = model.generate(ids, max_new_tokens=4, do_sample=False)
        install(model, planned_attention(config))
        assert torch.equal(model(ids, attention_mask=padding).logits, plain)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), written)
    assert not any("attn" in name and "ekiden" in str(v) for name, v in model.config.to_dict().items())


# -- the choice ---------------------------------------------------------------------------------------------------


def test_a_cpu_takes_its_flash_kernel() -> None:
    attention = choose_attention(shape("gemma3-tiny", 64), CPU, FP32)
    assert (attention.causal, attention.masked) == (FLASH, FLASH)
    assert attention.describe() == "flash"


@pytest.mark.parametrize("failure", ["raises", "raises in the backward pass", "is wrong", "is not a number"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_kernel_that_fails_is_passed_over(failure: str, precision: str) -> None:
    tried: list[Kernel] = []

    def run(kernel: Kernel, query: torch.Tensor, *others: Any) -> torch.Tensor:
        tried.append(kernel)
        if kernel.backend is not SDPBackend.FLASH_ATTENTION:
            return run_kernel(FLASH, query, *others)
        if failure == "raises":
            raise RuntimeError("No available kernel. Aborting execution.")
        if failure == "raises in the backward pass":
            query.register_hook(_no_backward)
        result = run_kernel(kernel, query, *others)
        return result * {"is wrong": 1.2, "is not a number": float("nan")}.get(failure, 1.0)

    config = shape("gemma3-tiny", 64)
    attention = choose_attention(config, CPU, named_precision(precision), run=run)
    assert tried[:3] == list(CANDIDATES[:3])
    assert attention.causal == attention.masked == CANDIDATES[2]
    assert attention.describe() == "cudnn"


def _no_backward(_gradient: torch.Tensor) -> None:
    raise RuntimeError("CUDA error: too many resources requested for launch")


def test_masks_may_need_another_kernel_and_shared_heads_their_copies() -> None:
    def run(kernel: Kernel, *tensors: Any) -> torch.Tensor:
        mask = tensors[3]
        flash = kernel.backend is SDPBackend.FLASH_ATTENTION
        efficient = kernel.backend is SDPBackend.EFFICIENT_ATTENTION
        if (flash and mask is None) or (efficient and not kernel.grouped):
            return run_kernel(FLASH, *tensors)
        raise RuntimeError("No available kernel. Aborting execution.")

    attention = choose_attention(shape("gemma3-tiny", 64), CPU, FP32, run=run)
    assert attention.causal == FLASH
    assert attention.masked == Kernel(SDPBackend.EFFICIENT_ATTENTION, grouped=False)
    assert attention.describe() == "flash, memory-efficient with a mask"


def test_without_any_kernel_plain_arithmetic_is_left() -> None:
    def none(*_: Any) -> torch.Tensor:
        raise NotImplementedError

    assert choose_attention(shape("gpt2-10m", 64), CPU, FP32, run=none).causal == MATH


def test_a_model_without_masks_needs_no_kernel_for_them() -> None:
    assert choose_attention(shape("gpt2-10m", 64), CPU, FP32).masked is None
    assert choose_attention(shape("gemma3-tiny", 16), CPU, FP32).masked is None
    assert attention_name(made(shape("gpt2-10m", 8))) == "transformers'"
