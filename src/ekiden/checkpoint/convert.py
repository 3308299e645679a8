"""`ekiden checkpoint convert`: a checkpoint in one format read lazily, written in another, and compared.

`.pt`/`.pth` files (also unpacked into a folder), folders of safetensors (Ekiden's and Hugging Face's) and JSON, each
to each, tensor by tensor: the memory needed does not grow with the model. `training.foreign` reads through `open_tree`.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ekiden.checkpoint import files
from ekiden.checkpoint.folder_format import (
    FACTS,
    is_folder,
    is_folder_tree,
    read_folder,
    write_checkpoint_folder,
    write_weights_folder,
)
from ekiden.checkpoint.json_format import read_json, write_json
from ekiden.checkpoint.lazy import CHUNK_BYTES, LazyTensor, TorchValue, check_tree, rechunk
from ekiden.checkpoint.listing import step_folders
from ekiden.checkpoint.torch_format import is_torch, read_torch, write_torch
from ekiden.errors import UserError

_STATE = re.compile(r"optim|sched|scaler|rng|random", re.IGNORECASE)


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    tensors: number written. source_bytes, bytes: size of the files before and after. left_out: keys not written.
    compared: tensors read back and found equal to the last bit; None: not asked for.
    """

    path: Path
    tensors: int
    source_bytes: int
    bytes: int
    left_out: list[str]
    compared: int | None

    def __str__(self) -> str:
        ratio = self.bytes / max(1, self.source_bytes)
        text = f"{self.path}: {self.tensors} tensors, {self.bytes / 1e6:.1f} MB, {ratio:.3f} of the source"
        if self.left_out:
            text += f"; left out: {', '.join(self.left_out[:8])}"
        if self.compared is not None:
            text += f"; read back, {self.compared} of {self.tensors} tensors equal to the last bit"
        return text


def open_tree(path: Path) -> Any:
    """Return what the checkpoint at `path` holds, whatever its format, its tensors lazy.

    Raises:
        UserError: there is none, it is damaged, or of a format that is not read.
    """
    try:
        if is_folder(path):
            return read_folder(path)
        if not path.exists():
            raise UserError(
                f"{path} does not exist; give a .pt, .pth or .json file, or a checkpoint's folder"
            )
        if is_torch(path):
            return read_torch(path)
        if path.is_file() and _is_json(path):
            return read_json(path)
        if path.suffix == ".safetensors":
            raise UserError(f"{path} holds weights alone; give the folder that it lies in")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({files.reason(error)}); mend that and try again") from None
    if (path / "checkpoints").is_dir():
        newest = next(iter(step_folders(path / "checkpoints")), path / "checkpoints" / "step-...")
        raise UserError(f"{path} is a run, not one checkpoint; give one of them, such as {newest}")
    raise UserError(
        f"{path} is no checkpoint that can be read; give a .pt or .pth file (or one unpacked into a folder), a .json "
        "file, or a folder with model.safetensors"
    )


def _is_json(path: Path) -> bool:
    start = files.read_start(path.resolve(), 64).lstrip()
    return path.suffix == ".json" or start.startswith((b"{", b"["))


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    weights_only: bool = False,
    readable: bool = False,
    test_load: bool = False,
) -> Conversion:
    """Convert the checkpoint `source` to `target`: `.json`, `.pt` or `.pth`, else a folder.

    Args:
        weights_only: leave out optimizer, schedule and random numbers.
        readable: in JSON, write numbers instead of base64.
        test_load: read the result back, a `.pt` through torch itself, and compare every value and tensor.

    Raises:
        UserError: the source cannot be read, the target exists, or cannot hold what the source holds.
    """
    source, target = Path(source), Path(target)
    if target.exists() or not target.parent.is_dir():
        problem = "exists" if target.exists() else "has no folder to lie in"
        raise UserError(f"{target} {problem}; give another name, or change that first")
    tree = open_tree(source)
    left_out: list[str] = []
    if weights_only:
        tree, left_out = _weights_only(source, tree)
    tensors = check_tree(tree, str(source))
    if not tensors:
        raise UserError(f"{source} holds no tensor, so it is no checkpoint; give another source")
    left_out += _write(target, tree, readable)
    return Conversion(
        target,
        len(tensors),
        _size(source),
        _size(target),
        left_out,
        _test_load(target, tree) if test_load else None,
    )


def write_json_model(folder: Path, path: Path) -> None:
    """Write the model in `folder` (weights, step, config and tokenizer, no optimizer) as the JSON file `path`.

    A file of that name is replaced once the new one is whole and durable.

    Raises:
        UserError: the folder is damaged.
        OSError: the disk is full or fails; the file that was there before stays.
    """
    write_json(path, read_folder(folder, weights_only=True))


def _weights_only(source: Path, tree: Any) -> tuple[Any, list[str]]:
    if is_folder_tree(tree) and is_folder(source):
        return read_folder(source, weights_only=True), ["optimizer and trainer's state"]
    if not isinstance(tree, dict):
        return tree, []
    drop = [key for key in tree if isinstance(key, str) and _STATE.search(key)]
    kept = type(tree)((key, value) for key, value in tree.items() if key not in drop)
    if is_folder_tree(tree):
        kept.pop("safetensors", None)
        kept["files"] = {k: v for k, v in dict(tree.get("files", {})).items() if k != "trainer_state.json"}
        drop.append("safetensors")
    elif hasattr(tree, "_metadata"):
        kept._metadata = tree._metadata  # type: ignore[attr-defined]
    return kept, drop


