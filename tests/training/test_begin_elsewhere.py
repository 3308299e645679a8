"""Runs that begin with what another run, program or format left: `--resume-from`, `--init-from`, JSON models."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from campaign import outcome
from torch.nn.functional import cross_entropy
from transformers import GPT2LMHeadModel

import ekiden
from ekiden.checkpoint import files
from ekiden.checkpoint.convert import convert_checkpoint
from ekiden.config import TrainConfig, build_config
from ekiden.errors import UsageError, UserError
from ekiden.export.load import load_model
from ekiden.training.history import read_history
from ekiden.training.loop import train
from ekiden.training.rundir import RunDirectory
from ekiden.training.start import prepare

Settings = Callable[..., TrainConfig]
CONSTANT = {"learning_rate": 3e-3, "min_learning_rate_ratio": 1.0, "warmup_steps": 0, "max_grad_norm": 0.0}
PLAIN = {
    "preset": "gpt2-10m",
    "weight_decay": 0.0,
    "beta1": 0.9,
    "beta2": 0.999,
    "optimizer": "adamw",
    **CONSTANT,
}


def losses(run: Path) -> list[float]:
    return [r["loss"] for r in read_history(run / "history.jsonl") if r["kind"] == "train"]


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [r for r in read_history(run / "history.jsonl") if r.get("event") == name]


def checkpoint_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


# -- whole checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "optimizer"), [("gemma3-tiny", "adamw"), ("gpt2-10m", "adamw"), ("gpt2-10m", "muon")]
)
def test_a_run_resumed_from_any_format_is_the_uninterrupted_one(
    settings: Settings, tmp_path: Path, preset: str, optimizer: str
) -> None:
    train(settings(8, preset, optimizer=optimizer))
    whole = outcome(tmp_path / "run")
    folder = checkpoint_of(tmp_path / "run", 3)
    json_file = convert_checkpoint(folder, tmp_path / "x.json", test_load=True).path
    pt_file = convert_checkpoint(json_file, tmp_path / "x.pt", test_load=True).path
    back = convert_checkpoint(pt_file, tmp_path / "back", test_load=True).path
    for number, source in enumerate((folder, json_file, pt_file, back)):
        run = tmp_path / f"again{number}"
        again = settings(8, preset, optimizer=optimizer, output_dir=str(run), resume_from=str(source))
        result = train(again)
        assert (result.status, result.step) == ("completed", 8)
        [resume] = events(run, "resume")
        assert (resume["step"], resume["level"]) == (3, "L1")
        # Weights, moments and random numbers of the last checkpoint, by their hashes.
        assert outcome(run).weights == whole.weights, source
        assert list(outcome(run).losses.items()) == list(whole.losses.items())[3:], source


def test_a_run_directory_means_its_newest_good_checkpoint(settings: Settings, tmp_path: Path) -> None:
    train(settings(6))
    (checkpoint_of(tmp_path / "run", 6) / "model.safetensors").write_bytes(b"damaged")
    before = sorted(tmp_path.rglob("*"))
    other = settings(7, output_dir=str(tmp_path / "other"), resume_from=str(tmp_path / "run"))
    start = prepare(other, RunDirectory(other.output_dir))
    assert start.resumed_from is not None and start.state.counters.step == 3
    assert [p for p in sorted(tmp_path.rglob("*")) if tmp_path / "other" not in (p, *p.parents)] == before


def test_the_same_command_again_goes_on_from_its_own(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(settings(3))
    path = convert_checkpoint(checkpoint_of(tmp_path / "run", 3), tmp_path / "x.json").path
    run = tmp_path / "other"
    train(settings(6, output_dir=str(run), resume_from=str(path)))
    capsys.readouterr()
    for present in (True, False):
        if not present:
            path.unlink()
        train(settings(8, output_dir=str(run), resume_from=str(path)))
        assert "going on from step-0000000" in capsys.readouterr().err
    assert [e["step"] for e in events(run, "resume")] == [3, 6, 8]
    fresh = settings(8, output_dir=str(tmp_path / "third"), resume_from=str(path))
    with pytest.raises(UserError, match=r"x\.json does not exist"):
        train(fresh)


def test_stopped_at_once_it_has_a_checkpoint_of_its_own(settings: Settings, tmp_path: Path) -> None:
    """`--resume-from` another run and nothing more to do: the state is this run's all the same."""
    train(settings(3))
    run = tmp_path / "other"
    result = train(settings(3, output_dir=str(run), resume_from=str(checkpoint_of(tmp_path / "run", 3))))
    assert result.checkpoint == "step-00000003" and checkpoint_of(run, 3).is_dir()


