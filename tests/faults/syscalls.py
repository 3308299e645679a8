"""Every system call on files of a save, a load, a deletion and a replacement, in turn: the process ends there, or the
call fails.

    python tests/faults/syscalls.py [--quick]

`files.fault_hook` shows what the store believes it does; this shows what the kernel is asked to do. strace attaches to
a forked process that waits, and ends it by SIGKILL on entering the K-th call of a name, for K = 1, 2, 3 ... until a
run ends untouched; and lets that call, or that one and all later ones, fail with ENOSPC, EIO or EROFS. What must be
there afterwards, and its bytes, are known to this process alone. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from common import Row, Tally, content, report, save, small_config, small_shards, work_folder, writer_of

from ekiden.checkpoint.folder import Checkpoint, recover_folder, replace_folder
from ekiden.checkpoint.store import CheckpointError, CheckpointStore
from ekiden.errors import UserError
from ekiden.training.history import History
from ekiden.training.loop import train
from ekiden.training.rundir import RunDirectory
from ekiden.training.saving import Saving
from ekiden.training.start import prepare
from ekiden.training.state import TrainingState
from ekiden.training.step import accumulate_gradients, apply_update

CHANGES = (
    *("openat", "write", "pwrite64", "writev", "fsync", "fdatasync", "rename", "renameat", "renameat2"),
    *("mkdir", "mkdirat", "unlink", "unlinkat", "rmdir", "ftruncate", "close"),
)
"""Calls that are made to fail in a save."""
QUICK = ("write", "fsync", "rename", "mkdir", "unlink", "rmdir")
"""Calls of the short campaign: what makes a save durable and visible, and what ends a deletion."""
READS = ("openat", "read", "pread64", "getdents64")
"""Calls that are made to fail in a load."""
CALLS = tuple(dict.fromkeys((*CHANGES, *READS)))
"""Calls before which the process is ended."""
ERRORS = ("ENOSPC", "EIO", "EROFS")
REFUSED, CRASHED = 3, 5
_PR_SET_PTRACER, _ANY = 0x59616D61, ctypes.c_ulong(-1)
_CALL = re.compile(r"(?:(\d+) +)?(\w+)\(")

Act = Callable[[], bool]


@dataclass(frozen=True)
class Scenario:
    """What is attacked.

    prepare: makes a run directory as it stands before. begin: in the process to be attacked, sets up in such a
    directory and returns the attacked part, which tells whether it did what it should. before, after: step of the
    newest checkpoint at either end; None: there is none. fails: calls that are made to fail. kept: good checkpoints
    that must be there at any moment. best: it is `best/` that is replaced, not the checkpoints.
    """

    name: str
    prepare: Callable[[Path], object]
    begin: Callable[[Path], Act]
    before: int | None
    after: int
    fails: tuple[str, ...] = CHANGES
    kept: int = 0
    best: bool = False

    def find(self, root: Path) -> Checkpoint | None:
        """Return what a process that starts now goes on from."""
        if not self.best:
            return CheckpointStore(root / "checkpoints", keep=2).newest()
        recover_folder(root / "best")
        return Checkpoint.open(root / "best") if (root / "best").exists() else None

    def again(self, root: Path) -> bool:
        """Save once more; return whether that is then found, with nothing half or stale beside it."""
        if self.best:
            replace_folder(root / "best", writer_of(9), {"step": 9})
            names = [path.name for path in root.iterdir()]
            return Checkpoint.open(root / "best").step == 9 and names == ["best"]
        folder = root / "checkpoints"
        save(folder, 9)
        stale = [path.name for path in folder.iterdir() if path.name.startswith((".tmp-", ".trash-"))]
        found = self.find(root)
        return found is not None and found.step == 9 and not stale

    def good(self, root: Path) -> int:
        """Return how many checkpoints verify; -1 where one under a final name does not."""
        if self.best:
            return 0
        statuses = [
            s for s in CheckpointStore(root / "checkpoints").list() if not s.name.startswith(".damaged-")
        ]
        return -1 if any(status.problem for status in statuses) else len(statuses)


@dataclass
class Traced:
    """One attacked process: its exit status (None: SIGKILL), whether it had acknowledged, and its calls.

    calls: (0 for the main thread, 1 for the next one, and so on; name), in order.
    """

    status: int | None
    acknowledged: bool
    calls: list[tuple[int, str]]
    injected: bool
    problem: str = ""

    def points(self) -> set[tuple[int, str, int]]:
        """Return (thread, name, how often it was called there by then) for every call."""
        seen: Counter[tuple[int, str]] = Counter()
        found = set()
        for call in self.calls:
            seen[call] += 1
            found.add((*call, seen[call]))
        return found


@dataclass
class Attack(Tally):
    """A row: what was found after each try."""

    old: int = 0
    new: int = 0
    neither: int = 0
    unreported: int = 0
    uncovered: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing went wrong: no other state than old or new, no error but as a sentence, no call left out."""
        return self.whole and not (self.neither or self.unreported or self.uncovered)

    def row(self) -> Row:
        """Return it for the table."""
        return {name: value for name, value in asdict(self).items() if name != "problems"}


