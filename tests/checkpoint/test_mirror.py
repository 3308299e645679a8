"""A mirror in a folder and in memory: what stands after any fault, what comes back, what is refused."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_faults import ERRNOS, Crash, Fault, Platter, injected, raising, writer_of
from mirror_runs import MirroredRun, everything_in, stored_names

from ekiden.checkpoint import files
from ekiden.checkpoint import mirror as mirrors
from ekiden.checkpoint.manifest import NAME
from ekiden.checkpoint.mirror import MirrorError, open_mirror, restore_from_mirror
from ekiden.checkpoint.mirror_backends import FolderBackend, read_file
from ekiden.checkpoint.mirror_files import Entry
from ekiden.checkpoint.store import CheckpointStore
from ekiden.errors import UsageError, UserError


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries follow at once, and fsync costs nothing."""
    monkeypatch.setattr(mirrors, "RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


@pytest.fixture(params=["folder", "file", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> MirroredRun:
    place = {
        "folder": f"{tmp_path}/mirror",
        "file": f"file://{tmp_path}/mirror",
        "memory": f"memory:/{tmp_path}",
    }
    root = tmp_path / "run"
    root.mkdir()
    return MirroredRun(root, place[request.param])


@pytest.fixture
def folder_run(tmp_path: Path) -> MirroredRun:
    (tmp_path / "run").mkdir()
    return MirroredRun(tmp_path / "run", f"{tmp_path}/mirror")


def test_the_newest_step_comes_back_bit_identical_and_the_older_one_goes(run: MirroredRun) -> None:
    assert run.mirror.newest() is None
    for step in (1, 2):
        run.upload(step)
        assert run.standing() == step
    state = run.mirror.newest()
    assert state is not None and state.run == {"tokens": 2000, "loss": 2.5}
    assert sorted(run.mirror._listing()) == sorted(stored_names(state))


def test_an_older_step_does_not_replace_a_newer_one(run: MirroredRun) -> None:
    first = run.save(1)
    run.upload(2)
    with pytest.raises(MirrorError, match=r"holds step 2, newer than 1, and was left alone"):
        run.mirror.upload(first, run.extras)
    assert run.standing() == 2


def test_a_history_is_taken_to_its_last_whole_line_and_missing_extras_are_left_out(run: MirroredRun) -> None:
    checkpoint = run.save(1)
    with (run.root / "history.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    run.mirror.upload(checkpoint, run.extras)
    assert run.standing() == 1
    state = run.mirror.newest()
    assert state is not None and set(state.extras) == {"history.jsonl", "config.yaml"}


def test_the_same_step_again_takes_only_what_changed(run: MirroredRun) -> None:
    run.upload(1)
    (run.root / "result.json").write_text('{"status": "completed"}\n')
    sent: list[str] = []
    put = run.mirror._backend.put

    def watched(sources: Any) -> None:
        sent.extend(sources)
        put(sources)

    run.mirror._backend.put = watched  # type: ignore[method-assign]
    run.upload(1)
    state = run.mirror.newest()
    assert state is not None
    assert sent == [state.extras["result.json"].stored, state.commit()[0]]
    sent.clear()
    run.upload(1)
    assert sent == []


def test_a_checkpoint_damaged_since_it_was_saved_is_not_uploaded(run: MirroredRun) -> None:
    run.upload(1)
    checkpoint = run.save(2)
    flip(checkpoint.path / "model.safetensors")
    with pytest.raises(
        MirrorError, match=r"model\.safetensors has 218 bytes and hash \w+, expected 218 and \w+"
    ):
        run.mirror.upload(checkpoint, run.extras)
    assert run.standing() == 1


def flip(path: Path, offset: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


# -- faults ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [*ERRNOS, "crash"])
@pytest.mark.parametrize("persistent", [False, True], ids=["once", "from then on"])
def test_an_upload_into_a_folder_that_fails_at_every_operation(
    folder_run: MirroredRun, error: str, persistent: bool
) -> None:
    folder_run.upload(1)
    old, at, failed = 1, 0, 0
    while True:
        at += 1
        checkpoint = folder_run.save(old + 1)
        fault = Fault(at, raising(error), persistent or error == "crash")
        try:
            with injected(fault):
                folder_run.mirror.upload(checkpoint, folder_run.extras)
        except (MirrorError, Crash):
            failed += 1
            standing = folder_run.standing()
            assert standing in (old, old + 1)
        else:
            standing = folder_run.standing()
            assert standing == old + 1
        if len(fault.operations) < at:
            break
        old = standing
    # One error is met by a retry, except where the checkpoint itself is read.
    assert failed >= (20 if persistent or error == "crash" else 5)
    # What the faults left behind is gone with the next upload.
    folder_run.upload(standing + 1)
    state = folder_run.mirror.newest()
    assert state is not None
    root = Path(folder_run.url)
    left = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} - {".tmp-mirror"}
    assert left == set(stored_names(state))


@pytest.mark.parametrize("names_survive", [False, True], ids=["unsynced names lost", "unsynced bytes lost"])
def test_power_cut_at_every_operation_of_uploads_into_a_folder(
    folder_run: MirroredRun, tmp_path: Path, names_survive: bool
) -> None:
    root = Path(folder_run.url)
    root.mkdir()
    checkpoints = [folder_run.save(step) for step in (1, 2)]
    acknowledged = 0
    cuts: list[tuple[int, int]] = []

    def check(platter: Platter) -> None:
        mirror = open_mirror(str(platter.after_power_cut(tmp_path / "left", names_survive)))
        step = -1
        with contextlib.suppress(MirrorError):
            step = 0
            if state := mirror.newest():
                step = -1
                machine = tmp_path / "machine"
                mirror.download(state, machine / "checkpoints", machine)
                shutil.rmtree(machine)
                step = state.step
        cuts.append((acknowledged, step))

    with injected(Platter(root, check)):
        for checkpoint in checkpoints:
            folder_run.mirror.upload(checkpoint, folder_run.extras)
            acknowledged = checkpoint.step
    # Nothing or the first step while the first is uploaded, then the first or the second.
    assert set(cuts) == {(0, 0), (0, 1), (1, 1), (1, 2)}


def test_the_model_of_a_power_cut_finds_a_missing_fsync(
    folder_run: MirroredRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "sync_folder", lambda _path: None)
    with pytest.raises(AssertionError):
        test_power_cut_at_every_operation_of_uploads_into_a_folder(folder_run, tmp_path, names_survive=False)


@pytest.mark.parametrize("error", [*ERRNOS, "crash"])
def test_a_download_that_fails_at_every_operation(
    folder_run: MirroredRun, tmp_path: Path, error: str
) -> None:
    folder_run.upload(3)
    state = folder_run.mirror.newest()
    assert state is not None
    at, failed = 0, 0
    while True:
        at += 1
        machine = tmp_path / f"machine-{at}"
        machine.mkdir()
        fault = Fault(at, raising(error), persistent=True)
        try:
            with injected(fault):
                folder_run.mirror.download(state, machine / "checkpoints", machine)
        except (MirrorError, Crash):
            failed += 1
        # Nothing half has a final name: the store finds the whole step or none, and another try brings it.
        found = CheckpointStore(machine / "checkpoints").newest()
        assert found is None or found.step == 3
        for name in ("history.jsonl", "config.yaml"):
            assert (
                not (machine / name).exists()
                or (machine / name).read_bytes() == (folder_run.root / name).read_bytes()
            )
        if found is None:
            folder_run.mirror.download(state, machine / "checkpoints", machine)
        assert (machine / "history.jsonl").exists()
        if len(fault.operations) < at:
            break
    assert failed >= 40


# -- damage ------------------------------------------------------------------------------------------------------


def test_one_flipped_byte_in_any_file_is_found_and_named(folder_run: MirroredRun, tmp_path: Path) -> None:
    folder_run.upload(5)
    state = folder_run.mirror.newest()
    assert state is not None
    for number, name in enumerate(stored_names(state)):
        path = Path(folder_run.url) / name
        whole = path.read_bytes()
        flip(path, len(whole) // 2)
        machine = tmp_path / f"machine-{number}"
        with pytest.raises(UserError) as raised:
            restore_from_mirror(folder_run.mirror, machine / "checkpoints", machine, None)
        assert path.name in str(raised.value) and "expected" in str(raised.value)
        assert hashlib.sha256(path.read_bytes()).hexdigest()[:12] in str(raised.value)
        assert "start again once the mirror can be read" in str(raised.value)
        assert CheckpointStore(machine / "checkpoints").newest() is None
        path.write_bytes(whole)


@pytest.mark.parametrize("change", ["missing", "shorter", "longer"])
def test_a_file_missing_or_of_another_length_is_found(
    folder_run: MirroredRun, tmp_path: Path, change: str
) -> None:
    folder_run.upload(1)
    state = folder_run.mirror.newest()
    assert state is not None
    path = Path(folder_run.url) / state.files["model.safetensors"].stored
    if change == "missing":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[:-1] if change == "shorter" else data + b"x" * 1000)
    expected = {
        "missing": "No such file",
        "shorter": "has 217 bytes, expected 218",
        "longer": "more than 218",
    }
    with pytest.raises(MirrorError, match=expected[change]):
        folder_run.mirror.download(state, tmp_path / "new", tmp_path)
    assert list((tmp_path / "new").iterdir()) == []


def test_an_older_step_that_still_stands_is_taken_where_the_newest_is_damaged(
    folder_run: MirroredRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder_run.upload(1)
    # The upload of step 2 was cut short before it removed step 1.
    monkeypatch.setattr(FolderBackend, "publish", lambda self, name, source, *_: self.put({name: source}))
    folder_run.upload(2)
    state = folder_run.mirror.newest()
    assert state is not None and state.step == 2
    flip(Path(folder_run.url) / state.files["model.safetensors"].stored)
    machine = tmp_path / "machine"
    folder = restore_from_mirror(folder_run.mirror, machine / "checkpoints", machine, None)
    assert folder is not None and folder.name == "step-00000001"


def write_commit(root: Path, step: Any, body: bytes) -> None:
    root.mkdir(exist_ok=True)
    (root / f"step-{step:08d}-{hashlib.sha256(body).hexdigest()[:12]}.json").write_bytes(body)


def hostile(change: Callable[[dict[str, Any]], None]) -> bytes:
    body: dict[str, Any] = {
        "format": "ekiden-mirror-1",
        "step": 7,
        "files": {NAME: [10, "a" * 64], "model.safetensors": [218, "b" * 64]},
        "extras": {},
        "run": {},
    }
    change(body)
    return json.dumps(body).encode()


HOSTILE = {
    "not JSON": (b"\x80\x04pickle", "not valid JSON"),
    "nothing": (b"", "has 0 bytes"),
    "too long": (b"[" * ((8 << 20) + 1), "8388609 bytes, expected 1 to 8388608"),
    "too deep": (b"[" * 100_000, "not valid JSON"),
    "a list": (b"[]", "does not have the fields"),
    "another format": (hostile(lambda body: body.update(format="x")), "format 'x'"),
    "another step": (hostile(lambda body: body.update(step=8)), "step 8"),
    "a step that is true": (hostile(lambda body: body.update(step=True)), "step True"),
    "a name that climbs": (hostile(lambda b: b["files"].update({"../../x": [1, "c" * 64]})), "plain name"),
    "a name from the root": (hostile(lambda b: b["files"].update({"/etc/x": [1, "c" * 64]})), "plain name"),
    "an extra that climbs": (hostile(lambda b: b["extras"].update({"../x": [1, "c" * 64]})), "'../x'"),
    "an extra of another name": (hostile(lambda b: b["extras"].update({".lock": [1, "c" * 64]})), "'.lock'"),
    "a size below zero": (hostile(lambda b: b["files"].update(x=[-1, "c" * 64])), "size or hash of x"),
    "a size beyond all": (hostile(lambda b: b["files"].update(x=[2**63, "c" * 64])), "size or hash of x"),
    "a size that is true": (hostile(lambda b: b["files"].update(x=[True, "c" * 64])), "size or hash of x"),
    "a hash that climbs": (
        hostile(lambda b: b["files"].update(x=[1, "../" * 21 + "x"])),
        "size or hash of x",
    ),
    "no manifest": (hostile(lambda body: body["files"].pop(NAME)), f"names no {NAME}"),
    "a manifest too long": (
        hostile(lambda b: b["files"].update({NAME: [2**40, "a" * 64]})),
        f"names no {NAME}",
    ),
    "a run that is a list": (hostile(lambda body: body.update(run=[])), "not an object"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_object_is_refused_with_a_sentence(tmp_path: Path, case: str) -> None:
    body, expected = HOSTILE[case]
    write_commit(tmp_path / "mirror", 7, body)
    before = everything_in(tmp_path)
    machine = tmp_path / "machine"
    with pytest.raises(UserError) as raised:
        restore_from_mirror(open_mirror(str(tmp_path / "mirror")), machine / "checkpoints", machine, None)
    assert expected in str(raised.value)
    assert everything_in(tmp_path) == before


def test_a_size_that_no_disk_has_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    write_commit(tmp_path / "mirror", 7, hostile(lambda b: b["files"].update(x=[2**59, "c" * 64])))
    mirror = open_mirror(str(tmp_path / "mirror"))
    state = mirror.newest()
    assert state is not None
    with pytest.raises(MirrorError, match=r"takes .* MB, and the disk of"):
        mirror.download(state, tmp_path / "checkpoints", tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_file_without_end_is_read_one_byte_too_far_and_no_further() -> None:
    asked = []

    def endless(_name: str, offset: int, length: int) -> bytes:
        asked.append((offset, length))
        return b"x" * length

    assert sum(map(len, read_file(endless, "x", 218))) == 219
    assert asked == [(0, 219)]


def test_a_step_whose_manifest_tells_of_other_files_is_refused(
    tmp_path: Path, folder_run: MirroredRun
) -> None:
    folder_run.upload(3)
    state = folder_run.mirror.newest()
    assert state is not None
    name, source = state.commit()
    body = json.loads(source.data)
    del body["files"]["trainer_state.json"]
    root = Path(folder_run.url)
    (root / name).unlink()
    write_commit(root, 3, json.dumps(body).encode())
    with pytest.raises(UserError, match=r"step 3 on mirror .* is not good: trainer_state\.json is missing"):
        restore_from_mirror(folder_run.mirror, tmp_path / "new", tmp_path, None)
    assert list((tmp_path / "new").iterdir()) == []


def test_files_of_other_names_are_left_alone(folder_run: MirroredRun) -> None:
    root = Path(folder_run.url)
    for name in (
        "README.md",
        "step-00000001/model.safetensors",
        "step-1-abc.json",
        "other/step-00000001-0123456789ab.json",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("mine")
    for step in (1, 2):
        folder_run.upload(step)
    state = folder_run.mirror.newest()
    assert state is not None
    assert [name for name, data in everything_in(root).items() if data == b"mine"] != []
    assert sum(data == b"mine" for data in everything_in(root).values()) == 4


# -- starting ----------------------------------------------------------------------------------------------------


def test_the_newer_one_of_disk_and_mirror_is_taken(folder_run: MirroredRun, tmp_path: Path) -> None:
    machine = tmp_path / "machine"
    arguments = folder_run.mirror, machine / "checkpoints", machine
    assert restore_from_mirror(*arguments, None) is None
    folder_run.upload(5)
    assert restore_from_mirror(*arguments, 5) is None
    assert restore_from_mirror(*arguments, 6) is None
    assert not machine.exists()
    folder = restore_from_mirror(*arguments, 4)
    assert folder is not None and folder.name == "step-00000005"


def test_a_history_here_is_replaced_only_by_its_own_continuation(
    folder_run: MirroredRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_run.upload(5)
    mirrored = (folder_run.root / "history.jsonl").read_bytes()
    cases = {
        "its beginning": (mirrored[:40] + b'{"ki', mirrored),
        "another": (b'{"step": 9}\n', None),
        "none": (None, mirrored),
    }
    for name, (here, expected) in cases.items():
        machine = tmp_path / name
        machine.mkdir()
        if here is not None:
            (machine / "history.jsonl").write_bytes(here)
        restore_from_mirror(folder_run.mirror, machine / "checkpoints", machine, None)
        assert (machine / "history.jsonl").read_bytes() == (expected if expected is not None else here), name
        assert ("the one here stays" in capsys.readouterr().err) == (name == "another")
        assert sorted(path.name for path in machine.iterdir()) == [
            "checkpoints",
            "config.yaml",
            "history.jsonl",
        ]


class Unreachable:
    """A back end whose network is gone."""

    def listing(self) -> dict[str, Entry]:
        raise ConnectionError("Network is unreachable")


def test_a_mirror_out_of_reach_is_never_a_fresh_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror = mirrors.Mirror("s3://bucket/run", Unreachable())  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"Network is unreachable; there is no local checkpoint .* start again"
    ):
        restore_from_mirror(mirror, tmp_path, tmp_path, None)
    assert restore_from_mirror(mirror, tmp_path, tmp_path, 12) is None
    assert "Network is unreachable; going on from step 12 on this disk" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["run_id", "data", "tokenizer"])
def test_the_mirror_of_another_run_is_refused(folder_run: MirroredRun, tmp_path: Path, key: str) -> None:
    def save(step: int, value: str) -> Any:
        return folder_run.store.save(step, writer_of(step), {"tokens": 1, key: value})

    folder_run.mirror.upload(save(1, "mine"), {})
    with pytest.raises(
        MirrorError, match=r"holds another run \(its .* is mine, here theirs\) and was left alone"
    ):
        folder_run.mirror.upload(save(2, "theirs"), {})
    arguments = folder_run.mirror, tmp_path / "new", tmp_path
    with pytest.raises(UserError, match=r"holds step 1 of another run \(its .* is mine, here theirs\)"):
        restore_from_mirror(*arguments, 9, {key: "theirs"})
    assert restore_from_mirror(*arguments, None, {key: "mine"}) is not None


def test_a_folder_in_the_way_is_not_overwritten(folder_run: MirroredRun, tmp_path: Path) -> None:
    folder_run.upload(1)
    (tmp_path / "new" / "step-00000001").mkdir(parents=True)
    (tmp_path / "new" / "step-00000001" / "x").write_text("mine")
    with pytest.raises(UserError, match=r"step-00000001 is in the way"):
        restore_from_mirror(folder_run.mirror, tmp_path / "new", tmp_path, None)
    assert everything_in(tmp_path / "new") == {"step-00000001/x": b"mine"}


@pytest.mark.parametrize(
    ("url", "kind", "sentence"),
    [
        ("s3:/bucket", UsageError, "is not a place"),
        ("s3://", UsageError, "is not a place"),
        ("simplecache::s3://bucket/x", UsageError, "is not a place"),
        ("bucket://x", UsageError, "bucket:// cannot be written to"),
        ("https://example.org/x", UsageError, "https:// cannot be written to"),
        ("hf://name", UsageError, "give hf://OWNER/REPO"),
        ("hf://owner/../x", UsageError, "give hf://OWNER/REPO"),
        ("hf://owner/repo", UserError, "set HF_TOKEN or run `hf auth login`"),
        pytest.param(
            "s3://bucket/x",
            UserError,
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or run `aws configure`",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("s3fs") is None, reason="needs s3fs: pip install 'ekiden[s3]'"
            ),
        ),
        ("adl://x/y", UserError, "run `pip install 'adlfs'`"),
    ],
)
def test_a_url_that_cannot_be_a_mirror(
    url: str, kind: type[UserError], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "adlfs" else real(name))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(kind) as raised:
        open_mirror(url)
    assert type(raised.value) is kind and sentence in str(raised.value)
