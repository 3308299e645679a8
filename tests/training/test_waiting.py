"""The host waits for the device where something is made of its numbers, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from campaign import outcome
from torch.utils._python_dispatch import TorchDispatchMode

from ekiden.config import TrainConfig, build_config
from ekiden.errors import UserError
from ekiden.modeling.build import build_model
from ekiden.modeling.device import named_precision
from ekiden.modeling.prepare import prepare_model
from ekiden.tokens.batches import Microbatch
from ekiden.training import loop as loop_module
from ekiden.training import step as step_module
from ekiden.training.feed import Later, Pair, on_device, one_ahead
from ekiden.training.history import read_history
from ekiden.training.loop import train
from ekiden.training.optimizer import build_optimizer
from ekiden.training.step import accumulate_gradients, apply_update
from ekiden.training.stepping import Stepper

Settings = Callable[..., TrainConfig]
CPU = torch.device("cpu")


class Questions(TorchDispatchMode):
    """Counts the numbers that the host asks the device for: `.item()`, `bool(tensor)`, `float(tensor)`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preset": "gpt2-10m"},
        {"optimizer": "adamw"},
        {"optimizer": "adamw", "optimizer_moments": "fp16"},
        {"activation_checkpointing": True, "document_mask": True},
        {"precision": "bf16"},
        {"precision": "fp16"},
    ],
    ids=str,
)
def test_a_step_asks_the_device_nothing(options: dict[str, Any]) -> None:
    shape = {"hidden_size": 16, "num_attention_heads": 2, "head_dim": 8, "num_hidden_layers": 2}
    shape |= {"num_key_value_heads": 2 if "preset" in options else 1, "intermediate_size": 32}
    settings = {"preset": "gemma3-tiny", "max_length": 16, "sliding_window": 8, **shape, **options}
    config = build_config(**settings)
    precision = named_precision(options.get("precision", "fp32"))
    model = build_model(config, 64, 0, 2, 1, seed=1)
    prepare_model(model, config, CPU, precision)
    optimizer = build_optimizer(model, config)
    scaler = torch.amp.GradScaler("cpu") if precision.use_scaler else None
    ids = np.arange(32).reshape(2, 16)
    for _ in range(2):
        with Questions() as asked:
            loss = accumulate_gradients(model, [(ids, ids)] * 2, 64, precision, scaler)
            figures = apply_update(optimizer, loss, 1e-3, 1.0, scaler)
        assert asked.count == 0
    with Questions() as asked:
        float(figures.loss)
        bool(figures.skipped)  # fp16's scaler may have begun too high
    assert asked.count == 2