def why_not() -> str | None:
    """Return why nothing can be attacked here, or None."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    done = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    return f"processes may not be traced here ({done.stderr.strip()[:80]})" if done.returncode else None


# -- one process ------------------------------------------------------------------------------------------------------


def traced(begin: Callable[[], Act], folder: Path, names: tuple[str, ...], inject: str = "") -> Traced:
    """Run what `begin` returns in a forked process with strace attached to all its threads.

    Args:
        folder: for strace's log and the process's stderr. names: calls that are listed, and counted by strace.
        inject: strace's expression; it counts calls by name and by thread.
    """
    go_read, go_write = os.pipe()
    # Its word is sent, not written: a call of the driver's own would be counted, and hide the same one of another thread.
    hears, tells = socket.socketpair()
    child = os.fork()
    if child == 0:
        _attacked(begin, folder / "stderr", go_read, tells)
    os.close(go_read)
    tells.close()
    hears.recv(1)  # it is set up: on a busy machine strace would otherwise count what it does for that
    log = folder / "strace"
    command = ["strace", "-f", "-o", str(log), "-e", f"trace={','.join(names)}", "-e", "signal=none"]
    command += ["-e", f"inject={inject}"] if inject else []
    with subprocess.Popen([*command, "-p", str(child)], stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        said = strace.stderr.readline()
        os.write(go_write, b"g")
        _, raw = os.waitpid(child, 0)
        said += strace.stderr.read()
    if "attached" not in said:
        raise RuntimeError(f"strace could not attach: {said}")
    acknowledged = hears.recv(1) == b"d"
    os.close(go_write)
    hears.close()
    code = os.waitstatus_to_exitcode(raw)
    lines = log.read_text(errors="replace")
    stderr = (folder / "stderr").read_text(errors="replace").strip()
    status = None if code == -signal.SIGKILL else code
    return Traced(status, acknowledged or code == 0, _calls(lines, child), "INJECTED" in lines, stderr[-300:])


def _attacked(begin: Callable[[], Act], stderr: Path, go: int, tells: socket.socket) -> None:
    """Set up, wait for strace, act, tell; never return. What it did is told by a socket and by the exit status."""
    status = CRASHED
    try:
        descriptor = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        act = begin()
        # Where only ancestors may trace (Yama), the process itself has to allow it.
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)
        tells.send(b"r")
        select.select([go], [], [])  # not a read: a call that waits is counted when strace attaches
        try:
            status = 0 if act() else REFUSED
        except (CheckpointError, UserError):
            status = REFUSED
        if status == 0:
            with contextlib.suppress(OSError):
                tells.send(b"d")
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(2, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(status)


def _calls(log: str, main: int) -> list[tuple[int, str]]:
    threads: dict[str, int] = {str(main): 0}
    calls = []
    for line in log.splitlines():
        if match := _CALL.match(line):
            thread = threads.setdefault(match[1] or str(main), len(threads))
            calls.append((thread, match[2]))
    return calls


# -- every call in turn -----------------------------------------------------------------------------------------------


class Campaign:
    """Attacks scenarios, each try in a fresh copy of the scenario's folder.

    Args:
        work: a folder for all of it. names: calls to be attacked; those of them that a scenario's errors are for.
    """

    def __init__(self, work: Path, names: tuple[str, ...] = CALLS) -> None:
        self.work, self.root, self.names = work, work / "run", names

    def undisturbed(self, scenario: Scenario, prepared: Path) -> tuple[Traced, dict[int, str]]:
        """Run once without a fault; return its calls and the bytes of the old and the new checkpoint, by step."""
        self._copy(prepared)
        scenario.again(self.root)  # what this process imports while it looks must not come between two counts
        expected = {}
        for step in (scenario.before, scenario.after):
            self._copy(prepared)
            if step == scenario.after:
                reference = traced(lambda: scenario.begin(self.root), self.work, self.names)
                assert reference.status == 0, f"{scenario.name}: {reference}"
            found = scenario.find(self.root)
            assert (found.step if found else None) == step, f"{scenario.name}: {found}"
            if found is not None:
                expected[found.step] = content(found.path)
        return reference, expected

    def _copy(self, prepared: Path) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(prepared, self.root)

    def attack(
        self, scenario: Scenario, kills: bool = True, errors: tuple[str, ...] = ERRORS
    ) -> list[Attack]:
        """Attack every call of a scenario; return a row for kills and one for each error."""
        prepared = self.work / "prepared"
        prepared.mkdir()
        with contextlib.redirect_stderr(io.StringIO()):
            scenario.prepare(prepared)
            reference, expected = self.undisturbed(scenario, prepared)
            rows = []
            if kills:
                rows.append(Attack(f"SIGKILL at each call of {scenario.name}"))
                self._kill(scenario, prepared, reference, expected, rows[-1])
            for error in errors:
                rows.append(Attack(f"{error} at each call of {scenario.name}"))
                self._fail(scenario, prepared, reference, expected, error, rows[-1])
        shutil.rmtree(prepared)
        return rows

    def _kill(
        self, scenario: Scenario, prepared: Path, reference: Traced, expected: dict[int, str], row: Attack
    ) -> None:
        covered = set()
        for name in _in_use(self.names, reference):
            for tried in self._until_untouched(scenario, prepared, name, "signal=SIGKILL", ""):
                self._judge(scenario, tried, expected, row)
                if tried.status is None:
                    thread, last = tried.calls[-1]
                    covered.add((thread, last, tried.calls.count((thread, last))))
                    assert last == name
        # strace counts by thread, so what one does can hide the same number of another's: none may be left.
        row.uncovered = len(reference.points() - covered)

    def _fail(
        self,
        scenario: Scenario,
        prepared: Path,
        reference: Traced,
        expected: dict[int, str],
        error: str,
        row: Attack,
    ) -> None:
        for name in _in_use(scenario.fails, reference):
            for more in ("", "+"):
                for tried in self._until_untouched(scenario, prepared, name, f"error={error}", more):
                    if tried.status not in (0, REFUSED):
                        row.unreported += 1
                        row.problems.append(f"{name}{more}: {tried.status} {tried.problem}")
                    self._judge(scenario, tried, expected, row, gave_up=error == "ENOSPC")

    def _until_untouched(
        self, scenario: Scenario, prepared: Path, name: str, fault: str, more: str
    ) -> Iterator[Traced]:
        """Attack the first call of that name, the second, and so on; end with the run that none was left in."""
        for number in range(1, 10_000):
            self._copy(prepared)
            expression = f"{name}:{fault}:when={number}{more}"
            tried = traced(lambda: scenario.begin(self.root), self.work, (name,), expression)
            if not tried.injected and tried.status is not None:
                assert tried.status == 0, f"{scenario.name} untouched: {tried}"
                return
            yield tried

    def _judge(
        self, scenario: Scenario, tried: Traced, expected: dict[int, str], row: Attack, gave_up: bool = False
    ) -> None:
        """Look at what the process left, as the next one would."""
        row.tries += 1
        try:
            found = scenario.find(self.root)
            step = found.step if found else None
            same = found is None or content(found.path) == expected.get(found.step)
            good = scenario.good(self.root)
        except (UserError, OSError) as error:
            row.neither += 1
            row.data_lost += 1
            row.problems.append(str(error))
            return
        state = "new" if step == scenario.after else "old" if step == scenario.before else "neither"
        if not same or (not scenario.best and good < scenario.kept - gave_up):
            state = "neither"
        setattr(row, state, getattr(row, state) + 1)
        row.bit_identical += same
        row.data_lost += (step or 0) < max(scenario.before or 0, scenario.after if tried.acknowledged else 0)
        row.resumed += scenario.again(self.root)
        if state == "neither":
            row.problems.append(f"found {step}, {good} good, bytes {'the same' if same else 'others'}")


def _in_use(names: tuple[str, ...], reference: Traced) -> list[str]:
    used = {name for _thread, name in reference.calls}
    return [name for name in names if name in used]


# -- scenarios: the store ---------------------------------------------------------------------------------------------


def saved(*steps: int, keep: int = 2) -> Callable[[Path], object]:
    """Return what makes a folder with the checkpoints of `steps`."""
    return lambda root: [save(root / "checkpoints", step, keep) for step in steps]


def saving(step: int) -> Callable[[Path], Act]:
    """Return the beginning of a save of `step`, the store's opening included."""
    return lambda root: lambda: save(root / "checkpoints", step).step == step


