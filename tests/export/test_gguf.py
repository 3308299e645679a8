"""A GGUF file holds the model: its tensors give the same logits, its vocabulary the same pieces; or it is not written."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import torch
from special_tokenizers import special_tokenizer

from ekiden.errors import UsageError, UserError
from ekiden.export import llama_tokens
from ekiden.export.gguf import export_gguf
from ekiden.tokenizer.load import load_tokenizer
from small_models import TEXT, small_model, small_tokenizer

gguf = pytest.importorskip("gguf")

FAMILIES = ("gpt2-10m", "gemma3-tiny")
BLOCK = {
    "gpt2": {
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
    "gemma3": {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "attn_output": "self_attn.o_proj",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
OUTER = {
    "gpt2": {
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
    },
    "gemma3": {"token_embd": "model.embed_tokens", "output_norm": "model.norm"},
}


def fields(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def stored(path):
    """Return {name: (fp32 values in the layout of torch, type)} of a file's tensors."""
    return {
        tensor.name: (gguf.quants.dequantize(tensor.data, tensor.tensor_type), tensor.tensor_type.name)
        for tensor in gguf.GGUFReader(path).tensors
    }


def transformers_name(architecture, name):
    stem, kind = name.rsplit(".", 1)
    if match := re.fullmatch(r"blk\.(\d+)\.(.+)", stem):
        prefix = "transformer.h" if architecture == "gpt2" else "model.layers"
        return f"{prefix}.{match[1]}.{BLOCK[architecture][match[2]]}.{kind}"
    return f"{OUTER[architecture][stem]}.{kind}"


def read_into(path, model):
    """Load a file's tensors into `model` by the names that llama.cpp gives them; every weight must be there."""
    architecture = fields(path)["general.architecture"]
    weights = {}
    for name, (values, _type) in stored(path).items():
        tensor, target = torch.tensor(values), transformers_name(architecture, name)
        if architecture == "gpt2" and tensor.dim() == 2 and ".h." in target:
            tensor = tensor.t()
        weights[target] = tensor - 1 if architecture == "gemma3" and "norm" in target else tensor
    assert set(weights) == {name for name, _ in model.named_parameters()}
    model.load_state_dict(weights, strict=False)
    return model


