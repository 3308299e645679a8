"""What `benchmarks/learning.py` reads off finished runs: the share of the tokens needed, the mixtures' change, the curves."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def learning(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop("learning", None)
    import learning

    yield learning
    sys.modules.pop("learning", None)


def finish(bench: ModuleType, folder: Path, recipe: str, tokens: int, konkani: float, **run: object) -> None:
    """Write the result of a run that ends at `konkani` bits per byte, and at 2.0 in Dutch."""
    ended = bench.Run("gpt2", recipe, 0.02, tokens=tokens, **{"seed": 1, "tokenizer": 0.5, **run})
    bits = {"dutch": 2.0, "konkani": konkani, "macro": (2.0 + konkani) / 2}
    result = {"run": bench.asdict(ended), "tokens": [tokens // 2, tokens], "bits_per_byte": [bits, bits]}
    result |= {"largest_value": 10 * konkani, "skipped": 1, "seconds": 1.0, "losses": []}
    (folder / "runs").mkdir(exist_ok=True)
    (folder / "runs" / f"{ended.name}.json").write_text(json.dumps(result))


def test_the_share_of_tokens_is_read_between_two_lengths(learning: ModuleType, tmp_path: Path) -> None:
    finish(learning, tmp_path, "plan", 1000, 2.0)
    finish(learning, tmp_path, "default", 100, 2.2)
    finish(learning, tmp_path, "default", 400, 1.8)
    finish(learning, tmp_path, "nanochat", 400, 2.1)
    figures = learning.report(tmp_path)
    assert figures["tokens_ratio"]["gpt2"]["default"] == pytest.approx(0.2)  # half way between the logarithms
    assert figures["tokens_ratio"]["gpt2"]["nanochat"] is None
    assert figures["bits_per_byte"]["gpt2"]["default 400"] == {"dutch": 2.0, "konkani": 1.8, "macro": 1.9}


def test_mixtures_are_compared_under_their_own_tokenizers(learning: ModuleType, tmp_path: Path) -> None:
    for seed, konkani in ((1, 1.4), (2, 1.6)):
        finish(learning, tmp_path, "mixed", 500, konkani, seed=seed, tokenizer=0.3)
    finish(learning, tmp_path, "mixed", 500, 9.0)  # under the other tokenizer: another comparison
    finish(learning, tmp_path, "proportional", 500, 2.0)
    figures = learning.report(tmp_path)
    assert figures["konkani_change_percent"] == {"gpt2": -25.0}
    assert figures["change_percent"]["gpt2"]["dutch"] == 0.0


def test_the_largest_values_of_the_longest_runs_and_curves_are_kept(
    learning: ModuleType, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    finish(learning, tmp_path, "default", 100, 5.0)
    finish(learning, tmp_path, "default", 400, 2.0)
    finish(learning, tmp_path, "default", 400, 3.0, seed=2)
    assert learning.report(tmp_path)["largest"] == {
        "gpt2 default": {"tokens": 400, "value": 30.0, "skipped": 2}
    }
    assert (tmp_path / "learning.png").stat().st_size > 1000


def test_quick_runs_are_of_both_families_under_their_own_tokenizers(learning: ModuleType) -> None:
    parser_defaults = {"quick": True, "recipe": None, "family": None, "tokens": None, "rates": None}
    options = learning.argparse.Namespace(**parser_defaults, tokenizer_temperature=None)
    runs = learning.chosen_runs(options, ())
    assert {run.family for run in runs} == {"gemma3", "gpt2"}
    assert {run.recipe: run.tokenizer for run in runs} == {
        "plan": 0.5,
        "proportional": 0.5,
        "mixed": 0.3,
        "default": 0.5,
    }
    assert len({run.name for run in runs}) == len(runs) == 12