def damaged_and_stale(root: Path) -> None:
    """Make checkpoints 1 and 2, the newer damaged, with what a killed save and a killed deletion leave."""
    saved(1, 2)(root)
    path = root / "checkpoints/step-00000002/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    for name in (".tmp-step-00000003-0", ".trash-step-00000000-0"):
        shutil.copytree(root / "checkpoints/step-00000001", root / "checkpoints" / name)


def loading(step: int) -> Callable[[Path], Act]:
    """Return the beginning of a load that has to find `step` and reads all of it."""

    def begin(root: Path) -> Act:
        def act() -> bool:
            checkpoint = CheckpointStore(root / "checkpoints", keep=2).newest()
            assert checkpoint is not None, "checkpoints that cannot be read became a fresh start"
            for name in checkpoint.manifest.files:
                checkpoint.tensors(name) if name.endswith(".safetensors") else checkpoint.json(name)
            return checkpoint.step == step

        return act

    return begin


def replacing(root: Path) -> Act:
    """Return the replacement of `best/` by that of step 2."""

    def act() -> bool:
        recover_folder(root / "best")
        replace_folder(root / "best", writer_of(2), {"step": 2})
        return True

    return act


STORE = (
    Scenario("the first save", saved(), saving(3), None, 3),
    Scenario("a save that deletes the oldest", saved(1, 2), saving(3), 2, 3, kept=2),
    Scenario("two deletions", saved(1, 2, 3, 4, keep=4), saving(4), 4, 4, kept=2),
    Scenario("a load", saved(1, 2), loading(2), 2, 2, READS, kept=2),
    Scenario("a load past damage, and cleaning", damaged_and_stale, loading(1), 1, 1, kept=1),
    Scenario(
        "a replacement of best/",
        lambda root: replace_folder(root / "best", writer_of(1), {"step": 1}),
        replacing,
        1,
        2,
        best=True,
    ),
)


