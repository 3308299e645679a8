"""`.pt` files: what torch wrote is read bit by bit, what is hostile or damaged is one sentence and nothing is run."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import DTYPES, MEGABYTE, convert_in_little_memory, every_bit, odd, refusal, trained

from ekiden.checkpoint.convert import compare, open_tree
from ekiden.checkpoint.lazy import check_tree, load_tree
from ekiden.checkpoint.torch_format import read_torch, write_torch
from ekiden.errors import UserError


def save(value: Any, path: Path) -> Path:
    torch.save(value, path)
    return path


@pytest.mark.parametrize("make", [trained, odd])
def test_torch_opens_what_is_written_and_it_is_what_was_read(make: Callable[[], Any], tmp_path: Path) -> None:
    path = save(make(), tmp_path / "a.pt")
    tree = read_torch(path)
    assert compare(tree, make()) == len(check_tree(tree, "a")) > 0
    write_torch(tmp_path / "b.pt", tree)
    for options in ({}, {"mmap": True}):
        back = torch.load(tmp_path / "b.pt", weights_only=True, **options)
        assert compare(tree, back) == len(check_tree(tree, "a"))
    assert zipfile.ZipFile(tmp_path / "b.pt").testzip() is None


def test_tied_tensors_share_one_storage_in_the_file_and_in_memory(tmp_path: Path) -> None:
    base = torch.randn(100, 100)
    path = save({"wte": base, "head": base, "half": base[50:]}, tmp_path / "a.pt")
    write_torch(tmp_path / "b.pt", read_torch(path))
    back = torch.load(tmp_path / "b.pt", weights_only=True)
    assert back["wte"].data_ptr() == back["head"].data_ptr()
    # A part of another tensor keeps its values; that it was a part is not kept.
    assert torch.equal(back["half"], base[50:])
    assert 60_000 < (tmp_path / "b.pt").stat().st_size < 65_000


def test_every_storage_is_aligned_so_that_it_can_be_mapped(tmp_path: Path) -> None:
    tensors = {str(n): torch.ones(n) for n in range(1, 40, 7)}
    write_torch(tmp_path / "b.pt", read_torch(save(tensors, tmp_path / "a.pt")))
    reader = torch._C.PyTorchFileReader(str(tmp_path / "b.pt"))
    assert all(reader.get_record_offset(f"data/{k}") % 64 == 0 for k in range(len(tensors)))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("nested", [True, False])
def test_other_pickle_protocols_and_unpacked_folders(tmp_path: Path, protocol: int, nested: bool) -> None:
    path = tmp_path / "a.pt"
    torch.save(trained(), path, pickle_protocol=protocol)
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "un")
    folder = tmp_path / "un" if nested else tmp_path / "un" / "a"
    assert compare(open_tree(folder), trained()) == compare(read_torch(path), trained()) == 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_element_type(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = every_bit(dtype, 3, 5)
    tree = read_torch(save(tensor, tmp_path / "a.pt"))
    assert torch.equal(load_tree(tree).view(torch.uint8), tensor.view(torch.uint8))
    write_torch(tmp_path / "b.pt", tree)
    back = torch.load(tmp_path / "b.pt", weights_only=True)
    assert back.dtype == dtype and torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))


def test_numpy_numbers_become_pythons(tmp_path: Path) -> None:
    import numpy as np

    value = {"loss": np.float64(3.5), "steps": np.int64(7), "flag": np.bool_(True), "small": np.float32(0.1)}
    tree = read_torch(save(value, tmp_path / "a.pt"))
    assert tree == {key: item.item() for key, item in value.items()}
    assert [type(item) for item in tree.values()] == [float, int, bool, float]


# -- hostile -----------------------------------------------------------------------------------------------------------


def archive(tmp_path: Path, data: bytes, storages: dict[str, bytes] | None = None, **options: Any) -> Path:
    path = tmp_path / "hostile.pt"
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("archive/data.pkl", data)
        for key, content in (storages or {}).items():
            file.writestr(f"archive/{key}", content)
        file.writestr("archive/version", "3\n")
    return path


class Runs:
    """Unpickled in the ordinary way, it creates the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def code(canary: Path) -> dict[str, bytes]:
    """Return pickles that run something, each by another operation."""
    command = f"touch {canary}".encode()
    arguments = b"(X" + struct.pack("<I", len(command)) + command + b"t"
    text = b"X" + struct.pack("<I", len(command)) + command
    inner = io.BytesIO()
    torch.save({"x": Runs(canary)}, inner)
    return {
        "reduce": pickle.dumps({"x": Runs(canary)}, 2),
        "stack global": pickle.dumps([Runs(canary)], 4),
        "protocol 0": pickle.dumps(Runs(canary), 0),
        "inst": b"(S'" + command + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\n" + text + b"o.",
        "newobj": b"cos\nsystem\n" + arguments + b"\x81.",
        "extension": b"\x82\x01.",
        "in a tensor": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nctorch\nTensor\n"
        + arguments
        + b"}tR.",
        "load from bytes": b"ctorch.storage\n_load_from_bytes\n(B"
        + struct.pack("<I", len(inner.getvalue()))
        + inner.getvalue()
        + b"tR.",
        "eval": b"c__builtin__\neval\n" + arguments + b"R.",
        "getattr": b"c__builtin__\ngetattr\n(cos\nsystem\nX\x08\x00\x00\x00__call__tR.",
        "build": b"ccollections\nOrderedDict\n)R}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsb.",
        "build on a name": b"ccollections\nOrderedDict\n(N}X\x05\x00\x00\x00itemscos\nsystem\nstb.",
        "numpy": b"cnumpy.core.multiarray\n_reconstruct\n)R.",
    }


