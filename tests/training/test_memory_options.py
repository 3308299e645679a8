"""Every option that saves memory or time: the run that was stopped and goes on is the uninterrupted one, bit for bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from campaign import outcome

from ekiden.config import TrainConfig, build_config
from ekiden.modeling import device as device_module
from ekiden.modeling import prepare as prepare_module
from ekiden.modeling.attention import MATH, Attention
from ekiden.modeling.build import build_model
from ekiden.modeling.device import named_precision
from ekiden.modeling.prepare import checkpoint_activations, prepare_model
from ekiden.training import facts as facts_module
from ekiden.training import microbatch
from ekiden.training import step as step_module
from ekiden.training.history import read_history
from ekiden.training.loop import train
from ekiden.training.step import accumulate_gradients

Settings = Callable[..., TrainConfig]
FP32, CPU = named_precision("fp32"), torch.device("cpu")


def stop_at(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Send SIGTERM before the n-th forward pass of a step."""
    seen = 0

    def hook(index: int, phase: str) -> None:
        nonlocal seen
        seen += index >= 0 and phase == "forward"
        if seen == calls and phase == "forward":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(step_module, "fault_hook", hook)


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": True},
        {"optimizer_moments": "bf16"},
        {"optimizer_moments": "fp16", "preset": "gpt2-10m"},
        {"optimizer_moments": "8bit"},
        {"cpu_offload": True},
        {"cpu_offload": True, "optimizer_moments": "8bit", "activation_checkpointing": True},
        {"optimizer_moments": "bf16", "optimizer": "muon"},
        {"sliding_window": 10, "activation_checkpointing": True},
        {"document_mask": True, "sliding_window": 10},
        {"document_mask": True, "preset": "gpt2-10m"},
        {"precision": "bf16", "loss_chunk_size": 64},
        {"precision": "fp16", "sliding_window": 10},
        {"precision": "fp16", "preset": "gpt2-10m", "optimizer_moments": "fp16", "cpu_offload": True},
        {"batch_size": "auto", "global_batch_size": 4, "document_mask": True},
        *(
            pytest.param({"compile": "on", **options}, marks=pytest.mark.slow)  # 20 to 60 s each
            for options in (
                {"sliding_window": 10},
                {"preset": "gpt2-10m", "precision": "bf16"},
                {"activation_checkpointing": True},
                {"document_mask": True, "sliding_window": 10},
                {"batch_size": "auto", "global_batch_size": 4, "sliding_window": 10},
                {"optimizer": "muon", "precision": "fp16"},
            )
        ),
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()),
)
def test_resume_is_bit_identical(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    if "8bit" in options.values():
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    if options.get("batch_size") == "auto" and options.get("compile") != "on":
        # Where to begin to try costs seconds, and is `test_microbatch`'s.
        monkeypatch.setattr(microbatch, "predicted_microbatch", lambda *given: given[3])
    assert_resume_is_bit_identical(settings, tmp_path, monkeypatch, **{"optimizer": "adamw", **options})
    if options.get("compile") == "on":
        assert all(e["environment"]["compiled"] for e in starts(tmp_path / "run"))


def assert_resume_is_bit_identical(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> None:
    """Train 5 steps, and 5 steps with a stop in the third; what they leave is the same."""
    more = {"sample_tokens": 1, "eval_steps": 0, **options}
    train(settings(5, output_dir=tmp_path / "reference", **more))
    stop_at(monkeypatch, 3)
    assert train(settings(5, **more)).status == "paused"
    monkeypatch.setattr(step_module, "fault_hook", None)
    assert train(settings(5, **more)).status == "completed"
    assert outcome(tmp_path / "run") == outcome(tmp_path / "reference")


def starts(run: Path) -> list[dict[str, Any]]:
    return [r for r in read_history(run / "history.jsonl") if r.get("event") in ("start", "resume")]


def plain_arithmetic(config: TrainConfig, *_: Any) -> Attention:
    return Attention(MATH, MATH, config.sliding_window)


def test_resume_is_bit_identical_with_another_kernel(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "choose_attention", plain_arithmetic)
    assert_resume_is_bit_identical(settings, tmp_path, monkeypatch, sliding_window=10)
    assert {e["environment"]["attention"] for e in starts(tmp_path / "run")} == {"math"}


def test_another_kernel_is_said_on_resume(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(settings(3))
    first = starts(tmp_path / "run")[0]["environment"]["attention"]
    assert first.startswith(("own AVX-512", "flash")) and f"{first} attention" in capsys.readouterr().err
    monkeypatch.setattr(prepare_module, "choose_attention", plain_arithmetic)
    train(settings(4))
    assert f"sums may differ in the last bits (attention was {first}, is math)" in capsys.readouterr().err


def test_arithmetic_without_our_own_kernels_is_said_on_resume(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(facts_module, "library", lambda: object())
    train(settings(3))
    capsys.readouterr()
    monkeypatch.setattr(facts_module, "library", lambda: None)
    train(settings(4))
    assert "(kernels was own, is PyTorch's)" in capsys.readouterr().err


def test_a_run_resumed_without_instructions_for_its_precision_says_so(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device_module, "has_instructions", lambda dtype: True)
    train(settings(3, precision="bf16"))
    monkeypatch.setattr(device_module, "has_instructions", lambda dtype: False)
    capsys.readouterr()
    train(settings(4, precision="bf16"))
    assert "precision was bf16, is bf16 by fp32 products" in capsys.readouterr().err


def gradients(config: TrainConfig, checkpointed: bool) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    model = build_model(config, 64, 0, 2, 1, seed=1)
    if checkpointed:
        checkpoint_activations(model)
    ids = torch.arange(32).reshape(2, 16).numpy()
    loss = accumulate_gradients(model, [(ids, ids)], 32, FP32)
    return loss, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("preset", ["gpt2-10m", "gemma3-tiny"])
def test_blocks_computed_again_give_the_same_gradients(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    config = build_config(
        preset, hidden_size=16, num_hidden_layers=2, intermediate_size=32, max_length=16, **heads
    )
    passes = 0
    model_class = type(build_model(config, 64, 0, 2, 1, seed=1))
    block = {"GPT2LMHeadModel": "GPT2MLP", "Gemma3ForCausalLM": "Gemma3MLP"}[model_class.__name__]
    module = __import__(model_class.__module__, fromlist=[block])
    forward = getattr(module, block).forward

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return forward(*arguments)

    monkeypatch.setattr(getattr(module, block), "forward", counted)
    loss, plain = gradients(config, checkpointed=False)
    assert passes == 2
    again, recomputed = gradients(config, checkpointed=True)
    assert passes == 2 + 4
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed) if a is not None)


def test_a_compiler_that_fails_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = build_config(
        "gpt2-10m", hidden_size=16, num_hidden_layers=1, max_length=8, batch_size=2, compile="on"
    )
    model = build_model(config, 64, 0, 2, 1, seed=1)
    decoder = prepare_module.body(model)

    def no_compiler(*_: Any, **__: Any) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found\nand more")

        decoder._compiled_call_impl = fail

    monkeypatch.setattr(decoder, "compile", no_compiler)
    assert prepare_model(model, config, CPU, FP32) is False
    assert "torch.compile does not work here (RuntimeError: InvalidCxxCompiler" in capsys.readouterr().err
    ids = torch.zeros(2, 8, dtype=torch.int64).numpy()
    assert torch.isfinite(accumulate_gradients(model, [(ids, ids)], 16, FP32))
