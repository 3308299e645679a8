"""`ekiden evaluate`: one model or several, on token shards, on tasks of the harness, or both; a table, or JSON lines.

Models are loaded one after another, so that comparing ten takes the memory of one. Loss is comparable between models
of one tokenizer, which all models on the same shards have.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ekiden.errors import UsageError
from ekiden.evaluation.harness import Harness
from ekiden.evaluation.loss import evaluate_loaded, format_evaluation
from ekiden.export.load import check_models, load_model
from ekiden.export.printed import check_output, emit
from ekiden.progress import say
from ekiden.tokens.format import TokenDataset
from ekiden.values import finite_json

Result = dict[str, Any]


def run_evaluate(
    models: Sequence[str],
    dataset_path: str | None = None,
    harness: str | None = None,
    harness_limit: int | None = None,
    harness_fewshot: int | None = None,
    output: str | None = None,
    as_json: bool = False,
    **options: Any,
) -> None:
    """Evaluate every model and print a table, or with `as_json` one JSON object a line and model.

    Args:
        models: MODELs.
        dataset_path: folder of token shards; None: no loss.
        harness: tasks, as `Harness` takes them; None: none. harness_limit, harness_fewshot: its `limit` and `fewshot`.
        output: a file that takes what would be printed. as_json: figures that are not finite stand as strings.
        options: max_tokens, batch_size and device, as `evaluate_model` takes them.

    Raises:
        UserError: a model, the shards or a task cannot be used. UsageError: nothing to evaluate on, or a bad value.
    """
    if dataset_path is None and harness is None:
        raise UsageError(
            "there is nothing to evaluate on; give --dataset-path SHARDS, --harness TASKS or both"
        )
    if harness is None and (harness_limit, harness_fewshot) != (None, None):
        raise UsageError("--harness-limit and --harness-fewshot mean nothing without --harness TASKS")
    for name, number in (
        ("max-tokens", options.get("max_tokens")),
        ("batch-size", options.get("batch_size")),
    ):
        if number is not None and number < 1:
            raise UsageError(f"--{name} must be 1 or more, not {number}")
    check_models(models)
    check_output(output)
    dataset = None if dataset_path is None else TokenDataset.open(dataset_path)
    tasks = None if harness is None else Harness(harness, harness_limit, harness_fewshot)
    results = [_evaluate(model, dataset, tasks, **options) for model in models]
    if as_json:
        text = "".join(json.dumps(finite_json(result)) + "\n" for result in results)
    else:
        text = format_comparison(results)
    emit(text, output)


def _evaluate(
    name: str,
    dataset: TokenDataset | None,
    tasks: Harness | None,
    max_tokens: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
) -> Result:
    """Return {"model", "step"} with what `evaluate_loaded` returns for the shards, and "harness" for the tasks."""
    loaded = load_model(name, device)
    say(f"{loaded.path}" + (f" (step {loaded.step})" if loaded.step else ""))
    result: Result = {"model": name, "step": loaded.step}
    if dataset is not None:
        result |= evaluate_loaded(loaded, dataset, max_tokens, batch_size)
    if tasks is not None:
        result["harness"] = tasks.run(loaded, batch_size)
    return result


def format_comparison(results: Sequence[Result]) -> str:
    """Return the tables of what was evaluated; a single model's is the longer one of `format_evaluation`."""
    parts = []
    if "languages" in results[0]:
        if len(results) == 1:
            parts.append(format_evaluation(results[0]) + "\n")
        else:
            parts += [_of_languages(results, "loss", "loss, nats a token")]
            parts += [_of_languages(results, "bits_per_byte", "bits a byte of text")]
    if "harness" in results[0]:
        parts.append(_of_tasks(results))
    return "\n".join(parts)


def _of_languages(results: Sequence[Result], figure: str, title: str) -> str:
    """Return a table of one figure: a row a model, a column a language, the lowest of each column marked."""
    columns = list(results[0]["languages"])
    rows = [
        (
            _name(result),
            [result["languages"][c][figure] for c in columns] + [result["macro"].get(figure)],
        )
        for result in results
    ]
    lowest = [
        min((value for value in column if value is not None), default=None)
        for column in zip(*(values for _name, values in rows))
    ]
    marked = [
        (
            name,
            [
                _figure(value) + ("*" if value is not None and value == best else " ")
                for value, best in zip(values, lowest)
            ],
        )
        for name, values in rows
    ]
    if figure == "loss":
        unigram = [results[0]["languages"][column]["unigram_loss"] for column in columns]
        marked.append(("frequencies of tokens alone", [_figure(value) + " " for value in unigram]))
    return _table(f"{title} (*: the lowest)", [*columns, "mean"], marked)


def _of_tasks(results: Sequence[Result]) -> str:
    """Return a table of the harness's figures: a row a metric, a column a model."""
    harness = [result["harness"] for result in results]
    rows = []
    for task, figures in harness[0]["tasks"].items():
        for metric in figures["metrics"]:
            found = [one["tasks"][task]["metrics"][metric] for one in harness]
            cells = [
                _figure(f["value"]) + ("" if f["stderr"] is None else f" ±{f['stderr']:.4f}") for f in found
            ]
            rows.append((f"{task} {metric}", cells))
    limit = harness[0]["limit"]
    title = f"lm_eval {harness[0]['lm_eval']}" + (f", {limit} questions a task at most" if limit else "")
    return _table(title, [_name(result) for result in results], rows)


def _table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Return lines of aligned columns; a row may be shorter than the others."""
    width = max(len(text) for text in [title, *(name for name, _cells in rows)]) + 2
    widths = [
        max(len(text) for text in [column, *(cells[i] for _name, cells in rows if i < len(cells))]) + 2
        for i, column in enumerate(columns)
    ]
    lines = [f"{title:<{width}}" + "".join(f"{c:>{w}}" for c, w in zip(columns, widths))]
    lines += [
        f"{name:<{width}}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths)) for name, cells in rows
    ]
    return "".join(line.rstrip() + "\n" for line in lines)


def _name(result: Result) -> str:
    return result["model"] + (f" (step {result['step']})" if result["step"] else "")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
