"""`ekiden evaluate` on several models: one table, JSON lines, a file; and mistakes found before a model is read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from ekiden.cli import main
from ekiden.errors import UsageError, UserError
from ekiden.evaluation.comparison import format_comparison, run_evaluate
from ekiden.evaluation.loss import evaluate_model
from small_models import TEXT, small_model, small_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make shards/ of two languages and the models one/ and two/."""
    from ekiden.export.huggingface import export_huggingface
    from ekiden.tokens.build import preprocess

    root = tmp_path_factory.mktemp("comparison")
    for language, lines in (("dutch", TEXT[4:]), ("hindi", TEXT[2:4])):
        (root / "corpus" / language).mkdir(parents=True)
        documents = [{"text": f"{number} {line}"} for number in range(20) for line in lines]
        rows = "".join(json.dumps(document) + "\n" for document in documents)
        (root / "corpus" / language / "text.jsonl").write_text(rows)
    tokenizer = small_tokenizer(root)
    preprocess(
        [str(root / "corpus")], str(root / "unigram.model"), str(root / "shards"), test_split=0.3, num_proc=1
    )
    for name, louder in (("one", 4.0), ("two", 1.0)):
        export_huggingface(small_model("gpt2-10m", tokenizer, louder), tokenizer, root / name)
    return root


def test_two_models_in_one_table(folder, capsys):
    models = [str(folder / name) for name in ("one", "two")]
    main(["evaluate", *models, "--dataset-path", str(folder / "shards"), "--device", "cpu"])
    out = capsys.readouterr().out
    results = [evaluate_model(model, folder / "shards", device="cpu") for model in models]
    losses, bits = (
        [line.split()[1:] for line in out.splitlines() if line.startswith(models[0])][n] for n in (0, 1)
    )
    for language, loss, bit in zip(("dutch", "hindi"), losses, bits):
        figures = results[0]["languages"][language]
        assert loss.rstrip("*") == f"{figures['loss']:.4f}"
        assert bit.rstrip("*") == f"{figures['bits_per_byte']:.4f}"
    # Of each column, the lowest is marked.
    assert out.count("*") - out.count("(*:") == 6
    better = min(results, key=lambda result: result["languages"]["dutch"]["loss"])
    assert f"{better['languages']['dutch']['loss']:.4f}*" in out
    assert "frequencies of tokens alone" in out


def test_json_lines_in_a_file(folder, tmp_path, capsys):
    models = [str(folder / name) for name in ("two", "one")]
    target = tmp_path / "figures.jsonl"
    run_evaluate(
        models, str(folder / "shards"), device="cpu", as_json=True, output=str(target), max_tokens=30
    )
    assert capsys.readouterr().out == ""
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert [one["model"] for one in found] == models
    expected = evaluate_model(models[0], folder / "shards", max_tokens=30, device="cpu")
    assert {key: found[0][key] for key in expected} == expected


def test_one_model_has_the_longer_table(folder, capsys):
    run_evaluate([str(folder / "one")], str(folder / "shards"), device="cpu", max_tokens=30)
    assert "perplexity" in capsys.readouterr().out


def test_a_language_without_test_tokens_and_scores_of_tasks():
    row = {"loss": 2.0, "bits_per_byte": None, "unigram_loss": 3.0}
    none = {"loss": None, "bits_per_byte": None, "unigram_loss": None}
    metrics = {"acc": {"value": 0.5, "stderr": 0.125}, "byte_perplexity": {"value": 3.25, "stderr": None}}
    harness = {"tasks": {"arc": {"metrics": metrics}}, "lm_eval": "0.4.13", "limit": 8}
    results = [
        {
            "model": name,
            "step": step,
            "languages": {"dutch": row, "hindi": none},
            "macro": {"loss": 2.0, "bits_per_byte": None},
            "harness": harness,
        }
        for name, step in (("a", 5), ("b", None))
    ]
    lines = [line.split() for line in format_comparison(results).splitlines()]
    assert ["a", "(step", "5)", "2.0000*", "-", "2.0000*"] in lines
    assert ["b", "-", "-", "-"] in lines
    assert ["frequencies", "of", "tokens", "alone", "3.0000", "-"] in lines
    assert ["arc", "acc", "0.5000", "±0.1250", "0.5000", "±0.1250"] in lines
    assert ["arc", "byte_perplexity", "3.2500", "3.2500"] in lines
    assert "8 questions a task at most" in format_comparison(results)


def test_mistakes_are_found_before_a_model_is_read(folder, monkeypatch):
    one, shards = str(folder / "one"), str(folder / "shards")
    with pytest.raises(UsageError, match="nothing to evaluate on; give --dataset-path SHARDS, --harness"):
        run_evaluate([one])
    with pytest.raises(UsageError, match="mean nothing without --harness"):
        run_evaluate([one], shards, harness_limit=3)
    with pytest.raises(UserError, match="onee does not exist; did you mean 'one'"):
        run_evaluate([one, f"{one}e"], shards)
    with pytest.raises(UserError, match="its folder does not exist"):
        run_evaluate([one], shards, output="/nowhere/x")
    with pytest.raises(UsageError, match="--batch-size must be 1 or more"):
        run_evaluate([one], shards, batch_size=0)
    with pytest.raises(UsageError, match="--max-tokens must be 1 or more, not -5"):
        run_evaluate([one], shards, max_tokens=-5)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'ekiden\[harness\]'"):
        run_evaluate([one], harness="arc_easy")
    with pytest.raises(UsageError, match="names no task"):
        run_evaluate([one], harness=" ,")
    with pytest.raises(UsageError, match="--harness-limit must be 1 or more, not 0"):
        run_evaluate([one], harness="arc_easy", harness_limit=0)


def test_figures_that_are_not_finite_are_still_json(folder, capsys, monkeypatch):
    monkeypatch.setattr("ekiden.evaluation.loss._exp", lambda loss: float("inf"))
    main(
        [
            "evaluate",
            str(folder / "one"),
            "--dataset-path",
            str(folder / "shards"),
            "--device",
            "cpu",
            "--json",
        ]
    )

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    result = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert result["macro"]["perplexity"] == "inf"
