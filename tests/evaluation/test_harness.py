"""lm-evaluation-harness on an exported model, offline, with tasks of our own; the figures recomputed here."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from ekiden.errors import UsageError, UserError
from ekiden.evaluation.harness import Harness, tokenizer_with_bos
from ekiden.export.huggingface import export_huggingface
from ekiden.export.load import load_model
from small_models import small_model, small_tokenizer

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'ekiden[harness]'")

QUESTIONS = [
    {"question": f"The river runs {number}", "choices": [" down", " beside the hill"], "answer": number % 2}
    for number in range(6)
]
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: {target}
metric_list: [{{metric: {metric}}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Write the questions, a multiple-choice task and one that scores whole texts; return both files, by commas."""
    root = tmp_path_factory.mktemp("tasks")
    data = root / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    choice = TASK.format(
        name="choice",
        data=data,
        kind="multiple_choice",
        text="{{question}}",
        target="answer",
        metric="acc",
    )
    whole = TASK.format(
        name="whole",
        data=data,
        kind="loglikelihood_rolling",
        text="",
        target='"{{question}}"',
        metric="byte_perplexity",
    )
    (root / "choice.yaml").write_text(choice + 'doc_to_choice: "{{choices}}"\n')
    (root / "whole.yaml").write_text(whole)
    return f"{root}/choice.yaml, {root}/whole.yaml"


@pytest.fixture(scope="module", params=["gpt2-10m", "gemma3-tiny"])
def loaded(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    tokenizer = small_tokenizer(root)
    return load_model(export_huggingface(small_model(request.param, tokenizer), tokenizer, root / "m"), "cpu")


def log_likelihood(loaded, text, begin=""):
    """Return the log-probability of what follows `begin` in `text`, read as in training: after BOS."""
    ids = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(text)]
    first = 1 + len(loaded.tokenizer.encode(begin)) if begin else 1
    with torch.no_grad():
        logs = loaded.model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(dim=-1)
    return sum(float(logs[i - 1, ids[i]]) for i in range(first, len(ids)))


def test_figures_are_those_of_the_model_after_bos(loaded, tasks):
    found = Harness(tasks).run(loaded, batch_size=4)["tasks"]
    right = 0
    for question in QUESTIONS:
        text = question["question"]
        scores = [log_likelihood(loaded, text + choice, text) for choice in question["choices"]]
        right += scores.index(max(scores)) == question["answer"]
    assert found["choice"]["metrics"]["acc"]["value"] == pytest.approx(right / len(QUESTIONS))
    assert found["choice"]["samples"] == len(QUESTIONS)
    total = sum(log_likelihood(loaded, question["question"]) for question in QUESTIONS)
    size = sum(len(question["question"].encode()) for question in QUESTIONS)
    assert found["whole"]["metrics"]["byte_perplexity"]["value"] == pytest.approx(
        math.exp(-total / size), rel=1e-4
    )


def test_a_limit_and_bos(loaded, tasks):
    found = Harness(tasks, limit=2).run(loaded)
    assert (found["limit"], found["tasks"]["choice"]["samples"]) == (2, 2)
    tokenizer = tokenizer_with_bos(loaded)
    text = "The river"
    assert tokenizer(text)["input_ids"] == [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(text)]


def test_tasks_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"x\.yaml does not exist; give a task file"):
        Harness(f"{tmp_path}/x.yaml")


def test_a_name_that_is_no_task():
    with pytest.raises(UsageError, match="is not a task of lm_eval; did you mean 'arc_easy'"):
        Harness("arc_eazy")


def test_a_task_that_fails_is_one_sentence(loaded, tmp_path):
    text = TASK.format(
        name="broken", data=tmp_path / "none", kind="multiple_choice", text="x", target="0", metric="acc"
    )
    (tmp_path / "broken.yaml").write_text(text + 'doc_to_choice: "{{choices}}"\n')
    with pytest.raises(UserError, match=r"broken\.yaml failed on"):
        Harness(f"{tmp_path}/broken.yaml").run(loaded)
