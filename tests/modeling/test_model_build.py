"""Models from presets: sizes, initial weights, special ids, and what a window can see."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, GPT2LMHeadModel

from ekiden.config import TrainConfig, build_config, preset_names
from ekiden.modeling.build import (
    body,
    build_model,
    head_weight,
    hidden_states,
    model_config,
    parameter_counts,
)

FAMILIES = ("gpt2-10m", "gemma3-tiny")


def small(preset: str, **changes) -> TrainConfig:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    heads = 4 if preset.startswith("gpt2") else 2
    shape |= {"intermediate_size": 48, "num_key_value_heads": heads, "max_length": 16, "sliding_window": 6}
    return build_config(preset, **{**shape, **changes})


def model(preset: str, pad: int | None = 0, seed: int = 1, **changes):
    return build_model(small(preset, **changes), vocab_size=50, pad_id=pad, bos_id=1, eos_id=2, seed=seed)


@pytest.mark.parametrize(
    ("preset", "vocabulary", "blocks", "total"),
    [
        ("gpt2-10m", 16384, 6.32e6 + 512 * 256, 10.6e6),
        ("gpt2-10m", 8000, 6.32e6 + 512 * 256, 8.5e6),
        ("gemma3-270m", 262144, 100.3e6, 268.1e6),
        ("gemma3-270m", 16000, 100.3e6, 110.6e6),
        ("gemma3-1b", 262144, 697.9e6, 999.9e6),
        ("gemma3-1b", 64000, 697.9e6, 771.6e6),
        ("gemma3-2b", 64000, 2.02e9, 2.17e9),
        ("gemma3-4b", 262144, 3.209e9, 3.880e9),
        ("gemma3-4b", 32000, 3.209e9, 3.291e9),
    ],
)
def test_preset_sizes(preset, vocabulary, blocks, total):
    settings = model_config(build_config(preset), vocabulary, 0, 2, 1)
    kind = GPT2LMHeadModel if preset.startswith("gpt2") else Gemma3ForCausalLM
    with torch.device("meta"):
        counts = parameter_counts(kind(settings))
    assert counts[1] == vocabulary * settings.hidden_size
    # As many digits as the published figure has.
    assert counts[0] == pytest.approx(blocks, rel=0.005)
    assert sum(counts) == pytest.approx(total, rel=0.005)


def test_tiny_preset_is_small():
    config = build_config("gemma3-tiny")
    counts = parameter_counts(build_model(config, 4096, 0, 2, 1, seed=0))
    assert 2e6 < sum(counts) < 3e6


@pytest.mark.parametrize("preset", preset_names())
def test_preset_shapes_fit_every_export(preset):
    config = build_config(preset)
    settings = model_config(config, 1000, 0, 2, 1)
    if config.model_type == "gpt2":
        assert settings.n_positions == config.max_length
        assert (settings.resid_pdrop, settings.embd_pdrop, settings.attn_pdrop) == (0, 0, 0)
        return
    assert settings.query_pre_attn_scalar == settings.head_dim
    full = [i for i, kind in enumerate(settings.layer_types) if kind == "full_attention"]
    assert full == list(range(5, config.num_hidden_layers, 6))
    rope = settings.rope_parameters
    assert rope["sliding_attention"]["rope_theta"] == 1e4
    assert rope["full_attention"]["rope_theta"] == 1e6
    scaling = (
        rope["full_attention"].get("factor") if rope["full_attention"]["rope_type"] == "linear" else None
    )
    assert scaling == (8.0 if preset == "gemma3-4b" else None)
    assert settings.attention_dropout == 0


@pytest.mark.parametrize("preset", FAMILIES)
def test_weights_depend_on_the_seed_alone(preset):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = model(preset).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    second, other = model(preset).state_dict(), model(preset, seed=2).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert all(tensor.dtype == torch.float32 for tensor in first.values())


@pytest.mark.parametrize("preset", FAMILIES)
@pytest.mark.parametrize("initialization", ["huggingface", "scaled"])
def test_gemma_pad_row_is_zero_and_absent_pad_is_allowed(preset, initialization):
    padded = head_weight(model(preset, pad=3, initialization=initialization))
    free = head_weight(model(preset, pad=None, initialization=initialization))
    if preset.startswith("gemma3"):
        assert not padded[3].any()
    assert padded[4].any()
    assert free.any(dim=1).all()


@pytest.mark.parametrize("preset", FAMILIES)
def test_ids_and_switches_are_the_tokenizers(preset):
    config = model(preset, pad=None).config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (None, 1, 2)
    assert config.use_cache is False
    assert config._attn_implementation == "sdpa"
    assert config.tie_word_embeddings


def test_scaled_initialization_of_gemma():
    built = model("gemma3-tiny", initialization="scaled", num_hidden_layers=8, hidden_size=64)
    gain = 1 / math.sqrt(16)
    for layer in body(built).layers:
        assert torch.allclose(1 + layer.post_attention_layernorm.weight, torch.tensor(gain))
        assert torch.allclose(1 + layer.post_feedforward_layernorm.weight, torch.tensor(gain))
        assert not layer.input_layernorm.weight.any()
    assert head_weight(built)[1:].std().item() == pytest.approx(1 / 8, rel=0.05)


def test_scaled_initialization_of_gpt2():
    built = model("gpt2-10m", initialization="scaled", hidden_size=64, intermediate_size=256)
    for name, weight in body(built).h.named_parameters():
        if name.endswith("c_proj.weight"):
            assert not weight.any()
        elif weight.dim() == 2:
            assert weight.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert head_weight(built).std().item() == pytest.approx(1 / 8, rel=0.05)
    # Every block begins as the identity: what comes out is the embedding, normalised.
    ids = torch.arange(16).unsqueeze(0)
    with torch.no_grad():
        start = head_weight(built)[ids] + body(built).wpe.weight[:16]
        expected = torch.nn.functional.layer_norm(start, (64,))
        assert torch.allclose(hidden_states(built, ids), expected, atol=1e-5)


@pytest.mark.parametrize("preset", FAMILIES)
@pytest.mark.parametrize("width", [32, 256])
def test_scaled_initialization_keeps_the_stream_at_one_size_at_every_width(preset, width):
    """RMS at the last norm's input, as each family sees it: about 1 for Gemma 3, 1/sqrt(width) for GPT-2."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1 if preset[1] == "e" else 4}
    built = model(
        preset,
        initialization="scaled",
        hidden_size=width,
        intermediate_size=2 * width,
        head_dim=width // 4,
        **heads,
    )
    seen = []
    norm = body(built).norm if hasattr(body(built), "norm") else body(built).ln_f
    norm.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].square().mean().sqrt().item())
    )
    with torch.no_grad():
        hidden_states(built, torch.arange(4, 20).unsqueeze(0))
    size = 1.0 if preset.startswith("gemma3") else (1 / width + 0.02**2) ** 0.5
    assert 0.8 * size < seen[0] < 1.7 * size


