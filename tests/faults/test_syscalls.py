"""A short part of the campaign over system calls, and that it finds what is wrong."""

from __future__ import annotations

import shutil
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import syscalls

if reason := syscalls.why_not():
    pytest.skip(reason, allow_module_level=True)


def test_a_save_killed_and_failed_at_every_call(tmp_path: Path) -> None:
    kills, full = syscalls.campaign(tmp_path, quick=True)
    assert kills.passed and kills.old > 10 and kills.new > 5, kills
    assert full.passed and full.old > 10, full


def careless(root: Path) -> syscalls.Act:
    """Return a save that makes room first."""

    def act() -> bool:
        shutil.rmtree(root / "checkpoints/step-00000002")
        return syscalls.save(root / "checkpoints", 3).step == 3

    return act


def test_a_save_that_removes_the_old_one_first_is_found_out(tmp_path: Path) -> None:
    scenario = syscalls.Scenario("a careless save", syscalls.saved(1, 2), careless, 2, 3, kept=2)
    kills, full = syscalls.Campaign(tmp_path, ("mkdir",)).attack(scenario, errors=("ENOSPC",))
    assert not kills.passed and kills.neither == kills.data_lost == 1
    # Failing once, and from then on.
    assert not full.passed and full.neither == full.data_lost == 2


def test_a_damaged_byte_is_no_old_checkpoint(tmp_path: Path) -> None:
    """Where the content is another than was saved, a manifest that fits it does not help."""

    def begin(root: Path) -> syscalls.Act:
        def act() -> bool:
            shutil.rmtree(root / "checkpoints/step-00000002")
            syscalls.CheckpointStore(root / "checkpoints", 2).save(2, syscalls.writer_of(7))
            return syscalls.save(root / "checkpoints", 3).step == 3

        return act

    scenario = syscalls.Scenario("a save of another run", syscalls.saved(1, 2), begin, 2, 3)
    (kills,) = syscalls.Campaign(tmp_path, ("rename",)).attack(scenario, errors=())
    assert kills.bit_identical < kills.tries and kills.neither > 0


def test_calls_are_counted_by_thread(tmp_path: Path) -> None:
    def begin() -> syscalls.Act:
        def work() -> None:
            for name in "abc":
                (tmp_path / (name + threading.current_thread().name)).mkdir(exist_ok=True)

        def act() -> bool:
            work()
            thread = threading.Thread(target=work, name="second")
            thread.start()
            thread.join()
            return True

        return act

    listed = syscalls.traced(begin, tmp_path, ("mkdir",))
    assert listed.calls == [(0, "mkdir")] * 3 + [(1, "mkdir")] * 3
    fourth = syscalls.traced(begin, tmp_path, ("mkdir",), "mkdir:signal=SIGKILL:when=4")
    assert fourth.status == 0 and not fourth.injected
    third = syscalls.traced(begin, tmp_path, ("mkdir",), "mkdir:signal=SIGKILL:when=3")
    assert third.status is None and len(third.calls) == 3 and not third.acknowledged


def test_the_drivers_own_calls_are_not_counted(tmp_path: Path) -> None:
    """One more call of the main thread would hide the same number of a thread that saves."""
    done = syscalls.traced(lambda: lambda: True, tmp_path, syscalls.CALLS)
    assert done.acknowledged and done.calls == []