def edited(path: Path, target: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    tree = json.loads(path.read_text())
    edit(tree)
    target.write_text(json.dumps(tree))
    return target


def misshape(tree: dict[str, Any]) -> None:
    moments = tree["safetensors"]["optimizer.safetensors"]
    name = next(name for name in moments if name.startswith("exp_avg/"))
    moments[name] = {"dtype": "float32", "shape": [1], "data": "AAAAAA=="}


def rename(tree: dict[str, Any]) -> None:
    moments = tree["safetensors"]["optimizer.safetensors"]
    moments["exp_avg/elsewhere"] = moments.pop(next(iter(moments)))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (misshape, "which is not its weight's"),
        (rename, "is not a whole checkpoint of this model"),
        (lambda tree: tree["safetensors"].pop("optimizer.safetensors"), "holds no optimizer.safetensors"),
        (lambda tree: tree["safetensors"].update({"rng.safetensors": {}}), "is not a whole checkpoint"),
        (lambda tree: tree["model_state_dict"].popitem(), "does not hold this model"),
        (lambda tree: tree["files"].update({"trainer_state.json": "[]"}), "is not a run's"),
        (lambda tree: tree["files"].update({"trainer_state.json": '{"a": NaN, "a": 1}'}), "twice"),
    ],
)
def test_converted_checkpoints_changed_by_hand_are_one_sentence(
    settings: Settings, tmp_path: Path, edit: Callable[[dict[str, Any]], Any], words: str
) -> None:
    train(settings(2))
    path = convert_checkpoint(checkpoint_of(tmp_path / "run", 2), tmp_path / "x.json").path
    changed = edited(path, tmp_path / "y.json", edit)
    config = settings(4, output_dir=str(tmp_path / "other"), resume_from=str(changed))
    with pytest.raises(UserError, match=words) as error:
        prepare(config, RunDirectory(config.output_dir))
    assert "\n" not in str(error.value)


# -- other programs' ---------------------------------------------------------------------------------------------------


class PlainScript:
    """A training script of the usual kind on a run's own data: transformers' GPT-2, AdamW, a scheduler, torch.save."""

    def __init__(self, config: TrainConfig) -> None:
        start = prepare(config, RunDirectory(config.output_dir))
        self.batches = start.batches
        torch.manual_seed(11)
        self.model = GPT2LMHeadModel(start.state.model.config)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=3e-3, betas=(0.9, 0.999), weight_decay=0.0
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        self.losses: list[float] = []

    def train(self, steps: int) -> list[float]:
        for _ in range(steps):
            loss = self.loss(len(self.losses))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.losses.append(loss.item())
        return self.losses[-steps:]

    def loss(self, step: int) -> torch.Tensor:
        [(inputs, targets)] = self.batches.microbatches(step, 4)
        logits = self.model(input_ids=torch.from_numpy(inputs).long()).logits
        return cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).long().flatten())

    def save(self, path: Path) -> Path:
        checkpoint = {
            "step": len(self.losses),
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": self.scheduler.state_dict(),
            "loss": self.losses[-1],
        }
        torch.save(checkpoint, path)
        return path