@pytest.mark.parametrize("preset", FAMILIES)
def test_hidden_states_give_the_models_own_logits(preset):
    built = model(preset, sliding_window=4).eval()
    ids = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = hidden_states(built, ids) @ head_weight(built).T
        expected = built(input_ids=ids, use_cache=False).logits
    assert logits.shape == (2, 16, 50)
    assert torch.allclose(logits, expected, atol=1e-6)


@pytest.mark.parametrize("preset", FAMILIES)
def test_a_window_sees_only_its_own_past(preset):
    built = model(preset)
    numbers = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 50, (3, 16), generator=numbers)
    with torch.no_grad():
        whole = hidden_states(built, ids)
        again = hidden_states(built, ids)
        alone = hidden_states(built, ids[1:2])
        changed = ids.clone()
        changed[:, 9:] = 5
        past = hidden_states(built, changed)
    # Nothing is carried from call to call, from row to row, or from later to earlier.
    assert torch.equal(whole, again)
    assert torch.allclose(whole[1], alone[0], atol=1e-5)
    assert torch.allclose(whole[:, :9], past[:, :9], atol=1e-5)
    assert not torch.allclose(whole[:, 9:], past[:, 9:], atol=1e-2)


def test_gemma_local_layers_see_their_window_only():
    built = model("gemma3-tiny", num_hidden_layers=1, sliding_window=4)
    ids = torch.arange(4, 20).unsqueeze(0)
    changed = ids.clone()
    changed[0, 5] = 40
    with torch.no_grad():
        difference = (hidden_states(built, ids) - hidden_states(built, changed)).abs().amax(dim=(0, 2))
    assert (difference[:5] == 0).all()
    assert (difference[5:9] > 1e-5).all()
    assert (difference[9:] < 1e-5).all()


@pytest.mark.parametrize("preset", FAMILIES)
def test_a_model_predicts_the_unigrams_at_step_0(preset):
    unigrams = np.random.default_rng(0).dirichlet(np.full(50, 0.3)) * 0.99 + 0.01 / 50
    config = small(preset, hidden_size=64, max_length=256)
    ids = torch.from_numpy(np.random.default_rng(1).choice(50, 257, p=unigrams))[None]
    entropy = -np.log(unigrams[ids[0, 1:].numpy()]).mean()
    losses = []
    for given in (unigrams, None):
        built = build_model(config, 50, None, 1, 2, seed=1, unigrams=given)
        with torch.no_grad():
            logits = hidden_states(built, ids[:, :-1]) @ head_weight(built).mT
        losses.append(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]).item())
    # Without, a tied model predicts its own input.
    with_them, without = losses[0] - entropy, losses[1] - entropy
    assert -0.1 < with_them < (0.3 if preset == "gpt2-10m" else 0.9) and without > 3 * with_them


@pytest.mark.parametrize("heads", [(4, 1, 48), (8, 4, 64), (4, 1, 256)])
def test_a_new_gemmas_first_heads_look_one_two_and_three_tokens_back(heads):
    shape = dict(zip(("num_attention_heads", "num_key_value_heads", "head_dim"), heads))
    config = small("gemma3-tiny", hidden_size=96, num_hidden_layers=2, sliding_window=16, **shape)
    ids = torch.from_numpy(np.random.default_rng(1).integers(4, 50, (2, 24)))
    shares = {}
    for local in (True, False):
        config = dataclasses.replace(config, local_heads=local)
        built = build_model(config, 50, None, 1, 2, seed=1, unigrams=np.full(50, 1 / 50))
        built.set_attn_implementation("eager")
        with torch.no_grad():
            weights = built(input_ids=ids, output_attentions=True).attentions[0]  # [b, heads, T, T]
        shares[local] = [
            weights[:, offset - 1].diagonal(-offset, dim1=-2, dim2=-1)[:, 3:].mean().item()
            for offset in (1, 2, 3)
        ]
    assert all(share > 0.4 for share in shares[True]) and all(share < 0.2 for share in shares[False])


def test_local_heads_leave_other_models_alone():
    unigrams = np.full(50, 1 / 50)
    for preset, more in (
        ("gpt2-10m", {}),
        ("gemma3-tiny", {"num_attention_heads": 1, "num_key_value_heads": 1}),
    ):
        with_them, without = (
            build_model(
                small(preset, local_heads=local, **more), 50, None, 1, 2, seed=1, unigrams=unigrams
            ).state_dict()
            for local in (True, False)
        )
        assert all(torch.equal(with_them[name], without[name]) for name in without)