def _write(target: Path, tree: Any, readable: bool) -> list[str]:
    """Write `tree`; return the keys of values that a folder of weights has no place for."""
    if target.suffix == ".json":
        write_json(target, tree, readable)
    elif target.suffix in (".pt", ".pth"):
        write_torch(target, tree)
    elif is_folder_tree(tree):
        write_checkpoint_folder(target, tree)
    else:
        weights, rest = _bare_weights(tree)
        large = [key for key, value in rest.items() if isinstance(value, (dict, list, LazyTensor))]
        if large:
            raise UserError(
                f"a folder would keep the weights alone and lose {', '.join(large[:6])}; convert to .json, or add "
                "--weights-only and give a file with nothing but weights"
            )
        write_weights_folder(target, weights)
        return list(rest)
    return []


def _bare_weights(tree: Any) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """Return the weights of a checkpoint that was no folder, and what there is beside them."""
    if isinstance(tree, dict) and tree and all(isinstance(value, LazyTensor) for value in tree.values()):
        return {str(name): tensor for name, tensor in tree.items()}, {}
    if isinstance(tree, dict):
        for key in ("model_state_dict", "model", "state_dict"):
            if isinstance(tree.get(key), dict):
                weights, rest = _bare_weights(tree[key])
                return weights, rest | {str(other): value for other, value in tree.items() if other != key}
    raise UserError("no weights were found to write as a folder; convert to .json or .pt instead")


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


# -- comparing ---------------------------------------------------------------------------------------------------------


def _test_load(target: Path, tree: Any) -> int:
    """Read `target` back and return how many tensors are equal, which is all of them.

    Raises:
        UserError: something differs, which is a defect or a failing disk; it says what.
    """
    if target.suffix in (".pt", ".pth"):
        import torch

        found = torch.load(target, map_location="cpu", mmap=True, weights_only=True)
    else:
        found = open_tree(target)
        if is_folder_tree(found) and not is_folder_tree(tree):
            tree, found = _bare_weights(tree)[0], found["model_state_dict"]
    return compare(tree, found)


def compare(expected: Any, found: Any, where: str = "") -> int:
    """Return the number of tensors in two trees that are equal in every value, type and bit; `found` may be torch's.

    Raises:
        UserError: they differ; it names the place.
    """
    different = UserError(
        f"{where or 'the checkpoint'} was not read back as it was written; convert it again"
    )
    if isinstance(expected, LazyTensor):
        if not _equal_tensors(expected, found):
            raise different
        return 1
    if isinstance(expected, TorchValue):
        if found != expected and expected.load() != found:
            raise different
        return 0
    if type(expected) is not type(found):
        raise different
    if isinstance(expected, dict):
        # A sharded folder's tensors may stand in another order, which names do not depend on.
        keys = list(expected) if isinstance(expected, OrderedDict) else sorted(expected, key=repr)
        others = list(found) if isinstance(expected, OrderedDict) else sorted(found, key=repr)
        if repr(keys) != repr(others) and not _holds_tensor(keys):
            raise different
        return sum(compare(expected[key], found[key], f"{where}/{key}") for key in keys if key != FACTS)
    if isinstance(expected, (list, tuple)):
        if len(expected) != len(found):
            raise different
        return sum(compare(a, b, f"{where}/{i}") for i, (a, b) in enumerate(zip(expected, found)))
    equal = expected == found or (isinstance(expected, float) and math.isnan(expected) and math.isnan(found))
    if not equal or math.copysign(1, found if isinstance(found, float) else 1) != math.copysign(
        1, expected if isinstance(expected, float) else 1
    ):
        raise different
    return 0


def _holds_tensor(keys: list[Any]) -> bool:
    return any(isinstance(key, LazyTensor) for key in keys)


def _equal_tensors(expected: LazyTensor, found: Any) -> bool:
    if isinstance(found, LazyTensor):
        dtype, shape, chunks = found.dtype, found.shape, found.read()
    else:
        dtype, shape = str(found.dtype).removeprefix("torch."), tuple(found.shape)
        chunks = _torch_chunks(found.detach())
    if (dtype, shape) != (expected.dtype, expected.shape):
        return False
    pairs = zip_longest(rechunk(expected.read(), CHUNK_BYTES), rechunk(chunks, CHUNK_BYTES))
    return all(a == b for a, b in pairs)


def _torch_chunks(tensor: Any) -> Iterator[bytes]:
    import torch

    flat = (
        tensor.contiguous().reshape(-1).view(torch.uint8)
        if tensor.numel()
        else tensor.new_empty(0, dtype=torch.uint8)
    )
    for begin in range(0, len(flat), CHUNK_BYTES):
        yield flat[begin : begin + CHUNK_BYTES].numpy().tobytes()