@pytest.mark.parametrize("suffix", ["pt", "json"])
def test_a_plain_scripts_run_is_trained_on(
    settings: Settings, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its losses on the same batches go on as they would have, and without its moments they do not."""
    script = PlainScript(settings(26, output_dir=str(tmp_path / "first"), **PLAIN))
    learned = script.train(20)
    assert learned[-1] < learned[0] - 0.5, "the script must have learned something worth keeping"
    source = script.save(tmp_path / "old.pt")
    weights = script.save(tmp_path / "weights.pt")
    held = torch.load(weights, weights_only=True)
    torch.save({key: held[key] for key in ("step", "model_state_dict")}, weights)
    theirs = script.train(6)
    if suffix == "json":
        source = convert_checkpoint(source, tmp_path / "old.json").path
    result = train(settings(26, resume_from=str(source), **PLAIN))
    assert (result.status, result.step) == ("completed", 26)
    # Ekiden's AdamW is the fused kernel, the script's is not: equal but for the last bits.
    assert losses(tmp_path / "run") == pytest.approx(theirs, rel=1e-4)
    said = capsys.readouterr().err
    assert "28 weights, the optimizer's moments of 28 parameters, step 20" in said
    [start] = events(tmp_path / "run", "start")
    assert start["step"] == 20 and str(source) in start["taken"]
    if suffix == "pt":
        train(settings(26, resume_from=str(weights), output_dir=str(tmp_path / "light"), **PLAIN))
        light = losses(tmp_path / "light")
        assert light[0] == pytest.approx(theirs[0], rel=1e-4)
        assert light != pytest.approx(theirs, rel=1e-4)
        assert "no optimizer was found, so its moments begin at zero" in capsys.readouterr().err


def test_a_script_that_did_all_the_steps_is_refused(settings: Settings, tmp_path: Path) -> None:
    script = PlainScript(settings(26, output_dir=str(tmp_path / "first"), **PLAIN))
    script.train(3)
    source = script.save(tmp_path / "old.pt")
    with pytest.raises(UserError, match="has done 3 steps"):
        train(settings(3, resume_from=str(source), **PLAIN))
    # Also where the length of the run is given in epochs.
    with pytest.raises(UserError, match="has done 3 steps"):
        train(settings(0, epochs=1e-6, resume_from=str(source), **PLAIN))


# -- a new run with a model's weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["run", "checkpoint", "folder", "json", "best_model.json"])
def test_a_new_run_begins_with_a_models_weights(settings: Settings, tmp_path: Path, kind: str) -> None:
    train(settings(3, checkpoint_format="json", **CONSTANT))
    old = tmp_path / "run"
    source = {
        "run": old,
        "checkpoint": checkpoint_of(old, 3),
        "folder": tmp_path / "hf",
        "json": tmp_path / "x.json",
        "best_model.json": old / "best_model.json",
    }[kind]
    if kind == "folder":
        load_model(old / "final_model").model.save_pretrained(source)
    elif kind == "json":
        convert_checkpoint(checkpoint_of(old, 3), source)
    expected = {n: p.detach() for n, p in load_model(old).model.named_parameters()}
    config = settings(4, output_dir=str(tmp_path / "new"), init_from=str(source), seed=8, **CONSTANT)
    start = prepare(config, RunDirectory(config.output_dir))
    assert start.state.counters.step == 0 and not start.state.optimizer.state and start.resumed_from is None
    for name, parameter in start.state.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    result = train(config)
    assert (result.status, result.step) == ("completed", 4)
    # Given again, with more steps, it goes on from its own checkpoint, even where the source is gone by now.
    shutil.rmtree(old)
    more = train(settings(5, output_dir=str(tmp_path / "new"), init_from=str(source), seed=8, **CONSTANT))
    assert more.step == 5 and [e["step"] for e in events(tmp_path / "new", "resume")] == [4]


def test_what_cannot_begin_a_run_is_one_sentence(settings: Settings, tmp_path: Path) -> None:
    train(settings(2))
    other = {"output_dir": str(tmp_path / "other")}
    with pytest.raises(UserError, match="does not exist"):
        train(settings(2, init_from=str(tmp_path / "nothing"), **other))
    with pytest.raises(UserError, match="give the settings"):
        train(settings(2, init_from=str(tmp_path / "run"), hidden_size=48, **other))
    with pytest.raises(UserError, match="no weights with names of this model"):
        train(settings(2, "gpt2-10m", init_from=str(tmp_path / "run"), **other))
    with pytest.raises(UsageError, match="give one of them"):
        build_config("gemma3-tiny", init_from="a", resume_from="b")


# -- models as JSON ----------------------------------------------------------------------------------------------------


def test_best_and_final_model_as_json(settings: Settings, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # From frequencies 4 steps of so small a model need not get better.
    train(settings(4, eval_steps=2, checkpoint_format="json", initialization="scaled"))
    for folder, name in (("best", "best_model.json"), ("final_model", "final_model.json")):
        plain = json.loads((run / name).read_text())
        assert plain["step"] == 4 and json.loads(plain["files"]["config.json"])["model_type"] == "gemma3_text"
        held = ekiden.load_json_checkpoint(run / name)
        expected = dict(load_model(run / folder).model.named_parameters())
        assert held["model_state_dict"].keys() == expected.keys()
        assert all(torch.equal(held["model_state_dict"][key], value) for key, value in expected.items())
        assert "safetensors" not in held and "trainer_state.json" not in held["files"]
    # What a killed process left is removed; a file that is missing or older than its folder is written anew.
    (run / ".best_model.json.123.tmp").write_text("left")
    (run / "best_model.json").unlink()
    os.utime(run / "final_model.json", ns=(0, 0))
    # From frequencies 4 steps of so small a model need not get better.
    train(settings(4, eval_steps=2, checkpoint_format="json", initialization="scaled"))
    assert json.loads((run / "best_model.json").read_text())["step"] == 4
    assert (run / "final_model.json").stat().st_mtime_ns > 0
    assert not list(run.glob(".best*tmp"))


def test_a_json_model_that_cannot_be_written_does_not_stop_the_run(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(operation: str, path: Path) -> None:
        if "_model.json" in path.name and operation == "rename":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "fault_hook", full)
    assert train(settings(3, checkpoint_format="json")).status == "completed"
    assert "best_model.json could not be written (the disk is full)" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*_model.json*")) and (tmp_path / "run" / "best").is_dir()
    assert {e["folder"] for e in events(tmp_path / "run", "save-failed")} == {
        "best_model.json",
        "final_model.json",
    }
