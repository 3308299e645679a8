"""Plans: does it fit, the smallest change that makes it fit, time, sessions and disk, refusals."""

from __future__ import annotations

import json
import shlex
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from ekiden.cli import cli
from ekiden.config import TrainConfig, build_config
from ekiden.errors import UsageError, UserError
from ekiden.modeling.flops import flops_per_token
from ekiden.planning import fitting, sharded
from ekiden.planning.devices import GIB, NAMES, PARALLEL_SHARE, find_machine
from ekiden.planning.plan import make_plan
from ekiden.planning.trace import Peak
from ekiden.tokenizer.load import load_tokenizer


def tracer(config: TrainConfig, vocab_size: int, _precision: object, microbatch: int) -> Peak:
    """A model of memory: 12 bytes a parameter, 3 GiB a sample."""
    blocks, embedding = 700_000_000, 1152 * vocab_size
    weights = 4 * (blocks + embedding)
    parts = {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,
        "forward": 3 * GIB * microbatch,
    }
    return Peak(sum(parts.values()), parts, "forward", 0, blocks, embedding)


def plan(device: str, vocab_size: int = 20_000, preset: str = "gemma3-1b", **more: object):
    own = {name: more.pop(name) for name in ("tokens", "disk_bytes", "tracer") if name in more}
    return make_plan(build_config(preset, **more), vocab_size, device, **{"tracer": tracer, **own})


@pytest.mark.parametrize("name", [n for n in NAMES if n != "p100"])
def test_every_machine_gives_a_plan(name: str) -> None:
    made = plan(name)
    assert made.tokens_per_second > 0
    assert made.machine.basis in " ".join(made.text().split())
    assert all(len(line) <= 100 for line in made.text().split("recipe: ")[0].splitlines())
    assert "recipe: " in made.text() and "measured on models of" in made.text()
    assert json.loads(json.dumps(made.as_dict()))["device"] == name


def test_the_largest_microbatch_that_fits_is_proposed() -> None:
    made = plan("a10g", batch_size=8, gradient_accumulation_steps=2)
    assert not made.fits
    # 10.8 GiB + 3 a sample within 20.5: 3, and of the halves of 8 that is 2.
    assert made.change == {"batch_size": 2, "gradient_accumulation_steps": 8}
    assert made.changed_peak is not None and made.changed_peak.total < made.machine.usable_bytes
    assert "DOES NOT FIT" in made.text()
    assert "--batch-size 2 --gradient-accumulation-steps 8" in made.text()


def test_an_automatic_microbatch_is_planned_for() -> None:
    made = plan("a10g", batch_size="auto", global_batch_size=16, max_steps=10)
    assert made.fits and made.change is None
    assert made.config.batch_size == 2
    assert made.tokens == 10 * 16 * 2048
    assert "with 2 x 2048 tokens" in made.text()
    shared = plan("a10gx4", batch_size="auto", global_batch_size=10)
    assert shared.config.batch_size == 3
    assert plan("t4", batch_size="auto", global_batch_size=8, vocab_size=400_000).fits is False


def test_what_fits_needs_no_change() -> None:
    made = plan("h100")
    assert made.fits and made.change is None
    assert "fits: 76.5 GiB of 79.1 GiB" in made.text()


def test_what_no_setting_can_make_fit_is_said() -> None:
    made = plan("t4", vocab_size=400_000)
    assert made.change is None
    assert "no setting makes it fit" in made.text()


