"""Text from a trained model: batches of prompts, a stream of one, a conversation on a terminal.

Takes a model and its tokenizer (`export.load`), gives continuations. The loop is our own, over transformers'
key/value cache, because each prompt draws from a random stream of its own: a text depends on the seed, its prompt
and its settings, never on the prompts beside it, and training's random state is not touched.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from ekiden.errors import UsageError, UserError, nearest
from ekiden.export.load import load_model
from ekiden.progress import say
from ekiden.tokenizer.load import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
FRACTION_BITS = 40
"""Probabilities are summed as whole numbers of 2^-40: such sums are the same in any order, so on any device."""
DECODE_CONTEXT = 16
"""Ids of the prompt decoded with the new ones: a piece's leading space shows only after another piece."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    max_new_tokens: its length at most. temperature: 0 is always the likeliest. top_k: among the k likeliest, 0: all.
    top_p: among the likeliest of this total probability (Holtzman et al. 2020, arXiv:1904.09751).
    repetition_penalty: logits of tokens that occurred are divided by it, multiplied where negative (Keskar et al.
    2019, arXiv:1909.05858). seed: same seed, same text.
    """

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    repetition_penalty: float = 1.1
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < 100, "from 0 to 100"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (0 < self.repetition_penalty < 100, "above 0 and below 100"),
        }
        for name, (fine, meaning) in limits.items():
            if not fine:
                raise UsageError(f"--{name.replace('_', '-')} must be {meaning}, not {getattr(self, name)}")


def generate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    repetition_penalty: float = 1.1,
    seed: int = 0,
    batch_size: int = 16,
) -> list[str]:
    """Return the continuation of each prompt, without the prompt.

    Each prompt has its own random stream, so its text does not depend on the others; a prompt that occurs twice gets
    two texts. `batch_size` prompts are computed together, which changes only the last bits of the logits.

    Raises:
        UsageError: a setting out of range.
        UserError: an empty prompt and a tokenizer without BOS and EOS.
    """
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    rows = [prompt_ids(model, tokenizer, prompt) for prompt in prompts]
    generators = prompt_generators(prompts, seed)
    new_ids: list[list[int]] = [[] for _ in rows]
    # By length, so that a batch holds little padding.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        steps = next_tokens(
            model,
            [rows[i] for i in chosen],
            sampling,
            [generators[i] for i in chosen],
            tokenizer.vocab_size,
            tokenizer.eos_id,
        )
        for tokens in steps:
            for index, token in zip(chosen, tokens):
                if token is not None:
                    new_ids[index].append(token)
    return [continuation(tokenizer, row, new) for row, new in zip(rows, new_ids)]


def stream(model: PreTrainedModel, tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> Iterator[str]:
    """Yield the continuation of `prompt` in pieces as it grows; a character comes whole or not yet."""
    row = prompt_ids(model, tokenizer, prompt)
    generators = prompt_generators([prompt], sampling.seed)
    new_ids: list[int] = []
    shown = 0
    for (token,) in next_tokens(model, [row], sampling, generators, tokenizer.vocab_size, tokenizer.eos_id):
        if token is None:
            break
        new_ids.append(token)
        # The bytes of a character may be tokens of their own; until the last one they decode to U+FFFD.
        text = continuation(tokenizer, row, new_ids).rstrip(REPLACEMENT)
        if len(text) > shown:
            yield text[shown:]
            shown = len(text)
    rest = continuation(tokenizer, row, new_ids)[shown:]
    if rest:
        yield rest


def prompt_ids(model: PreTrainedModel, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the ids the model reads for `prompt`: BOS where the tokenizer has one, then the text.

    A prompt longer than the model's context is cut from the left, which is said.

    Raises:
        UserError: nothing to begin with.
    """
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = [*begin, *tokenizer.encode(prompt)]
    if not ids:
        # After the end of a document another one begins, as in training.
        if tokenizer.eos_id is None:
            raise UserError(
                "an empty --prompt needs a tokenizer with BOS or EOS, which this one lacks; give some text"
            )
        ids = [tokenizer.eos_id]
    context = int(model.config.max_position_embeddings)
    if len(ids) > context:
        say(f"prompt of {len(ids)} tokens: the model reads its last {context}, the length of its context")
    return ids[-context:]


def prompt_generators(prompts: Sequence[str], seed: int) -> list[torch.Generator]:
    """Return a generator for each prompt, seeded by `seed`, its text, and how often it occurred before."""
    generators, occurred = [], dict.fromkeys(prompts, 0)
    for prompt in prompts:
        key = f"{seed}\0{occurred[prompt]}\0{prompt}".encode("utf-8", "surrogatepass")
        occurred[prompt] += 1
        number = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1
        generators.append(torch.Generator().manual_seed(number))
    return generators


