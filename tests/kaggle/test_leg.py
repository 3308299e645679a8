"""One leg, run as Kaggle would run it."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from campaign import Outcome, outcome
from sessions import Faults, Session, Zygote

from ekiden.config import preset_names
from ekiden.kaggle import inputs, leg
from ekiden.kaggle import session as session_steps
from ekiden.kaggle.inputs import PACK_MANIFEST
from ekiden.kaggle.launcher import MAX_BYTES, packed_package, render
from ekiden.kaggle.session import Ended
from ekiden.tokens.kernel import SOURCES
from ekiden.training.history import read_history

ROOT = Path(__file__).parents[2]
LegSettings = dict[str, Any]


@pytest.fixture
def settings(packed: dict[str, Path], recipe: str) -> LegSettings:
    """Return the settings of a first leg."""
    manifest = json.loads((packed["tester/tiny-corpus-1"] / PACK_MANIFEST).read_text())
    return {
        "relay": "r",
        "leg": 1,
        "nonce": "n1",
        "datasets": sorted(packed),
        "fingerprint": manifest["fingerprint"],
        "previous": "",
        "expected": None,
        "recipe": recipe,
        "gpus": 1,
        "seconds": 300,
        "grace": 30,
        "output_bytes": 20_000_000_000,
    }


@pytest.fixture
def go(packed: dict[str, Path], tmp_path: Path, zygote: Zygote) -> Callable[..., Session]:
    """Return what runs a leg with settings and returns its session, which must be complete."""
    count = 0

    def run(settings: LegSettings, previous: Path | None = None, **options: Any) -> Session:
        nonlocal count
        count += 1
        inputs = {f"datasets/{ref}": path for ref, path in packed.items()}
        if previous:
            inputs["notebooks/" + settings["previous"]] = previous
        options = {"python": str(zygote.python), "inputs": inputs, **options}
        session = Session(tmp_path / f"session-{count}", render(settings), **options)
        session.status = session.run()  # type: ignore[attr-defined]
        return session

    return run


def following(settings: LegSettings, session: Session) -> LegSettings:
    """Return the settings of the leg after `session`."""
    verdict = session.verdict()
    return {
        **settings,
        "leg": 2,
        "nonce": "n2",
        "previous": "tester/leg-a",
        "expected": verdict["checkpoint"],
    }


def test_two_legs_are_one_run(
    settings: LegSettings, go: Callable[..., Session], reference: Outcome, packed: dict[str, Path]
) -> None:
    first = go(settings, faults=Faults(stop_after_steps=8))
    assert first.status == ("COMPLETE", ""), first.log
    verdict = first.verdict()
    assert (verdict["status"], verdict["step"], verdict["nonce"]) == ("paused", 8, "n1")
    second = go(following(settings, first), previous=first.working, flat=True)
    verdict = second.verdict()
    assert verdict["status"] == "completed", second.log
    assert verdict["step"] == 20 and verdict["steps_done"] == 12
    assert outcome(second.working / "run") == reference
    events = [
        r["event"] for r in read_history(second.working / "run" / "history.jsonl") if r["kind"] == "event"
    ]
    assert events.count("start") == events.count("resume") == 1
    assert (second.working / "run" / "final_model" / "model.safetensors").is_file()


def test_the_package_that_travels_is_whole(tmp_path: Path) -> None:
    zipfile.ZipFile(io.BytesIO(base64.b85decode(packed_package()))).extractall(tmp_path / "package")
    source = "import ekiden.config as c; print(c.__file__, *c.preset_names())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "package")}
    done = subprocess.run(
        [sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=True
    )
    native = tmp_path / "package" / "ekiden" / "tokens" / "native"
    assert {path.name for path in native.iterdir()} == {path.name for path in SOURCES}
    assert done.stdout.split() == [str(tmp_path / "package" / "ekiden" / "config.py"), *preset_names()]
    assert len(render({}).encode()) < MAX_BYTES


def test_what_an_image_lacks_is_known_and_installed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dependencies = {re.split(r"[<>=]", item)[0] for item in project["dependencies"]}
    needed = {session_steps.DISTRIBUTIONS.get(name, name) for name in session_steps.NEEDED}
    assert needed | session_steps.SPARED == dependencies and not needed & session_steps.SPARED
    assert session_steps.install_missing() == []
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command[4:])
        return subprocess.CompletedProcess(command, len(commands) - 1, stderr="no network")

    monkeypatch.setattr(subprocess, "run", run)
    assert session_steps.install_missing(["json", "no_such", "no.such"]) == ["no_such", "no.such"]
    assert commands == [["--quiet", "--no-deps", "no_such", "no.such"]]
    with pytest.raises(Ended, match="pip install no_such failed: no network"):
        session_steps.install_missing(["no_such"])


def test_a_leg_begins_with_the_standard_library_alone() -> None:
    """It installs what the image lacks, so it must not need it before."""
    source = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); import ekiden.kaggle.leg"
    subprocess.run([sys.executable, "-S", "-E", "-c", source], check=True)


def test_a_leg_whose_package_is_damaged_leaves_a_verdict(tmp_path: Path) -> None:
    source = render({"leg": 3, "nonce": "n3"})
    begin = source.index("PACKAGE = '") + len("PACKAGE = '")
    damaged = Session(tmp_path / "session", source[:begin] + "00000" + source[begin + 5 :], {})
    assert damaged.run() == ("COMPLETE", "")
    verdict = damaged.verdict()
    assert (verdict["status"], verdict["leg"], verdict["nonce"]) == ("failed", 3, "n3")
    assert "BadZipFile" in str(verdict["reason"])


def test_training_that_does_not_stop_is_killed_with_its_ranks(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    child = f"{deaf}print('ready', flush=True); time.sleep(60)"
    parent = (
        f"{deaf}import subprocess, sys; "
        f"rank = subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True, stdout=subprocess.PIPE); "
        "rank.stdout.readline(); print(rank.pid, flush=True); rank.wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    assert process.stdout
    rank = psutil.Process(int(process.stdout.readline()))
    assert leg.wait(process, 0.0, 0.1) == -signal.SIGKILL
    assert not rank.is_running() or rank.wait(5) is None


@pytest.mark.slow
def test_a_leg_has_no_need_of_an_installed_package(settings: LegSettings, go: Callable[..., Session]) -> None:
    """The package that travels in the file is the one that trains, in a process of its own, until the deadline."""
    session = go({**settings, "seconds": 45}, python=sys.executable)
    # The first step's save is not measured yet, so a minute is kept for it: a leg of 45 s does one step.
    assert session.verdict()["status"] == "paused", session.log
    assert session.verdict()["reason"] == "time limit" and session.verdict()["step"] == 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_gpus_are_two_ranks(settings: LegSettings, go: Callable[..., Session]) -> None:
    """Both on the CPU here: what is tried is torchrun, the deadline and the verdict."""
    first = go({**settings, "gpus": 2, "seconds": 75}, python=sys.executable, faults=Faults(gpus=2))
    assert first.verdict()["status"] == "paused", first.log
    assert first.verdict()["reason"] == "time limit"
    later = {**following(settings, first), "gpus": 2}
    second = go(later, previous=first.working, python=sys.executable, faults=Faults(gpus=2))
    assert second.verdict()["status"] == "completed", second.log
    # 2 ranks of 4 samples of 32 tokens, 20 steps.
    assert second.verdict()["tokens"] == 2 * 4 * 32 * 20


def test_without_a_gpu_a_leg_ends_at_once_with_the_checkpoint_carried(
    settings: LegSettings, go: Callable[..., Session]
) -> None:
    first = go(settings, faults=Faults(stop_after_steps=4))
    second = go(following(settings, first), previous=first.working, faults=Faults(gpus=0))
    assert second.status == ("COMPLETE", "")
    verdict = second.verdict()
    assert verdict["status"] == "no-gpu" and verdict["reason"] == "0 GPUs found, 1 needed"
    assert verdict["checkpoint"] == first.verdict()["checkpoint"]
    third = go(following(settings, second), previous=second.working)
    assert third.verdict()["status"] == "completed"


def test_an_older_version_of_the_input_is_recognised(
    settings: LegSettings, go: Callable[..., Session]
) -> None:
    first = go(settings, faults=Faults(stop_after_steps=4))
    later = following(settings, first)
    later["expected"] = {**later["expected"], "step": 9, "manifest_sha256": "0" * 64}
    second = go(later, previous=first.working)
    assert second.verdict()["status"] == "stale-input"
    assert "holds step 4, expected step 9" in str(second.verdict()["reason"])
    assert go({**settings, "fingerprint": "1" * 64}).verdict()["status"] == "stale-input"
    assert go(later).verdict()["status"] == "no-checkpoint"
    assert go(settings, faults=Faults(hide_inputs=True)).verdict()["status"] == "no-corpus"


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    settings: LegSettings, go: Callable[..., Session], reference: Outcome, tmp_path: Path
) -> None:
    first = go(settings, faults=Faults(stop_after_steps=8))
    damaged = tmp_path / "damaged"
    shutil.copytree(first.working, damaged)
    weights = damaged / "run" / "checkpoints" / "step-00000008" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    second = go(following(settings, first), previous=damaged)
    assert second.verdict()["carried"]["step"] == 6  # type: ignore[index]
    assert "step-00000008 is damaged (model.safetensors)" in second.log
    assert outcome(second.working / "run") == reference


def test_whatever_fails_the_status_is_0_and_the_verdict_says_why(
    settings: LegSettings, go: Callable[..., Session], recipe: str
) -> None:
    session = go({**settings, "recipe": recipe.replace("hidden_size: 32", "hidden_size: 0")})
    assert session.status == ("COMPLETE", "")
    assert session.verdict()["status"] == "failed"
    session = go({**settings, "gpus": "two"})
    assert session.status == ("COMPLETE", "") and "TypeError" in str(session.verdict()["reason"])


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_a_leg_stays_within_the_output_limit(settings: LegSettings, go: Callable[..., Session]) -> None:
    free = go(settings)
    checkpoints = inputs.checkpoints_of(free.working / "run")
    limit = size_of(free.working) - size_of(checkpoints[0]) // 2
    assert len(checkpoints) == 4
    assert go(settings, output_limit=limit).status == ("ERROR", "Output exceeds the limit.")
    within = go({**settings, "output_bytes": limit}, output_limit=limit)
    assert within.status == ("COMPLETE", "") and within.verdict()["status"] == "completed"
    assert 2 <= len(inputs.checkpoints_of(within.working / "run")) < 4


def test_checkpoints_beyond_the_output_limit_are_given_up(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "MANIFEST.json").write_bytes(b"{}")
        (folder / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "run" / "checkpoints" / ".tmp-step-00000004-0").mkdir()
    leg.keep_within(tmp_path, 2500)
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step-00000002", "step-00000003"]


def test_a_pack_is_the_folder_again(packed: dict[str, Path], shards: Path, tmp_path: Path) -> None:
    for number, path in enumerate(packed.values()):
        shutil.copytree(path, tmp_path / "input" / "deeper" / str(number))
    manifest, chunks = inputs.find_pack(tmp_path, [], "")
    assert manifest["parts"] == 2 and len(chunks) == 4
    inputs.unpack(manifest, chunks, tmp_path / "out")
    for path in shards.rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            assert (tmp_path / "out" / path.relative_to(shards)).read_bytes() == path.read_bytes()
    name = manifest["chunks"][1]["name"]
    data = bytearray(chunks[name].read_bytes())
    data[3] ^= 1
    chunks[name].write_bytes(data)
    with pytest.raises(Ended, match="damaged"):
        inputs.unpack(manifest, chunks, tmp_path / "again")
    manifest["files"][0]["path"] = "../out"
    with pytest.raises(Ended, match="not a path below the pack"):
        inputs.unpack(manifest, chunks, tmp_path / "again")
    chunks[name].unlink()
    with pytest.raises(Ended, match=f"{name} of the corpus tiny-corpus is not among the inputs"):
        inputs.find_pack(tmp_path, [], "")
