"""A trained model as a Hugging Face folder that plain transformers loads: checkpoints, best/ and exports are such.

Takes a model and the tokenizer it was trained with. The trainer writes `model_folder_files` beside its weights
through the checkpoint store; `export_huggingface` writes a whole folder, in fp32 or 16 bit, for somebody else.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ekiden.checkpoint.manifest import NAME as MANIFEST
from ekiden.checkpoint.manifest import Damaged, read_manifest
from ekiden.checkpoint.store import CheckpointWriter, replace_folder
from ekiden.errors import UserError
from ekiden.modeling.build import parameter_counts
from ekiden.progress import human_count
from ekiden.tokenizer.huggingface import huggingface_files
from ekiden.tokenizer.load import Tokenizer

WEIGHTS = "model.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def model_tensors(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return the weights by transformers' names, in host memory; the tied head once, as the embedding.

    Raises:
        UserError: a weight is not finite, or would not be in `dtype`.
    """
    tensors = {name: weight.detach().to("cpu", dtype) for name, weight in model.named_parameters()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            kind = str(dtype).removeprefix("torch.")
            raise UserError(
                f"{name} holds values that are not finite in {kind}; export with --dtype bf16 or fp32"
            )
    return tensors


def model_folder_files(
    model: PreTrainedModel, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32
) -> dict[str, bytes]:
    """Return every file of the folder but the weights, by name.

    These are config.json, generation_config.json, README.md, and the tokenizer's: its own and AutoTokenizer's.
    """
    return {
        "config.json": _json(_config(model, dtype)),
        "generation_config.json": _json(_generation_config(tokenizer)),
        "README.md": model_card(model, tokenizer).encode(),
        **huggingface_files(tokenizer, context_length(model)),
    }


def context_length(model: PreTrainedModel) -> int:
    """Return the most tokens the model was made for (GPT-2 has no positions beyond)."""
    return int(model.config.max_position_embeddings)


def _config(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Any]:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.use_cache = True  # off in training only; without it everybody's generation is quadratic
    value = json.loads(config.to_json_string())
    value["transformers_version"] = transformers.__version__
    return value


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    return {
        **{name: number for name, number in ids.items() if number is not None},
        "transformers_version": transformers.__version__,
    }


def model_card(model: PreTrainedModel, tokenizer: Tokenizer) -> str:
    """Return a README that says what the folder is and how to load it."""
    blocks, embedding = parameter_counts(model)
    begin = "" if tokenizer.bos_id is None else f"id {tokenizer.bos_id}, then "
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# A {type(model).__name__} trained from scratch with Ekiden

{human_count(blocks)} parameters in blocks, {human_count(embedding)} in the embedding (shared with the output).
{tokenizer.vocab_size} pieces ({tokenizer.kind}, {tokenizer.model_type}), context of {context_length(model)} tokens.
A base model: it continues text and follows no instructions. It has read each document as {begin}its text.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
```
"""


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def export_huggingface(
    model: PreTrainedModel, tokenizer: Tokenizer, target: str | Path, dtype: str = "fp32"
) -> Path:
    """Write `model` with `tokenizer` as the folder `target`, whole or not at all; return the folder.

    Args:
        target: created, or replaced where it is an earlier export.
        dtype: of the stored weights: fp32, bf16 or fp16.

    Raises:
        UserError: `target` holds other files, cannot be written, or a weight is not finite in `dtype`.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    folder = Path(target)
    _check_target(folder)
    tensors = model_tensors(model, DTYPES[dtype])
    contents = model_folder_files(model, tokenizer, DTYPES[dtype])

    def write(writer: CheckpointWriter) -> None:
        for name, content in contents.items():
            writer.bytes(name, content)
        writer.tensors(WEIGHTS, tensors, metadata={"format": "pt"})

    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        replace_folder(folder.absolute(), write, {"dtype": dtype})
    except OSError as error:
        raise UserError(
            f"--output {folder} cannot be written ({error.strerror or error}); give another place"
        ) from None
    return folder


def _check_target(folder: Path) -> None:
    """Refuse a folder that holds anything but an earlier export: it is going to be replaced.

    Raises:
        UserError: it does, or it is a file.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--output {folder} is a file; give the folder to write")
    found = {path.name for path in folder.iterdir()}
    try:
        known = {MANIFEST, *read_manifest(folder).files} if found else set()
    except Damaged:
        known = set()
    if found - known:
        raise UserError(
            f"--output {folder} holds files that are not an earlier export's ({min(found - known)}); "
            "give a new folder"
        )
