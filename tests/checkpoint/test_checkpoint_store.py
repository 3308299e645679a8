"""Retention, full disks, listing and replacing."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from checkpoint_faults import content_step, folder_step, full_while, good_steps, injected, save, writer_of

from ekiden.checkpoint import files
from ekiden.checkpoint.store import (
    CheckpointError,
    CheckpointStore,
    CheckpointWriter,
    format_statuses,
    recover_folder,
    replace_folder,
)
from ekiden.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run/checkpoints"


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- saving and retention ---------------------------------------------------------------------------------------------


def test_what_was_saved_comes_back(folder: Path) -> None:
    store = CheckpointStore(folder)
    saved = save(store, 1000)
    assert saved.path.name == "step-00001000" and content_step(saved) == 1000
    found = CheckpointStore(folder).newest()
    assert found is not None and found.manifest == saved.manifest
    assert found.manifest.run == {"tokens": 1_000_000, "loss": 1000.5}
    for name, record in found.manifest.files.items():
        data = (found.path / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (record.bytes, record.sha256)
    assert found.manifest.files["model.safetensors"].tensors == {"weight": "F32[3,4]", "flags": "BOOL[2]"}


def test_floats_keep_every_bit(folder: Path) -> None:
    value = {
        "loss": 0.1 + 0.2,
        "scale": 2.0**-1074,
        "big": 1.7976931348623157e308,
        "inf": float("inf"),
        "n": 2**63,
    }
    checkpoint = CheckpointStore(folder).save(1, lambda writer: writer.json("state.json", value))
    assert checkpoint.json("state.json") == value


def test_copy_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "tokenizer.model"
    source.write_bytes(bytes(range(256)) * 50_000)  # several chunks
    checkpoint = CheckpointStore(folder).save(1, lambda writer: writer.copy(source, "tokenizer.model"))
    assert (checkpoint.path / "tokenizer.model").read_bytes() == source.read_bytes()
    assert (
        checkpoint.manifest.files["tokenizer.model"].sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    )


def test_the_newest_are_kept(folder: Path) -> None:
    store = CheckpointStore(folder, keep=3)
    for step in range(1, 7):
        save(store, step)
    assert steps(folder) == ["step-00000004", "step-00000005", "step-00000006"]


def test_the_byte_budget_keeps_no_fewer_than_two(folder: Path) -> None:
    size = save(CheckpointStore(folder), 1).manifest.total_bytes
    store = CheckpointStore(folder, keep=10, budget_bytes=3 * size + 20)
    for step in range(2, 7):
        save(store, step)
    assert good_steps(store) == [6, 5, 4]
    store = CheckpointStore(folder, keep=10, budget_bytes=0)
    save(store, 7)
    assert good_steps(store) == [7, 6]


def test_without_a_budget_a_tenth_of_the_disk_stays_free(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(folder, keep=10)
    size = save(store, 1).manifest.total_bytes
    monkeypatch.setattr(files, "free_bytes", lambda _path: size)
    for step in range(2, 7):
        save(store, step)
    # n checkpoints on a disk of n + 1 times their size: n <= 0.9 (n + 1) holds up to 9, so all six stay.
    assert len(good_steps(store)) == 6
    monkeypatch.setattr(files, "free_bytes", lambda _path: 0)
    store.save(7, writer_of(7), estimate_bytes=0)
    assert len(good_steps(store)) < 7


def test_a_damaged_checkpoint_does_not_count_as_kept(folder: Path) -> None:
    store = CheckpointStore(folder, keep=2)
    save(store, 1)
    save(store, 2)
    (folder / "step-00000002/trainer_state.json").write_text("")
    store = CheckpointStore(folder, keep=2)
    save(store, 3)
    assert good_steps(store) == [3, 1]
    assert steps(folder)[0] == ".damaged-step-00000002-0"


def test_protected_steps_stay(folder: Path) -> None:
    store = CheckpointStore(folder, keep=2)
    store.protected.add(1)
    for step in range(1, 6):
        save(store, step)
    assert good_steps(store) == [5, 4, 1]
    store.protected.clear()
    save(store, 6)
    assert good_steps(store) == [6, 5]


def test_a_checkpoint_that_exists_is_kept_and_not_written_again(folder: Path) -> None:
    store = CheckpointStore(folder)
    before = save(store, 1)
    inode = (before.path / "model.safetensors").stat().st_ino

    def never(_writer: CheckpointWriter) -> None:
        raise AssertionError("written again")

    assert store.save(1, never).manifest == before.manifest
    assert (before.path / "model.safetensors").stat().st_ino == inode


def test_damaged_again_and_again_every_one_is_set_aside(folder: Path) -> None:
    store = CheckpointStore(folder)
    for _time in range(3):
        (save(store, 5).path / "trainer_state.json").write_text("x")
    (folder / ".damaged-step-00000005-0").rename(folder / "away")
    save(store, 5)
    assert good_steps(store) == [5]
    assert len(list(folder.glob(".damaged-*"))) == 2


def test_an_error_of_the_callback_leaves_nothing(folder: Path) -> None:
    store = CheckpointStore(folder)

    def fail(writer: CheckpointWriter) -> None:
        writer.bytes("a", b"1")
        raise KeyError("weight")

    with pytest.raises(KeyError):
        store.save(1, fail)
    with pytest.raises(ValueError, match="complex64 cannot stand"):
        store.save(1, lambda w: w.tensors("a", {"z": torch.zeros(1, dtype=torch.complex64)}))
    with pytest.raises(ValueError, match="JSON"):
        store.save(1, writer_of(1), {"loss": float("nan")})
    assert steps(folder) == []


# -- disks ------------------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_the_oldest_where_newer_ones_stay(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = CheckpointStore(folder)
    for step in (1, 2, 3):
        save(store, step)
    with injected(full_while(folder / "step-00000001")):
        assert save(store, 4).step == 4
    assert good_steps(store) == [4, 3, 2]
    assert "the disk is full: gave up step-00000001, step-00000003 stays" in capsys.readouterr().err


def test_a_disk_that_stays_full_costs_one_old_checkpoint_and_the_new_one(folder: Path) -> None:
    store = CheckpointStore(folder)
    for step in (1, 2, 3):
        save(store, step)
    with injected(full_while(folder)), pytest.raises(CheckpointError, match="step 4: the disk is full"):
        save(store, 4)
    assert good_steps(store) == [3, 2]
    assert steps(folder) == ["step-00000002", "step-00000003"]


def test_the_last_good_checkpoint_is_never_given_up(folder: Path) -> None:
    store = CheckpointStore(folder)
    save(store, 1)
    save(store, 2)
    (folder / "step-00000002/model.safetensors").write_bytes(b"")
    with injected(full_while(folder)), pytest.raises(CheckpointError):
        save(store, 3)
    assert good_steps(store) == [1]


def test_a_checkpoint_that_may_not_be_durable_costs_no_older_one(folder: Path) -> None:
    store = CheckpointStore(folder)
    save(store, 1)

    def full(operation: str, path: Path) -> None:
        if operation == "sync" and path == folder and (folder / "step-00000002").exists():
            raise OSError(errno.ENOSPC, "No space left on device")

    for _again in range(2):  # the second time it stands there already, whole, but still not durable
        with injected(full), pytest.raises(CheckpointError, match="step 2: the disk is full"):
            save(store, 2)
        assert good_steps(store) == [2, 1]
    assert save(store, 2).step == 2


def test_too_little_space_is_said_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(folder)
    save(store, 1)
    monkeypatch.setattr(files, "free_bytes", lambda _path: 10_000)

    def never(_writer: CheckpointWriter) -> None:
        raise AssertionError("written")

    with pytest.raises(
        CheckpointError, match=r"step 2: it needs 5\.0 MB, and the disk of .* has 0\.0 MB free"
    ):
        store.save(2, never, estimate_bytes=5_000_000)
    monkeypatch.setattr(files, "free_bytes", lambda _path: 10)
    with pytest.raises(CheckpointError, match="step 2: it needs"):
        store.save(2, never)
    assert good_steps(store) == [1]


def test_a_read_only_folder_can_still_be_read(folder: Path) -> None:
    store = CheckpointStore(folder)
    for step in (1, 2):
        save(store, step)
    (folder / "step-00000002/model.safetensors").write_bytes(b"")
    (folder / ".tmp-step-00000003-0").mkdir()

    def read_only(operation: str, _path: Path) -> None:
        if operation not in ("open", "read"):
            raise OSError(errno.EROFS, "Read-only file system")

    with injected(read_only):
        store = CheckpointStore(folder)
        newest = store.newest()
        assert newest is not None and content_step(newest) == 1
        with pytest.raises(CheckpointError, match="step 3: the file system is read-only"):
            save(store, 3)
        with pytest.raises(UserError, match="cannot be created: the file system is read-only; give another"):
            CheckpointStore(folder.parent / "other")


def test_a_removed_folder_is_made_again(folder: Path) -> None:
    store = CheckpointStore(folder)
    files.remove_tree(folder.parent)
    assert save(store, 1).step == 1
    assert good_steps(store) == [1]


def test_removing_never_follows_a_link(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    folder.mkdir(parents=True)
    (folder / ".trash-step-00000001-0").symlink_to(outside)
    (folder / ".tmp-a").mkdir()
    (folder / ".tmp-a/link").symlink_to(outside)
    CheckpointStore(folder)
    assert steps(folder) == []
    assert (outside / "mine").read_text() == "mine"


def test_a_file_system_that_cannot_sync_folders_is_used_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    assert good_steps(CheckpointStore(save(CheckpointStore(folder), 1).path.parent)) == [1]


def test_short_writes_are_continued(tmp_path: Path) -> None:
    class Short:
        """A file that takes three bytes at a time, as a disk that fills up or a signal may make it."""

        def __init__(self, file: BinaryIO) -> None:
            self.write = lambda data: file.write(data[:3])
            self.fileno, self.close = file.fileno, file.close

    with files.DurableFile(tmp_path / "x") as file:
        file._file = Short(file._file)  # type: ignore[assignment]
        file.write(bytes(range(256)))
    assert (tmp_path / "x").read_bytes() == bytes(range(256))


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_the_table(folder: Path) -> None:
    store = CheckpointStore(folder)
    for step in (1, 2):
        save(store, step)
    (folder / "step-00000001/trainer_state.json").unlink()
    table, good = format_statuses(folder.parent)
    header, newest, oldest = table.splitlines()
    assert header.split() == ["step", "tokens", "loss", "MB", "age", "state"]
    assert newest.split()[:3] == ["2", "2000", "2.5000"] and newest.endswith("verified")
    assert oldest.endswith("damaged: trainer_state.json is missing") and good
    assert format_statuses(folder)[1] and len(format_statuses(folder)[0].splitlines()) == 3
    one, good = format_statuses(folder / "step-00000002")
    assert one.splitlines()[1].endswith("verified") and len(one.splitlines()) == 2 and good
    assert not format_statuses(folder / "step-00000001")[1]
    with pytest.raises(UserError, match="holds no checkpoints"):
        format_statuses(folder.parent.parent)


# -- replacing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", [True, False])
def test_replace_folder(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(files, "exchange", lambda _first, _second: False)
    target = tmp_path / "run/best"
    for step in (1, 2, 3):
        replace_folder(target, writer_of(step), {"step": step, "loss": 1.0})
        assert folder_step(target) == step
        assert steps(target.parent) == ["best"]


def test_a_replacement_cut_short_between_two_renames_is_undone(tmp_path: Path) -> None:
    target = tmp_path / "best"
    replace_folder(target, writer_of(1), {"step": 1})
    target.rename(tmp_path / ".old-best")
    recover_folder(target)
    assert folder_step(target) == 1
    assert steps(tmp_path) == ["best"]


def test_exchange_swaps_two_folders(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not files.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system or file system has no renameat2 with RENAME_EXCHANGE")
    assert steps(tmp_path / "a") == ["b"] and steps(tmp_path / "b") == ["a"]
    with pytest.raises(FileNotFoundError):
        files.exchange(tmp_path / "a", tmp_path / "missing")


def test_write_atomic_keeps_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    files.write_atomic(path, b"old")
    for operation in ("create", "write", "fsync", "rename"):
        with injected(full_while(tmp_path, operation)), pytest.raises(OSError, match="No space"):
            files.write_atomic(path, b"new")
        assert path.read_bytes() == b"old" and steps(tmp_path) == ["result.json"]
    files.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("operation", ["fsync", "rename", "sync"])
def test_a_file_that_takes_a_name_is_the_old_or_the_new_one(tmp_path: Path, operation: str) -> None:
    path = tmp_path / "model.json"
    path.write_text("old")

    def fail(seen: str, _path: Path) -> None:
        if seen == operation:
            raise OSError(errno.ENOSPC, "No space left on device")

    with injected(fail), pytest.raises(OSError, match="No space"), files.replacing(path) as temporary:
        temporary.write_text("new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.json"]
    assert path.read_text() == ("new" if operation == "sync" else "old")


def test_a_block_that_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as temporary:
        temporary.write_text("half of the ne")
        raise KeyboardInterrupt
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.json"] and path.read_text() == "old"
    with files.replacing(path) as temporary:
        temporary.write_text("new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.json"] and path.read_text() == "new"
