"""Datasets through the real client: what is sent, cut, lost, and gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest
from stand_in import TOKEN, HttpFault, StandIn

from ekiden.cli import cli
from ekiden.errors import UsageError, UserError
from ekiden.kaggle import inputs
from ekiden.kaggle.client import Kaggle, KaggleError
from ekiden.kaggle.upload import manifest_of, shards_fingerprint, upload


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of files, nested, one of them empty, 5,000 bytes together."""
    root = tmp_path / "folder"
    for number in range(5):
        path = root / f"language-{number % 2}" / f"{number}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes((number * i) % 251 for i in range(1250)) if number else b"")
    return root


def send(folder: Path, kaggle: Kaggle, tmp_path: Path) -> list[str]:
    """Upload as two parts of two or three chunks."""
    return upload(
        folder,
        "some-corpus",
        kaggle,
        max_part_bytes=3000,
        chunk_bytes=1000,
        staging=tmp_path / "staging",
        wait=lambda _: None,
    )


def content(stand_in: StandIn, refs: list[str], target: Path) -> dict[str, bytes]:
    """Return the files that a leg would find in datasets."""
    for ref in refs:
        mount = target / "input" / "datasets" / ref
        mount.parent.mkdir(parents=True, exist_ok=True)
        mount.symlink_to(stand_in.datasets[ref][-1])
    manifest, chunks = inputs.find_pack(target, refs, "")
    inputs.unpack(manifest, chunks, target / "out")
    found = (target / "out").rglob("*")
    return {str(path.relative_to(target / "out")): path.read_bytes() for path in found if path.is_file()}


def everything(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_folder_arrives_and_only_changes_are_sent_again(
    stand_in: StandIn, kaggle: Kaggle, folder: Path, tmp_path: Path
) -> None:
    refs = send(folder, kaggle, tmp_path)
    assert refs == ["tester/some-corpus-1", "tester/some-corpus-2"]
    assert content(stand_in, refs, tmp_path / "a") == everything(folder)
    blobs = stand_in.calls("StartBlobUpload")
    assert blobs == 3 + 2 + 2 and not (tmp_path / "staging").exists()
    assert send(folder, kaggle, tmp_path) == refs
    assert stand_in.calls("StartBlobUpload") == blobs
    (folder / "language-0" / "4.bin").write_bytes(bytes(1250))
    # Right after a push Kaggle still shows the version before; that is waited out.
    stand_in.settle = 3
    send(folder, kaggle, tmp_path)
    assert stand_in.calls("CreateDatasetVersion") == 2
    assert content(stand_in, refs, tmp_path / "b") == everything(folder)
    assert len(manifest_of(refs, kaggle)["files"]) == 5
    with pytest.raises(KaggleError, match="are not the 2 parts of one corpus"):
        manifest_of(refs[:1], kaggle)
    with pytest.raises(UserError, match="holds no token shards; give `kaggle corpus upload` the output of"):
        shards_fingerprint(refs, kaggle)


def test_an_upload_cut_at_every_file_goes_on(
    stand_in: StandIn, kaggle: Kaggle, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"some-corpus-{number:05d}.bin" for number in range(5)]
    # Cut in the middle, before the first byte, and by a 503 after the last.
    stand_in.upload_cuts = {name: [[400], [0], [1000], [400, 100], [10]][i] for i, name in enumerate(names)}
    refs = send(folder, kaggle, tmp_path)
    assert not any(stand_in.upload_cuts.values())
    assert content(stand_in, refs, tmp_path / "a") == everything(folder)


def test_a_process_killed_at_every_file_goes_on(
    stand_in: StandIn, kaggle: Kaggle, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    real = kaggle._api.upload_complete
    sent: list[str] = []

    def until_killed(path: str, *rest: object, **options: object) -> object:
        if len(sent) in kills:
            kills.remove(len(sent))
            raise Killed
        sent.append(Path(path).name)
        return real(path, *rest, **options)

    kills = [0, 1, 2, 3, 4, 5, 6]
    monkeypatch.setattr(kaggle._api, "upload_complete", until_killed)
    while kills:
        with pytest.raises(Killed):
            send(folder, kaggle, tmp_path)
    refs = send(folder, kaggle, tmp_path)
    # Not one upload was begun a second time: 5 chunks and 2 manifests.
    assert stand_in.calls("StartBlobUpload") == 7
    assert content(stand_in, refs, tmp_path / "a") == everything(folder)


def test_a_dataset_that_lost_a_file_is_noticed(
    stand_in: StandIn, kaggle: Kaggle, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.lose_files = ["some-corpus-00001.bin"]
    refs = send(folder, kaggle, tmp_path)
    assert "some-corpus-00001.bin is not there; uploading it anew" in capsys.readouterr().err
    assert content(stand_in, refs, tmp_path / "a") == everything(folder)
    stand_in.datasets.clear()
    stand_in.lose_files = ["some-corpus-00001.bin"] * 2
    with pytest.raises(KaggleError, match=r"00001.bin is not there, twice; look at it on kaggle.com"):
        send(folder, kaggle, tmp_path)


def test_an_expired_upload_begins_afresh(
    stand_in: StandIn, kaggle: Kaggle, folder: Path, tmp_path: Path
) -> None:
    stand_in.expired_uploads = ["some-corpus-00001.bin"]
    refs = send(folder, kaggle, tmp_path)
    assert not stand_in.expired_uploads
    assert content(stand_in, refs, tmp_path / "a") == everything(folder)


def test_requests_that_fail_in_passing_are_repeated(
    stand_in: StandIn, kaggle: Kaggle, folder: Path, tmp_path: Path
) -> None:
    stand_in.http_faults["GetDatasetStatus"] = [HttpFault(503), HttpFault(0)]
    stand_in.http_faults["ListDatasetFiles"] = [HttpFault(429, headers={"Retry-After": "3"})]
    stand_in.http_faults["GET"] = [HttpFault(503)]
    assert len(send(folder, kaggle, tmp_path)) == 2


def test_one_sentence_for_each_mistake(
    stand_in: StandIn, kaggle: Kaggle, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"--name must be .* 'my-corpus' would do"):
        upload(folder, "My Corpus", kaggle)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no files"):
        upload(tmp_path / "empty", "my-corpus", kaggle)
    monkeypatch.setenv("KAGGLE_API_TOKEN", "KGAT_another")
    with pytest.raises(KaggleError, match="Kaggle does not accept the token in KAGGLE_API_TOKEN") as error:
        Kaggle()
    assert "KGAT" not in str(error.value) and TOKEN not in str(error.value)


def test_the_verbs_upload_and_say_what_to_give_the_relay(
    stand_in: StandIn, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--name", "some-corpus", "--max-part-size", "3000", "--staging", str(tmp_path / "staging")]
    cli.main(["kaggle", "corpus", "upload", str(folder), *options], standalone_mode=False)
    assert capsys.readouterr().out == "tester/some-corpus-1,tester/some-corpus-2\n"
    cli.main(
        ["kaggle", "push", str(folder / "language-1" / "3.bin"), "--name", "one-file"], standalone_mode=False
    )
    # A pack of one file is that file: a notebook finds a wheel in it without Ekiden's help.
    data = (folder / "language-1" / "3.bin").read_bytes()
    assert (stand_in.datasets["tester/one-file-1"][-1] / "one-file-00000.bin").read_bytes() == data
    with pytest.raises(UserError, match="holds no relay; start one with"):
        cli.main(["kaggle", "status", "--relay-dir", str(tmp_path / "none")], standalone_mode=False)