# -- scenarios: the trainer's state -----------------------------------------------------------------------------------


def trained(preset: str, shards: Path, run: Path) -> None:
    """Train two steps, in a process of its own: this one forks, so it must not have had threads."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            train(small_config(preset, shards, run, 2))
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def trainer_scenarios(preset: str, shards: Path, work: Path) -> Iterator[Scenario]:
    """Yield the background save of a third step, and the resume at the second one, of a run of `preset`."""
    made = work / preset
    with contextlib.redirect_stderr(io.StringIO()):
        trained(preset, shards, made)
        start = prepare(small_config(preset, shards, made, 2), RunDirectory(made))
    start.batches.close()
    at_two = fingerprint(start.state)

    def third_step() -> None:
        ids = torch.arange(start.state.config.max_length * 4).reshape(4, -1).numpy() % 300
        loss = accumulate_gradients(start.state.model, [(ids, ids)], ids.size, start.precision)
        apply_update(start.state.optimizer, loss, 1e-3, 1.0)
        start.state.counters.step = 3

    def begin_save(root: Path) -> Act:
        third_step()
        start.store = CheckpointStore(root / "checkpoints", keep=2)
        keeping = Saving(start, History(root / "history.jsonl", 3))

        def act() -> bool:
            keeping.save(1.0, wait=True)
            return keeping.saved_step == 3

        return act

    def begin_load(root: Path) -> Act:
        def act() -> bool:
            resumed = prepare(small_config(preset, shards, root, 2), RunDirectory(root))
            return fingerprint(resumed.state) == at_two

        return act

    def copy(root: Path) -> None:
        shutil.copytree(made, root, dirs_exist_ok=True)

    yield Scenario(f"a background save of {preset}", copy, begin_save, 2, 3, kept=2)
    yield Scenario(f"a resume of {preset}", copy, begin_load, 2, 2, (), kept=2)


def fingerprint(state: TrainingState) -> list[int]:
    """Return what tells two states apart: a hash of every tensor, and the counters."""
    snapshot = state.snapshot()
    tensors = snapshot.model | snapshot.optimizer | snapshot.rng
    hashes = [hash(tensor.numpy().tobytes()) for _name, tensor in sorted(tensors.items())]
    return [*hashes, hash(str(snapshot.trainer["counters"]))]


# -- the program ------------------------------------------------------------------------------------------------------


def campaign(work: Path, quick: bool, only: str = "") -> Iterator[Attack]:
    """Yield the rows, as they are done; `quick`: `QUICK` of one save with its deletion, kills and full disks only."""
    if quick:
        yield from Campaign(work, QUICK).attack(STORE[1], errors=("ENOSPC",))
        return
    driver = Campaign(work)
    for scenario in STORE:
        if only in scenario.name:
            yield from driver.attack(scenario, errors=ERRORS if scenario.fails is CHANGES else ("EIO",))
    if not any(only in f"a background save of {p} a resume of {p}" for p in PRESETS):
        return
    with contextlib.redirect_stderr(io.StringIO()):
        shards = small_shards(work)
    for preset in PRESETS:
        for scenario in trainer_scenarios(preset, shards, work):
            if only in scenario.name:
                yield from driver.attack(scenario, errors=ERRORS if scenario.fails else ())


PRESETS = ("gemma3-tiny", "gpt2-10m")


def main() -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one save with its deletion, seconds long")
    parser.add_argument("--only", default="", help="scenarios whose name contains this")
    options = parser.parse_args()
    if reason := why_not():
        return report("syscalls", [], True, skipped=reason)
    torch.set_num_threads(1)
    began = time.monotonic()
    attacks = []
    with tempfile.TemporaryDirectory(dir=work_folder()) as name:
        for attack in campaign(Path(name), options.quick, options.only):
            attacks.append(attack)
            print(f"{time.monotonic() - began:7.1f}s {attack.row()}", file=sys.stderr)
            for problem, count in Counter(attack.problems).most_common(5):
                print(f"    {count} x {problem}", file=sys.stderr)
    return report("syscalls", [a.row() for a in attacks], all(a.passed for a in attacks))


if __name__ == "__main__":
    sys.exit(main())
