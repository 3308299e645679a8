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
from ekiden.planning import sharded
from ekiden.planning.ledger import BLOCK, OUTSIDE, Span, Tally, for_all_blocks
from ekiden.planning.trace import _update, fully_traced_peak, traced_peak
from ekiden.training import muon
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


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("case", ["gpt2-10m:8000:8:2:fp32:adamw", "gemma3-tiny:8000:8:4:fp32:muon"])
def test_the_prediction_is_what_a_rank_in_shards_takes(case: str) -> None:
    benchmark = BENCHMARK.with_name("plan_ranks.py")
    output = subprocess.run(
        [sys.executable, benchmark, "--cases", case, "--set", "max_length=128"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "EKIDEN_KERNEL": "0"},
    ).stdout
    row = json.loads(output.splitlines()[-1])["rows"][0]
    assert 0.93 < row["predicted_over_measured"] < 1.07


def test_what_fsdp_gathers_and_frees_is_counted() -> None:
    config = small("gpt2-10m", hidden_size=256, num_hidden_layers=12, max_length=8)
    sharded._microbatch.cache_clear()
    peak = sharded.sharded_peak(config, 8000, FP32, 1, 4)
    standing = sum(peak.parts[name] for name in ("weights", "gradients", "optimizer"))
    # The embedding, whole, its gradient as the loss makes it, and laid out to be reduced: 4.2. Where nothing that is gathered
    # were freed, all 12 blocks would stand beside it: 6.1.
    assert 3 < (peak.total - standing) / (4 * peak.embedding) < 5


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


MOMENTS = {"optimizer_moments": "8bit", "max_length": 8, "num_hidden_layers": 4}
CHUNKS = {"sliding_window": 16, "document_mask": True, "num_hidden_layers": 14}
CASES = [
    ("gpt2-10m", "fp16", 4, {"num_hidden_layers": 4, "optimizer_moments": "bf16"}),
    ("gemma3-tiny", "fp16", 2, {"num_hidden_layers": 7, "activation_checkpointing": True}),
]
SLOW_CASES = [
    ("gpt2-10m", "bf16", 3, {"num_hidden_layers": 5, "optimizer": "muon"}),
    ("gpt2-10m", "fp32", 2, {"num_hidden_layers": 3, "max_length": 8, "cpu_offload": True}),
    ("gpt2-10m", "fp32", 4, {"num_hidden_layers": 1, "optimizer": "muon", "max_length": 8}),
    ("gpt2-10m", "bf16", 1, MOMENTS),
    ("gpt2-10m", "fp32", 8, {"num_hidden_layers": 12, "document_mask": True}),
    ("gemma3-tiny", "bf16", 4, {"num_hidden_layers": 6, "sliding_window": 16, "optimizer": "muon"}),
    ("gemma3-tiny", "fp16", 3, {"num_hidden_layers": 12, "sliding_window": 24}),
    ("gemma3-tiny", "fp16", 1, CHUNKS),
    ("gemma3-tiny", "bf16", 4, {"num_hidden_layers": 18, "cpu_offload": True}),
    ("gemma3-tiny", "bf16", 2, {"num_hidden_layers": 13, "loss_chunk_size": 64, "max_length": 128}),
    ("gemma3-tiny", "fp32", 1, {"num_hidden_layers": 20, "optimizer": "muon", "max_length": 8}),
]


@pytest.mark.parametrize(
    ("preset", "precision", "microbatch", "changes"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)],
)
def test_a_few_blocks_say_what_all_take(preset: str, precision: str, microbatch: int, changes: dict) -> None:
    if "8bit" in changes.values():
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    config = small(preset, **changes)
    arithmetic = named_precision(precision)
    quick = traced_peak(config, 500, arithmetic, microbatch)
    assert quick == fully_traced_peak(config, 500, arithmetic, microbatch)


@pytest.mark.slow
def test_many_small_matrices_are_taken_in_stacks() -> None:
    config = small(num_hidden_layers=4, optimizer="muon", max_length=8)
    whole = traced_peak(config, 500, FP32, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "_STACK", 2 * 64 * 128)
        _update.cache_clear()
        stacked = traced_peak(config, 500, FP32, 1)
        assert stacked == fully_traced_peak(config, 500, FP32, 1)
    _update.cache_clear()
    assert stacked.total < whole.total and whole.during == "update"


def test_blocks_are_repeated_in_the_order_of_the_pass() -> None:
    def span(block: int, phase: str, number: int) -> Span:
        return Span(block, phase, [(number, "forward", number)])

    outside = span(OUTSIDE, "forward", 1)
    up = [span(0, "forward", 2), span(1, "forward", 3)]
    down = [span(1, "backward", 4), span(1, "backward", 5), span(0, "backward", 6)]
    made = for_all_blocks([outside, *up, *down], like=[0, 1, 1])
    assert [s.events[0][0] for s in made if s.events] == [1, 2, 3, 3, 4, 5, 4, 5, 6]


def test_the_worst_moment_is_a_moment_and_not_a_sum_of_worst_parts() -> None:
    tally = Tally(weights=10)
    tally.play([Span(OUTSIDE, "forward", [(1, "forward", 7), (1, "forward", -7), (2, "host", 99)])])
    tally.play([Span(OUTSIDE, "update", [(3, "update", 6), (4, "optimizer", 2)])])
    assert (tally.worst, tally.worst_phase, tally.worst_host) == (18, "update", 99)
    assert tally.worst_parts["update"] == 6 and tally.worst_parts["forward"] == 0


SHARDED = [
    ("gpt2-10m", "fp32", {"num_hidden_layers": 1, "max_length": 8}),
    ("gpt2-10m", "bf16", {"num_hidden_layers": 7}),
]
SLOW_SHARDED = [
    ("gpt2-10m", "bf16", {"num_hidden_layers": 6, "activation_checkpointing": True, "optimizer": "muon"}),
    ("gemma3-tiny", "bf16", {"num_hidden_layers": 13, "sliding_window": 16, "optimizer": "muon"}),
    ("gemma3-tiny", "fp16", {"num_hidden_layers": 14, "activation_checkpointing": True}),
    ("gemma3-tiny", "fp32", {"num_hidden_layers": 12, "max_length": 8}),
]


@pytest.mark.parametrize(
    ("preset", "precision", "changes"),
    [*SHARDED, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_SHARDED)],
)
def test_of_shards_too_a_few_blocks_say_what_all_take(preset: str, precision: str, changes: dict) -> None:
    config, arithmetic = small(preset, **changes), named_precision(precision)
    for ranks in (3, 4) if "optimizer" in changes else (4,):
        quick = sharded.sharded_peak(config, 500, arithmetic, 2, ranks)
        assert quick == sharded.fully_sharded_peak(config, 500, arithmetic, 2, ranks)
    assert not torch.distributed.is_initialized()


def test_shards_are_a_part_of_everything_that_lasts() -> None:
    config = small("gpt2-10m", num_hidden_layers=2, hidden_size=256)
    whole = traced_peak(config, 500, FP32, 1)
    part = sharded.sharded_peak(config, 500, FP32, 1, 4)
    for name in ("weights", "optimizer"):
        assert part.parts[name] == pytest.approx(whole.parts[name] / 4, rel=0.05)
    assert (part.blocks, part.embedding) == (whole.blocks, whole.embedding)
