"""Every file operation of a save, a load, a deletion and a replacement, made to fail in turn: old or new, never neither."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkpoint_faults import (
    ERRNOS,
    Crash,
    Fault,
    Platter,
    content_step,
    folder_step,
    injected,
    raising,
    save,
    writer_of,
)

from ekiden.checkpoint import files
from ekiden.checkpoint.store import CheckpointError, CheckpointStore, recover_folder, replace_folder
from ekiden.errors import UserError

# Each error once, and from then on; after a crash nothing runs any more. A disk does not turn read-only for one call.
FAULTS = [
    *((error, persistent) for error in ERRNOS for persistent in (False, True) if error != "EROFS"),
    pytest.param("EROFS", False, marks=pytest.mark.slow),
    ("EROFS", True),
    ("crash", True),
]
READ_FAULTS = [fault for fault in FAULTS if "ENOSPC" not in getattr(fault, "values", fault)]
# A kill leaves what a crash does, at which all scenarios are looked at; a fork of pytest's process costs 50 ms.
KILLED = ("save and retention", "load")


@pytest.fixture(autouse=True)
def no_real_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations are counted and failed before the system call; thousands of real ones would only cost time."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


def open_store(root: Path) -> CheckpointStore:
    return CheckpointStore(root / "checkpoints", keep=2)


@dataclass(frozen=True)
class Scenario:
    """`prepare` makes the state before; `act` is attacked; it returns the step that it acknowledged or found.

    before: steps that were acknowledged before; after: the step that `act` leads to.
    """

    prepare: Callable[[Path], object]
    act: Callable[[Path], int]
    before: tuple[int, ...]
    after: int


def saved(*steps: int) -> Callable[[Path], object]:
    return lambda root: [save(open_store(root), step) for step in steps]


def saved_and_damaged(root: Path) -> None:
    saved(1, 2)(root)
    path = root / "checkpoints/step-00000002/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")


def save_three(root: Path) -> int:
    return save(open_store(root), 3).step


def save_two(root: Path) -> int:
    return save(open_store(root), 2).step


def load(root: Path) -> int:
    checkpoint = open_store(root).newest()
    assert checkpoint is not None, "a fault while reading became a fresh start"
    return content_step(checkpoint)


SAVES = {
    "first save": Scenario(lambda root: None, save_three, (), 3),
    "save and retention": Scenario(saved(1, 2), save_three, (1, 2), 3),
    "save over a damaged one": Scenario(saved_and_damaged, save_two, (1,), 2),
    "save that exists": Scenario(saved(1, 2), save_two, (1, 2), 2),
}
LOADS = {
    "load": Scenario(saved(1, 2), load, (1, 2), 2),
    "load past a damaged one": Scenario(saved_and_damaged, load, (1,), 1),
}


def operations(scenario: Scenario, root: Path) -> list[tuple[str, str]]:
    """Return the operations of the undisturbed scenario."""
    root.mkdir()
    scenario.prepare(root)
    fault = Fault()
    with injected(fault):
        assert scenario.act(root) == scenario.after
    return fault.operations


def each_operation(scenario: Scenario, tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """Yield the number of each operation, with a folder prepared anew."""
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    scenario.prepare(prepared)
    for at in range(1, len(operations(scenario, tmp_path / "count")) + 1):
        root = tmp_path / str(at)
        shutil.copytree(prepared, root)
        yield at, root


def check_store(scenario: Scenario, root: Path, acknowledged: bool, given_up: bool) -> None:
    """Open the store again after the fault: nothing acknowledged is lost, nothing half is found, and saving goes on."""
    store = open_store(root)
    newest = store.newest()
    allowed = {scenario.after} if acknowledged else {scenario.after, max(scenario.before, default=None)}
    assert (newest.step if newest else None) in allowed
    statuses = [status for status in store.list() if status.name.startswith("step-")]
    assert all(status.problem is None for status in statuses)
    assert len(statuses) >= min(2, len(scenario.before)) - given_up
    if newest is not None:
        assert content_step(newest) == newest.step
    leftovers = [p.name for p in store.folder.iterdir() if p.name.startswith((".tmp-", ".trash-"))]
    assert not leftovers
    assert save(store, 9).step == 9
    assert load(root) == 9


@pytest.mark.parametrize(("error", "persistent"), FAULTS)
@pytest.mark.parametrize("name", SAVES)
def test_save_at_every_operation(tmp_path: Path, name: str, error: str, persistent: bool) -> None:
    scenario = SAVES[name]
    for at, root in each_operation(scenario, tmp_path):
        acknowledged = False
        with injected(Fault(at, raising(error), persistent)):
            try:
                acknowledged = scenario.act(root) == scenario.after
            except (CheckpointError, UserError) as problem:
                assert error != "crash"
                assert "\n" not in str(problem) and ("disk" in str(problem) or "read-only" in str(problem))
            except Crash:
                assert error == "crash"
        check_store(scenario, root, acknowledged, given_up=error == "ENOSPC")


@pytest.mark.parametrize(("error", "persistent"), READ_FAULTS)
@pytest.mark.parametrize("name", LOADS)
def test_load_at_every_operation(tmp_path: Path, name: str, error: str, persistent: bool) -> None:
    scenario = LOADS[name]
    for at, root in each_operation(scenario, tmp_path):
        with injected(Fault(at, raising(error), persistent)):
            try:
                assert scenario.act(root) in scenario.before
            except UserError as problem:
                assert "\n" not in str(problem)
            except Crash:
                assert error == "crash"
        # A disk that could not be read for a moment has cost no checkpoint.
        assert load(root) == scenario.after


@pytest.mark.parametrize(
    "name", [name if name in KILLED else pytest.param(name, marks=pytest.mark.slow) for name in SAVES | LOADS]
)
def test_kill_at_every_operation(tmp_path: Path, name: str) -> None:
    scenario = (SAVES | LOADS)[name]
    for at, root in each_operation(scenario, tmp_path):
        child = os.fork()
        if child == 0:
            files.fault_hook = Fault(at, lambda: os._exit(9))
            try:
                scenario.act(root)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        if name in SAVES:
            check_store(scenario, root, acknowledged=False, given_up=False)
        else:
            assert load(root) == scenario.after


def test_the_enumeration_sees_every_kind_of_operation(tmp_path: Path) -> None:
    seen = {operation for operation, _name in operations(SAVES["save and retention"], tmp_path / "count")}
    wanted = {"create", "write", "fsync", "mkdir", "rename", "sync", "unlink", "rmdir", "open", "read"}
    assert seen == wanted


TRACED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from checkpoint_faults import CheckpointStore, Fault, injected, save
root = Path(sys.argv[2])
for step in (1, 2):
    save(CheckpointStore(root / "checkpoints", keep=2), step)
fault = Fault()
(root / "BEGIN").mkdir()
with injected(fault):
    save(CheckpointStore(root / "checkpoints", keep=2), 3)
(root / "END").mkdir()
print(*(operation for operation, _name in fault.operations))
"""
CALLS = (
    "openat,creat,write,pwrite64,writev,fsync,fdatasync,rename,renameat,renameat2,mkdir,rmdir,unlink,unlinkat"
)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_no_system_call_that_changes_something_goes_around_the_hook(tmp_path: Path) -> None:
    log = tmp_path / "strace.log"
    (tmp_path / "run").mkdir()
    arguments = [sys.executable, "-c", TRACED, str(Path(__file__).parent), str(tmp_path / "run")]
    command = ["strace", "-f", "-y", "-o", str(log), "-e", f"trace={CALLS}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    if "ptrace" in done.stderr or not log.read_text():
        pytest.skip("processes may not be traced here")
    assert done.returncode == 0, done.stderr
    traced = log.read_text().split("BEGIN", 1)[1].split("END", 1)[0]
    # The first and the last line are the rests of the two marks.
    lines = [line.split(maxsplit=1)[1] for line in traced.splitlines()[1:-1] if str(tmp_path) in line]
    changes = [line for line in lines if not line.startswith("openat") or "O_CREAT" in line]
    counted = Counter(line.split("(")[0] for line in changes)
    seen = Counter(done.stdout.split())
    assert counted["openat"] == seen["create"] > 0
    assert counted["write"] == seen["write"] > 0
    assert counted["fsync"] == seen["fsync"] + seen["sync"] > 0
    assert sum(counted[name] for name in ("rename", "renameat", "renameat2")) == seen["rename"] > 0
    assert counted["mkdir"] == seen["mkdir"] > 0
    assert (
        sum(counted[name] for name in ("unlink", "unlinkat", "rmdir")) == seen["unlink"] + seen["rmdir"] > 0
    )


# -- replacing best/ and final_model/ ---------------------------------------------------------------------------------


@pytest.fixture(params=["exchange", "two renames"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of putting a new folder in the place of an old one."""
    if request.param == "two renames":
        monkeypatch.setattr(files, "_renameat2", None)
    return str(request.param)


def replace(root: Path, step: int) -> None:
    replace_folder(root / "best", writer_of(step), {"step": step, "loss": 1.5})


def count_replace(root: Path, first: int | None) -> int:
    root.mkdir()
    if first is not None:
        replace(root, first)
    fault = Fault()
    with injected(fault):
        replace(root, 2)
    assert folder_step(root / "best") == 2
    assert [path.name for path in root.iterdir()] == ["best"]
    return len(fault.operations)


@pytest.mark.parametrize("first", [None, 1], ids=["first", "again"])
@pytest.mark.parametrize(("error", "persistent"), FAULTS)
def test_replace_at_every_operation(
    tmp_path: Path, swap: str, first: int | None, error: str, persistent: bool
) -> None:
    for at in range(1, count_replace(tmp_path / "count", first) + 1):
        root = tmp_path / str(at)
        root.mkdir()
        if first is not None:
            replace(root, first)
        acknowledged = False
        with injected(Fault(at, raising(error), persistent)):
            try:
                replace(root, 2)
                acknowledged = True
            except CheckpointError as problem:
                assert "best/ could not be written" in str(problem)
            except Crash:
                assert error == "crash"
        target = root / "best"
        if swap == "exchange" and first is not None:
            assert target.is_dir(), "an exchange leaves no moment without the folder"
        recover_folder(target)
        found = folder_step(target) if target.exists() else None
        assert found in ({2} if acknowledged else {2, first})
        replace(root, 4)
        assert folder_step(target) == 4
        assert [path.name for path in root.iterdir()] == ["best"]


# -- power cuts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names_survive", [False, True], ids=["unsynced names lost", "unsynced bytes lost"])
def test_power_cut_at_every_operation_of_saves(tmp_path: Path, names_survive: bool) -> None:
    root, acknowledged, cuts = tmp_path / "run", [], []
    root.mkdir()

    def check(platter: Platter) -> None:
        left = platter.after_power_cut(tmp_path / "left", names_survive)
        found = open_store(left).newest()
        newest = acknowledged[-1] if acknowledged else None
        assert (found.step if found else None) in (newest, (newest or 0) + 1)
        cuts.append(newest)

    with injected(Platter(root, check)):
        for step in (1, 2, 3, 4):
            save(open_store(root), step)
            acknowledged.append(step)
    assert set(cuts) == {None, 1, 2, 3}


@pytest.mark.parametrize("names_survive", [False, True], ids=["unsynced names lost", "unsynced bytes lost"])
def test_power_cut_at_every_operation_of_replacements(tmp_path: Path, swap: str, names_survive: bool) -> None:
    root, acknowledged, cuts = tmp_path / "run", [], []
    root.mkdir()

    def check(platter: Platter) -> None:
        target = platter.after_power_cut(tmp_path / "left", names_survive) / "best"
        recover_folder(target)
        newest = acknowledged[-1] if acknowledged else None
        assert (folder_step(target) if target.exists() else None) in (newest, (newest or 0) + 1)
        cuts.append(newest)

    with injected(Platter(root, check)):
        for step in (1, 2, 3):
            replace(root, step)
            acknowledged.append(step)
    assert set(cuts) == {None, 1, 2}


def test_the_model_of_a_power_cut_finds_a_missing_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "sync_folder", lambda _path: None)
    with pytest.raises(AssertionError):
        test_power_cut_at_every_operation_of_saves(tmp_path, names_survive=False)
