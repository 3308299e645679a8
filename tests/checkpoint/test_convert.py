"""Conversions of folders: every bit, every file, little memory; what cannot be converted is a sentence."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conversions import DTYPES, MEGABYTE, convert_in_little_memory, every_bit, refusal, trained
from safetensors.torch import load_file, save_file

from ekiden.checkpoint.convert import compare, convert_checkpoint, open_tree
from ekiden.checkpoint.folder import Checkpoint, write_folder
from ekiden.checkpoint.header import ITEM_BYTES
from ekiden.checkpoint.lazy import DTYPES as NAMES
from ekiden.cli import cli
from ekiden.errors import UserError

HELD = [dtype for dtype in DTYPES if NAMES[str(dtype).removeprefix("torch.")].code in ITEM_BYTES]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return a checkpoint folder with every element type, NaNs and infinities, texts and bytes."""
    weights = {str(dtype): every_bit(dtype, 7, 3) for dtype in HELD}
    moments = {f"exp_avg/{n}": torch.randn(30, 4) for n in range(3)}
    moments["step"] = torch.tensor(4.0)
    moments["inf"] = torch.tensor([math.inf, -math.inf, math.nan, -0.0])

    def write(writer: Any) -> None:
        writer.tensors("model.safetensors", weights, {"format": "pt"})
        writer.tensors("optimizer.safetensors", moments)
        writer.tensors("rng.safetensors", {"cpu": torch.get_rng_state(), "empty": torch.empty(0, 3)})
        writer.json("trainer_state.json", {"best": math.nan, "names": ["न्हंय"], "n": 2**53 + 1})
        writer.bytes("tokenizer.model", bytes(range(256)))
        writer.bytes("config.json", b'{"a": 1}')

    write_folder(tmp_path / "step-00000007", write, 7, {"tokens": 99, "loss": 0.1})
    return tmp_path / "step-00000007"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "MANIFEST.json"}


@pytest.mark.parametrize("ways", [["x.json"], ["x.pt"], ["x.json", "x.pt", "y.json"]], ids="-".join)
def test_a_folder_comes_back_byte_for_byte(checkpoint: Path, ways: list[str], tmp_path: Path) -> None:
    source = checkpoint
    for name in ways:
        source = convert_checkpoint(source, tmp_path / name, test_load=True).path
    back = convert_checkpoint(source, tmp_path / "back", test_load=True)
    assert contents(back.path) == contents(checkpoint)
    opened, original = Checkpoint.open(back.path), Checkpoint.open(checkpoint)
    assert (opened.step, opened.manifest.run) == (7, original.manifest.run)
    assert opened.manifest.files == original.manifest.files
    assert back.compared == back.tensors == len(HELD) + 5 + 2


