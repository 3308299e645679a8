"""Mirrors on a real S3-speaking server and on a stand-in of the hub, broken at every request in turn."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import mirror_zygote
import pytest
import torch
from mirror_runs import MirroredRun, stored_names
from mirror_servers import TOKEN, Faults, Hub, s3_app, serving

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from forked import Served

from ekiden.checkpoint import mirror as mirrors
from ekiden.checkpoint import mirror_backends
from ekiden.checkpoint.mirror import MirrorError, open_mirror, restore_from_mirror
from ekiden.checkpoint.store import CheckpointWriter
from ekiden.errors import UserError

boto3 = pytest.importorskip("boto3")
MODES = ("error", "drop", "lost", "cut", "half")


class Place:
    """One kind of mirror: the server's faults, and how to reach into what it keeps."""

    def __init__(self, kind: str, faults: Faults, hub: Hub | None) -> None:
        self.kind, self.faults, self.hub = kind, faults, hub
        self.name = f"run-{uuid.uuid4().hex[:12]}"
        self.url = f"s3://bucket/{self.name}" if kind == "s3" else f"hf://somebody/{self.name}"

    def flip(self, stored: str) -> None:
        """Flip one bit of what is kept, as a failing disk of the server would."""
        if self.hub is None:
            body = boto3.client("s3").get_object(Bucket="bucket", Key=f"{self.name}/{stored}")["Body"].read()
            boto3.client("s3").put_object(Bucket="bucket", Key=f"{self.name}/{stored}", Body=flipped(body))
            return
        tree = self.hub.repositories[f"somebody/{self.name}"].commits[-1][1]
        kind, content = tree[stored]
        if isinstance(content, bytes):
            tree[stored] = (kind, flipped(content))
        else:
            self.hub.objects[content] = flipped(self.hub.objects[content])


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.fixture(scope="module")
def s3_server() -> Iterator[tuple[str, Faults]]:
    with serving(s3_app()) as (address, faults):
        keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=address, **keys).create_bucket(Bucket="bucket")
        yield address, faults


@pytest.fixture(scope="module")
def hub_server() -> Iterator[tuple[str, Faults, Hub]]:
    hub = Hub()
    with serving(hub) as (address, faults):
        yield address, faults, hub


