"""Folders of safetensors: an Ekiden checkpoint or a Hugging Face model, as one tree of values and back.

The tree of a folder, which `.json` and `.pt` files made from it hold, is a dict with these keys:

    "step"              optimizer steps (Ekiden's), else absent
    "model_state_dict"  name -> tensor, of model.safetensors or of the shards model-*.safetensors
    "safetensors"       file name -> name -> tensor, of every other safetensors file (optimizer, random numbers)
    "files"             file name -> text, or bytes where it is not UTF-8: config.json, trainer_state.json, tokenizer...
    "ekiden_folder"     "version", the facts of the manifest ("run"), "metadata" of the tensor files, and for sharded
                        weights "shards": file name -> names of its tensors
"""

from __future__ import annotations

import itertools
import os
import struct
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ekiden.checkpoint import files
from ekiden.checkpoint.header import METADATA, TensorInfo, encode_header, layout, read_header
from ekiden.checkpoint.lazy import DTYPES, LazyTensor, check_tree, read_range
from ekiden.checkpoint.manifest import NAME as MANIFEST
from ekiden.checkpoint.manifest import (
    Damaged,
    FileRecord,
    Hashes,
    check_name,
    describe_tensors,
    verify_folder,
)
from ekiden.checkpoint.strict_json import parse_json
from ekiden.errors import UserError
from ekiden.progress import say

if TYPE_CHECKING:
    from ekiden.checkpoint.folder import CheckpointWriter

VERSION = 1
FACTS = "ekiden_folder"
WEIGHTS = "model.safetensors"
_SUFFIX = ".safetensors"
_MAX_FILE_BYTES = 64 << 20
_CODES = {dtype.code: name for name, dtype in DTYPES.items() if dtype.code}
_STATE_FILES = ("trainer_state.json",)


def is_folder(path: Path) -> bool:
    """Return whether `path` is a folder with weights in safetensors."""
    return path.is_dir() and any(path.glob("*" + _SUFFIX))


def is_folder_tree(value: Any) -> bool:
    """Return whether `value` was made from a folder by `read_folder`."""
    facts = value.get(FACTS) if isinstance(value, dict) else None
    return isinstance(facts, dict) and facts.get("version") == VERSION


def read_folder(path: Path, weights_only: bool = False) -> dict[str, Any]:
    """Return the tree of the folder `path`, its tensors lazy. An Ekiden checkpoint is verified to the last byte first.

    Args:
        weights_only: leave out the optimizer, random numbers and trainer's state.

    Raises:
        UserError: it is damaged, or holds no weights.
    """
    facts: dict[str, Any] = {"version": VERSION, "run": {}, "metadata": {}}
    tree: dict[str, Any] = {}
    try:
        if (path / MANIFEST).is_file():
            manifest = verify_folder(path)
            names = sorted(manifest.files)
            facts["run"] = manifest.run
            # A Hugging Face folder that was converted and came back has a manifest, and no step.
            if manifest.step or _STATE_FILES[0] in names:
                tree["step"] = manifest.step
        else:
            names = _plain_names(path, weights_only)
        tensors = {name: _tensors(path, name, facts) for name in names if name.endswith(_SUFFIX)}
        texts = {name: _text(path / name) for name in names if not name.endswith(_SUFFIX)}
    except Damaged as damage:
        raise UserError(f"{path} is damaged ({damage}); give another one, or a copy of it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({files.reason(error)}); mend that and try again") from None
    weights = {name: tensors.pop(name) for name in sorted(tensors) if _is_weights(name)}
    if not weights:
        raise UserError(f"{path} holds no model.safetensors; give a checkpoint or a Hugging Face folder")
    if list(weights) != [WEIGHTS]:
        facts["shards"] = {name: list(held) for name, held in weights.items()}
    tree["model_state_dict"] = {name: tensor for held in weights.values() for name, tensor in held.items()}
    if len(tree["model_state_dict"]) != sum(len(held) for held in weights.values()):
        raise UserError(f"{path} holds a tensor of one name in two files; give a whole download of the model")
    if weights_only:
        texts = {name: text for name, text in texts.items() if name not in _STATE_FILES}
        facts["metadata"] = {name: facts["metadata"].get(name, {}) for name in weights}
    else:
        tree["safetensors"] = tensors
    return {**tree, "files": texts, FACTS: facts}


def _is_weights(name: str) -> bool:
    return name == WEIGHTS or (name.startswith("model-") and "-of-" in name)


def _plain_names(path: Path, weights_only: bool) -> list[str]:
    """Return the files of a folder that has no manifest, and say which are left out."""
    names: list[str] = []
    left: list[str] = []
    for file in sorted(path.iterdir()):
        if weights_only and file.suffix in (".pt", ".pth", ".bin"):
            continue  # a trainer's state
        fits = file.is_file() and (file.suffix == _SUFFIX or file.stat().st_size <= _MAX_FILE_BYTES)
        try:
            check_name(file.name)
        except Damaged:
            fits = False
        (names if fits else left).append(file.name)
    if left:
        say(f"left out of {path.name}: {', '.join(left[:8])}{' ...' if len(left) > 8 else ''}")
    return names