def test_time_and_sessions() -> None:
    made = plan("t4x2", tokens=10**9)
    one = plan("t4", tokens=10**9)
    assert made.tokens_per_second == pytest.approx(2 * PARALLEL_SHARE * one.tokens_per_second)
    expected = 65e12 * 0.30 / flops_per_token(one.config, one.parameters)
    assert one.tokens_per_second == pytest.approx(expected)
    assert made.seconds == pytest.approx(10**9 / made.tokens_per_second)
    assert made.sessions == -(-made.seconds // (0.9 * 12 * 3600))
    assert plan("t4", tokens=10**9, max_time="6h").sessions > one.sessions
    assert plan("a10g", tokens=10**9).sessions is None
    steps = plan("t4x2", max_steps=10, batch_size=2, gradient_accumulation_steps=3)
    assert steps.tokens == 10 * 2 * 3 * 2 * 2048


def test_a_model_smaller_than_any_known_one_is_said_to_be_slower() -> None:
    assert "for 1B parameters: with fewer it may be much less" in " ".join(
        plan_of_ten_million("t4").text().split()
    )
    assert "with fewer" not in plan_of_ten_million("cpu").text()
    assert "with fewer" not in plan("t4").text()


def plan_of_ten_million(device: str):
    small = Peak(GIB, {"weights": GIB, "optimizer": GIB}, "forward", 0, 6_000_000, 4_000_000)
    return make_plan(build_config("gpt2-10m"), 16_000, device, tracer=lambda *_: small)


def test_one_session_is_one() -> None:
    assert ": 1 session of 12h00m" in plan("t4", tokens=10**6).text()
    assert " sessions of 12h00m" in plan("t4", tokens=10**10).text()


def test_disk() -> None:
    parameters = 700_000_000 + 1152 * 20_000
    made = plan("t4", max_checkpoints=4)
    assert made.checkpoint_bytes == 12 * parameters
    assert made.run_bytes == 5 * 12 * parameters + 8 * parameters
    told = " ".join(made.text().split())
    assert "TOO MUCH of 20.0 GB: --max-checkpoints 2, the fewest, takes 31.8 GB" in told
    assert "choose a smaller preset or have a larger disk (--mirror copies checkpoints" in told
    adamw = " ".join(plan("t4", optimizer="adamw").text().split())
    assert "with --optimizer-moments 8bit it takes 18.8 GB" in adamw
    assert "give --max-checkpoints 3" in plan("a10g", disk_bytes=41 * 10**9).text()
    assert "TOO MUCH" not in plan("a10g", disk_bytes=60 * 10**9).text()


def test_local_layers_and_the_head_are_counted_once() -> None:
    config = build_config("gemma3-1b", max_length=2048)
    width, full, local = 4 * 256, 26 // 6, 26 - 26 // 6
    assert flops_per_token(config, 1000) == 6000 + 6 * width * (full * 2048 + local * 512)


def test_refusals_are_sentences() -> None:
    with pytest.raises(UserError, match=r"P100.*not supported.*t4x2"):
        plan("p100")
    with pytest.raises(UsageError, match="did you mean 'a10g'"):
        find_machine("a10")
    with pytest.raises(UserError, match="bf16 is not there on a Tesla T4; give fp16"):
        plan("t4", precision="bf16")


def test_the_verb() -> None:
    shape = "--hidden-size 32 --num-attention-heads 2 --num-key-value-heads 2 --num-hidden-layers 1 --max-length 16"
    arguments = [
        "plan",
        "gpt2-10m",
        "--device",
        "t4",
        "--vocab-size",
        "300",
        "--tokens",
        "1M",
        "--json",
        *shape.split(),
    ]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    made = json.loads(result.stdout.splitlines()[-1])
    assert made["fits"] and made["embedding_parameters"] == 300 * 32 and made["tokens"] == 10**6
    refused = CliRunner().invoke(cli, ["plan", "gpt2-10m", "--tokens", "many"])
    assert refused.exit_code == 2 and "whole number such as" in refused.output
    with pytest.raises(UsageError, match="--vocab-size 1 is too small"):
        CliRunner().invoke(cli, ["plan", "gpt2-10m", "--vocab-size", "1"], catch_exceptions=False)


def saving(config: TrainConfig, vocab_size: int, precision: object, microbatch: int) -> Peak:
    """The same, of which activation checkpointing saves half of the samples' part and 2 GiB."""
    peak = tracer(config, vocab_size, precision, microbatch)
    kept = peak.parts["forward"] // 2 if config.activation_checkpointing else peak.parts["forward"] + 2 * GIB
    parts = {**peak.parts, "forward": kept}
    return Peak(sum(parts.values()), parts, "forward", 0, peak.blocks, peak.embedding)


def fed_back(device: str, vocab_size: int, preset: str, **settings: object):
    """Return a plan and, where it names a change, the plan of the settings with that change."""
    first = make_plan(build_config(preset, **settings), vocab_size, device, tracer=saving)
    if not first.change:
        return first, None
    changed = build_config(preset, **{**settings, **first.change})
    return first, make_plan(changed, vocab_size, device, tracer=saving)


@pytest.mark.parametrize("device", [n for n in NAMES if n not in ("p100", "cpu")])
@pytest.mark.parametrize("batch", [{}, {"batch_size": 12}, {"global_batch_size": 30, "batch_size": 5}])
def test_the_change_that_is_named_fits_when_it_is_made(device: str, batch: dict) -> None:
    first, second = fed_back(device, 20_000, "gemma3-1b", **batch)
    if second is None:
        assert first.fits
        return
    assert second.fits and second.peak == first.changed_peak
    if "global_batch_size" not in batch:
        steps = [made.config.batch_size * made.config.gradient_accumulation_steps for made in (first, second)]
        assert steps[0] == steps[1]
    for name in ("--batch-size", "--activation-checkpointing"):
        assert (name in first.text()) == (name.strip("-").replace("-", "_") in first.change)


def test_a_change_of_an_automatic_microbatch_leaves_it_automatic() -> None:
    settings = {"batch_size": "auto", "global_batch_size": 8}
    config = build_config("gemma3-1b", **settings)
    first = make_plan(config, 20_000, "t4", tracer=saving)
    assert first.change == {"activation_checkpointing": True}
    second = make_plan(build_config("gemma3-1b", **settings, **first.change), 20_000, "t4", tracer=saving)
    assert second.fits and second.peak == first.changed_peak


def test_nothing_is_traced_where_weights_and_gradients_are_too_much() -> None:
    traces = []

    def counted(*arguments: object) -> Peak:
        traces.append(arguments)
        return tracer(*arguments)

    made = make_plan(build_config("gemma3-1b"), 1_200_000, "t4", tracer=counted)
    assert len(traces) == 1 and made.change is None
    assert "choose a smaller preset or --vocab-size, or a device" in " ".join(made.text().split())


def test_the_next_command_is_said() -> None:
    assert "ekiden train gemma3-1b --dataset-path SHARDS --output-dir RUN" in plan("h100").text()
    assert "ekiden kaggle relay gpt2-10m --corpus YOU/CORPUS-1" in plan_of_ten_million("t4").text()
    own = plan("h100", max_length=1024, batch_size=2).as_dict()["next"]
    assert own.endswith("--output-dir RUN --max-length 1024 --batch-size 2")
    changed = " ".join(fed_back("t4x2", 20_000, "gemma3-1b")[0].text().split())
    assert "where my.yaml says `preset: gemma3-1b`" in changed
    assert "next" not in plan("t4", vocab_size=400_000).text()


AUTOMATIC = {"batch_size": "auto", "global_batch_size": 16}


def test_where_no_automatic_microbatch_fits_the_smallest_is_what_is_shown() -> None:
    # 16 samples would be 48 GiB, one 2.4 + 9.7 + 3 of which 1.5 and 2 are saved.
    made = plan("t4", vocab_size=500_000, **AUTOMATIC)
    assert not made.fits and made.change is None and made.config.batch_size == 1
    assert made.peak.total == tracer(made.config, 500_000, None, 1).total
    assert "with 1 x 2048 tokens" in made.text()


def test_the_smallest_setting_is_named_with_what_it_takes() -> None:
    made = make_plan(build_config("gemma3-1b", **AUTOMATIC), 220_000, "t4", tracer=saving)
    assert not made.fits and made.change is None
    assert "with 1 x 2048 tokens and --activation-checkpointing" in " ".join(made.text().split())
    assert made.least_bytes == made.peak.total > made.machine.usable_bytes


@pytest.mark.parametrize("device", [n for n in NAMES if n != "p100"])
def test_no_line_ends_between_a_number_and_its_unit(device: str) -> None:
    for vocab_size in (20_000, 260_000):
        for more in ({}, {"tokens": 10**9}, AUTOMATIC):
            text = plan(device, vocab_size, **more).text().split("recipe: ")[0]
            for before, after in pairwise(text.splitlines()):
                first = after.split()[0]
                assert first not in ("GiB", "MiB", "GB", "MB", "tokens", "sessions", "a", "x"), text
                assert before.split()[-1] not in ("--batch-size", "--max-checkpoints", "--devices"), text


def test_the_command_that_is_named_is_the_run_that_was_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "is_sharded", lambda _config, _vocabulary, machine: machine.count > 1)
    monkeypatch.setattr("ekiden.planning.plan.is_sharded", fitting.is_sharded)
    started: list[TrainConfig] = []

    def train(config: TrainConfig) -> SimpleNamespace:
        started.append(config)
        return SimpleNamespace()

    monkeypatch.setattr("ekiden.training.loop.train", train)
    for settings in ({}, AUTOMATIC, {"batch_size": 9, "max_length": 1024, "max_steps": 70}):
        made = plan("a10gx4", tracer=saving, **settings)
        lines = made.text().split("recipe: ")[0].split("next ")[1].strip()
        program, *arguments = shlex.split(lines.replace("\\\n", " "))
        assert shlex.join([program, *arguments]) == made.as_dict()["next"] and program == "ekiden"
        done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        config = started.pop()
        assert config.devices == 4 and config.max_steps == made.asked.max_steps
        assert config.batch_size == made.microbatch > 0
        again = plan("a10gx4", tracer=saving, **{**settings, **(made.change or {})})
        assert again.fits and again.microbatch == made.microbatch