def continuation(tokenizer: Tokenizer, prompt: list[int], new_ids: list[int]) -> str:
    """Return the text that `new_ids` add after `prompt`."""
    before = prompt[-DECODE_CONTEXT:]
    head, whole = tokenizer.decode(before), tokenizer.decode([*before, *new_ids])
    return whole[len(head) :] if whole.startswith(head) else tokenizer.decode(new_ids)


@torch.no_grad()
def next_tokens(
    model: PreTrainedModel,
    rows: list[list[int]],
    sampling: Sampling,
    generators: list[torch.Generator],
    vocab_size: int,
    eos_id: int | None,
) -> Iterator[list[int | None]]:
    """Yield the next token of every row until all have ended; None for a row that has.

    A row ends before EOS or at `max_new_tokens`. Where a row is full (GPT-2 has no positions beyond its context), it
    goes on with its newer half, read anew.

    Args:
        rows: ids of each prompt.
        vocab_size: pieces of the tokenizer; a model may have more rows than that, which mean nothing.
    """
    context = int(model.config.max_position_embeddings)
    views = [row[-context:] for row in rows]
    seen = torch.zeros(len(rows), vocab_size, dtype=torch.bool)
    for index, row in enumerate(rows):
        seen[index, row] = True
    seen = seen.to(model.device)
    ended = [False] * len(rows)
    cache: DynamicCache | None = None
    for _ in range(sampling.max_new_tokens):
        if cache is None:
            cache, (inputs, mask) = DynamicCache(config=model.config), pad_left(views, model.device)
        logits = _forward(model, inputs, mask, cache, context)[:, :vocab_size]
        tokens = choose(logits, seen, sampling, generators)
        ended = [before or token == eos_id for before, token in zip(ended, tokens)]
        if all(ended):
            return
        yield [None if end else token for end, token in zip(ended, tokens)]
        for index, token in enumerate(tokens):
            views[index].append(token)
            if len(views[index]) > context:
                views[index] = views[index][-(context // 2) :]
                cache = None
        inputs = torch.tensor([[token] for token in tokens], device=model.device)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        seen.scatter_(1, inputs, True)


def pad_left(rows: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask (1: a token), [rows, longest] each, with the padding on the left."""
    longest = max(len(row) for row in rows)
    ids = [[0] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _forward(
    model: PreTrainedModel, inputs: torch.Tensor, mask: torch.Tensor, cache: DynamicCache, context: int
) -> torch.Tensor:
    """Return the fp32 logits [b, V] after the last of `inputs` [b, n], extending `cache`; `mask` is [b, all so far]."""
    extra: dict[str, Any] = {}
    if not bool(mask.all()):
        positions = (mask.cumsum(1) - 1).clamp(0, context - 1)
        extra = {"attention_mask": mask, "position_ids": positions[:, -inputs.shape[1] :]}
    # A compiled body would be compiled again for every length of the cache.
    with _evaluating(model), torch.compiler.set_stance("force_eager"):
        output = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra)
    logits = output.logits[:, -1].float()
    if not torch.isfinite(logits).all():
        raise UserError(
            "the model's output is not finite: its weights are damaged; generate from another checkpoint"
        )
    return logits


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put the model into evaluation mode for a while: the trainer generates samples between its steps."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def choose(
    logits: torch.Tensor, seen: torch.Tensor, sampling: Sampling, generators: list[torch.Generator]
) -> list[int]:
    """Return one token for every row of `logits` [b, V].

    Args:
        seen: [b, V], tokens that occurred in the row.
        generators: one a row; each gives one number a call, so that rows do not depend on one another.
    """
    if sampling.repetition_penalty != 1:
        penalised = torch.where(
            logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty
        )
        logits = torch.where(seen, penalised, logits)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1).tolist()
    ordered, tokens = (logits / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ordered, tokens = ordered[:, : sampling.top_k], tokens[:, : sampling.top_k]
    shares = (ordered.softmax(dim=-1).double() * 2**FRACTION_BITS).long()
    totals = shares.cumsum(dim=-1)
    # The nucleus: as many of the likeliest tokens as it takes to reach top_p (Holtzman et al. 2020).
    wanted = (totals[:, -1:].double() * sampling.top_p).long().clamp(min=1)
    last = (totals < wanted).sum(dim=-1, keepdim=True).clamp(max=totals.shape[1] - 1)
    draws = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators]).to(
        logits.device
    )
    points = (draws * totals.gather(1, last).double()).long()
    picked = torch.minimum((totals <= points).sum(dim=-1, keepdim=True), last)
    return tokens.gather(1, picked).squeeze(1).tolist()


# -- on a terminal --------------------------------------------------------------------------------------------


def run_generate(
    model_path: str, prompts: list[str], interactive: bool = False, device: str = "auto", **settings: Any
) -> None:
    """Print continuations of `prompts`, or converse on the terminal: `ekiden generate`.

    Raises:
        UserError: no such model. UsageError: a setting out of range, or nothing to continue.
    """
    sampling = Sampling(**settings)
    if not prompts and not interactive:
        raise UsageError("there is nothing to continue; give --prompt TEXT or --interactive")
    loaded = load_model(model_path, device)
    say(f"{loaded.path}" + (f" (step {loaded.step})" if loaded.step else ""))
    if len(prompts) == 1:
        _write(prompts[0])
        for piece in stream(loaded.model, loaded.tokenizer, prompts[0], sampling):
            _write(piece)
        _write("\n")
    elif prompts:
        texts = generate(loaded.model, loaded.tokenizer, prompts, **dataclasses.asdict(sampling))
        for prompt, text in zip(prompts, texts):
            _write(f"{prompt}{text}\n\n")
    if interactive:
        converse(loaded.model, loaded.tokenizer, sampling, _ask, _write)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _ask() -> str | None:
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() line editing and the lines before
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


HELP = """Type the beginning of a text and the model continues it; what you type next goes on from there.
An empty line lets it write on. Ctrl-C stops it.
  /temperature 0.8   /top-k 40   /top-p 0.95   /repetition-penalty 1.1   /max-new-tokens 128   /seed 0
  /settings          the settings as they are
  /history           the text so far
  /reset             forget the text so far
  /quit              the end, as Ctrl-D
"""


def converse(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    sampling: Sampling,
    ask: Callable[[], str | None],
    write: Callable[[str], None],
) -> None:
    """Continue what `ask` returns, again and again, each on top of the text so far, until None or /quit.

    Args:
        ask: returns a line, None at the end of the input.
        write: shows text, adding nothing.
    """
    conversation = Conversation(model, tokenizer, sampling, write)
    write("/help lists the commands, /quit ends\n")
    while (line := ask()) is not None:
        if line.startswith("/"):
            if not conversation.command(line[1:].split()):
                return
        else:
            conversation.answer(line)


class Conversation:
    """The text so far, and the settings it goes on with."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        sampling: Sampling,
        write: Callable[[str], None],
    ) -> None:
        self.model, self.tokenizer, self.sampling, self.write = model, tokenizer, sampling, write
        self.text = ""

    def answer(self, line: str) -> None:
        """Add `line` to the text, and what the model makes of it; show both."""
        space = " " if self.text and line and not self.text[-1].isspace() else ""
        self.text += space + line
        self.write(line)
        try:
            for piece in stream(self.model, self.tokenizer, self.text, self.sampling):
                self.text += piece
                self.write(piece)
        except KeyboardInterrupt:
            self.write(" [stopped]")
        self.write("\n")

    def command(self, words: list[str]) -> bool:
        """Do a command; return False where it ends the conversation."""
        name = words[0] if words else "help"
        settings = [field.name.replace("_", "-") for field in dataclasses.fields(Sampling)]
        if name in ("quit", "exit"):
            return False
        if name == "help":
            self.write(HELP)
        elif name == "settings":
            self.write("".join(f"{n} {getattr(self.sampling, n.replace('-', '_'))}\n" for n in settings))
        elif name == "history":
            self.write(f"{self.text}\n")
        elif name == "reset":
            self.text = ""
        elif name in settings:
            self._set(name, words[1:])
        else:
            commands = ["help", "settings", "history", "reset", "quit", *settings]
            self.write(f"there is no /{name}{nearest(name, commands)}\n")
        return True

    def _set(self, name: str, values: list[str]) -> None:
        field = name.replace("-", "_")
        kind = type(getattr(self.sampling, field))
        try:
            self.sampling = dataclasses.replace(self.sampling, **{field: kind(values[0])})
        except (IndexError, ValueError):
            self.write(f"/{name} needs a number, as /{name} {getattr(self.sampling, field)}\n")
        except UsageError as error:
            self.write(f"{error}\n")
        else:
            self.write(f"{name} {getattr(self.sampling, field)}\n")
