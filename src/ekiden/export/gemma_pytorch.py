"""A Gemma 3 as the `.ckpt` file that google/gemma_pytorch loads (`GemmaForCausalLM.load_weights`).

The file is torch's zip of {"model_state_dict": tensors} plus "gemma_config", the values its `GemmaConfig` needs for
this shape, and "ekiden". Its loader is lenient (strict=False), so a wrong name would go unseen there: names and shapes
are what matters here.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import ekiden
from ekiden.errors import UserError
from ekiden.export.huggingface import DTYPES, model_tensors
from ekiden.export.new_file import check_target, new_file

_STORED = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def export_gemma_pytorch(model: PreTrainedModel, target: str | Path, dtype: str = "fp32") -> Path:
    """Write `model` as the file `target`, whole or not at all; return it.

    Args:
        target: NAME.ckpt; replaced where it is an earlier export.
        dtype: of the stored weights: fp32, bf16 or fp16.

    Raises:
        UserError: gemma_pytorch has no such model; `target` holds something else or cannot be written; a weight is
            not finite in `dtype`.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    path = Path(target)
    check_target(path, ".ckpt", is_export)
    _check_model(model)
    contents = {
        "model_state_dict": gemma_pytorch_tensors(model_tensors(model, DTYPES[dtype])),
        "gemma_config": gemma_config(model.config) | {"dtype": _STORED[dtype]},
        "ekiden": ekiden.__version__,
    }
    with new_file(path) as temporary, temporary.open("wb") as file:
        torch.save(contents, file)  # given a name, it would repeat it inside the file
    return path


def is_export(path: Path) -> bool:
    """Return whether a file was written by `export_gemma_pytorch`; nothing in it is executed."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        contents = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    except Exception:  # whatever somebody else's bytes make of it
        return False
    return isinstance(contents, dict) and "ekiden" in contents


def _check_model(model: PreTrainedModel) -> None:
    config: Any = model.config
    problem = None
    if type(model).__name__ != "Gemma3ForCausalLM":
        raise UserError(
            f"--format gemma-pytorch writes Gemma 3 only, and this is {type(model).__name__}; export it with --format hf or "
            "gguf"
        )
    local, full = (config.rope_parameters[f"{kind}_attention"] for kind in ("sliding", "full"))
    if {local["rope_type"], full["rope_type"]} != {"default"}:
        problem = "its text model does not scale positions (rope_scaling_factor)"
    elif not config.tie_word_embeddings:
        problem = "its output matrix is the embedding's"
    elif config.hidden_activation != "gelu_pytorch_tanh":
        problem = f"its activation is tanh-approximated gelu, not {config.hidden_activation}"
    if problem:
        raise UserError(f"gemma_pytorch cannot run this model: {problem}; export it with --format hf")


def gemma_pytorch_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return transformers' tensors of a Gemma 3 under gemma_pytorch's names.

    Query, key and value are one matrix there, in this order; norms are 1 + w in both.
    """
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".self_attn.")
        if name == "model.embed_tokens.weight":
            result["embedder.weight"] = tensor
        elif kind == "q_proj.weight":
            parts = [tensors[f"{layer}.self_attn.{part}_proj.weight"] for part in "qkv"]
            result[f"{layer}.self_attn.qkv_proj.weight"] = torch.cat(parts)
        elif kind in ("k_proj.weight", "v_proj.weight"):
            continue
        elif kind in ("q_norm.weight", "k_norm.weight"):
            long = {"q": "query", "k": "key"}[kind[0]]
            result[f"{layer}.self_attn.{long}_norm.weight"] = tensor
        else:
            result[name] = tensor
    return result


def gemma_config(config: Any) -> dict[str, Any]:
    """Return the fields of gemma_pytorch's `GemmaConfig` for a transformers configuration.

    Enumeration members are given by name: architecture, attn_types (one a layer) and the keys of rope_wave_length.
    """
    kinds = {"sliding_attention": "LOCAL_SLIDING", "full_attention": "GLOBAL"}
    return {
        "architecture": "GEMMA_3",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "query_pre_attn_scalar": config.query_pre_attn_scalar,
        "attn_types": [kinds[kind] for kind in config.layer_types],
        "sliding_window_size": config.sliding_window,
        "final_logit_softcapping": config.final_logit_softcapping,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "use_pre_ffw_norm": True,
        "use_post_ffw_norm": True,
        "use_qk_norm": True,
        "rope_wave_length": {kinds[kind]: int(config.rope_parameters[kind]["rope_theta"]) for kind in kinds},
    }
