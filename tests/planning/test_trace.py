"""The predicted peak against a measured one, and against arithmetic that is known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ekiden.config import TrainConfig, build_config
from ekiden.modeling.device import named_precision
from ekiden.planning.trace import BLOCK, traced_peak
from ekiden.training import step as step_module

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "plan_memory.py"
FP32 = named_precision("fp32")


def small(preset: str = "gpt2-10m", **changes: object) -> TrainConfig:
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    return build_config(
        preset,
        **{
            **shape,
            "optimizer": "adamw",
            "head_dim": 32,
            "intermediate_size": 128,
            "max_length": 64,
            **changes,
        },
    )


def measured(*arguments: str) -> dict:
    output = subprocess.run(
        [sys.executable, BENCHMARK, *arguments],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ).stdout
    return json.loads(output.splitlines()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("preset", "shape"),
    [
        ("gpt2-10m", "hidden_size=128 num_hidden_layers=3 max_length=256 intermediate_size=512"),
        pytest.param(
            "gemma3-tiny", "num_hidden_layers=7 sliding_window=64 max_length=256", marks=pytest.mark.slow
        ),
        pytest.param("gpt2-10m", "loss_chunk_size=256", marks=pytest.mark.slow),
    ],
)
def test_the_prediction_is_what_a_step_takes(preset: str, shape: str) -> None:
    result = measured(
        "--preset", preset, "--vocab-size", "8000", "--batch-size", "12", "--set", *shape.split()
    )
    assert result["measured_bytes"] > 100e6
    assert 0.93 < result["predicted_over_measured"] < 1.07


@pytest.mark.gpu
def test_the_prediction_on_a_gpu() -> None:
    result = measured("--preset", "gemma3-270m", "--vocab-size", "16000", "--batch-size", "2")
    assert 0.9 < result["predicted_over_measured"] < 1.1


@pytest.mark.parametrize("preset", ["gpt2-10m", "gemma3-tiny"])
def test_weights_gradients_and_moments_are_4_4_and_8_bytes_a_parameter(preset: str) -> None:
    peak = traced_peak(small(preset, optimizer="adamw"), 500, FP32, 1)
    parameters = peak.blocks + peak.embedding
    rounding = 100 * BLOCK
    assert 0 <= peak.parts["weights"] - 4 * parameters < rounding
    assert 0 <= peak.parts["gradients"] - 4 * parameters < rounding
    assert 0 <= peak.parts["optimizer"] - 8 * parameters < 2 * rounding
    assert peak.total == sum(peak.parts.values())


def test_a_larger_microbatch_costs_the_same_again_for_every_sample() -> None:
    config = small(loss_chunk_size=64)
    two, four, eight = (traced_peak(config, 500, FP32, n).total for n in (2, 4, 8))
    assert four > two
    assert eight - four == pytest.approx(2 * (four - two), rel=0.05)


def test_tracing_leaves_nothing_behind() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    traced_peak(small(), 500, FP32, 1)
    assert torch.are_deterministic_algorithms_enabled()
    assert step_module.fault_hook is None
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize(
    ("option", "part", "share"),
    [
        ({"activation_checkpointing": True}, "forward", (0.02, 0.95)),
        ({"optimizer_moments": "bf16"}, "optimizer", (0.45, 0.6)),
        ({"optimizer_moments": "8bit"}, "optimizer", (0.2, 0.4)),
        ({"cpu_offload": True}, "optimizer", (0.0, 0.0)),
    ],
)
def test_options_that_save_memory_are_seen(option: dict, part: str, share: tuple[float, float]) -> None:
    if "8bit" in option.values():
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    plain = traced_peak(small(num_hidden_layers=4), 500, FP32, 4)
    saved = traced_peak(small(num_hidden_layers=4, **option), 500, FP32, 4)
    assert saved.total < plain.total
    assert share[0] <= saved.parts[part] / plain.parts[part] <= share[1]
    assert (saved.host > 0) == ("cpu_offload" in option)
