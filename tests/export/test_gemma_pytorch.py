"""The `.ckpt` of gemma_pytorch: its names and shapes, and the same logits when read back."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from ekiden.errors import UsageError, UserError
from ekiden.export.gemma_pytorch import export_gemma_pytorch
from small_models import small_model


def expected_shapes(config):
    """Return the state of gemma_pytorch's GemmaForCausalLM of this configuration, but for its tables of angles."""
    width, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"], config["num_key_value_heads"]
    shapes = {"embedder.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}
    for number in range(config["num_hidden_layers"]):
        layer = {
            "self_attn.qkv_proj": ((queries + 2 * keys) * head, width),
            "self_attn.o_proj": (width, queries * head),
            "self_attn.query_norm": (head,),
            "self_attn.key_norm": (head,),
            "mlp.gate_proj": (config["intermediate_size"], width),
            "mlp.up_proj": (config["intermediate_size"], width),
            "mlp.down_proj": (width, config["intermediate_size"]),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
            "pre_feedforward_layernorm": (width,),
            "post_feedforward_layernorm": (width,),
        }
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def read_back(path):
    """Build a Gemma 3 from the file alone."""
    contents = torch.load(path, weights_only=True)
    values, tensors = contents["gemma_config"], contents["model_state_dict"]
    kinds = {"LOCAL_SLIDING": "sliding_attention", "GLOBAL": "full_attention"}
    same = ("vocab_size", "max_position_embeddings", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "hidden_size", "intermediate_size", "head_dim", "rms_norm_eps")
    config = Gemma3TextConfig(
        **{name: values[name] for name in (*same, "query_pre_attn_scalar")},
        sliding_window=values["sliding_window_size"],
        layer_types=[kinds[kind] for kind in values["attn_types"]],
        rope_parameters={
            kinds[kind]: {"rope_type": "default", "rope_theta": float(theta)}
            for kind, theta in values["rope_wave_length"].items()
        },
    )
    heads, groups = values["num_attention_heads"], values["num_key_value_heads"]
    weights = {"model.embed_tokens.weight": tensors["embedder.weight"]}
    for name, tensor in tensors.items():
        if name.endswith("qkv_proj.weight"):
            parts = tensor.split([n * values["head_dim"] for n in (heads, groups, groups)])
            weights |= {name.replace("qkv", part): value for part, value in zip("qkv", parts)}
        elif name != "embedder.weight":
            weights[name.replace("query_norm", "q_norm").replace("key_norm", "k_norm")] = tensor
    model = Gemma3ForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return model


def test_names_shapes_and_logits(tokenizer, tmp_path):
    model = small_model("gemma3-tiny", tokenizer).eval()
    path = export_gemma_pytorch(model, tmp_path / "model.ckpt")
    contents = torch.load(path, weights_only=True)
    tensors = contents["model_state_dict"]
    assert {name: tuple(t.shape) for name, t in tensors.items()} == expected_shapes(contents["gemma_config"])
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    ids = torch.randint(340, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        found = read_back(path)(ids, use_cache=False).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.ckpt"]


def test_half_precision_and_overwriting(tokenizer, tmp_path):
    model, path = small_model("gemma3-tiny", tokenizer), tmp_path / "model.ckpt"
    export_gemma_pytorch(model, path)
    export_gemma_pytorch(model, path, "bf16")
    contents = torch.load(path, weights_only=True)
    assert contents["gemma_config"]["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in contents["model_state_dict"].values()} == {torch.bfloat16}
    torch.save({"model_state_dict": {}}, path)
    with pytest.raises(UserError, match="exists and is not an earlier export"):
        export_gemma_pytorch(model, path)
    path.write_bytes(b"years of work")
    with pytest.raises(UserError, match="exists and is not an earlier export"):
        export_gemma_pytorch(model, path)
    assert path.read_bytes() == b"years of work"
    with pytest.raises(UsageError, match=r"must end in .ckpt"):
        export_gemma_pytorch(model, tmp_path / "model.pt")


def test_models_that_it_cannot_run(tokenizer, tmp_path):
    with pytest.raises(UserError, match="writes Gemma 3 only, and this is GPT2LMHeadModel"):
        export_gemma_pytorch(small_model("gpt2-10m", tokenizer), tmp_path / "m.ckpt")
    scaled = small_model("gemma3-tiny", tokenizer, rope_scaling_factor=8.0)
    with pytest.raises(UserError, match="does not scale positions"):
        export_gemma_pytorch(scaled, tmp_path / "m.ckpt")
    other = small_model("gemma3-tiny", tokenizer)
    other.config.hidden_activation = "silu"
    with pytest.raises(UserError, match="tanh-approximated gelu, not silu"):
        export_gemma_pytorch(other, tmp_path / "m.ckpt")
    other.config.tie_word_embeddings = False
    with pytest.raises(UserError, match="its output matrix is the embedding's"):
        export_gemma_pytorch(other, tmp_path / "m.ckpt")
    assert not list(tmp_path.iterdir())


def test_the_same_export_gives_the_same_bytes(tokenizer, tmp_path):
    model = small_model("gemma3-tiny", tokenizer)
    first = export_gemma_pytorch(model, tmp_path / "first.ckpt").read_bytes()
    assert export_gemma_pytorch(model, tmp_path / "second.ckpt").read_bytes() == first