def _tensors(path: Path, name: str, facts: dict[str, Any]) -> dict[str, LazyTensor]:
    # Hugging Face's cache keeps every file behind a symbolic link.
    file = (path / name).resolve()
    header = read_header(file)
    [length] = struct.unpack("<Q", files.read_start(file, 8))
    entries = parse_json(files.read_start(file, 8 + length)[8:], name)
    facts["metadata"][name] = entries.get(METADATA) or {}
    result = {}
    for key, info in header.items():
        offset = 8 + length + entries[key]["data_offsets"][0]
        read = partial(read_range, file, offset, info.bytes)
        result[key] = LazyTensor(_CODES[info.dtype], info.shape, read, (name, key))
    return result


def _text(path: Path) -> str | bytes:
    data = files.read_start(path.resolve(), _MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        raise Damaged(f"{path.name} is larger than {_MAX_FILE_BYTES >> 20} MB")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def write_checkpoint_folder(path: Path, tree: dict[str, Any]) -> None:
    """Write the folder that `tree` was made from: every file as it was, a manifest with hashes last.

    Raises:
        UserError: the tree holds what no such folder does.
        OSError: the disk is full or fails.
    """
    from ekiden.checkpoint.folder import write_folder

    facts, contents = _checked_tree(tree)

    def write(writer: CheckpointWriter) -> None:
        for name, content in contents.items():
            if isinstance(content, dict):
                metadata = facts["metadata"].get(name) or None
                writer.records[name] = _write_tensors(writer.folder / name, content, metadata)
            else:
                writer.bytes(name, content.encode() if isinstance(content, str) else content)

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_folder(temporary, write, tree.get("step", 0), facts["run"])
        files.rename(temporary, path)
        files.sync_folder(path.parent)
    except Damaged as damage:
        raise UserError(f"{path} cannot be written: {damage}") from None
    finally:
        files.remove_tree(temporary)


def _checked_tree(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the facts and the files of a folder's tree, which may come from anybody's `.json` or `.pt`."""
    check_tree(tree, "the checkpoint")
    facts: dict[str, Any] = tree[FACTS]
    weights: Any = tree.get("model_state_dict")
    others, texts, shards = tree.get("safetensors", {}), tree.get("files", {}), facts.get("shards")
    step = tree.get("step", 0)
    dicts = (facts.get("run"), facts.get("metadata"), weights, others, texts)
    if not all(isinstance(part, dict) for part in dicts) or type(step) is not int or step < 0:
        raise _misshapen()
    try:
        shards = shards if shards is not None else {WEIGHTS: list(weights)}
        held = {name: {key: weights[key] for key in keys} for name, keys in shards.items()}
        contents: dict[str, Any] = {**held, **others, **texts}
        for name in contents:
            check_name(name)
        if len(contents) != len(held) + len(others) + len(texts):
            raise _misshapen()
        for metadata in facts["metadata"].values():
            if not all(isinstance(text, str) for text in metadata.values()):
                raise _misshapen()
    except (Damaged, KeyError, TypeError, AttributeError):
        raise _misshapen() from None
    for name, content in contents.items():
        if isinstance(content, dict) and name.endswith(_SUFFIX):
            _check_tensors(content)
        elif not isinstance(content, (str, bytes)):
            raise _misshapen()
    return facts, contents


def _misshapen() -> UserError:
    return UserError(
        "the checkpoint says that it was made from a folder, and does not hold one; convert the folder again"
    )


def _check_tensors(tensors: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == METADATA or not isinstance(tensor, LazyTensor):
            raise _misshapen()
        if DTYPES[tensor.dtype].code is None:
            raise UserError(
                f"{name[:80]} is of dtype {tensor.dtype}, which a folder of safetensors cannot hold; convert to .json "
                "or .pt"
            )


def write_weights_folder(path: Path, weights: dict[str, LazyTensor]) -> None:
    """Write a folder with `model.safetensors` alone, from a checkpoint that was no folder.

    Raises:
        UserError: a tensor's type is not one that safetensors has.
        OSError: the disk is full or fails.
    """
    facts = {"version": VERSION, "run": {}, "metadata": {WEIGHTS: {"format": "pt"}}}
    write_checkpoint_folder(path, {"model_state_dict": weights, FACTS: facts})


def _write_tensors(path: Path, tensors: dict[str, LazyTensor], metadata: dict[str, str] | None) -> FileRecord:
    """Write the safetensors file that `tensors.write_tensors` would, from lazy tensors, a piece at a time."""
    infos = {
        name: TensorInfo(str(DTYPES[tensor.dtype].code), tensor.shape) for name, tensor in tensors.items()
    }
    hashes = Hashes()
    with files.DurableFile(path) as file:
        header = encode_header(infos, metadata)
        pieces = (piece for name in layout(infos) for piece in tensors[name].read())
        for piece in itertools.chain([header], pieces):
            hashes.update(piece)
            file.write(piece)
    return hashes.record(describe_tensors(infos))
