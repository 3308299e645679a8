"""Evaluation: every token once, in any windows; the right units; nothing left out without a word."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ekiden.config import TrainConfig
from ekiden.evaluation.loss import evaluate, format_evaluation, unigram_cross_entropy, windows
from ekiden.modeling.build import build_model
from ekiden.modeling.device import Precision

VOCABULARY = 11


class Stream:
    """A token stream in memory."""

    def __init__(self, tokens: np.ndarray, size: int = 0) -> None:
        self.values, self.tokens, self.bytes = tokens, len(tokens), size
        self.documents = int(len(tokens) > 0)

    def read(self, start: int, count: int) -> np.ndarray:
        assert start >= 0 and start + count <= self.tokens, "evaluation never reads beyond the text"
        return self.values[start : start + count].astype(np.int64)


class Dataset:
    """A dataset in memory: {language: (training tokens, test tokens)}, three bytes a test token."""

    vocab_size = VOCABULARY

    def __init__(self, **languages: tuple[list[int], list[int]]) -> None:
        self.languages = sorted(languages)
        self.streams = {
            (name, split): Stream(np.array(tokens, dtype=np.uint16), 3 * len(tokens))
            for name, both in languages.items()
            for split, tokens in zip(("train", "test"), both)
        }

    def split(self, language: str, split: str) -> Stream:
        return self.streams[language, split]


class Bigram(torch.nn.Module):
    """A language model whose prediction depends on the last token alone, so windows cannot matter."""

    def __init__(self, table: np.ndarray) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.from_numpy(np.log(table)).float().T.contiguous())
        self.transformer = self.body
        self.seen_training: list[bool] = []

    def body(self, input_ids: torch.Tensor, use_cache: bool) -> object:
        self.seen_training.append(self.training)
        hidden = torch.nn.functional.one_hot(input_ids, VOCABULARY).float()
        return type("Output", (), {"last_hidden_state": hidden})

    def get_output_embeddings(self) -> object:
        return type("Head", (), {"weight": self.table})


def bigram(seed: int = 0) -> tuple[Bigram, np.ndarray]:
    table = np.random.default_rng(seed).dirichlet(np.ones(VOCABULARY), size=VOCABULARY)
    return Bigram(table), table


def text(count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count).tolist()


def expected_loss(table: np.ndarray, tokens: list[int]) -> float:
    return float(np.mean([-math.log(table[a, b]) for a, b in zip(tokens, tokens[1:])]))


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 200), st.integers(1, 40), st.integers(1, 5), st.one_of(st.none(), st.integers(1, 250)))
def test_every_token_is_predicted_once_in_any_windows(count, length, batch_size, limit):
    model, table = bigram()
    tokens = text(count)
    result = evaluate(model, Dataset(x=([], tokens)), length, limit, batch_size)["languages"]["x"]
    predicted = min(count - 1, limit or count)
    assert result["tokens"] == predicted
    assert result["loss"] == pytest.approx(expected_loss(table, tokens[: predicted + 1]), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 6), st.data())
def test_windows_are_the_text_in_order_with_padding_at_the_very_end(total, length, batch_size, data):
    count = data.draw(st.integers(1, total))
    stream = Stream(np.arange(total + 1))
    batches = list(windows(stream, count, length, batch_size))
    inputs, targets = (np.concatenate([pair[i].ravel() for pair in batches]) for i in (0, 1))
    assert inputs[:count].tolist() == list(range(count))
    assert targets[:count].tolist() == list(range(1, count + 1))
    assert (inputs[count:] == count).all(), "never the padding id, of which transformers warns"
    assert (targets[count:] == -100).all() and len(targets) - count < min(length, count)
    assert all(pair[0].shape == pair[1].shape and len(pair[0]) <= batch_size for pair in batches)


def test_bits_per_byte_is_all_bits_over_all_bytes():
    model, _ = bigram()
    tokens = text(101)
    row = evaluate(model, Dataset(x=([], tokens)), 16)["languages"]["x"]
    assert row["bytes"] == 303
    assert row["bits_per_byte"] == pytest.approx(row["loss"] * 100 / math.log(2) / 303)
    capped = evaluate(model, Dataset(x=([], tokens)), 16, tokens_per_language=50)["languages"]["x"]
    assert capped["bytes"] == round(303 * 50 / 100)
    assert capped["bits_per_byte"] == pytest.approx(capped["loss"] * 50 / math.log(2) / capped["bytes"])


def test_macro_counts_languages_alike_and_micro_counts_tokens_alike():
    model, table = bigram()
    long, short = text(301, 2), text(11, 3)
    result = evaluate(model, Dataset(a=([], long), b=([], short)), 16)
    losses = [expected_loss(table, long), expected_loss(table, short)]
    assert abs(losses[0] - losses[1]) > 0.01
    assert result["macro"]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert result["macro"]["perplexity"] == pytest.approx(math.exp(sum(losses) / 2), rel=1e-4)
    rows = result["languages"]
    assert result["macro"]["bits_per_byte"] == pytest.approx(
        (rows["a"]["bits_per_byte"] + rows["b"]["bits_per_byte"]) / 2
    )
    assert result["micro"]["loss"] == pytest.approx((losses[0] * 300 + losses[1] * 10) / 310, rel=1e-5)
    assert (result["micro"]["tokens"], result["micro"]["bytes"]) == (310, 936)


def test_a_language_without_test_tokens_is_reported_and_left_out_of_the_averages():
    model, table = bigram()
    tokens = text(50)
    result = evaluate(model, Dataset(a=([], tokens), empty=(text(9), []), one=([], [4])), 16)
    for name in ("empty", "one"):
        assert result["languages"][name] == {
            "loss": None,
            "perplexity": None,
            "bits_per_byte": None,
            "tokens": 0,
            "bytes": 0,
        }
    assert result["macro"]["loss"] == pytest.approx(expected_loss(table, tokens), rel=1e-5)
    lines = format_evaluation(result).splitlines()
    assert sum("no test tokens" in line for line in lines) == 2
    nothing = evaluate(model, Dataset(empty=(text(9), [])), 16)
    assert nothing["macro"] == nothing["micro"] == {}
    assert "no test tokens" in format_evaluation(nothing)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_evaluated_in_evaluation_mode_and_left_as_it_was(training):
    model, _ = bigram()
    model.train(training)
    before, state = model.table.detach().clone(), torch.get_rng_state()
    evaluate(model, Dataset(a=([], text(50))), 16)
    assert set(model.seen_training) == {False} and model.training is training
    assert model.table.grad is None and torch.equal(model.table, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_infinite_perplexity_is_no_crash():
    table = np.full((VOCABULARY, VOCABULARY), 1e-300)
    table[:, 0] = 1.0
    model = Bigram(table)
    model.table.data *= 1000
    result = evaluate(model, Dataset(a=([], [1] * 20)), 16)
    assert result["languages"]["a"]["perplexity"] == math.inf
    assert "inf" in format_evaluation(result)


# -- real models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3"])
def test_a_real_model_gives_what_its_logits_give_window_by_window(model_type):
    config = TrainConfig(
        model_type=model_type,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2 if model_type == "gpt2" else 1,
        head_dim=16,
        intermediate_size=64,
        max_length=16,
        sliding_window=8,
    )
    model = build_model(config, VOCABULARY, None, None, None, seed=0)
    tokens = text(75)
    with torch.no_grad():
        nats = 0.0
        for first in range(0, 74, 16):
            piece = torch.tensor([tokens[first : first + 17]])
            logits = model.eval()(piece[:, :-1]).logits[0]
            nats += torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum").item()
    dataset = Dataset(x=([], tokens))
    loss = evaluate(model, dataset, 16)["languages"]["x"]["loss"]
    assert loss == pytest.approx(nats / 74, abs=1e-5)
    assert evaluate(model, dataset, 16)["languages"]["x"]["loss"] == loss, "deterministic to the last bit"
    for batch_size in (1, 3):
        again = evaluate(model, dataset, 16, batch_size=batch_size)["languages"]["x"]["loss"]
        assert again == pytest.approx(loss, abs=1e-5)
    half = evaluate(model, dataset, 16, precision=Precision("bf16", torch.bfloat16, False))
    assert half["languages"]["x"]["loss"] == pytest.approx(loss, abs=0.05)
    assert half["languages"]["x"]["loss"] != loss


# -- the baseline ---------------------------------------------------------------------------------------------


def test_unigram_cross_entropy_is_that_of_smoothed_training_frequencies():
    train, test = [0] * 6 + [1] * 3, [5, 0, 1, 2, 0]
    p = {token: (train.count(token) + 1) / (len(train) + VOCABULARY) for token in range(VOCABULARY)}
    dataset = Dataset(x=(train, test))
    expected = -sum(math.log(p[token]) for token in test[1:]) / 4
    assert unigram_cross_entropy(dataset, "x") == pytest.approx(expected, rel=1e-12)
    assert unigram_cross_entropy(dataset, "x", 2) == pytest.approx(-math.log(p[0] * p[1]) / 2, rel=1e-12)


def test_unigram_cross_entropy_without_training_or_test_tokens():
    assert unigram_cross_entropy(Dataset(x=([], [1, 2, 3])), "x") == pytest.approx(math.log(VOCABULARY))
    assert unigram_cross_entropy(Dataset(x=([1], [])), "x") is None
    assert unigram_cross_entropy(Dataset(x=([1], [2])), "x") is None


def test_unigram_frequencies_of_a_long_text_are_of_pieces_from_all_of_it(monkeypatch):
    from ekiden.evaluation import loss

    tokens = [0] * 400 + [1] * 400 + [2] * 37
    exact = unigram_cross_entropy(Dataset(x=(tokens, [0, 1, 2, 1])), "x")
    monkeypatch.setattr(loss, "UNIGRAM_CHUNK", 10)
    assert unigram_cross_entropy(Dataset(x=(tokens, [0, 1, 2, 1])), "x") == pytest.approx(exact, rel=0.05)
    monkeypatch.setattr(loss, "UNIGRAM_CHUNKS", 20)
    assert unigram_cross_entropy(Dataset(x=(tokens, [0, 1, 2, 1])), "x") == pytest.approx(exact, rel=0.05)


# -- the table ------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_a_language_and_the_averages():
    row = {"loss": 3.14159, "perplexity": 23.1406, "bits_per_byte": 1.5, "tokens": 12345, "bytes": 40000}
    result = {
        "languages": {"english": row | {"unigram_loss": 7.25}, "कोंकणी": row | {"bits_per_byte": None}},
        "macro": {"loss": 3.0, "perplexity": 20.0, "bits_per_byte": 1.5},
        "micro": row,
    }
    one = format_evaluation(result | {"languages": {"english": row}}).splitlines()
    assert [line.split()[0] for line in one] == ["language", "english"]
    lines = format_evaluation(result).splitlines()
    assert [line.split()[0] for line in lines] == ["language", "english", "कोंकणी", "mean", "mean"]
    assert lines[1].split()[1:] == ["3.1416", "23.14", "1.5000", "12,345", "7.2500"]
    assert lines[2].split()[1:] == ["3.1416", "23.14", "-", "12,345"]
    assert lines[3].split()[3:] == ["3.0000", "20.00", "1.5000"]