@pytest.mark.parametrize("kind", list(code(Path("x"))))
def test_a_pickle_with_code_is_one_sentence_and_nothing_is_run(kind: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = archive(tmp_path, code(canary)[kind])
    with pytest.raises(UserError, match="nothing in the file was run") as error:
        open_tree(path)
    assert not canary.exists() and "\n" not in str(error.value)


def test_the_canary_would_have_appeared(tmp_path: Path) -> None:
    pickle.loads(code(tmp_path / "canary")["reduce"])  # noqa: S301
    assert (tmp_path / "canary").exists()


def test_code_is_refused_by_the_verb_too(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = archive(tmp_path, code(canary)["reduce"])
    assert "it refers to posix.system" in refusal(path, tmp_path)
    assert not canary.exists()


def tensor_pickle(
    shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, elements: int = 1
) -> bytes:
    """Return the pickle of a tensor with these claims, over storage 0 of float32."""

    def number(n: int) -> bytes:
        return b"\x8a\x09" + n.to_bytes(9, "little", signed=True)

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(number(n) for n in values) + b"t"

    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
        + (storage + number(elements) + b"tQ")
        + (number(offset) + numbers(shape) + numbers(stride))
        + b"\x89ccollections\nOrderedDict\n)RtR."
    )


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        (tensor_pickle((10**9,), (1,), elements=10**9), "needs 4000000000 bytes"),
        (tensor_pickle((10**9,), (1,)), "needs 4000000000 bytes"),
        (tensor_pickle((1,), (1,), offset=10**12), "needs 4000000000004 bytes"),
        (tensor_pickle((10**12,), (0,)), "claims 4000000000000 bytes of tensors"),
        (tensor_pickle((2**40, 2**40), (0, 0)), "bytes of tensors"),
        (tensor_pickle((2,), (-1,)), "cannot be"),
        (tensor_pickle((-3,), (1,)), "cannot be"),
        (tensor_pickle((1,), (1, 1)), "not well-formed"),
        (tensor_pickle((1,) * 5000, (1,) * 5000), "cannot be"),
    ],
)
def test_claims_beyond_the_file_cost_no_memory(claim: bytes, words: str, tmp_path: Path) -> None:
    assert words in refusal(archive(tmp_path, claim, {"data/0": b"\0\0\0\0"}), tmp_path)


def laughs(levels: int) -> bytes:
    """Return a pickle of lists of lists, each twice the one before: 2**levels items in a few bytes each."""
    return b"]q\0" + b"".join(b"](h\0h\0eq\0" for _ in range(levels)) + b"."


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x80\x02" + b"]" * 1_100_000 + b".", "more than 1000000 operations"),
        (b"]" + b"r\xff\xff\xff\xff" + b".", "no torch checkpoint's value"),
        (b"\x96" + struct.pack("<Q", 2**40) + b".", "not well-formed"),
        (b"\x8d" + struct.pack("<Q", 2**40) + b".", "not well-formed"),
        (laughs(20), "more than 1000000 values"),
        (laughs(60), "more than 24 levels"),
        (b"]q\0h\0a.", "more than 24 levels"),
        (b"\x8b\xff\xff\xff\x7f.", "not well-formed"),
        (b"I" + b"9" * 10000 + b"\n.", "not well-formed"),
        (b"\x8a\x20" + b"\x01" * 32 + b".", "beyond 64 bits"),
        (b"N", "not well-formed"),
        (b"", "not well-formed"),
        (b"t.", "not well-formed"),
        (b"h\x05.", "not well-formed"),
        (b"}]Ns.", "not well-formed"),
        (b"(((0.", "POP"),
        (b"(X\x07\x00\x00\x00storageNNNNtQ.", "no storage"),
        (b"ctorch\nSize\n(]((I1\nttR.", "calls something"),
        (b"ctorch\nFloatStorage\n.", "holds a Global"),
    ],
)
def test_pickles_that_are_hostile_without_code(data: bytes, words: str, tmp_path: Path) -> None:
    path = archive(tmp_path, data)
    if words == "no torch checkpoint's value":
        # A memo entry of number 2**32 - 1 makes CPython's unpickler reserve 64 GB; here it is a key.
        assert read_torch(path) == []
        ended = convert_in_little_memory(path, tmp_path / "x.json")
        assert ended.returncode == 1 and "holds no tensor" in ended.stderr
        return
    assert words in refusal(path, tmp_path)


