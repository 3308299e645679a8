"""A GPT-2 or Gemma 3 with its SentencePiece vocabulary as one GGUF file, for llama.cpp and what is built on it.

Takes a loaded model; names come from the `gguf` package, which llama.cpp's authors publish. Tensors are converted and
written one at a time. The file gets its name only after the ids that llama.cpp gives on real text were compared with
the ids the model was trained on (`export.token_check`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

import ekiden
from ekiden.errors import UserError
from ekiden.export.llama_tokens import Vocabulary, vocabulary
from ekiden.export.new_file import check_target, new_file
from ekiden.export.token_check import TokenComparison, check_tokens
from ekiden.modeling.build import head_weight
from ekiden.optional import require
from ekiden.tokenizer.load import SentencePieceTokenizer, Tokenizer

DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
_ARCHITECTURES = {"GPT2LMHeadModel": "gpt2", "Gemma3ForCausalLM": "gemma3"}
_VERSION_KEY = "ekiden.version"
_Q8_BLOCK = 32
"""Values that share a scale in q8_0; a row must be a multiple."""


def export_gguf(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    target: str | Path,
    dtype: str = "fp32",
    texts: list[str] | None = None,
) -> TokenComparison | None:
    """Write `model` with `tokenizer` as the GGUF file `target`, whole or not at all.

    Args:
        target: NAME.gguf; replaced where it is an earlier export.
        dtype: of the matrices: fp32, fp16, bf16 or q8_0; vectors and GPT-2's positions stay fp32, as llama.cpp
            has them.
        texts: real text to compare llama.cpp's ids with the tokenizer's on; None or empty: not compared.

    Returns:
        The comparison; None where there were no texts.

    Raises:
        UserError: `gguf` is not installed; llama.cpp computes this model or its tokens otherwise; `target` holds
            something else or cannot be written; a weight is not finite in `dtype`.
    """
    gguf, path = _package(), Path(target)
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    check_target(path, ".gguf", is_export)
    architecture = check_model(model)
    known = vocabulary(tokenizer, head_weight(model).shape[0])
    assert isinstance(tokenizer, SentencePieceTokenizer)
    if not texts and known.kind == "llama" and known.normalises:
        raise UserError(
            "llama.cpp does not normalise text for a BPE vocabulary, and this tokenizer does; give --check-text FILE with "
            "real text to see whether it matters, or export with --format hf"
        )
    with new_file(path) as temporary:
        writer = gguf.GGUFWriter(str(temporary), architecture)
        try:
            writer.add_name(path.stem)
            writer.add_string(_VERSION_KEY, ekiden.__version__)
            writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[DTYPES[dtype]]])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            (_add_gpt2 if architecture == "gpt2" else _add_gemma3)(writer, model.config)
            _add_vocabulary(writer, tokenizer, known)
            _write_tensors(gguf, writer, model, DTYPES[dtype])
        finally:
            writer.close()
        return check_tokens(temporary, tokenizer, known, texts) if texts else None


def _package() -> Any:
    gguf = require("gguf", "--format gguf", extra="gguf")
    logging.getLogger("gguf").setLevel(logging.WARNING)
    return gguf


def is_export(path: Path) -> bool:
    """Return whether a file is a GGUF that this program wrote."""
    try:
        return _VERSION_KEY in _package().GGUFReader(str(path)).fields
    except Exception:  # not a GGUF, or a broken one: numpy's and struct's errors, whatever its bytes say
        return False


def check_model(model: PreTrainedModel) -> str:
    """Return llama.cpp's name of the architecture.

    Raises:
        UserError: llama.cpp has no such model, or computes it with other constants.
    """
    config, architecture = model.config, _ARCHITECTURES.get(type(model).__name__)
    if architecture is None:
        raise UserError(
            f"--format gguf writes GPT-2 and Gemma 3 text models, not {type(model).__name__}; export it with --format hf"
        )
    problem = _unlike_gpt2(config) if architecture == "gpt2" else _unlike_gemma3(config)
    if problem:
        raise UserError(f"llama.cpp computes this model otherwise: {problem}; export it with --format hf")
    return architecture


def _unlike_gpt2(config: Any) -> str | None:
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        return f"its activation is tanh-approximated gelu, not {config.activation_function}"
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        return "its attention is scaled by 1/sqrt(head size) in every layer"
    return None


def _unlike_gemma3(config: Any) -> str | None:
    # The 62 layers of 27B are its only mark.
    expected = (
        config.hidden_size // config.num_attention_heads
        if config.num_hidden_layers == 62
        else config.head_dim
    )
    if config.query_pre_attn_scalar != expected:
        return f"its attention is scaled by 1/sqrt({expected}), not 1/sqrt({config.query_pre_attn_scalar})"
    if config.attn_logit_softcapping:
        return "it has no soft cap of attention logits"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is causal"
    if config.hidden_activation != "gelu_pytorch_tanh":
        return f"its activation is tanh-approximated gelu, not {config.hidden_activation}"
    local, full = (config.rope_parameters[f"{kind}_attention"] for kind in ("sliding", "full"))
    if local["rope_type"] != "default" or full["rope_type"] not in ("default", "linear"):
        return f"its positions are scaled linearly in global layers only, not {local['rope_type']}/{full['rope_type']}"
    return None


def _add_gpt2(writer: Any, config: Any) -> None:
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _add_gemma3(writer: Any, config: Any) -> None:
    local, full = (config.rope_parameters[f"{kind}_attention"] for kind in ("sliding", "full"))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(full["rope_theta"])
    if full["rope_type"] == "linear":
        writer.add_rope_scaling_type(_package().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    if any(sliding):
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern(sliding)
        writer.add_rope_freq_base_swa(local["rope_theta"])


def _add_vocabulary(writer: Any, tokenizer: SentencePieceTokenizer, known: Vocabulary) -> None:
    writer.add_tokenizer_model(known.kind)
    writer.add_tokenizer_pre("default")
    writer.add_token_list(known.texts)
    writer.add_token_scores(known.scores)
    writer.add_token_types(known.types)
    writer.add_unk_token_id(known.unk_id)
    # Where a vocabulary has none, llama.cpp would take a common model's id for the end of text; the unknown piece
    # is the one that is never meant.
    writer.add_eos_token_id(known.unk_id if tokenizer.eos_id is None else tokenizer.eos_id)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    if tokenizer.pad_id is not None:
        writer.add_pad_token_id(tokenizer.pad_id)
    # Training began every document with BOS, and a prompt has not ended.
    writer.add_add_bos_token(tokenizer.bos_id is not None)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(known.add_space_prefix)
    writer.add_remove_extra_whitespaces(known.remove_extra_whitespaces)
    if known.charsmap:
        writer.add_precompiled_charsmap(known.charsmap)


def gguf_tensors(gguf: Any, model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights under llama.cpp's names and in its layout, in host memory, fp32.

    GPT-2's matrices are stored [in, out] by transformers and [out, in] by llama.cpp; Gemma's norms are 1 + w there.
    The output matrix is left out where it is the embedding's: llama.cpp then takes that one.
    """
    architecture = _ARCHITECTURES[type(model).__name__]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], model.config.num_hidden_layers)
    for name, weight in model.named_parameters():
        tensor = weight.detach().to("cpu", torch.float32)
        if architecture == "gpt2" and tensor.dim() == 2 and ".h." in name:
            tensor = tensor.t().contiguous()
        if architecture == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor + 1
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name} holds values that are not finite; export an earlier checkpoint")
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        yield target, tensor


