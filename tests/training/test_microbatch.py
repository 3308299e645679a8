"""`batch_size: auto`: the largest microbatch that fits is found, kept, and found again on another machine."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from campaign import outcome

from ekiden.config import TrainConfig, build_config
from ekiden.errors import UsageError, UserError
from ekiden.modeling.device import Precision, named_precision
from ekiden.planning import trace
from ekiden.planning.trace import traced_peak
from ekiden.training import facts, microbatch
from ekiden.training import step as step_module
from ekiden.training.history import read_history
from ekiden.training.loop import train
from ekiden.training.microbatch import largest_that_fits, predicted_microbatch

Settings = Callable[..., TrainConfig]
AUTO = {"batch_size": "auto", "global_batch_size": 8, "eval_steps": 0, "sample_tokens": 1}


@pytest.mark.parametrize(
    ("most", "first", "room", "grow", "found", "tried"),
    [
        (16, 16, 16, False, 16, [16]),
        (16, 16, 5, False, 4, [16, 8, 4]),
        (16, 4, 100, False, 4, [4]),
        (16, 4, 100, True, 16, [4, 8, 16]),
        (16, 4, 9, True, 8, [4, 8, 16]),
        (16, 16, 9, True, 8, [16, 8]),
        (12, 8, 9, True, 6, [8, 12]),  # two of 6 rather than 8 and 4
        (12, 12, 100, True, 12, [12]),
        (7, 100, 3, False, 3, [7, 3]),
        (16, 4, 0, True, 0, [4, 2, 1]),
    ],
)
def test_the_largest_that_fits(
    most: int, first: int, room: int, grow: bool, found: int, tried: list[int]
) -> None:
    sizes: list[int] = []

    def fits(size: int) -> bool:
        sizes.append(size)
        return size <= room

    assert largest_that_fits(most, first, grow, fits) == found
    assert sizes == tried


def test_the_prediction_is_what_a_plan_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: dict[int, trace.Peak] = {}

    def once(config: TrainConfig, vocab_size: int, precision: Precision, size: int, *_: bool) -> trace.Peak:
        if size not in traced:
            traced[size] = traced_peak(config, vocab_size, precision, size)
        return traced[size]

    monkeypatch.setattr(trace, "traced_peak", once)  # a second each
    config = build_config(
        "gpt2-10m",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_length=64,
    )
    fp32 = named_precision("fp32")
    room = once(config, 300, fp32, 11).total
    assert predicted_microbatch(config, 300, fp32, 64, room) in (10, 11, 12)
    assert predicted_microbatch(config, 300, fp32, 6, room) == 6
    assert predicted_microbatch(config, 300, fp32, 64, 0) == 1


def fail_above(limit: int, tried: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a device run out of memory with more samples than `limit`."""
    accumulate = step_module.accumulate_gradients

    def limited(model: Any, batches: Any, *arguments: Any, **options: Any) -> Any:
        batches = list(batches)
        if options.get("first_index", 0) < 0 and len(batches[0][0]) > 1:
            tried.append(len(batches[0][0]))
        if max(len(inputs) for inputs, _ in batches) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return accumulate(model, batches, *arguments, **options)

    from ekiden.training import memory, stepping

    # Which would be stopped, too: it runs the same step, on tensors without data.
    monkeypatch.setattr(microbatch, "predicted_microbatch", lambda *arguments: arguments[3])
    for module in (memory, stepping):
        monkeypatch.setattr(module, "accumulate_gradients", limited)


def stop_in_the_second_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the run be told to stop there."""
    steps = 0

    def stop(index: int, phase: str) -> None:
        nonlocal steps
        steps += (index, phase) == (0, "forward")
        if steps == 2 and (index, phase) == (0, "forward"):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(step_module, "fault_hook", stop)


def schedule(run: Path, step: int) -> list[list[int]]:
    state = json.loads((run / "checkpoints" / f"step-{step:08}" / "trainer_state.json").read_text())
    return state["counters"]["microbatch_schedule"]


def test_a_resumed_run_takes_what_was_found_to_the_last_bit(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = {**AUTO, "batch_size": 4}
    train(settings(4, output_dir=tmp_path / "reference", **reference))
    tried: list[int] = []
    fail_above(5, tried, monkeypatch)
    stop_in_the_second_step(monkeypatch)
    assert train(settings(4, **AUTO)).status == "paused"
    assert tried[:2] == [8, 4]
    assert schedule(tmp_path / "run", 2) == [[0, 8], [0, 4]]
    monkeypatch.setattr(step_module, "fault_hook", None)
    tried.clear()
    assert train(settings(4, **AUTO)).status == "completed"
    assert tried == []
    assert outcome(tmp_path / "run") == outcome(tmp_path / "reference")


def test_another_machine_tries_again_with_the_same_global_batch(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings(4, output_dir=tmp_path / "reference", **{**AUTO, "batch_size": 2}))
    tried: list[int] = []
    with monkeypatch.context() as small:
        fail_above(2, tried, small)
        stop_in_the_second_step(small)
        train(settings(4, **AUTO))
    assert schedule(tmp_path / "run", 2)[-1] == [0, 2]
    monkeypatch.setattr(facts, "cpu_name", lambda: "another processor")
    fail_above(4, tried, monkeypatch)
    train(settings(4, **AUTO))
    assert schedule(tmp_path / "run", 4)[-1] == [2, 4]
    found, expected = outcome(tmp_path / "run").losses, outcome(tmp_path / "reference").losses
    assert all(found[step] == pytest.approx(expected[step], rel=1e-5) for step in expected)
    events = [r for r in read_history(tmp_path / "run" / "history.jsonl") if r.get("event") == "microbatch"]
    assert [event["samples"] for event in events] == [2, 4]


def test_what_was_predicted_is_not_exceeded_on_a_cpu(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    fail_above(100, tried, monkeypatch)
    monkeypatch.setattr(microbatch, "predicted_microbatch", lambda *_: 2)
    train(settings(2, **AUTO))
    assert set(tried) == {2}
    assert schedule(tmp_path / "run", 2)[-1] == [0, 2]


def test_nothing_fits(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_above(0, [], monkeypatch)
    with pytest.raises(UserError, match="with one sample of 32 tokens; lower --max-length"):
        train(settings(2, **AUTO))


def test_the_global_batch_is_a_number_of_its_own(settings: Settings, tmp_path: Path) -> None:
    more = {"eval_steps": 0, "sample_tokens": 1}
    train(settings(3, output_dir=tmp_path / "reference", batch_size=2, gradient_accumulation_steps=3, **more))
    train(settings(3, batch_size=2, global_batch_size=6, **more))
    assert outcome(tmp_path / "run").losses == outcome(tmp_path / "reference").losses
    with pytest.raises(
        UserError, match=r"a global batch of 4 samples is not the 6 .* give --global-batch-size 6"
    ):
        train(settings(5, batch_size=2, global_batch_size=4, **more))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": "auto"}, "--batch-size auto needs --global-batch-size"),
        ({"batch_size": "auto", "global_batch_size": 8, "elastic_exact": True}, "--elastic-exact needs"),
        (
            {"global_batch_size": 8, "gradient_accumulation_steps": 2},
            "leave --gradient-accumulation-steps out",
        ),
        ({"batch_size": "automatic"}, "--batch-size: must be a whole number, such as 500 or 20k, or auto"),
        ({"global_batch_size": -1}, "--global-batch-size must not be negative"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build_config("gpt2-10m", **changes)
