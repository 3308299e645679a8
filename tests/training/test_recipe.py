"""Schedules, a decay begun from any checkpoint, and the recipe that is printed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ekiden.config import TrainConfig, build_config, preset_names
from ekiden.errors import UsageError, UserError
from ekiden.tokens.format import TokenDataset
from ekiden.tokens.mixture import Mixture
from ekiden.tokens.unigram import unigram_probabilities
from ekiden.training.history import read_history
from ekiden.training.loop import train
from ekiden.training.optimizer import learning_rate, momenta
from ekiden.training.recipe import SETTINGS, describe_recipe

Settings = Callable[..., TrainConfig]


def rates(run: Path) -> dict[int, float]:
    return {
        r["step"]: r["learning_rate"] for r in read_history(run / "history.jsonl") if r["kind"] == "train"
    }


def state_of(run: Path, step: int) -> dict[str, Any]:
    return json.loads((run / "checkpoints" / f"step-{step:08d}" / "trainer_state.json").read_text())


def test_wsd_is_constant_and_then_a_line_to_its_end() -> None:
    config = build_config(
        "gpt2-10m",
        schedule="wsd",
        optimizer="adamw",
        learning_rate=1.0,
        warmup_steps=10,
        decay_ratio=0.25,
        min_learning_rate_ratio=0.0,
    )
    values = [learning_rate(step, config, 200) for step in range(200)]
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert set(values[10:151]) == {1.0}
    assert values[150:] == pytest.approx([(200 - step) / 50 for step in range(150, 200)])
    # All of the run after the warm-up, and a run too short for either.
    whole = dataclasses.replace(config, decay_ratio=1.0)
    assert learning_rate(15, whole, 100) < learning_rate(10, whole, 100) == 1.0
    # Muon warms up for a fiftieth at most.
    muon = dataclasses.replace(config, optimizer="muon")
    assert [learning_rate(step, muon, 100) for step in range(3)] == [0.5, 1.0, 1.0]
    assert learning_rate(0, config, 1) == 1.0


def test_a_decay_falls_from_the_rate_it_found_whatever_was_before() -> None:
    config = build_config("gpt2-10m", schedule="cosine", learning_rate=1.0, min_learning_rate_ratio=0.1)
    decay = [40.0, 10.0, 0.5]
    assert learning_rate(39, config, 100, decay) == learning_rate(39, config, 100)
    values = [learning_rate(step, config, 50, decay) for step in range(40, 50)]
    assert values == pytest.approx([0.5 * (0.1 + 0.9 * (50 - step) / 10) for step in range(40, 50)])


def test_the_momentum_rises_on_a_line_and_a_resumed_run_goes_on_with_it(
    settings: Settings, tmp_path: Path
) -> None:
    config = build_config(
        "gpt2-10m", muon_first_momentum=0.5, muon_momentum=0.9, muon_momentum_steps=4, optimizer="muon"
    )
    config = dataclasses.replace(config, muon_first_beta1=0.4, beta1=0.8)
    momentum, beta1 = zip(*(momenta(step, config) for step in range(7)))
    assert momentum == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9])
    assert beta1 == pytest.approx([0.4, 0.5, 0.6, 0.7, 0.8, 0.8, 0.8])
    assert momenta(0, dataclasses.replace(config, muon_momentum_steps=0)) == (0.9, 0.8)
    assert momenta(0, dataclasses.replace(config, optimizer="adamw"))[1] == 0.8
    more = {"optimizer": "muon", "muon_first_momentum": 0.2, "muon_momentum_steps": 6, "decay_ratio": 0.01}
    train(settings(3, output_dir=tmp_path / "parts", **more))
    train(settings(6, output_dir=tmp_path / "parts", **more))
    train(settings(6, output_dir=tmp_path / "once", **more))
    train(settings(6, output_dir=tmp_path / "flat", **more | {"muon_first_momentum": 0.95}))
    train(settings(6, output_dir=tmp_path / "longer", **more | {"muon_first_beta1": 0.8}))
    parts, once, *others = (
        (tmp_path / name / "final_model" / "model.safetensors").read_bytes()
        for name in ("parts", "once", "flat", "longer")
    )
    assert parts == once and once not in others


def test_decay_from_closes_a_run_and_resumes_like_any_other(settings: Settings, tmp_path: Path) -> None:
    more = {"schedule": "wsd", "decay_ratio": 0.01, "min_learning_rate_ratio": 0.0, "learning_rate": 0.01}
    train(settings(60, output_dir=tmp_path / "long", max_time="", save_steps=6, max_checkpoints=20, **more))
    source = tmp_path / "long" / "checkpoints" / "step-00000012"
    decay = {**more, "decay_from": str(source), "decay_steps": 4}
    assert train(settings(60, output_dir=tmp_path / "whole", **decay)).step == 16
    whole = rates(tmp_path / "whole")
    assert whole == pytest.approx({13: 0.01, 14: 0.0075, 15: 0.005, 16: 0.0025})
    assert state_of(tmp_path / "whole", 16)["counters"]["decay"] == [12, 4, 0.01]
    # Done; and the same command again has nothing more to do, where the source is gone too.
    source.rename(tmp_path / "gone")
    assert train(settings(60, output_dir=tmp_path / "whole", **decay)).step == 16
    assert rates(tmp_path / "whole") == whole


def test_a_decay_of_a_quarter_with_other_shares_at_the_end(settings: Settings, tmp_path: Path) -> None:
    more = {"temperature": 1.0, "final_temperature": 0.0, "final_share": 0.3}
    train(settings(8, output_dir=tmp_path / "long", save_steps=8, **more))
    result = train(settings(8, output_dir=tmp_path / "end", decay_from=str(tmp_path / "long"), **more))
    assert result.step == 10
    mixture = state_of(tmp_path / "end", 10)["mixture"]
    assert mixture["later"][-1] == [8 * 4, [2048, 2048]]
    assert state_of(tmp_path / "long", 8)["mixture"]["later"] == [[22, [2048, 2048]]]


def test_a_decay_needs_a_whole_checkpoint(settings: Settings, tmp_path: Path) -> None:
    train(settings(3, output_dir=tmp_path / "long"))
    for source, words in (("nowhere", "does not exist"), ("long/final_model", "no whole checkpoint")):
        with pytest.raises(UserError, match=f"--decay-from .*{words}"):
            train(settings(8, output_dir=tmp_path / "end", decay_from=str(tmp_path / source)))
    with pytest.raises(UsageError, match="leave --init-from and --resume-from out"):
        settings(8, decay_from="run", init_from="other")


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_says_its_recipe_and_where_it_comes_from(preset: str) -> None:
    text = "\n".join(describe_recipe(build_config(preset)))
    assert "languages: " in text and "languages: " not in "\n".join(describe_recipe(build_config(preset), 1))
    assert "docs/recipe.md" in text and "but for what you set" not in text
    changed = "\n".join(describe_recipe(build_config(preset, learning_rate=0.5, schedule="cosine")))
    assert "learning_rate=0.5 (preset: " in changed and "schedule=cosine (preset: wsd)" in changed
    adamw = "\n".join(describe_recipe(build_config(preset, optimizer="adamw", language_weights="a=1,b=2")))
    assert "AdamW at" in adamw and "as --language-weights says" in adamw
    changes = {"temperature": 1.0, "final_temperature": 0.2, "final_share": 0.6, "small_language_share": 0.2}
    ends = "\n".join(describe_recipe(build_config(preset, **changes)))
    given = "20% of it given to the smallest"
    assert f"n^1, {given}; n^0.2, {given} in the last 60%" in ends
    own = build_config(preset, language_weights="a=1,b=2", final_language_weights="b=1", final_share=0.6)
    explicit = "\n".join(describe_recipe(own))
    assert "as --language-weights says; as --final-language-weights says in the last 60%" in explicit
    with pytest.raises(UsageError, match="--final-language-weights needs --final-share"):
        build_config(preset, final_language_weights="b=1")


def test_the_recipes_settings_are_settings() -> None:
    config = build_config("gpt2-10m")
    assert all(hasattr(config, name) for name in SETTINGS)


def test_train_prints_the_recipe(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    train(settings(1))
    assert "recipe: " in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["gpt2-10m", "gemma3-tiny"])
def test_a_fresh_run_begins_with_the_frequencies_of_its_shards(
    settings: Settings, tmp_path: Path, preset: str
) -> None:
    """The first loss beside the cross-entropy of the counts; without them a tied model predicts its own input."""
    first = {}
    for start in ("cooccurrence", "unigram", "scaled"):
        config = settings(
            1, preset, output_dir=tmp_path / start, initialization=start, log_steps=1, hidden_size=64
        )
        train(config)
        records = read_history(tmp_path / start / "history.jsonl")
        first[start] = next(record["loss"] for record in records if record["kind"] == "train")
    dataset = TokenDataset.open(config.dataset_path)
    mixture = Mixture.from_dict(state_of(tmp_path / "unigram", 1)["mixture"])
    counted = unigram_probabilities(dataset, mixture)
    entropy = -float((counted * np.log(counted)).sum())
    for start in ("cooccurrence", "unigram"):
        assert abs(first[start] - entropy) < 0.7 < first["scaled"] - entropy
    assert first["cooccurrence"] != first["unigram"]