def test_a_step_in_shards_that_cannot_be_traced_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = build_config("gpt2-10m", **small, parallel="fsdp", batch_size=2, max_length=64)
    traced = make_plan(config, 2000, "t4x2")
    assert traced.sharded and not traced.peak.estimated and "ESTIMATED" not in traced.text()

    def gone(*_: object) -> None:
        raise AttributeError("module has no attribute 'fully_shard'")

    monkeypatch.setattr(sharded, "shard_model", gone)
    sharded._microbatch.cache_clear()
    made = make_plan(config, 2000, "t4x2")
    told = " ".join(made.text().split())
    assert "ESTIMATED" in told and "AttributeError: module has no attribute 'fully_shard'" in told
    assert made.peak.total == pytest.approx(traced.peak.total, rel=0.2)


@pytest.mark.parametrize("tiny_tokenizer_path", ["bpe"], indirect=True)
def test_what_says_the_same_twice_is_refused(tiny_tokenizer_path: Path) -> None:
    def refused(*arguments: str) -> str:
        with pytest.raises(UsageError) as error:
            CliRunner().invoke(cli, ["plan", "gpt2-10m", *arguments], catch_exceptions=False)
        return str(error.value)

    assert "--tokens and --max-steps both say" in refused("--tokens", "1B", "--max-steps", "10")
    assert "--tokens and --text both say" in refused("--tokens", "1B", "--text", "1GB")
    assert "--disk 10 is 10 bytes; give it with a unit" in refused("--disk", "10")
    assert "both say how many pieces" in refused(
        "--vocab-size", "300", "--tokenizer", str(tiny_tokenizer_path)
    )
    assert "did you mean 'a10g'" in refused("--device", "cpu", "--device", "a10")


@pytest.mark.parametrize("tiny_tokenizer_path", ["bpe"], indirect=True)
def test_the_vocabulary_may_be_a_tokenizers(tiny_tokenizer_path: Path) -> None:
    shape = "--hidden-size 32 --num-attention-heads 2 --num-key-value-heads 2 --num-hidden-layers 1 --max-length 16"
    arguments = [
        "plan",
        "gpt2-10m",
        "--device",
        "t4",
        "--json",
        "--tokenizer",
        str(tiny_tokenizer_path),
        *shape.split(),
    ]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    made = json.loads(result.stdout.splitlines()[-1])
    assert made["vocab_size"] == load_tokenizer(tiny_tokenizer_path).vocab_size