def _stored_type(name: str, shape: torch.Size, wanted: str) -> str:
    if len(shape) == 1 or name == "position_embd.weight":
        return "F32"
    return "F16" if wanted == "Q8_0" and shape[-1] % _Q8_BLOCK else wanted


def _write_tensors(gguf: Any, writer: Any, model: PreTrainedModel, wanted: str) -> None:
    """Write the table of all tensors, then each of them."""
    types = gguf.GGMLQuantizationType
    kinds: list[str] = []
    for name, tensor in gguf_tensors(gguf, model):
        kind = _stored_type(name, tensor.shape, wanted)
        kinds.append(kind)
        dtype = {"F32": np.float32, "F16": np.float16}.get(kind, np.uint8)
        shape = tuple(tensor.shape)
        if dtype is np.uint8:
            shape = gguf.quants.quant_shape_to_byte_shape(shape, types[kind])
        size = math.prod(shape) * np.dtype(dtype).itemsize
        writer.add_tensor_info(name, shape, np.dtype(dtype), size, raw_dtype=types[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for kind, (name, tensor) in zip(kinds, gguf_tensors(gguf, model)):
        if kind == "F16" and not torch.isfinite(tensor.half()).all():
            raise UserError(
                f"{name} holds values that are not finite in fp16; export with --dtype bf16 or fp32"
            )
        writer.write_tensor_data(gguf.quants.quantize(tensor.numpy(), types[kind]))