def test_a_skipped_step_is_looked_at_one_step_later(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step that is neither logged nor saved is looked at when the next one is under way."""
    seen: list[str] = []

    class Recorded(Later):
        steps = 0

        def __init__(self, flag: torch.Tensor) -> None:
            super().__init__(flag)
            Recorded.steps += 1
            self.step = Recorded.steps

        def read(self) -> bool:
            seen.append(f"look {self.step}")
            return super().read()

    step = Stepper.step

    def recorded(self: Stepper) -> Any:
        seen.append(f"step {self.counters.step + 1}")
        with Questions() as asked:
            figures = step(self)
        assert asked.count == 0
        return figures

    monkeypatch.setattr(loop_module, "Later", Recorded)
    monkeypatch.setattr(Stepper, "step", recorded)
    train(settings(7, log_steps=5, save_steps=0, eval_steps=0))
    steps = (
        "step 1,look 1,step 2,step 3,look 2,step 4,look 3,step 5,look 4,look 5,step 6,step 7,look 6,look 7"
    )
    assert seen == steps.split(",")


def poison(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> None:
    """Make the loss of the n-th steps infinite, also when they are done again."""
    real, step = step_module.chunked_cross_entropy, Stepper.step
    now = 0

    def counted(self: Stepper) -> Any:
        nonlocal now
        now = self.counters.data_step(self.counters.step) + 1
        return step(self)

    def poisoned(*arguments: Any) -> torch.Tensor:
        loss = real(*arguments)
        return loss * float("inf") if torch.is_grad_enabled() and now in bad else loss

    monkeypatch.setattr(Stepper, "step", counted)
    monkeypatch.setattr(step_module, "chunked_cross_entropy", poisoned)


def story(run: Path) -> list[tuple[Any, ...]]:
    """Return what the history says about bad steps."""
    found = [r for r in read_history(run / "history.jsonl") if r["kind"] == "event"]
    return [(r["event"], r["step"]) for r in found if r["event"] in ("skip", "rollback")]


@pytest.mark.parametrize("bad", [{4, 6}, {5, 6, 7}, {5, 6, 7, 8}])
def test_looking_later_changes_nothing(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: set[int]
) -> None:
    poison(monkeypatch, bad)
    more = {"save_steps": 4, "eval_steps": 0, "sample_tokens": 1, "max_bad_steps": 3}
    train(settings(9, log_steps=1, output_dir=tmp_path / "at once", **more))
    train(settings(9, log_steps=100, output_dir=tmp_path / "later", **more))
    assert story(tmp_path / "later") == story(tmp_path / "at once")
    assert outcome(tmp_path / "later").weights == outcome(tmp_path / "at once").weights
    expected = ["skip"] * len(bad) if len(bad) < 3 else None
    if expected:
        assert [event for event, _ in story(tmp_path / "later")] == expected


def test_a_save_that_is_asked_for_amid_bad_steps_waits_for_the_roll_back(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third bad step in a row is under way when the save is asked for: what is saved comes after the roll-back."""
    poison(monkeypatch, {5, 6, 7})
    calls = 0

    def ask(index: int, phase: str) -> None:
        nonlocal calls
        calls += index >= 0 and phase == "forward"
        if calls == 7 and phase == "forward":
            (tmp_path / "run" / "save").touch()

    monkeypatch.setattr(step_module, "fault_hook", ask)
    train(settings(9, log_steps=100, save_steps=0, eval_steps=0))
    assert story(tmp_path / "run")[-1][0] == "rollback"
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert saved == ["step-00000001", "step-00000009"]


def test_a_run_that_stays_bad_still_fails(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, set(range(4, 1000)))
    with pytest.raises(UserError, match=r"3 steps in a row without a finite loss up to step \d+, after 2"):
        train(settings(40, log_steps=100, save_steps=3, eval_steps=0))


# -- on the way to the device -------------------------------------------------------------------------------------


def test_the_next_copy_begins_before_this_one_is_used() -> None:
    seen: list[str] = []
    batches: list[Microbatch] = [(np.full(1, n), np.full(1, n)) for n in range(3)]

    def begin(batch: Microbatch) -> Callable[[], Pair]:
        number = int(batch[0][0])
        seen.append(f"copy {number}")

        def finish() -> Pair:
            seen.append(f"wait {number}")
            return torch.from_numpy(batch[0]), torch.from_numpy(batch[1])

        return finish

    for inputs, _targets in one_ahead(batches, begin):
        seen.append(f"use {int(inputs)}")
    order = "copy 0,copy 1,wait 0,use 0,copy 2,wait 1,use 1,wait 2,use 2"
    assert seen == order.split(",")
    assert list(one_ahead([], begin)) == []


def test_a_gpus_copies_go_over_a_stream_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of CUDA, with a stand-in for it."""
    from ekiden.training import feed

    asked: list[str] = []
    computing = SimpleNamespace(wait_event=lambda event: asked.append(f"wait for {event}"))
    copying = SimpleNamespace(record_event=lambda: "the copy")
    monkeypatch.setattr(feed, "_copy_stream", lambda _device: copying)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: computing)
    monkeypatch.setattr(torch.cuda, "stream", _Entered)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, non_blocking: tensor if non_blocking else None)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: asked.append("in use"))
    batch = np.arange(4).reshape(1, 4)
    [(inputs, targets)] = on_device([(batch, batch + 1)], torch.device("cuda", 0))
    assert (inputs.tolist(), targets.tolist()) == ([[0, 1, 2, 3]], [[1, 2, 3, 4]])
    assert asked == ["wait for the copy", "in use", "in use"]


class _Entered:
    def __init__(self, _stream: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass
