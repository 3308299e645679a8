"""Text from a trained model: for samples during training, for the command line, for a conversation.

Sampling is done here, token by token over the model's key/value cache, from a random stream of its own: the same
seed gives the same text, and training's random state is not touched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ekiden.errors import UsageError
from ekiden.export.load import load_model
from ekiden.modeling.device import select_device
from ekiden.tokenizer.load import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How a continuation is chosen.

    max_new_tokens: its length. temperature: 0 is always the likeliest token. top_k: among the k likeliest, 0: all.
    top_p: among the likeliest of this total probability (Holtzman et al. 2020, arXiv:1904.09751).
    repetition_penalty: above 1, tokens that stood before are less likely (Keskar et al. 2019, arXiv:1909.05858).
    """

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    repetition_penalty: float = 1.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UsageError(
                "generation needs max-new-tokens of at least 1, temperature and top-k of at least 0, top-p above 0 and at most 1"
            )
        if self.repetition_penalty <= 0:
            raise UsageError(f"repetition-penalty must be above 0, not {self.repetition_penalty}")


def generate(model: PreTrainedModel, tokenizer: Tokenizer, prompts: list[str], **settings: Any) -> list[str]:
    """Return the continuation of each prompt.

    Args:
        settings: fields of `Sampling`.

    Each prompt has its own random stream, so its text does not depend on the others.
    """
    sampling = Sampling(**settings)
    return ["".join(stream(model, tokenizer, prompt, sampling)) for prompt in prompts]


def stream(model: PreTrainedModel, tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece, never part of a character."""
    ids = prompt_ids(tokenizer, prompt)
    made: list[int] = []
    shown = 0
    for token in sample_tokens(model, tokenizer, ids, sampling):
        made.append(token)
        text = tokenizer.decode(made)
        # A character spelt in bytes decodes to U+FFFD until its last byte is there.
        if not text.endswith("\ufffd") and len(text) > shown:
            yield text[shown:]
            shown = len(text)
    text = tokenizer.decode(made)
    if len(text) > shown:
        yield text[shown:]


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the ids that stand before a continuation: BOS as documents begin, then the prompt.

    Without BOS an empty prompt begins after the end of some other document, as in training.
    """
    ids = tokenizer.encode(prompt)
    if tokenizer.bos_id is not None:
        return [tokenizer.bos_id, *ids]
    return ids or [tokenizer.eos_id if tokenizer.eos_id is not None else 0]


@torch.no_grad()
def sample_tokens(
    model: PreTrainedModel, tokenizer: Tokenizer, ids: list[int], sampling: Sampling
) -> Iterator[int]:
    """Yield tokens until EOS or the length. Context beyond the model's length falls off at the left."""
    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(sampling.seed)
    limit = int(model.config.max_position_embeddings)
    context = ids[-limit:]
    cache, fresh = None, context
    for _ in range(sampling.max_new_tokens):
        if len(context) > limit:
            # Positions end here: go on with the newer half, read anew.
            context = context[-(limit // 2) :]
            cache, fresh = None, context
        output = model(torch.tensor([fresh], device=device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        token = choose(output.logits[0, -1].float().cpu(), context, sampling, random)
        if token == tokenizer.eos_id:
            return
        yield token
        context = [*context, token]
        fresh = [token]


def choose(logits: torch.Tensor, context: list[int], sampling: Sampling, random: torch.Generator) -> int:
    """Return the next token for `logits` [vocabulary]."""
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(context)))
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    ordered, order = torch.sort(logits / sampling.temperature, descending=True, stable=True)
    if sampling.top_k:
        ordered[sampling.top_k :] = -torch.inf
    probabilities = torch.softmax(ordered, dim=-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= sampling.top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=random)])


HELP = """/NAME VALUE changes a setting (temperature, top-k, top-p, repetition-penalty, max-new-tokens, seed);
/settings shows them, /reset forgets the text so far, /quit ends. Anything else is continued."""


def converse(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    sampling: Sampling,
    ask: Callable[[], str | None],
    write: Callable[[str], None],
) -> None:
    """Continue what `ask` returns, again and again, each on top of the text so far, until it returns None or /quit."""
    history = ""
    while (line := ask()) is not None:
        if line == "/quit":
            return
        if line == "/reset":
            history = ""
        elif line == "/settings":
            write(" ".join(f"{f.name.replace('_', '-')} {getattr(sampling, f.name)}" for f in fields(sampling)) + "\n")
        elif line.startswith("/"):
            sampling = change_setting(sampling, line, write)
        else:
            history += line
            for piece in stream(model, tokenizer, history, sampling):
                write(piece)
                history += piece
            write("\n")


def change_setting(sampling: Sampling, line: str, write: Callable[[str], None]) -> Sampling:
    """Return `sampling` with the change that `/name value` asks for; say what is wrong with it otherwise."""
    name, _, value = line[1:].partition(" ")
    name = name.replace("-", "_")
    types = {field.name: type(getattr(sampling, field.name)) for field in fields(sampling)}
    if name not in types:
        write(HELP + "\n")
        return sampling
    try:
        return replace(sampling, **{name: types[name](value)})
    except (ValueError, UsageError) as error:
        write(f"{error}\n")
        return sampling


def run_generate(
    model_path: str, prompts: list[str], interactive: bool = False, device: str = "auto", **settings: Any
) -> None:
    """Print continuations of `prompts`, or converse on the terminal: `ekiden generate`.

    Raises:
        UserError: no model. UsageError: nothing to continue.
    """
    sampling = Sampling(**settings)
    if not prompts and not interactive:
        raise UsageError("there is nothing to continue; give --prompt TEXT or --interactive")
    loaded = load_model(model_path, select_device(device))

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def ask() -> str | None:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return None

    for prompt in prompts:
        write(prompt)
        for piece in stream(loaded.model, loaded.tokenizer, prompt, sampling):
            write(piece)
        write("\n")
    if interactive:
        converse(loaded.model, loaded.tokenizer, sampling, ask, write)
