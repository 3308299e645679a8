"""The loop: resumed is uninterrupted, stops are agreed and saved, changes that make another run are refused."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from campaign import outcome
from forked import Command

from ekiden.checkpoint import files
from ekiden.config import TrainConfig, build_config, to_yaml
from ekiden.errors import UserError
from ekiden.export.load import load_model
from ekiden.training import evaluating
from ekiden.training import step as step_module
from ekiden.training.history import read_history
from ekiden.training.loop import train
from ekiden.training.state import as_it_began, changed_settings

Settings = Callable[..., TrainConfig]


def events(run: Path) -> list[dict[str, Any]]:
    return [r for r in read_history(run / "history.jsonl") if r["kind"] == "event"]


def at_step(monkeypatch: pytest.MonkeyPatch, microbatch_calls: int, action: Callable[[], None]) -> None:
    """Run `action` before the n-th forward pass."""
    calls = 0

    def hook(index: int, phase: str) -> None:
        nonlocal calls
        if index < 0 or phase != "forward":  # the trial before the first step has negative indices
            return
        calls += 1
        if calls == microbatch_calls:
            action()

    monkeypatch.setattr(step_module, "fault_hook", hook)


def test_a_run_leaves_everything_it_promises(settings: Settings, tmp_path: Path) -> None:
    result = train(settings(6, max_checkpoints=2))
    run = tmp_path / "run"
    assert (result.status, result.step, result.tokens) == ("completed", 6, 6 * 4 * 32)
    assert json.loads((run / "result.json").read_text()) == vars(result)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]
    for folder in (run, run / "best", run / "final_model", run / "checkpoints" / "step-00000003"):
        assert load_model(folder).tokenizer.vocab_size == 500
    history = list(read_history(run / "history.jsonl"))
    assert [r["step"] for r in history if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    evaluation = [r for r in history if r["kind"] == "eval"][-1]
    assert set(evaluation["languages"]) == {"english", "other"}
    assert evaluation["macro"]["perplexity"] == pytest.approx(math.exp(evaluation["macro"]["loss"]))
    columns = json.loads((run / "training_history.json").read_text())
    assert columns["train"]["step"] == [1, 2, 3, 4, 5, 6]
    samples = [r for r in history if r["kind"] == "samples"][-1]
    assert set(samples["languages"]) == {"english", "other"}


def test_running_a_finished_run_again_changes_nothing(settings: Settings, tmp_path: Path) -> None:
    train(settings(3))
    before = outcome(tmp_path / "run")
    assert train(settings(3)).status == "completed"
    assert outcome(tmp_path / "run") == before
    assert sum(r["kind"] == "eval" for r in read_history(tmp_path / "run" / "history.jsonl")) == 1


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "SIGUSR1", "stop file", "time limit"])
@pytest.mark.parametrize("preset", ["gemma3-tiny", "gpt2-10m"])
def test_a_stopped_run_goes_on_bit_identical(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, preset: str
) -> None:
    train(settings(8, preset, output_dir=tmp_path / "reference"))
    run = tmp_path / "run"
    config = settings(8, preset)
    if how == "stop file":
        at_step(monkeypatch, 5, lambda: (run / "stop").touch())
    elif how == "time limit":
        config.max_time = "1s"  # the process is older than that: one step, and out
    else:
        at_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.Signals[how]))
    paused = train(config)
    expected = 1 if how == "time limit" else 5
    assert (paused.status, paused.step, paused.reason) == ("paused", expected, how)
    assert paused.checkpoint == f"step-{expected:08d}"
    monkeypatch.setattr(step_module, "fault_hook", None)
    assert train(settings(8, preset)).status == "completed"
    assert outcome(run) == outcome(tmp_path / "reference")
    assert not (run / "stop").exists()


def test_a_save_file_saves_and_goes_on(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 2, lambda: (tmp_path / "run" / "save").touch())
    assert train(settings(4, save_steps=0)).status == "completed"
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()


def test_resume_says_that_it_is_bit_exact(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    at_step(monkeypatch, 6, stop)
    with pytest.raises(KeyboardInterrupt):
        train(settings(8))
    monkeypatch.setattr(step_module, "fault_hook", None)
    capsys.readouterr()
    train(settings(8))
    err = capsys.readouterr().err
    assert "resuming at step 3: same data order, bit-identical" in err
    assert "resume verified bit-exact at step 4" in err
    assert [e for e in events(tmp_path / "run") if e["event"] == "resume-verified"][0]["bit_exact"] is True


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 5}, "--seed 5 differs from the 1337"),
        ({"hidden_size": 64}, "--hidden-size 64"),
        ({"max_length": 16}, "--max-length 16"),
        ({"batch_size": 8}, "global batch of 8 samples, but this run began with 4"),
        ({"temperature": 0.5}, "--temperature 0.5"),
        ({"initialization": "huggingface"}, "--initialization huggingface"),
        ({"optimizer": "adamw"}, "--optimizer adamw"),
        ({"weight_decay": 0.0}, "--weight-decay 0.0"),
    ],
)
def test_a_change_that_makes_another_run_is_refused_by_name(
    settings: Settings, change: dict[str, Any], words: str
) -> None:
    train(settings(3))
    with pytest.raises(UserError, match=words):
        train(settings(6, **change))


def test_a_setting_that_an_older_checkpoint_lacks_was_at_its_default(settings: Settings) -> None:
    config = settings(3)
    saved = dataclasses.asdict(config)
    del saved["document_mask"]
    assert changed_settings(saved, config) == {}
    with pytest.raises(UserError, match="--document-mask True differs from the False this run began with"):
        changed_settings(saved, settings(3, document_mask=True))


def test_a_run_from_before_a_part_of_the_recipe_goes_on_without_it(settings: Settings) -> None:
    config = settings(3)
    saved = dataclasses.asdict(config)
    for name in ("muon_even", "muon_first_beta1"):
        del saved[name]
    goes_on = as_it_began(config, saved)
    assert (goes_on.muon_even, goes_on.muon_first_beta1) == (False, config.beta1)
    assert changed_settings(saved, goes_on) == {}
    asked = settings(3, muon_first_beta1=0.3)
    with pytest.raises(UserError, match=r"--muon-first-beta1 0\.3 differs from the 0\.8 this run began with"):
        changed_settings(saved, as_it_began(asked, saved))
    whole = dataclasses.asdict(config)
    assert as_it_began(config, whole) == config
    assert as_it_began(config, {**saved, "initialization": "scaled"}).initialization == "scaled"
    before = whole | {"initialization": "unigram", "small_language_share": 0.12}
    assert changed_settings(before, as_it_began(config, before)) == {}


def test_a_run_from_before_heads_began_local_keeps_its_rate(settings: Settings) -> None:
    config = build_config("gemma3-tiny", dataset_path="shards", output_dir="run")
    saved = dataclasses.asdict(config) | {"learning_rate": 0.012}
    del saved["local_heads"]
    goes_on = as_it_began(config, saved)
    assert (goes_on.learning_rate, goes_on.local_heads) == (0.012, False)
    assert changed_settings(saved, goes_on) == {}


def test_a_run_from_before_a_part_was_given_to_small_languages_goes_on_with_its_own_mixture(
    settings: Settings,
) -> None:
    today = settings(3)
    saved = dataclasses.asdict(today) | {"temperature": 0.5, "final_temperature": 0.5, "final_min_share": 0.1}
    del saved["small_language_share"]
    goes_on = as_it_began(today, saved)
    assert (goes_on.temperature, goes_on.small_language_share) == (0.5, 0.0)
    assert changed_settings(saved, goes_on) == {}
    own = settings(3, temperature=0.3)
    assert as_it_began(own, saved | {"temperature": 0.3}) == dataclasses.replace(goes_on, temperature=0.3)
    # What is asked for now and was not then is refused by name, as ever.
    with pytest.raises(UserError, match=r"--temperature 0\.2 differs from the 0\.5"):
        changed_settings(saved, as_it_began(settings(3, temperature=0.2), saved))
    assert as_it_began(own, dataclasses.asdict(today)) == own


def test_changes_that_may_be_made_are_recorded(settings: Settings, tmp_path: Path) -> None:
    train(settings(3))
    train(settings(6, save_steps=2, batch_size=2, gradient_accumulation_steps=2))
    resume = [e for e in events(tmp_path / "run") if e["event"] == "resume"][0]
    assert resume["changed"]["max_steps"] == [3, 6]
    assert resume["changed"]["batch_size"] == [4, 2]
    assert resume["level"] == "L3"
    assert outcome(tmp_path / "run").steps_twice == 0


def test_other_data_is_refused(settings: Settings, shards: Path, tmp_path: Path) -> None:
    import shutil

    train(settings(3))
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    train(settings(6, dataset_path=other))  # moved: the same data
    description = json.loads((other / "dataset.json").read_text())
    description["languages"]["english"]["train"]["documents"] += 0
    description["rejected"] = {"english": {"blank line": 1}}
    (other / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="its token shards differ"):
        train(settings(9, dataset_path=other))


def test_out_of_memory_halves_the_microbatch_and_keeps_the_run(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings(6, output_dir=tmp_path / "reference"))

    def fail(index: int, phase: str) -> None:
        if phase == "backward" and index == 0 and not events_have_oom():
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    def events_have_oom() -> bool:
        return any(e["event"] == "oom" for e in events(tmp_path / "run"))

    monkeypatch.setattr(step_module, "fault_hook", fail)
    train(settings(6))
    oom = [e for e in events(tmp_path / "run") if e["event"] == "oom"]
    assert [e["microbatch"] for e in oom] == [[4, 2]]
    found, expected = outcome(tmp_path / "run"), outcome(tmp_path / "reference")
    assert list(found.losses) == list(expected.losses)
    assert all(found.losses[s] == pytest.approx(expected.losses[s], rel=1e-5) for s in expected.losses)
    newest = tmp_path / "run" / "checkpoints" / "step-00000006" / "trainer_state.json"
    assert json.loads(newest.read_text())["counters"]["microbatch_schedule"] == [[0, 4], [0, 2]]


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_out_of_memory_is_found_before_the_first_step(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    train(settings(4, batch_size=2, gradient_accumulation_steps=2, output_dir=tmp_path / "reference"))
    tried: list[int] = []

    def fail(index: int, now: str) -> None:
        if index < 0 and now == phase:
            tried.append(index)
            if len(tried) == 2:  # beside the gradients of the first microbatch
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    monkeypatch.setattr(step_module, "fault_hook", fail)
    train(settings(4))
    oom = [e for e in events(tmp_path / "run") if e["event"] == "oom"]
    assert [(e["step"], e["microbatch"]) for e in oom] == [(0, [4, 2])]
    assert outcome(tmp_path / "run") == outcome(tmp_path / "reference")


def test_out_of_memory_in_an_evaluation_takes_smaller_batches(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings(3, output_dir=tmp_path / "reference"))
    sizes: list[int] = []

    def small(*arguments: Any, batch_size: int, **others: Any) -> Any:
        sizes.append(batch_size)
        if batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return evaluate(*arguments, batch_size=batch_size, **others)

    evaluate = evaluating.evaluate
    monkeypatch.setattr(evaluating, "evaluate", small)
    train(settings(3))
    assert sizes == [4, 2, 1]
    assert outcome(tmp_path / "run") == outcome(tmp_path / "reference")


def test_out_of_memory_with_one_sample_says_what_to_lower(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(_index: int, _phase: str) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(step_module, "fault_hook", fail)
    with pytest.raises(UserError, match="lower --max-length"):
        train(settings(3))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"


def poison(monkeypatch: pytest.MonkeyPatch, bad_calls: set[int]) -> None:
    """Make the loss of the n-th microbatches infinite."""
    calls = -3  # the trial before the first step
    real = step_module.chunked_cross_entropy

    def poisoned(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += torch.is_grad_enabled()
        loss = real(*arguments)
        return loss * float("inf") if torch.is_grad_enabled() and calls in bad_calls else loss

    monkeypatch.setattr(step_module, "chunked_cross_entropy", poisoned)


def test_one_bad_step_is_skipped_and_counted(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {4})
    assert train(settings(6)).status == "completed"
    assert [e["step"] for e in events(tmp_path / "run") if e["event"] == "skip"] == [4]
    assert math.isfinite(outcome(tmp_path / "run").losses[6])


def test_bad_steps_in_a_row_roll_back_and_leave_their_data_out(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {5, 6, 7})
    assert train(settings(9)).status == "completed"
    run = tmp_path / "run"
    rollback = [e for e in events(run) if e["event"] == "rollback"][0]
    assert (rollback["step"], rollback["first_bad_step"], rollback["batches_left_out"]) == (3, 5, 3)
    state = json.loads((run / "checkpoints" / "step-00000009" / "trainer_state.json").read_text())
    assert state["counters"]["skipped_batches"] == [[4, 3]]
    assert outcome(run).steps_twice == 0


def test_a_run_that_never_gets_finite_stops_as_failed(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, set(range(4, 1000)))
    with pytest.raises(UserError, match="lower --learning-rate"):
        train(settings(9))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"


def test_a_full_disk_costs_the_new_checkpoint_only(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(operation: str, path: Path) -> None:
        if operation == "write" and "step-00000006" in str(path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "fault_hook", full)
    assert train(settings(9)).status == "completed"
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert "step-00000006" not in names and "step-00000009" in names
    assert "training goes on" in capsys.readouterr().err
    assert [e["event"] for e in events(tmp_path / "run")].count("save-failed") == 1


def test_a_second_trainer_is_refused(settings: Settings, tmp_path: Path) -> None:
    from ekiden.training.rundir import RunDirectory

    run = RunDirectory(tmp_path / "run")
    failure: list[Exception] = []

    def second() -> None:
        try:
            with RunDirectory(tmp_path / "run").lock():
                pass
        except UserError as error:
            failure.append(error)

    with run.lock():
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert "is in use by process" in str(failure[0])


def test_a_second_signal_ends_at_once_and_costs_nothing(settings: Settings, tmp_path: Path) -> None:
    """In a process of its own: the second signal is the end of it."""
    config = settings(5000, save_steps=5)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(config))
    process = Command(["train", str(recipe)], tmp_path / "log")
    checkpoints = tmp_path / "run" / "checkpoints"
    while not list(checkpoints.glob("step-*")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send(signal.SIGTERM)
    process.send(signal.SIGINT)
    assert process.wait() in (128 + signal.SIGINT, 128 + signal.SIGTERM, 0)
    config.max_steps = max(int(p.name[5:]) for p in checkpoints.glob("step-*")) + 3
    assert train(config).status == "completed"


def test_a_branch_from_an_older_checkpoint_needs_a_folder_of_its_own(
    settings: Settings, tmp_path: Path
) -> None:
    train(settings(6))
    older = tmp_path / "run" / "checkpoints" / "step-00000003"
    assert train(settings(6, resume_from=older)).step == 6
    assert sum(e["event"] == "rollback" for e in events(tmp_path / "run")) == 0
    branch = settings(6, resume_from=older, output_dir=tmp_path / "branch", save_steps=2)
    assert train(branch).status == "completed"
    assert [
        r["step"] for r in read_history(tmp_path / "branch" / "history.jsonl") if r["kind"] == "train"
    ] == [4, 5, 6]
    assert outcome(tmp_path / "branch").weights == outcome(tmp_path / "run").weights
    branch.max_steps = 8
    train(branch)
    resumes = [e["step"] for e in events(tmp_path / "branch") if e["event"] == "resume"]
    assert resumes == [3, 6]
    with pytest.raises(UserError, match="--resume-from"):
        train(settings(6, resume_from=tmp_path / "nothing"))