def test_readable_folders_come_back_too(checkpoint: Path, tmp_path: Path) -> None:
    convert_checkpoint(checkpoint, tmp_path / "x.json", readable=True)
    convert_checkpoint(tmp_path / "x.json", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(checkpoint)


def test_a_sharded_hugging_face_folder(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file({"a": torch.randn(9).bfloat16(), "c": torch.ones(2)}, folder / names[0], {"format": "pt"})
    save_file({"b": torch.randn(4, 4)}, folder / names[1], {"format": "pt"})
    (folder / "config.json").write_text("{}")
    (folder / "cache").symlink_to(folder / "config.json")
    convert_checkpoint(folder, tmp_path / "x.json", test_load=True)
    back = convert_checkpoint(tmp_path / "x.json", tmp_path / "back", test_load=True).path
    for name in names:
        there, here = load_file(folder / name), load_file(back / name)
        assert there.keys() == here.keys() and all(torch.equal(there[key], here[key]) for key in there)
    assert json.loads((tmp_path / "x.json").read_text())["files"]["config.json"] == "{}"


def test_weights_alone(checkpoint: Path, tmp_path: Path) -> None:
    done = convert_checkpoint(checkpoint, tmp_path / "x.json", weights_only=True, test_load=True)
    assert done.tensors == len(HELD) and "left out: optimizer and trainer's state" in str(done)
    convert_checkpoint(tmp_path / "x.json", tmp_path / "back", weights_only=True)
    assert set(contents(tmp_path / "back")) == {"model.safetensors", "config.json", "tokenizer.model"}
    torch.save(trained(), tmp_path / "script.pt")
    light = convert_checkpoint(tmp_path / "script.pt", tmp_path / "light.pt", weights_only=True)
    assert light.left_out == ["optimizer_state_dict", "scheduler_state_dict"]
    assert torch.load(light.path, weights_only=True).keys() == {"step", "model_state_dict", "loss", "notes"}
    # From that, the weights become a folder; with the optimizer beside them they would not be whole.
    with pytest.raises(UserError, match="would keep the weights alone and lose"):
        convert_checkpoint(tmp_path / "script.pt", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_state_dict_becomes_a_folder(tmp_path: Path) -> None:
    weights = trained()["model_state_dict"]
    for number, value in enumerate((weights, {"model": weights, "step": 3})):
        torch.save(value, tmp_path / f"{number}.pt")
        folder = convert_checkpoint(tmp_path / f"{number}.pt", tmp_path / str(number), test_load=True)
        assert folder.left_out == (["step"] if number else [])
        held = load_file(folder.path / "model.safetensors")
        assert held.keys() == weights.keys() and all(torch.equal(held[k], weights[k]) for k in weights)


def claim(**changes: Any) -> dict[str, Any]:
    tensor = {"dtype": "float32", "shape": [1], "data": "AAAAAA=="}
    tree: dict[str, Any] = {
        "step": 1,
        "model_state_dict": {"w": tensor},
        "safetensors": {},
        "files": {},
        "ekiden_folder": {"version": 1, "run": {}, "metadata": {}},
    }
    return tree | changes


FACTS = {"version": 1, "run": {}, "metadata": {}}


@pytest.mark.parametrize(
    "tree",
    [
        claim(files={"../../escape": "x"}),
        claim(files={"/etc/escape": "x"}),
        claim(files={"MANIFEST.json": "x"}),
        claim(files={"": "x"}),
        claim(files={"a.json": ["x"]}),
        claim(files={"model.safetensors": "x"}),
        claim(files=[1]),
        claim(step=-1),
        claim(step="many"),
        claim(safetensors={"../x.safetensors": {}}),
        claim(safetensors={"x.safetensors": {"a": 1}}),
        claim(safetensors={"x.bin": {"a": 1}}),
        claim(model_state_dict={"w": 5}),
        claim(model_state_dict={"__metadata__": claim()["model_state_dict"]["w"]}),
        claim(model_state_dict={"w": {"dtype": "complex64", "shape": [0], "data": ""}}),
        claim(model_state_dict={"w": {"dtype": "float32", "shape": [1] * 40, "data": "AAAAAA=="}}),
        claim(ekiden_folder=FACTS | {"shards": {"../x.safetensors": ["w"]}}),
        claim(ekiden_folder=FACTS | {"shards": {"x.safetensors": ["other"]}}),
        claim(ekiden_folder=FACTS | {"shards": 5}),
        claim(ekiden_folder=FACTS | {"run": 5}),
        claim(ekiden_folder=FACTS | {"metadata": {"model.safetensors": {"a": 5}}}),
        claim(ekiden_folder=FACTS | {"metadata": {"model.safetensors": 5}}),
    ],
    ids=lambda tree: str(tree)[:60],
)
def test_folders_that_somebody_made_up(tree: dict[str, Any], tmp_path: Path) -> None:
    """Nothing outside the target is written, and nothing of a target that is refused stays."""
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    (inside / "x.json").write_text(json.dumps(tree))
    with pytest.raises(UserError) as error:
        convert_checkpoint(inside / "x.json", inside / "out")
    assert "\n" not in str(error.value)
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == [
        "a",
        "a/b",
        "a/b/x.json",
    ]


def test_the_claim_without_changes_would_have_been_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(claim()))
    convert_checkpoint(tmp_path / "x.json", tmp_path / "out", test_load=True)
    assert Checkpoint.open(tmp_path / "out").step == 1


def cut(folder: Path) -> None:
    data = (folder / "optimizer.safetensors").read_bytes()
    (folder / "optimizer.safetensors").write_bytes(data[:-4])


def flip(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize("spoil", [cut, flip, lambda folder: (folder / "config.json").unlink()])
def test_a_damaged_checkpoint_is_never_converted(
    checkpoint: Path, spoil: Callable[[Path], None], tmp_path: Path
) -> None:
    spoil(checkpoint)
    with pytest.raises(UserError, match="is damaged"):
        convert_checkpoint(checkpoint, tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def test_what_is_asked_for_wrongly(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "there.json").write_text("kept")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    shutil.copy(checkpoint / "model.safetensors", tmp_path / "w.safetensors")
    for source, target, words in (
        (checkpoint, "there.json", "exists"),
        (checkpoint, "nowhere/x.json", "has no folder to lie in"),
        (tmp_path / "nothing.pt", "x.json", "does not exist"),
        (tmp_path / "notes.txt", "x.json", "is no checkpoint that can be read"),
        (tmp_path / "empty", "x.json", "is no checkpoint that can be read"),
        (tmp_path / "w.safetensors", "x.json", "give the folder that it lies in"),
    ):
        with pytest.raises(UserError, match=words):
            convert_checkpoint(source, tmp_path / target)
    assert (tmp_path / "there.json").read_text() == "kept"


def test_test_load_finds_what_was_not_written_as_it_was(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer with a defect: one bit of one tensor, in each format."""
    import ekiden.checkpoint.convert as convert_module

    for name in ("write_json", "write_torch", "write_checkpoint_folder"):
        original = getattr(convert_module, name)

        def spoiled(path: Path, tree: Any, *more: Any, original: Any = original) -> None:
            key = "torch.int8"
            tensor = tree["model_state_dict"][key]
            other = b"".join(tensor.read())
            wrong = type(tensor)(
                tensor.dtype, tensor.shape, lambda: iter([bytes([other[0] ^ 1]) + other[1:]]), "x"
            )
            weights = tree["model_state_dict"] | {key: wrong}
            original(path, tree | {"model_state_dict": weights}, *more)

        monkeypatch.setattr(convert_module, name, spoiled)
    for target in ("x.json", "x.pt", "x"):
        with pytest.raises(UserError, match=r"model_state_dict/torch\.int8 was not read back"):
            convert_checkpoint(checkpoint, tmp_path / target, test_load=True)


def test_the_verb_says_what_it_did(checkpoint: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        cli, ["checkpoint", "convert", str(checkpoint), str(tmp_path / "x.json"), "--test-load"]
    )
    assert done.exit_code == 0
    assert f"read back, {len(HELD) + 7} of {len(HELD) + 7} tensors equal to the last bit" in done.output


def test_folders_need_no_more_memory_than_json(tmp_path: Path) -> None:
    """90 MB to a folder and back in 160 MB of address space: torch alone would take more."""
    torch.save({"w": torch.zeros(90 * MEGABYTE, dtype=torch.uint8)}, tmp_path / "a.pt")
    done = convert_in_little_memory(tmp_path / "a.pt", tmp_path / "folder", 160)
    assert done.returncode == 0, done.stderr
    done = convert_in_little_memory(tmp_path / "folder", tmp_path / "b.json", 160)
    assert done.returncode == 0, done.stderr
    found = open_tree(tmp_path / "b.json")["model_state_dict"]
    assert compare(open_tree(tmp_path / "a.pt"), found) == 1


def test_a_full_disk_is_a_sentence_and_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """A limit on the size of files ends a write as a full disk does."""
    import resource
    import subprocess
    import sys

    torch.save({"w": torch.zeros(4 * MEGABYTE)}, tmp_path / "a.pt")
    before = sorted(tmp_path.iterdir())

    def limit() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MEGABYTE, MEGABYTE))

    for name in ("x.json", "x.pt", "x"):
        done = subprocess.run(
            [sys.executable, "-m", "ekiden", "checkpoint", "convert", tmp_path / "a.pt", tmp_path / name],
            preexec_fn=limit,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1 and done.stderr.startswith("ekiden: "), done.stderr
        assert done.stderr.count("\n") == 1 and "defect" not in done.stderr
        assert sorted(tmp_path.iterdir()) == before
    assert refusal(tmp_path / "nothing.pt", tmp_path)


def test_what_holds_no_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text("{}")
    with pytest.raises(UserError, match=r"e\.json holds no tensor, so it is no checkpoint"):
        convert_checkpoint(tmp_path / "e.json", tmp_path / "e.pt")
    assert not (tmp_path / "e.pt").exists()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    checkpoint.rename(tmp_path / "run" / "checkpoints" / checkpoint.name)
    with pytest.raises(UserError, match=r"run is a run, .* such as .*/run/checkpoints/step-00000007"):
        convert_checkpoint(tmp_path / "run", tmp_path / "run.pt")
