"""`ekiden generate` with every flag: side by side, JSON lines, files, and the benchmark."""

from __future__ import annotations

import io
import json

import pytest

from ekiden.cli import main
from ekiden.errors import UsageError
from ekiden.export.load import load_model
from ekiden.generation import Sampling, benchmark, benchmark_generation, generate


def run(capsys, *arguments):
    """Return (status, stdout, stderr) of `ekiden generate`."""
    status = 0
    try:
        main(["generate", *map(str, arguments), "--device", "cpu"])
    except SystemExit as ended:
        status = int(ended.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_several_models_side_by_side(folders, capsys):
    paths = [str(folders / name) for name in ("gpt2", "gemma3")]
    texts = {}
    for path in paths:
        loaded = load_model(path, "cpu")
        texts[path] = generate(loaded.model, loaded.tokenizer, ["The", "De"], max_new_tokens=5, seed=9)
    models = [word for path in paths for word in ("--model-path", path)]
    flags = ["--prompt", "The", "--prompt", "De", "--max-new-tokens", 5, "--seed", 9]
    _status, out, _err = run(capsys, *models, *flags)
    expected = "".join(
        f"=== {prompt}\n" + "".join(f"--- {path}\n{texts[path][index]}\n" for path in paths) + "\n"
        for index, prompt in enumerate(["The", "De"])
    )
    assert out == expected


def test_json_lines_hold_every_setting_that_was_given(folders, tmp_path, capsys):
    path, target = str(folders / "gemma3"), tmp_path / "texts.jsonl"
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The river"}\n{"prompt": "नदी"}\n')
    settings = {"temperature": 0.9, "top_k": 30, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.3}
    settings |= {"seed": 4, "max_new_tokens": 7, "batch_size": 1}
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
    files = ["--prompt-file", tmp_path / "prompts.jsonl", "--output", target]
    status, out, err = run(capsys, "--model-path", path, *files, "--json", *flags)
    assert (status, out) == (0, ""), err
    loaded = load_model(path, "cpu")
    texts = generate(loaded.model, loaded.tokenizer, ["The river", "नदी"], **settings)
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(one["prompt"], one["text"]) for one in found] == list(zip(["The river", "नदी"], texts))
    assert {(one["model"], one["step"], one["seed"]) for one in found} == {(path, None, 4)}
    assert all(1 <= one["tokens"] <= 7 for one in found)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--temperature", 3), ("--top-k", 1), ("--top-p", 0.01), ("--min-p", 1), ("--repetition-penalty", 30)],
)
def test_every_setting_changes_the_text(flag, value, folders, capsys):
    flags = ["--model-path", folders / "gpt2", "--prompt", "The river", "--max-new-tokens", 20]
    usual, changed = run(capsys, *flags)[1], run(capsys, *flags, flag, value)[1]
    assert usual.startswith("The river") and changed.startswith("The river")
    assert usual != changed


def test_what_is_piped_in_is_continued(folders, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("The river\n"))
    _status, out, _err = run(capsys, "--model-path", folders / "gpt2", "--max-new-tokens", 4)
    assert out.startswith("The river") and len(out) > len("The river\n")


def test_the_benchmark_is_a_table_and_json(folders, capsys):
    shapes = ["--benchmark-batch-sizes", "2,1", "--benchmark-prompt-lengths", "8,20,500"]
    flags = ["--model-path", folders / "gemma3", "--benchmark", *shapes, "--max-new-tokens", 4]
    status, out, err = run(capsys, *flags)
    assert status == 0, err
    *table, last = out.strip().splitlines()
    (result,) = json.loads(last)["benchmark"]
    rows = result["rows"]
    # A prompt of 500 leaves no room in a context of 32.
    assert [(r["batch_size"], r["prompt_tokens"], r["new_tokens"]) for r in rows] == [
        (1, 8, 4),
        (1, 20, 4),
        (2, 8, 4),
        (2, 20, 4),
    ]
    for row in rows:
        first = row["time_to_first_token_seconds"]
        assert row["prefill_tokens_per_second"] == pytest.approx(
            row["batch_size"] * row["prompt_tokens"] / first
        )
        assert row["decode_tokens_per_second"] > 0
        assert 50e6 < row["memory_bytes"] < 50e9
    assert len([line for line in table if line.endswith("MB")]) == 4
    assert json.loads(run(capsys, *flags, "--json")[1])["benchmark"][0]["dtype"] == "float32"


def test_what_does_not_fit_into_memory_is_a_row_of_its_own(folders, monkeypatch):
    loaded, timed = load_model(folders / "gpt2", "cpu"), benchmark._timed

    def small(model, rows, *others):
        if len(rows) > 1:
            raise MemoryError
        return timed(model, rows, *others)

    monkeypatch.setattr(benchmark, "_timed", small)
    result = benchmark_generation(loaded, Sampling(max_new_tokens=2), [1, 2], [4], repeats=1)
    assert [row["memory_bytes"] is None for row in result["rows"]] == [False, True]
    assert "does not fit into memory" in benchmark.format_benchmark(result)
    with pytest.raises(UsageError, match="must be 1 or more"):
        benchmark_generation(loaded, Sampling(), [0], [4])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--prompt", "x", "--batch-size", "0"], "--batch-size must be 1 or more, not 0"),
        (["--prompt", "x", "--min-p", "2"], "--min-p must be from 0 to 1, not 2.0"),
        (["--interactive", "--json"], "--interactive talks with one model on the terminal"),
        (["--benchmark", "--prompt", "x"], "--benchmark reads random tokens; leave out --prompt"),
        (["--benchmark", "--interactive"], "leave out --interactive"),
        (["--benchmark", "--benchmark-batch-sizes", "1,x"], "1,x is not a list of whole numbers"),
        (["--prompt", "x", "--json", "--output", "/nowhere/x"], "its folder does not exist"),
        (["--prompt", "x", "--json", "--output", "/"], "--output / is a folder"),
    ],
)
def test_mistakes_are_one_sentence(flags, sentence, folders, capsys):
    status, out, err = run(capsys, "--model-path", folders / "gpt2", *flags)
    assert status in (1, 2)
    assert sentence in err
    assert (out, err.count("\n")) == ("", 1)


def test_a_model_that_is_not_there_is_named_before_anything_is_loaded(folders, capsys):
    models = ["--model-path", folders / "gpt2", "--model-path", folders / "gemma2"]
    _status, out, err = run(capsys, *models, "--prompt", "x")
    assert "gemma2 does not exist; did you mean 'gemma3'?" in err
    assert out == ""
