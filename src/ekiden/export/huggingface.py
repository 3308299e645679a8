"""A trained model as a Hugging Face folder that plain transformers loads: checkpoints, best/ and exports are such.

Takes a model and the tokenizer it was trained with. The trainer writes `model_folder_files` beside its weights
through the checkpoint store; `export_huggingface` writes a whole folder, in fp32 or 16 bit, in several files where
one would be too large, for somebody else.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import PreTrainedModel

from ekiden.checkpoint import files
from ekiden.checkpoint.manifest import NAME as MANIFEST
from ekiden.checkpoint.manifest import Damaged, read_manifest
from ekiden.checkpoint.store import CheckpointError, CheckpointWriter, replace_folder
from ekiden.errors import UserError
from ekiden.export.card import RunFacts, model_card
from ekiden.tokenizer.huggingface import huggingface_files
from ekiden.tokenizer.load import Tokenizer

WEIGHTS, INDEX, CARD = "model.safetensors", "model.safetensors.index.json", "README.md"
SHARD_BYTES = 5_000_000_000
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
        CARD: model_card(model, tokenizer).encode(),
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


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def export_huggingface(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    target: str | Path,
    dtype: str = "fp32",
    facts: RunFacts | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write `model` with `tokenizer` as the folder `target`, whole or not at all; return the folder.

    Args:
        target: created, or replaced where it is an earlier export whose card nobody has edited.
        dtype: of the stored weights: fp32, bf16 or fp16.
        facts: of the run, for the model card.
        shard_bytes: weights above this are split into files of at most as much (a larger tensor has its own).

    Raises:
        UserError: `target` holds other files, cannot be written, or a weight is not finite in `dtype`.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    folder = Path(target)
    _check_target(folder)
    tensors = model_tensors(model, DTYPES[dtype])
    contents = model_folder_files(model, tokenizer, DTYPES[dtype])
    card = model_card(model, tokenizer, facts).encode()
    del contents[CARD]

    def write(writer: CheckpointWriter) -> None:
        for name, content in contents.items():
            writer.bytes(name, content)
        _write_weights(writer, tensors, shard_bytes)
        # Outside the manifest: whoever publishes the model edits its card, which must not count as damage.
        with files.DurableFile(writer.folder / CARD) as file:
            file.write(card)

    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        about = {"dtype": dtype, "card": hashlib.sha256(card).hexdigest(), "step": facts.step if facts else 0}
        replace_folder(folder.absolute(), write, about)
    except (OSError, CheckpointError) as error:
        reason = files.reason(error) if isinstance(error, OSError) else str(error).partition(": ")[2]
        raise UserError(f"--output {folder} cannot be written ({reason}); give another place") from None
    return folder


def _write_weights(writer: CheckpointWriter, tensors: dict[str, torch.Tensor], shard_bytes: int) -> None:
    """Write one safetensors file, or several and the index that says which tensor is where."""
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_bytes)
    for filename, names in split.filename_to_tensors.items():
        writer.tensors(filename, {name: tensors[name] for name in names}, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        writer.bytes(INDEX, _json(index))


def _check_target(folder: Path) -> None:
    """Refuse a folder that holds anything but an earlier export: it is going to be replaced.

    Raises:
        UserError: it does, its card was edited, or it is a file.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--output {folder} is a file; give the folder to write")
    found = {path.name for path in folder.iterdir()}
    known: set[str] = set()
    card = None
    if found:
        try:
            manifest = read_manifest(folder)
            # A run's own folders have a manifest too, and no hash of their card in it.
            if card := manifest.run.get("card"):
                known = {MANIFEST, CARD, *manifest.files}
        except Damaged:
            pass
    if found - known:
        raise UserError(
            f"--output {folder} holds files that are not an earlier export's ({min(found - known)}); "
            "give a new folder"
        )
    if card and CARD in found and hashlib.sha256((folder / CARD).read_bytes()).hexdigest() != card:
        raise UserError(f"--output {folder} holds a {CARD} that was edited; give a new folder")