def logits(model):
    ids = torch.randint(340, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("preset", FAMILIES)
def test_the_tensors_give_the_same_logits(preset, tokenizer, tmp_path):
    model = small_model(preset, tokenizer)
    export_gguf(model, tokenizer, tmp_path / "m.gguf")
    assert {kind for _values, kind in stored(tmp_path / "m.gguf").values()} == {"F32"}
    other = read_into(tmp_path / "m.gguf", small_model(preset, tokenizer, seed=99, louder=1.0))
    expected = logits(model)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(other), expected, atol=2e-5, rtol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("preset", FAMILIES)
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "q8_0"])
def test_smaller_types_hold_matrices_and_leave_vectors(preset, dtype, tokenizer, tmp_path):
    model = small_model(preset, tokenizer)
    export_gguf(model, tokenizer, tmp_path / "full.gguf")
    export_gguf(model, tokenizer, tmp_path / "m.gguf", dtype)
    full, small = stored(tmp_path / "full.gguf"), stored(tmp_path / "m.gguf")
    wanted = {"fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}[dtype]
    assert small.keys() == full.keys()
    kinds = set()
    for name, (values, kind) in small.items():
        before = full[name][0]
        if before.ndim == 1 or name == "position_embd.weight":
            assert kind == "F32"
            assert np.array_equal(values, before)
        elif kind == "Q8_0":
            # A scale for 32 values, the largest becoming 127.
            largest = np.abs(before.reshape(-1, 32)).max(axis=1)
            error = np.abs((values - before).reshape(-1, 32)).max(axis=1)
            assert (error <= largest / 127 * 0.51 + largest * 1e-3).all(), name
        else:
            half = {"F16": torch.float16, "BF16": torch.bfloat16}[kind]
            assert torch.equal(torch.tensor(values), torch.tensor(before).to(half).float())
        kinds.add(kind)
    # Rows of 48 are no multiple of q8_0's 32.
    assert kinds == {"F32", wanted} | ({"F16"} if dtype == "q8_0" else set())
    relative = (logits(read_into(tmp_path / "m.gguf", small_model(preset, tokenizer))) - logits(model)).std()
    assert 0 < relative < 0.1 * logits(model).std()


def test_what_gpt2s_file_says(tokenizer, tmp_path):
    export_gguf(small_model("gpt2-10m", tokenizer), tokenizer, tmp_path / "m.gguf", "bf16")
    found = fields(tmp_path / "m.gguf")
    expected = {
        "block_count": 7,
        "context_length": 32,
        "embedding_length": 32,
        "feed_forward_length": 48,
        "attention.head_count": 4,
        "attention.layer_norm_epsilon": pytest.approx(1e-5),
    }
    assert found["general.architecture"] == "gpt2"
    assert {name: found[f"gpt2.{name}"] for name in expected} == expected
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16


def test_what_gemma3s_file_says(tokenizer, tmp_path):
    model = small_model("gemma3-tiny", tokenizer, rope_scaling_factor=8.0)
    export_gguf(model, tokenizer, tmp_path / "m.gguf")
    found = fields(tmp_path / "m.gguf")
    expected = {
        "block_count": 7,
        "context_length": 32,
        "embedding_length": 32,
        "feed_forward_length": 48,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 8,
        "attention.value_length": 8,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "attention.sliding_window": 6,
        "attention.sliding_window_pattern": [True] * 5 + [False, True],
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
    }
    assert found["general.architecture"] == "gemma3"
    assert {name: found[f"gemma3.{name}"] for name in expected} == expected


def test_the_vocabulary_is_sentencepieces(any_tokenizer, tmp_path):
    export_gguf(small_model("gemma3-tiny", any_tokenizer), any_tokenizer, tmp_path / "m.gguf")
    found = fields(tmp_path / "m.gguf")
    processor = any_tokenizer.processor
    kind = {"bpe": "llama", "unigram": "t5"}[any_tokenizer.model_type]
    assert found["tokenizer.ggml.model"] == kind
    assert found["tokenizer.ggml.tokens"] == [processor.id_to_piece(i) for i in range(340)]
    assert found["tokenizer.ggml.scores"] == [processor.get_score(i) for i in range(340)]
    types = found["tokenizer.ggml.token_type"]
    assert types[:4] == [3, 3, 3, 2]
    assert [i for i, number in enumerate(types) if number == 6] == [
        i for i in range(340) if processor.is_byte(i)
    ]
    special = {"padding": 0, "eos": 1, "bos": 2, "unknown": 3}
    assert {name: found[f"tokenizer.ggml.{name}_token_id"] for name in special} == special
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert found["tokenizer.ggml.add_space_prefix"] is True
    assert found["tokenizer.ggml.remove_extra_whitespaces"] is False
    assert "tokenizer.ggml.precompiled_charsmap" not in found


def test_normalisation_and_pieces_of_the_users(tmp_path):
    tokenizer = special_tokenizer(user_defined_symbols=["\n", "▁und▁"])
    model = small_model("gpt2-10m", tokenizer)
    export_gguf(model, tokenizer, tmp_path / "m.gguf")
    found = fields(tmp_path / "m.gguf")
    known = llama_tokens.vocabulary(tokenizer, 340)
    assert bytes(np.array(found["tokenizer.ggml.precompiled_charsmap"], dtype=np.uint8)) == known.charsmap
    assert len(known.charsmap) > 1000
    assert found["tokenizer.ggml.remove_extra_whitespaces"] is True
    # llama.cpp looks for them in the raw text.
    assert found["tokenizer.ggml.tokens"][4:6] == ["\n", " und "]
    assert found["tokenizer.ggml.token_type"][4:6] == [4, 4]


def test_an_embedding_with_more_rows_than_pieces(tokenizer, tmp_path):
    model = small_model("gemma3-tiny", tokenizer)
    model.resize_token_embeddings(352, mean_resizing=False)
    export_gguf(model, tokenizer, tmp_path / "m.gguf")
    found = fields(tmp_path / "m.gguf")
    assert len(found["tokenizer.ggml.tokens"]) == len(set(found["tokenizer.ggml.tokens"])) == 352
    assert found["tokenizer.ggml.token_type"][340:] == [5] * 12


def test_a_vocabulary_without_special_ids(tmp_path):
    bare = small_tokenizer(tmp_path, pad_id=-1, bos_id=-1, eos_id=-1, unk_id=0)
    export_gguf(small_model("gpt2-10m", bare), bare, tmp_path / "m.gguf")
    found = fields(tmp_path / "m.gguf")
    assert found["tokenizer.ggml.add_bos_token"] is False
    # Left out, llama.cpp would end texts at id 1 or 2.
    assert found["tokenizer.ggml.eos_token_id"] == 0


def test_tokens_are_compared_before_the_file_counts(any_tokenizer, tmp_path):
    model = small_model("gpt2-10m", any_tokenizer)
    assert export_gguf(model, any_tokenizer, tmp_path / "m.gguf") is None
    compared = export_gguf(model, any_tokenizer, tmp_path / "m.gguf", texts=[*TEXT, "☂ Ω"])
    assert (compared.texts, compared.different) == (len(TEXT) + 1, 0)
    assert compared.outside == (1 if any_tokenizer.model_type == "unigram" else 0)


def test_a_unigram_vocabulary_declared_as_llama_is_caught(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(llama_tokens.KINDS, "unigram", "llama")
    model = small_model("gemma3-tiny", tokenizer)
    with pytest.raises(UserError, match=r"would not read text as the model was trained to: \d of 5 texts"):
        export_gguf(model, tokenizer, tmp_path / "m.gguf", texts=TEXT)
    assert not list(tmp_path.iterdir())


def test_a_normalising_bpe_is_refused_unless_text_shows_otherwise(tmp_path):
    tokenizer = special_tokenizer("bpe", normalization_rule_name="nfkc_cf")
    model, target = small_model("gpt2-10m", tokenizer), tmp_path / "m.gguf"
    with pytest.raises(UserError, match=r"llama\.cpp does not normalise text for a BPE vocabulary"):
        export_gguf(model, tokenizer, target)
    with pytest.raises(UserError, match="its BPE does not normalise text"):
        export_gguf(model, tokenizer, target, texts=["The River"])
    assert not target.exists()
    assert export_gguf(model, tokenizer, target, texts=["the river"]).equal == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"query_pre_attn_scalar": 16}, r"scaled by 1/sqrt\(8\), not 1/sqrt\(16\)"),
        ({"attn_logit_softcapping": 50.0}, "soft cap"),
        ({"hidden_activation": "gelu"}, "tanh-approximated gelu, not gelu"),
        ({"use_bidirectional_attention": True}, "causal"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise(change, reason, tokenizer, tmp_path):
    model = small_model("gemma3-tiny", tokenizer)
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(UserError, match=reason):
        export_gguf(model, tokenizer, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_gpt2_with_another_activation_or_scale(tokenizer, tmp_path):
    model = small_model("gpt2-10m", tokenizer)
    model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(UserError, match="every layer"):
        export_gguf(model, tokenizer, tmp_path / "m.gguf")
    model.config.activation_function = "relu"
    with pytest.raises(UserError, match="not relu"):
        export_gguf(model, tokenizer, tmp_path / "m.gguf")


def test_tokenizers_that_llama_cpp_has_no_equal_of(tokenizer, tmp_path):
    from ekiden.tokenizer.huggingface import huggingface_files

    (tmp_path / "tokenizer.json").write_bytes(huggingface_files(tokenizer)["tokenizer.json"])
    model = small_model("gpt2-10m", tokenizer)
    with pytest.raises(
        UserError, match="needs a SentencePiece tokenizer, BPE or unigram, and this model's is"
    ):
        export_gguf(model, load_tokenizer(tmp_path / "tokenizer.json"), tmp_path / "m.gguf")


def test_what_may_be_overwritten(tokenizer, tmp_path):
    model, target = small_model("gpt2-10m", tokenizer), tmp_path / "m.gguf"
    with pytest.raises(UsageError, match=r"must end in .gguf"):
        export_gguf(model, tokenizer, tmp_path / "out")
    for content in (b"years of work", b"GGUF\x03\0\0\0", b""):
        target.write_bytes(content)
        with pytest.raises(UserError, match="exists and is not an earlier export"):
            export_gguf(model, tokenizer, target)
        assert target.read_bytes() == content
    target.unlink()
    target.mkdir()
    with pytest.raises(UserError, match="is not a file"):
        export_gguf(model, tokenizer, target)
    target.rmdir()
    export_gguf(model, tokenizer, target)
    size = target.stat().st_size
    export_gguf(model, tokenizer, target, "fp16")
    assert target.stat().st_size < size


def test_weights_that_a_file_cannot_hold(tokenizer, tmp_path):
    model = small_model("gemma3-tiny", tokenizer)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(UserError, match=r"blk.1.ffn_up.weight holds values that are not finite in fp16"):
        export_gguf(model, tokenizer, tmp_path / "m.gguf", "fp16")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(
        UserError, match=r"model.layers.1.mlp.up_proj.weight holds values that are not finite;"
    ):
        export_gguf(model, tokenizer, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fails(tokenizer, tmp_path, monkeypatch):
    from ekiden.checkpoint import files

    def fail(operation, path):
        if operation == "rename":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "fault_hook", fail)
    with pytest.raises(UserError, match="the disk is full"):
        export_gguf(small_model("gpt2-10m", tokenizer), tokenizer, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_without_the_package(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'ekiden\[gguf\]'"):
        export_gguf(small_model("gpt2-10m", tokenizer), tokenizer, tmp_path / "m.gguf")
