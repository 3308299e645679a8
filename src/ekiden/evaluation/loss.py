"""Loss, perplexity and bits per byte of a model on the test split, per language.

The trainer evaluates its model every so often, `ekiden evaluate` any saved one. The text is read in consecutive
windows; every token but the first of the split is predicted exactly once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ekiden.errors import UserError
from ekiden.export.load import load_model
from ekiden.modeling.build import head_weight, hidden_states
from ekiden.modeling.device import Precision, select_device, select_precision
from ekiden.modeling.loss import IGNORE, chunked_cross_entropy
from ekiden.tokens.format import TokenDataset, TokenStream


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    dataset: TokenDataset,
    length: int,
    tokens_per_language: int | None = None,
    batch_size: int = 8,
    precision: Precision | None = None,
) -> dict[str, Any]:
    """Return the figures of `model` on every language's test split.

    Args:
        length: context, in tokens.
        tokens_per_language: evaluate the first ones only; None: all.

    Returns:
        {"languages": {LANG: {"loss" (nats a token), "perplexity", "bits_per_byte", "tokens"}},
        "macro": mean over languages, "micro": over all tokens}. A language without test tokens has "tokens": 0 and
        no other figure. Bits per byte = loss / ln 2 x tokens / bytes, with the bytes a token of the whole split.
    """
    was_training = model.training
    model.eval()
    languages: dict[str, dict[str, float]] = {}
    for language in dataset.languages:
        stream = dataset.split(language, "test")
        count = min(stream.tokens - 1, tokens_per_language or stream.tokens)
        if count < 1:
            languages[language] = {"tokens": 0}
            continue
        total = summed_loss(model, stream, count, length, batch_size, precision)
        languages[language] = figures(total / count, count, stream.bytes / stream.tokens)
    model.train(was_training)
    return {"languages": languages, **averages(languages)}


def summed_loss(
    model: torch.nn.Module,
    stream: TokenStream,
    count: int,
    length: int,
    batch_size: int,
    precision: Precision | None,
) -> float:
    """Return the summed loss, in nats, of predicting the tokens 1..count of `stream`."""
    device = head_weight(model).device
    dtype = precision.dtype if precision else torch.float32
    total = 0.0
    for first in range(0, count, length * batch_size):
        inputs, targets = [], []
        for start in range(first, min(first + length * batch_size, count), length):
            window = stream.read(start, min(length, count - start) + 1)
            padding = length - (len(window) - 1)
            inputs.append(np.pad(window[:-1], (0, padding)))
            targets.append(np.pad(window[1:], (0, padding), constant_values=IGNORE))
        ids, wanted = (torch.from_numpy(np.stack(part)).to(device) for part in (inputs, targets))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            hidden = hidden_states(model, ids)
            loss = chunked_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), head_weight(model), wanted.reshape(-1))
        total += float(loss)
    return total


def figures(loss: float, tokens: int, bytes_per_token: float) -> dict[str, float]:
    """Return loss, perplexity and bits per byte for a mean loss in nats a token."""
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
        "tokens": tokens,
    }


def averages(languages: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the macro average (every language counts the same) and the micro average (every token does)."""
    measured = [values for values in languages.values() if values["tokens"]]
    if not measured:
        return {"macro": {}, "micro": {}}
    tokens = sum(values["tokens"] for values in measured)
    names = ("loss", "bits_per_byte")
    macro = {name: sum(values[name] for values in measured) / len(measured) for name in names}
    micro = {name: sum(values[name] * values["tokens"] for values in measured) / tokens for name in names}
    for average in (macro, micro):
        average["perplexity"] = math.exp(min(average["loss"], 700.0))
    return {"macro": macro, "micro": micro}


def unigram_cross_entropy(dataset: TokenDataset, language: str) -> float:
    """Return the nats a token of the test split under a unigram model of the training tokens.

    Add-one smoothing (Laplace). A model that has learned no more than which tokens are frequent reaches this figure.
    """
    counts = np.ones(dataset.vocab_size)
    train, test = dataset.split(language, "train"), dataset.split(language, "test")
    for start in range(0, train.tokens, 1 << 22):
        part = train.read(start, min(1 << 22, train.tokens - start))
        counts += np.bincount(part, minlength=dataset.vocab_size)
    if test.tokens < 2:
        raise UserError(f"{dataset.path} has no test tokens for {language}; preprocess with a larger --test-split")
    log_probabilities = np.log(counts / counts.sum())
    return float(-log_probabilities[test.read(1, test.tokens - 1)].mean())


def evaluate_model(
    model: str, dataset_path: str, max_tokens: int | None = None, batch_size: int = 8, device: str = "auto"
) -> dict[str, Any]:
    """Evaluate a saved model: `ekiden evaluate`.

    Returns:
        As `evaluate`, with "unigram_loss" beside each language's loss.

    Raises:
        UserError: no model, no shards, or shards of another tokenizer.
    """
    target = select_device(device)
    loaded = load_model(model, target)
    dataset = TokenDataset.open(dataset_path)
    if dataset.tokenizer_sha256 != loaded.tokenizer.sha256:
        raise UserError(
            f"--dataset-path {dataset_path} was made with another tokenizer than {loaded.path}; preprocess the corpus with "
            f"--tokenizer {loaded.path}"
        )
    length = int(loaded.model.config.max_position_embeddings)
    precision = select_precision(target, "auto")
    result = evaluate(loaded.model, dataset, length, max_tokens, batch_size, precision)
    for language, values in result["languages"].items():
        if values["tokens"]:
            values["unigram_loss"] = unigram_cross_entropy(dataset, language)
    return result


def format_evaluation(result: dict[str, Any]) -> str:
    """Return the figures as a table."""
    rows = [f"{'language':<14}{'loss':>9}{'perplexity':>12}{'bits/byte':>11}{'tokens':>12}{'unigram loss':>14}"]
    for name, values in [*result["languages"].items(), ("macro", result["macro"]), ("micro", result["micro"])]:
        if "loss" not in values:
            rows.append(f"{name:<14}  no test tokens")
            continue
        tokens = f"{values['tokens']:,}" if "tokens" in values else ""
        unigram = f"{values['unigram_loss']:.4f}" if "unigram_loss" in values else ""
        rows.append(
            f"{name:<14}{values['loss']:>9.4f}{values['perplexity']:>12.2f}{values['bits_per_byte']:>11.4f}"
            f"{tokens:>12}{unigram:>14}"
        )
    return "\n".join(row.rstrip() for row in rows)
