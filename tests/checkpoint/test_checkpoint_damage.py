"""Every kind of damage to every file is found, named and passed over; hostile files are refused in one sentence."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_faults import Fault, content_step, good_steps, injected, save, writer_of

from ekiden.checkpoint.header import read_header
from ekiden.checkpoint.manifest import NAME, Damaged, read_manifest, seal, verify_folder
from ekiden.checkpoint.store import Checkpoint, CheckpointStore, format_statuses, replace_folder
from ekiden.checkpoint.tensors import read_tensors
from ekiden.errors import UserError

FILES = ["model.safetensors", "trainer_state.json", NAME]


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """A store with the checkpoints of steps 1 and 2."""
    store = CheckpointStore(tmp_path / "run/checkpoints")
    for step in (1, 2):
        save(store, step)
    return store


def flip(position: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(position * (len(data) - 1))] ^= 0x10
        path.write_bytes(data)

    return damage


def rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


def replace_by_link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to("../elsewhere")


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def swap_with_older(path: Path) -> None:
    other = path.parent.parent / "step-00000001" / path.name
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "bit flipped in the first byte": flip(0),
    "bit flipped in the middle": flip(0.5),
    "bit flipped in the last byte": flip(1),
    "one byte cut off": rewrite(lambda data: data[:-1]),
    "cut to nothing": rewrite(lambda data: b""),
    "one byte more": rewrite(lambda data: data + b"x"),
    "second half zeros": rewrite(lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2)),
    "removed": Path.unlink,
    "a symbolic link": replace_by_link,
    "a pipe": replace_by_pipe,
    "a folder": replace_by_folder,
}


@pytest.mark.parametrize("filename", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_named_and_passed_over(
    store: CheckpointStore, filename: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGES[damage](store.folder / "step-00000002" / filename)
    assert [status.problem is None for status in store.list()] == [False, True]
    newest = CheckpointStore(store.folder).newest()
    assert newest is not None and content_step(newest) == 1
    sentences = [line for line in capsys.readouterr().err.splitlines() if "passed over" in line]
    assert len(sentences) == 1 and "step-00000002" in sentences[0] and filename in sentences[0]
    assert [path.name for path in store.folder.glob(".damaged-*")] == [".damaged-step-00000002-0"]
    # The step can be saved again, and is then the newest.
    assert save(store, 2).step == 2
    assert good_steps(store) == [2, 1]


def test_every_single_bit_of_a_checkpoint_matters(store: CheckpointStore) -> None:
    folder = store.folder / "step-00000002"
    for filename in FILES:
        path = folder / filename
        whole = path.read_bytes()
        for position in range(len(whole)):
            data = bytearray(whole)
            data[position] ^= 1 << position % 8
            path.write_bytes(data)
            with pytest.raises(Damaged):
                verify_folder(folder)
        path.write_bytes(whole)
    assert verify_folder(folder).step == 2


def test_files_swapped_between_checkpoints_are_found(store: CheckpointStore) -> None:
    save(store, 3)
    folder = store.folder / "step-00000003"
    for filename in ("model.safetensors", "trainer_state.json"):
        swap_with_older(folder / filename)
    newest = store.newest()
    assert newest is not None and content_step(newest) == 2


def test_expected_and_found_stand_in_the_sentence(store: CheckpointStore) -> None:
    path = store.folder / "step-00000002/model.safetensors"
    expected = read_manifest(path.parent).files[path.name]
    flip(1)(path)
    with pytest.raises(
        Damaged, match=rf"model.safetensors has hash [0-9a-f]{{32}}, expected {expected.xxh3}"
    ):
        verify_folder(path.parent)
    path.write_bytes(b"short")
    with pytest.raises(Damaged, match=f"model.safetensors has 5 bytes, expected {expected.bytes}"):
        verify_folder(path.parent)


def test_none_good_is_never_a_fresh_start(store: CheckpointStore) -> None:
    for folder in store.folder.iterdir():
        flip(0.5)(folder / "model.safetensors")
    for _again in range(2):  # the second time they have been set aside already
        with pytest.raises(UserError, match=r"no good checkpoint is left in .*; restore one") as problem:
            CheckpointStore(store.folder).newest()
        assert "\n" not in str(problem.value)
    table, good = format_statuses(store.folder.parent)
    assert not good and table.count("damaged: model.safetensors has hash") == 2


def test_no_checkpoint_at_all_is_a_fresh_start(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    (store.folder / ".tmp-step-00000001-0").mkdir()
    (store.folder / "notes.txt").write_text("mine")
    assert CheckpointStore(store.folder).newest() is None
    assert [path.name for path in store.folder.iterdir()] == ["notes.txt"]


def test_an_extra_file_is_noted_and_never_read(
    store: CheckpointStore, capsys: pytest.CaptureFixture[str]
) -> None:
    (store.folder / "step-00000002/payload.pkl").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    newest = store.newest()
    assert newest is not None and content_step(newest) == 2
    assert "step-00000002 also holds payload.pkl, ignored" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"holds no payload\.pkl"):
        newest.json("payload.pkl")
    assert "verified; ignored: payload.pkl" in format_statuses(store.folder.parent)[0]


def test_what_cannot_be_read_now_is_passed_over_but_keeps_its_name(store: CheckpointStore) -> None:
    def refuse(operation: str, path: Path) -> None:
        if operation == "open" and path.parent.name == "step-00000002":
            raise PermissionError(13, "Permission denied")

    with injected(refuse):
        newest = store.newest()
    assert newest is not None and newest.step == 1
    newest = store.newest()
    assert newest is not None and newest.step == 2


def test_checkpoints_are_ordered_by_their_manifests(store: CheckpointStore) -> None:
    save(store, 30)
    for path, seconds in zip(sorted(store.folder.iterdir()), (2e9, 1e9, 1e8), strict=True):
        os.utime(path, (seconds, seconds))
    (store.folder / "step-00000001").rename(store.folder / "step-99999999")
    newest = store.newest()
    assert newest is not None and newest.step == 30
    assert [status.step for status in store.list()] == [30, 2, 1]


def test_an_open_checkpoint_that_is_damaged_is_refused_in_one_sentence(store: CheckpointStore) -> None:
    flip(0.5)(store.folder / "step-00000002/model.safetensors")
    with pytest.raises(
        UserError, match=r"is not a good checkpoint: model.safetensors has hash .*; choose another"
    ):
        Checkpoint.open(store.folder / "step-00000002")
    with pytest.raises(UserError, match=f"not a good checkpoint: {NAME} is missing"):
        Checkpoint.open(store.folder)


# -- hostile manifests ------------------------------------------------------------------------------------------------


def body(**changes: Any) -> bytes:
    """Return the body of a manifest of no files, with `changes`."""
    value = {"version": 1, "step": 5, "created": "", "files": {}, "run": {}} | changes
    return json.dumps(value).encode()[1:]


def record(**changes: Any) -> dict[str, Any]:
    return {"bytes": 1, "xxh3": "0" * 32, "sha256": "0" * 64} | changes


HOSTILE_BODIES = {
    "NaN": body(run={"loss": float("nan")}),
    "infinity": body(run={"loss": float("inf")}),
    "beyond a float": body().replace(b'"run": {}', b'"run": {"loss": 1e400}'),
    "key twice": body()[:-1] + b', "step": 6}',
    "hash twice": body()[:-1] + b', "xxh3": ""}',
    "deep list": body().replace(b'"run": {}', b'"run": {"x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "deep and open": body().replace(b'"run": {}', b'"run": {"x": ' + b'{"x":' * 200_000),
    "many quotes": b'"' + b'\\"' * 1_000_000,
    "huge integer": body().replace(b'"step": 5', b'"step": ' + b"9" * 1_000_000),
    "step beyond 63 bits": body(step=2**63),
    "negative step": body(step=-1),
    "step true": body(step=True),
    "step a float": body(step=5.0),
    "other version": body(version=2),
    "version true": body(version=True),
    "unknown field": body(pickle="gASV"),
    "no files": b'"version": 1, "step": 5, "created": "", "run": {}}',
    "not JSON": b"\xff\xfe\x00",
    "two values": body() + b"{}",
    "run a list": body(run=[]),
    "up and out": body(files={"../../etc/passwd": record()}),
    "absolute": body(files={"/etc/passwd": record()}),
    "dots": body(files={"..": record()}),
    "hidden": body(files={".ssh": record()}),
    "line break": body(files={"a\nb": record()}),
    "itself": body(files={NAME: record()}),
    "empty name": body(files={"": record()}),
    "long name": body(files={"a" * 300: record()}),
    "negative size": body(files={"a": record(bytes=-1)}),
    "size a string": body(files={"a": record(bytes="1")}),
    "absurd size": body(files={"a": record(bytes=2**60)}),
    "short hash": body(files={"a": record(xxh3="0")}),
    "hash a list": body(files={"a": record(sha256=["0"] * 64)}),
    "unknown field of a file": body(files={"a": record(code="x")}),
    "tensors a list": body(files={"a": record(tensors=[1])}),
    "too many files": body(files={f"f{i}": record() for i in range(10_001)}),
    "missing file": body(files={"a": record()}),
}


@pytest.mark.parametrize("name", HOSTILE_BODIES)
def test_hostile_manifests_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / NAME).write_bytes(seal(HOSTILE_BODIES[name]))
    with pytest.raises(Damaged) as problem:
        verify_folder(tmp_path)
    assert "\n" not in str(problem.value) and len(str(problem.value)) < 400


def test_the_body_that_the_hostile_ones_are_made_of_is_good(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(seal(body()))
    assert verify_folder(tmp_path).step == 5


def test_a_manifest_of_100_megabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / NAME).open("wb") as file:
        file.truncate(100 << 20)
    seen = Fault()
    with injected(seen), pytest.raises(Damaged, match="larger than"):
        verify_folder(tmp_path)
    assert seen.operations.count(("read", NAME)) <= 3


def test_a_checkpoint_cannot_reach_out_of_its_folder(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    checkpoint = save(store, 1)
    (store.folder / "secret.json").write_text("{}")
    with pytest.raises(UserError, match="holds no"):
        checkpoint.json("../secret.json")
    with pytest.raises(Damaged, match="not a plain name"):
        replace_folder(tmp_path / "best", lambda writer: writer.json("../out.json", 1), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints"]


# -- hostile tensor files ---------------------------------------------------------------------------------------------


def tensor_file(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: str = "[2]", offsets: str = "[0,8]", dtype: str = "F32") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


HOSTILE_TENSORS = {
    "empty": b"",
    "header of 2**63 bytes": tensor_file("{}", length=2**63),
    "header of 100 MB": tensor_file("{}", bytes(1000), length=100 << 20),
    "header beyond the file": tensor_file("{}", length=3),
    "not JSON": tensor_file(b"\x80\x04\x95"),
    "a list": tensor_file("[]"),
    "absurd shape": tensor_file(f'{{"w":{entry("[1000000,1000000]")}}}', bytes(8)),
    "absurd empty shape": tensor_file(f'{{"w":{entry(f"[0,{2**40}]", "[0,0]")}}}'),
    "overflowing shape": tensor_file(f'{{"w":{entry(f"[{2**33},{2**33}]", "[0,0]")}}}'),
    "negative shape": tensor_file(f'{{"w":{entry("[-2]")}}}', bytes(8)),
    "shape of floats": tensor_file(f'{{"w":{entry("[2.0]")}}}', bytes(8)),
    "shape true": tensor_file(f'{{"w":{entry("[true,2]")}}}', bytes(8)),
    "many dimensions": tensor_file(f'{{"w":{entry("[" + "1," * 999 + "2]")}}}', bytes(8)),
    "unknown dtype": tensor_file(f'{{"w":{entry(dtype="PICKLE")}}}', bytes(8)),
    "name twice": tensor_file(f'{{"w":{entry()},"w":{entry()}}}', bytes(8)),
    "overlap": tensor_file(f'{{"v":{entry()},"w":{entry(offsets="[4,12]")}}}', bytes(12)),
    "hole": tensor_file(f'{{"w":{entry(offsets="[8,16]")}}}', bytes(16)),
    "bytes left over": tensor_file(f'{{"w":{entry()}}}', bytes(9)),
    "bytes missing": tensor_file(f'{{"w":{entry()}}}', bytes(7)),
    "offsets backwards": tensor_file(f'{{"w":{entry(offsets="[8,0]")}}}', bytes(8)),
    "unknown field": tensor_file(f'{{"w":{entry()[:-1]},"code":"x"}}}}', bytes(8)),
    "deep": tensor_file('{"w":' + "[" * 100_000, bytes(8)),
}


@pytest.mark.parametrize("name", HOSTILE_TENSORS)
def test_hostile_tensor_files_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE_TENSORS[name])
    with pytest.raises(Damaged) as problem:
        read_tensors(path)
    assert "\n" not in str(problem.value) and len(str(problem.value)) < 400


def test_the_entry_that_the_hostile_ones_are_made_of_is_good(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(tensor_file(f'{{"w":{entry()}}}', bytes(8)))
    assert {name: str(info) for name, info in read_header(path).items()} == {"w": "F32[2]"}


def test_tensors_other_than_the_manifest_records_are_refused(tmp_path: Path) -> None:
    replace_folder(tmp_path / "best", writer_of(1), {"step": 1})
    folder = tmp_path / "best"
    text = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(seal(text.split(b"\n", 2)[2].replace(b"F32[3,4]", b"F32[4,3]")))
    with pytest.raises(Damaged, match=r"holds tensor 'weight' as F32\[3,4\], expected F32\[4,3\]"):
        verify_folder(folder)
