"""Settings: every field is typed, documented, read somewhere, and refused by name when wrong."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

import ekiden.config
from ekiden.cli import cli
from ekiden.config import (
    RESUME_FREE,
    TrainConfig,
    build_config,
    field_help,
    field_types,
    load_preset,
    parse_yaml,
    preset_names,
    to_yaml,
)
from ekiden.errors import UsageError
from ekiden.values import parse_bytes, parse_duration

SOURCE = Path(ekiden.config.__file__).parent


def test_every_field_is_read_outside_the_settings_modules() -> None:
    own = ("config.py", "config_fields.py", "config_checks.py")
    code = "\n".join(p.read_text(encoding="utf-8") for p in SOURCE.rglob("*.py") if p.name not in own)
    unread = [name for name in field_types() if not re.search(rf"config\.{name}\b", code)]
    assert unread == []


def test_every_field_is_a_documented_flag() -> None:
    text = CliRunner().invoke(cli, ["train", "--help"]).output
    words = " ".join(text.split())
    for name, sentence in field_help().items():
        if name != "preset":
            assert f"--{name.replace('_', '-')}" in words
            assert sentence[:30].split()[0] in words
    assert set(field_help()) == set(field_types())


UNITS = re.compile(
    r"tokens|steps?\b|samples|bytes|epochs|units|heads|blocks|devices?|threads|seconds|time|rate|share|norm|power|factor|"
    r"scaling|decay|epsilon|evaluations|microbatch|roll-backs|checkpoints|seed",
    re.IGNORECASE,
)


@pytest.mark.parametrize("name", [n for n, kind in field_types().items() if kind in (int, float)])
def test_every_number_says_its_unit(name: str) -> None:
    assert UNITS.search(field_help()[name])


def test_resume_rules_name_real_fields() -> None:
    assert set(field_types()) >= RESUME_FREE
    assert not RESUME_FREE & {"seed", "hidden_size", "max_length", "temperature", "model_type", "preset"}


def test_yaml_round_trip_keeps_every_value() -> None:
    config = build_config(
        "gemma3-tiny",
        max_steps="10k",
        language_weights="english=1,हिन्दी=2",
        sample_prompts=["a: b", "कोंकणी"],
        compile="on",
        max_time="11h30m",
    )
    assert TrainConfig(**parse_yaml(to_yaml(config), "config.yaml")) == config
    assert config.max_steps == 10_000
    assert config.language_weights == {"english": 1.0, "हिन्दी": 2.0}


@pytest.mark.parametrize("name", preset_names())
def test_presets_hold_only_valid_settings(name: str) -> None:
    assert load_preset(name)["preset"] == name
    build_config(name)


def test_a_recipe_wins_over_its_preset_and_a_flag_over_both(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("preset: gemma3-tiny\nlearning_rate: 1e-4\nmax_steps: 7\n")
    config = build_config(str(recipe), max_steps=9)
    assert (config.model_type, config.learning_rate, config.max_steps) == ("gemma3", 1e-4, 9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nmax_step: 5", "r.yaml:2: unknown setting 'max_step'; did you mean 'max_steps'?"),
        ("max_steps: many", "r.yaml:1: max_steps must be a whole number, such as 500 or 20k, not 'many'"),
        ("seed: 1\nseed: 2", "r.yaml:2: seed is set twice"),
        ("precision: int8", "r.yaml:1: precision must be one of auto, fp32, bf16, fp16, not 'int8'"),
        ("a: [", "is not valid YAML"),
        ("- a", "r.yaml:1 must hold"),
        ("max_steps: 1.5", "must be a whole number"),
        ("use_wandb: maybe", "must be true or false"),
        ("output_dir: 2026-99-99", "r.yaml:1: output_dir holds a value that is not plain YAML"),
        ("seed: !!python/object/apply:os.system ['true']", "seed"),
    ],
)
def test_a_wrong_recipe_is_one_sentence_with_its_line(text: str, expected: str) -> None:
    with pytest.raises(UsageError, match=re.escape(expected)):
        parse_yaml(text, "r.yaml")


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 0},
        {"max_checkpoints": 1},
        {"num_attention_heads": 7},
        {"max_time": "soon"},
        {"checkpoint_budget": "lots"},
        {"max_steps": 0, "epochs": 0},
        {"learning_rate": -1},
        {"eval_steps": -5},
        {"learning_rate": "nan"},
        {"decay_ratio": "nan"},
        {"epochs": "inf"},
        {"max_steps": "inf"},
        {"beta1": 1},
        {"muon_momentum": 1},
        {"num_threads": -1},
        {"max_grad_norm": -1},
        {"rope_scaling_factor": 0},
    ],
)
def test_values_that_no_run_could_use_are_refused_by_name(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="--"):
        build_config("gpt2-10m", **settings)


def test_a_recipe_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"r\.yaml cannot be read .*; give a YAML file in UTF-8"):
        build_config(str(tmp_path / "r.yaml"))


def test_durations_and_sizes() -> None:
    assert parse_duration("11h30m", "x") == 41_400
    assert parse_duration("90s", "x") == 90
    assert parse_duration("", "x") is None
    assert parse_bytes("8GB", "x") == 8_000_000_000
    assert parse_bytes("1.5M", "x") == 1_500_000
    assert parse_bytes("", "x") is None


def test_the_package_holds_every_file_that_is_no_module() -> None:
    """What `package-data` does not name is missing from a wheel, and is noticed far from here."""
    checkout = Path(__file__).parents[1]  # not what is installed, which may be a wheel
    root = checkout / "src" / "ekiden"
    settings = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["ekiden"]
    named = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
    others = {path for path in root.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others and {path for path in others if "__pycache__" not in path.parts} == named
    assert root / "py.typed" in named


def test_gpt2_has_no_key_value_heads_to_agree_with() -> None:
    assert build_config("gpt2-10m", num_attention_heads=4).num_attention_heads == 4
    with pytest.raises(
        UsageError, match="--num-attention-heads 3 must be a multiple of --num-key-value-heads"
    ):
        build_config("gemma3-tiny", num_attention_heads=3, num_key_value_heads=2)