def test_zip_bombs_overlaps_and_paths(tmp_path: Path) -> None:
    value = io.BytesIO()
    torch.save({"x": torch.zeros(50 * MEGABYTE // 4)}, value)
    with (
        zipfile.ZipFile(value) as source,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in source.namelist():
            bomb.writestr(name, source.read(name))
    assert (tmp_path / "bomb.pt").stat().st_size < MEGABYTE
    assert "compressed" in refusal(tmp_path / "bomb.pt", tmp_path)
    (tmp_path / "bomb.pt").unlink()
    # A storage's key that leads out of the archive is no key of the archive.
    outside = tensor_pickle((1,), (1,)).replace(b"X\x01\x00\x00\x000X", b"X\x0c\x00\x00\x00../../secretX")
    (tmp_path / "secret").write_bytes(b"\0\0\0\0")
    assert "cannot be" in refusal(archive(tmp_path, outside, {"../../secret": b"\0\0\0\0"}), tmp_path)
    folder = tmp_path / "folder"
    (folder / "data").mkdir(parents=True)
    (folder / "data.pkl").write_bytes(outside)
    assert "cannot be" in refusal(folder, tmp_path)


def test_entries_over_one_another(tmp_path: Path) -> None:
    """Forty directory entries for one megabyte of data would be forty megabytes of tensors."""
    path = archive(tmp_path, b"N.", {f"data/{k}": bytes(4 if k else MEGABYTE) for k in range(40)})
    with zipfile.ZipFile(path) as file:
        first = file.getinfo("archive/data/0")
    raw = bytearray(path.read_bytes())
    position = 0
    while (position := raw.find(b"PK\x01\x02", position)) >= 0:
        struct.pack_into("<III", raw, position + 16, first.CRC, first.file_size, first.file_size)
        struct.pack_into("<I", raw, position + 42, first.header_offset)
        position += 4
    path.write_bytes(raw)
    assert ("overlap" in refusal(path, tmp_path)) or ("damaged" in refusal(path, tmp_path))


def test_old_formats_other_files_and_torchscript_are_named(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert "torch.save" in refusal(tmp_path / "old.pt", tmp_path) and "1.6" in refusal(
        tmp_path / "old.pt", tmp_path
    )
    (tmp_path / "text.pt").write_text("hello")
    assert "zip format" in refusal(tmp_path / "text.pt", tmp_path)
    (tmp_path / "empty.pt").touch()
    refusal(tmp_path / "empty.pt", tmp_path)
    path = archive(tmp_path, b"N.", {"constants.pkl": b"N."})
    assert "TorchScript" in refusal(path, tmp_path)
    path = archive(tmp_path, b"N.", {"byteorder": b"big"})
    assert "big-endian" in refusal(path, tmp_path)
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as file:
        file.writestr("hello.txt", "x")
    assert "no data.pkl" in refusal(tmp_path / "zip.pt", tmp_path)


def read_all(path: Path) -> Any:
    tree = open_tree(path)
    for tensor in check_tree(tree, "x"):
        for _ in tensor.read():
            pass
    return tree


def test_every_cut_is_told(tmp_path: Path) -> None:
    data = save(trained(), tmp_path / "a.pt").read_bytes()
    cut = tmp_path / "cut.pt"
    for length in [*range(0, 200, 7), *range(200, len(data), 331), len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(UserError):
            read_all(cut)


def test_every_flipped_bit_is_told_or_harmless(tmp_path: Path) -> None:
    """Of 600 files with one bit changed, none gives other values than were saved, and none an unknown exception."""
    expected = trained()
    data = save(expected, tmp_path / "a.pt").read_bytes()
    random.seed(11)
    flipped, told = tmp_path / "flipped.pt", 0
    for _ in range(600):
        changed = bytearray(data)
        changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
        flipped.write_bytes(changed)
        try:
            compare(open_tree(flipped), expected)
        except UserError as error:
            assert "was not read back" not in str(error)
            told += 1
    assert told > 300


def test_any_pickle_is_read_or_told(tmp_path: Path) -> None:
    """Operations in any order, and damaged pickles without their checksum: a value or a sentence, nothing else."""
    random.seed(12)
    good = zipfile.ZipFile(save(odd(), tmp_path / "a.pt")).read("a/data.pkl")
    codes = [operation.code.encode("latin1") for operation in pickletools.opcodes]
    names = [
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ccollections\nOrderedDict\n",
        b"ctorch\nSize\n",
        b"K\x01",
    ]
    told = 0
    for number in range(800):
        if number % 2:
            data = bytearray(good)
            for _ in range(3):
                data[random.randrange(len(data))] = random.randrange(256)
        else:
            data = bytearray(b"".join(random.choice(codes + names * 8) for _ in range(30)) + b".")
        try:
            read_torch(archive(tmp_path, bytes(data), {f"data/{k}": bytes(9000) for k in range(30)}))
        except UserError:
            told += 1
    assert told > 400