@pytest.fixture(autouse=True)
def clients(
    monkeypatch: pytest.MonkeyPatch, s3_server: tuple[str, Faults], hub_server: tuple[str, Faults, Hub]
) -> None:
    """Lead the clients to the servers; nobody waits between tries, and only the mirror itself tries again."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server[0],
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "HF_ENDPOINT": hub_server[0],
        "HF_TOKEN": TOKEN,
    }.items():
        monkeypatch.setenv(name, value)
    s3_server[1].disarm()
    hub_server[1].disarm()
    monkeypatch.setattr(mirrors, "RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(mirror_backends, "S3_ATTEMPTS", 1)
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)


@pytest.fixture(params=["s3", "hub"])
def place(
    request: pytest.FixtureRequest, s3_server: tuple[str, Faults], hub_server: tuple[str, Faults, Hub]
) -> Place:
    if request.param == "s3":
        return Place("s3", s3_server[1], None)
    return Place("hub", hub_server[1], hub_server[2])


@pytest.fixture
def run(place: Place, tmp_path: Path) -> MirroredRun:
    (tmp_path / "run").mkdir()
    return MirroredRun(tmp_path / "run", place.url)


def test_a_step_comes_back_on_an_empty_machine_and_older_ones_go(run: MirroredRun, place: Place) -> None:
    assert run.mirror.newest() is None
    for step in (1, 2):
        run.upload(step)
        assert run.standing() == step
    state = run.mirror.newest()
    assert state is not None
    assert sorted(run.mirror._listing()) == sorted(stored_names(state))
    if place.hub:
        repository = place.hub.repositories[f"somebody/{place.name}"]
        assert repository.private
        kept = {content for kind, content in repository.commits[-1][1].values() if kind == "lfs"}
        earlier = {
            content for _, tree in repository.commits for kind, content in tree.values() if kind == "lfs"
        }
        # What only older commits name is deleted: their storage would count.
        assert len(earlier) == 2 and kept == earlier & set(place.hub.objects)


def faulted(run: MirroredRun, place: Place, cases: list[tuple[str, bool]], each: int) -> tuple[int, int, int]:
    """Break request after request, in `each` of the cases in turn; return tries, failures, requests of a clean upload."""
    run.upload(1)
    place.faults.disarm()
    run.upload(2)
    clean = len(place.faults.requests)
    # Always another step: what one try had sent is not sent again.
    step, new, tries, failures = 2, 2, 0, 0
    for at in range(1, clean + 1):
        for mode, persistent in [cases[(tries + i) % len(cases)] for i in range(each)]:
            new += 1
            checkpoint = run.save(new)
            place.faults.arm(at, mode, persistent)
            try:
                run.mirror.upload(checkpoint, run.extras)
                worked = True
            except MirrorError as error:
                assert str(error).startswith(f"mirror {run.url} "), error
                worked = False
            assert len(place.faults.requests) >= at, place.faults.requests
            place.faults.disarm()
            standing = run.standing(run.mirror)
            assert standing in ((new,) if worked else (step, new))
            # Once is met by a retry.
            assert worked or persistent, (at, mode)
            step, tries, failures = standing, tries + 1, failures + (not worked)
    return tries, failures, clean


CASES = [(mode, persistent) for mode in MODES for persistent in (False, True)]


def test_an_upload_broken_at_every_request(run: MirroredRun, place: Place) -> None:
    tries, failures, clean = faulted(run, place, CASES, each=1)
    assert tries == clean >= 12
    assert failures >= clean // 4


@pytest.mark.slow
def test_an_upload_broken_at_every_request_in_every_way(run: MirroredRun, place: Place) -> None:
    tries, failures, clean = faulted(run, place, CASES, each=len(CASES))
    print(f"{place.kind}: {tries} uploads broken in {len(CASES)} ways at {clean} requests, {failures} failed")
    assert tries == clean * len(CASES)


def test_a_download_broken_at_every_request(run: MirroredRun, place: Place, tmp_path: Path) -> None:
    run.upload(1)
    place.faults.disarm()
    run.standing()
    clean = len(place.faults.requests)
    mirror = open_mirror(run.url)
    state = mirror.newest()
    assert state is not None
    for at in range(1, clean):
        for mode, persistent in ("drop", False), ("cut", True):
            machine = tmp_path / f"machine-{at}-{persistent}"
            place.faults.arm(at, mode, persistent)
            try:
                mirror.download(state, machine / "checkpoints", machine)
            except MirrorError:
                assert persistent
                assert list((machine / "checkpoints").iterdir()) == []
            else:
                assert not persistent or len(place.faults.requests) < at
    place.faults.disarm()
    assert run.standing() == 1


def test_a_flipped_bit_in_the_bucket_is_found_and_named(
    run: MirroredRun, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.upload(4)
    state = run.mirror.newest()
    assert state is not None
    stored = state.files["model.safetensors"].stored
    place.flip(stored)
    machine = tmp_path / "machine"
    expected = (
        rf"{stored} on mirror {run.url} has hash \w{{64}}, expected {state.files['model.safetensors'].sha256}"
    )
    with pytest.raises(UserError, match=expected):
        restore_from_mirror(run.mirror, machine / "checkpoints", machine, None)
    assert restore_from_mirror(run.mirror, machine / "checkpoints", machine, 3) is None
    assert "going on from step 3 on this disk" in capsys.readouterr().err
    assert list((machine / "checkpoints").iterdir()) == []
    # The next upload does not build on it.
    run.upload(5)
    assert run.standing() == 5


def test_a_damaged_commit_is_found_and_named(run: MirroredRun, place: Place, tmp_path: Path) -> None:
    run.upload(4)
    state = run.mirror.newest()
    assert state is not None
    place.flip(state.commit()[0])
    with pytest.raises(MirrorError, match=rf"{state.commit()[0]} has hash \w+, expected \w+"):
        run.mirror.newest()
    run.upload(5)
    assert run.standing() == 5


def test_a_file_that_stands_is_not_sent_again(run: MirroredRun, place: Place, monkeypatch: Any) -> None:
    backend = run.mirror._backend
    checkpoint = run.save(1)
    with monkeypatch.context() as patched:
        # Cut short before its commit.
        patched.setattr(type(backend), "publish", lambda *_: (_ for _ in ()).throw(ConnectionError("gone")))
        with pytest.raises(MirrorError, match="could not be written: gone"):
            run.mirror.upload(checkpoint, run.extras)
    assert open_mirror(run.url).newest() is None
    place.faults.disarm()
    run.mirror.upload(checkpoint, run.extras)
    sent = [line for line in place.faults.requests if line.startswith("PUT") or line.endswith("/commit/main")]
    assert len(sent) == 1
    assert run.standing() == 1


def test_a_bad_token_or_key_is_told_at_once(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if place.hub is None:
        mirror = open_mirror(place.url)
        monkeypatch.setattr(
            type(mirror._backend),
            "listing",
            lambda _self: (_ for _ in ()).throw(PermissionError("Forbidden")),
        )
    else:
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        mirror = open_mirror(place.url)
    with pytest.raises(UserError, match=r"access is refused .*; check the credentials.*start again"):
        restore_from_mirror(mirror, tmp_path / "checkpoints", tmp_path, None)
    assert len(place.faults.requests) <= 1


def test_a_repository_that_this_token_may_not_see_is_no_empty_mirror(
    hub_server: tuple[str, Faults, Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = hub_server[2]
    mirror = open_mirror("hf://somebody/hidden")
    # The hub says that it is missing, and that it exists where one wants to create it.
    monkeypatch.setattr(hub, "routes", [(m, p, h) for m, p, h in hub.routes if h != hub.info])
    hub.repositories["somebody/hidden"] = object()  # type: ignore[assignment]
    with pytest.raises(MirrorError, match="cannot be read"):
        mirror.newest()
    del hub.repositories["somebody/hidden"]


def test_a_bucket_that_is_missing_is_no_empty_mirror() -> None:
    with pytest.raises(MirrorError, match="there is no bucket other"):
        open_mirror("s3://other/run").newest()


def big(run: MirroredRun, step: int) -> Any:
    def write(writer: CheckpointWriter) -> None:
        writer.tensors(
            "model.safetensors", {"weight": torch.arange(step, step + 3_000_000, dtype=torch.float32)}
        )

    return run.store.save(step, write)


def test_a_large_file_goes_in_parts_and_comes_back_in_ranges(
    tmp_path: Path, s3_server: tuple[str, Faults], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_backends, "PART_BYTES", 5 << 20)
    monkeypatch.setattr(mirror_backends, "READ_BYTES", 1_000_000)
    place = Place("s3", s3_server[1], None)
    run = MirroredRun(tmp_path, place.url)
    checkpoint = big(run, 1)
    run.mirror.upload(checkpoint, {})
    sent = [line for line in place.faults.requests if line.startswith("PUT") and "safetensors" in line]
    assert len(sent) == 3
    # Its ETag is known without reading it back.
    assert [line for line in place.faults.requests if line.startswith("GET") and "safetensors" in line] == []
    state = run.mirror.newest()
    assert state is not None
    folder = run.mirror.download(state, tmp_path / "new", tmp_path)
    name = "model.safetensors"
    assert (folder / name).read_bytes() == (checkpoint.path / name).read_bytes()


def test_an_etag_that_is_no_md5_is_met_by_reading_one_file_back(
    tmp_path: Path, s3_server: tuple[str, Faults], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place("s3", s3_server[1], None)
    run = MirroredRun(tmp_path, place.url)
    monkeypatch.setattr(mirror_backends, "s3_etag", lambda _source: "as with a key of the user's")
    run.upload(1)
    read = [line for line in place.faults.requests if line.startswith("GET") and "/step-" in line]
    assert len(read) == 2  # one of the data, and the commit
    assert run.standing() == 1


# -- killed ------------------------------------------------------------------------------------------------------


@pytest.fixture
def zygote(tmp_path: Path) -> Iterator[Served]:
    process = Served(mirror_zygote.begin, tmp_path / "zygote.log")
    yield process
    process.close()


def upload_in(zygote: Served, run: MirroredRun, step: int, arm: Any, **more: Any) -> int:
    """Upload `step` in a process of its own; `arm` is called with its number before it begins. Return its status."""
    checkpoint = run.save(step)
    extras = {name: str(path) for name, path in run.extras.items()}
    task = {"url": run.url, "checkpoint": str(checkpoint.path), "extras": extras, **more}
    arm(zygote.ask(task))
    return zygote.ask(None)


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_killed_at_a_request_leaves_the_old_or_the_new(
    run: MirroredRun, place: Place, zygote: Served, every: int
) -> None:
    run.upload(1)
    place.faults.disarm()
    run.upload(2)
    clean, step, new, kept = len(place.faults.requests), 2, 2, set()
    for at in range(1, clean + 1, every):
        for mode in ("kill", "kill-after") if every == 1 else (("kill", "kill-after")[at % 2],):
            new += 1
            status = upload_in(zygote, run, new, lambda pid: place.faults.arm(at, mode, victim=pid))  # noqa: B023
            assert status == signal.SIGKILL
            place.faults.disarm()
            standing = run.standing(run.mirror)
            assert standing in (step, new)
            kept.add(standing == new)
            step = standing
    assert kept == {False, True}
    run.upload(new + 1)
    state = run.mirror.newest()
    assert state is not None
    assert sorted(run.mirror._listing()) == sorted(stored_names(state))


def test_a_process_that_ends_does_not_wait_for_a_silent_network(
    run: MirroredRun, place: Place, zygote: Served
) -> None:
    run.upload(1)
    status = upload_in(
        zygote, run, 2, lambda _pid: place.faults.arm(3, "hang", persistent=True), uploader=True
    )
    # The server never answered, and the process ended of its own.
    assert status == 0
    place.faults.disarm()
    assert run.standing() == 1
