"""Many prompts: what is computed together, where, and that it changes no text."""

from __future__ import annotations

import pytest
import torch

from ekiden.errors import UserError
from ekiden.export.load import load_model
from ekiden.generation import Sampling, batch, continue_prompts, generate, plan_batches, share_batches
from ekiden.generation.batch import devices_for

PROMPTS = ["The river runs down from the hill and", "x", "नदी पहाड़ से", "De", "The", "water " * 40, "पत्थर"]
GREEDY = Sampling(max_new_tokens=12, temperature=0)


@pytest.fixture(scope="module", params=["gpt2", "gemma3"])
def loaded(request, folders):
    return load_model(folders / request.param, "cpu")


def test_together_and_one_by_one_give_the_same_greedy_texts(loaded):
    alone = [continue_prompts(loaded, [prompt], GREEDY)[0] for prompt in PROMPTS]
    for size in (2, 3, 16):
        assert continue_prompts(loaded, PROMPTS, GREEDY, batch_size=size) == alone
    assert len({one.text for one in alone}) > 3
    assert (
        max(one.tokens for one in alone) == 12
    )  # what these models say, and where they end, depends on torch


def test_batches_are_made_by_length_and_hold_every_prompt_once():
    lengths = [9, 1, 5, 5, 30, 2, 1]
    batches = plan_batches(lengths, 3)
    assert batches == [[1, 6, 5], [2, 3, 0], [4]]
    assert plan_batches([], 3) == []


def test_shares_are_even():
    shares = share_batches([7, 7, 6, 1, 1, 1], 3)
    assert sorted(number for share in shares for number in share) == list(range(6))
    loads = sorted(sum([7, 7, 6, 1, 1, 1][i] for i in share) for share in shares)
    assert loads == [7, 8, 8]
    assert share_batches([4], 2) == [[0], []]


def test_devices_in_processes_of_their_own_give_the_same(folders, capsys):
    loaded = load_model(folders / "gpt2", "cpu")
    expected = continue_prompts(loaded, PROMPTS, GREEDY, batch_size=2)
    assert continue_prompts(loaded, PROMPTS, GREEDY, batch_size=2, devices=["cpu", "cpu"]) == expected
    assert "4 batches over cpu, cpu" in capsys.readouterr().err


def test_every_gpu_that_a_batch_is_left_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert devices_for("auto", 100, 16) == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert devices_for("auto", 17, 16) == ["cuda:0", "cuda:1"]
    assert devices_for("auto", 16, 16) == ["auto"]
    assert devices_for("cuda:3", 100, 16) == ["cuda:3"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices_for("auto", 100, 16) == ["auto"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_what_does_not_fit_is_done_in_halves(error, loaded, monkeypatch, capsys):
    expected = generate(loaded.model, loaded.tokenizer, PROMPTS, max_new_tokens=6)
    together = batch._continue_together

    def small(model, tokenizer, rows, sampling):
        if len(rows) > 2:
            raise error
        return together(model, tokenizer, rows, sampling)

    monkeypatch.setattr(batch, "_continue_together", small)
    assert generate(loaded.model, loaded.tokenizer, PROMPTS, max_new_tokens=6) == expected
    assert "7 prompts at a time do not fit into memory; going on with 4" in capsys.readouterr().err


def test_one_prompt_that_does_not_fit_is_said_and_a_defect_is_not_hidden(loaded, monkeypatch):
    def none(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(batch, "_continue_together", none)
    with pytest.raises(UserError, match="one prompt of 3 tokens and --max-new-tokens 6 do not fit"):
        generate(loaded.model, loaded.tokenizer, ["x"], max_new_tokens=6)

    def defect(*_arguments):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(batch, "_continue_together", defect)
    with pytest.raises(RuntimeError, match="shapes"):
        generate(loaded.model, loaded.tokenizer, ["x", "y"])
