"""What a corpus consists of, and what a mixture would make of it: `ekiden corpus inspect`.

A folder of token shards is told from its `dataset.json` at once (words are counted in a sample of its documents); a raw
corpus is read as a whole by worker processes. Shares and epochs come from `shares.plan_mixture`, so they are the ones
that training would have.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ekiden.corpus.cleaning import repeated
from ekiden.corpus.documents import divide, read_documents
from ekiden.corpus.ledger import Ledger
from ekiden.corpus.script import ScriptTally
from ekiden.corpus.sources import discover
from ekiden.errors import UsageError, UserError
from ekiden.optional import check_installed, require
from ekiden.progress import Progress, human_count, say
from ekiden.tokenizer.load import Tokenizer, load_tokenizer
from ekiden.tokens.format import TokenDataset
from ekiden.tokens.shares import plan_mixture
from ekiden.tokens.units import Unit, parse_count, plan_units
from ekiden.tokens.worker import worker_processes

TEMPERATURES = (1.0, 0.7, 0.5, 0.3, 0.0)
SAMPLED_DOCUMENTS = 256
"""Documents of each language of a shards folder whose words are counted."""

_BATCH_BYTES = 1 << 20
_BAR = 40


@dataclass
class Language:
    """What one language consists of.

    Attributes:
        documents, bytes: of text (UTF-8), without what was rejected.
        tokens: with BOS and EOS where the tokenizer has them; None: no tokenizer was given.
        training_tokens: without the test split; for a raw corpus all of them.
        fertility: tokens a word (what stands between white space); None: no tokenizer, or no words.
        rejected: records by reason.
        duplicates: documents whose text stood before, in any language; None: not counted.
        scripts: documents by the script they are mostly in.
    """

    documents: int = 0
    bytes: int = 0
    tokens: int | None = None
    training_tokens: int | None = None
    fertility: float | None = None
    rejected: dict[str, int] = field(default_factory=dict)
    duplicates: int | None = None
    scripts: dict[str, int] = field(default_factory=dict)


@dataclass
class Inspection:
    """All languages, and for each temperature the share and epochs of each at `budget` tokens (bytes: no tokenizer)."""

    languages: dict[str, Language]
    budget: int
    unit: str
    mixtures: dict[str, dict[str, dict[str, float]]]

    def as_json(self) -> str:
        """Return everything as one JSON object."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    def describe(self) -> str:
        """Return the tables and bars for a terminal."""
        return "\n".join([*self._contents(), "", *self._mixture(), "", *self._bars()])

    def _contents(self) -> list[str]:
        head = f"{'language':<14}{'documents':>11}{'bytes':>10}{'tokens':>10}{'tokens/word':>13}{'bytes/token':>13}"
        rows = [head + f"{'rejected':>10}{'duplicates':>12}"]
        for name, language in self.languages.items():
            tokens = human_count(language.tokens) if language.tokens is not None else "-"
            fertility = f"{language.fertility:.2f}" if language.fertility else "-"
            ratio = f"{language.bytes / language.tokens:.2f}" if language.tokens else "-"
            twice = f"{language.duplicates:,}" if language.duplicates is not None else "-"
            rows.append(
                f"{name:<14}{language.documents:>11,}{human_count(language.bytes) + 'B':>10}{tokens:>10}{fertility:>13}"
                f"{ratio:>13}{sum(language.rejected.values()):>10,}{twice:>12}"
            )
            rows += [
                f"{'':<14}rejected: {count:,} ({why})" for why, count in sorted(language.rejected.items())
            ]
        return rows

    def _mixture(self) -> list[str]:
        rows = [f"share, and epochs of {human_count(self.budget)} {self.unit}, by --temperature:"]
        rows.append(f"{'language':<14}" + "".join(f"{temperature:>18}" for temperature in self.mixtures))
        for name in self.languages:
            cells = [values.get(name) for values in self.mixtures.values()]
            shown = (f"{c['share']:.1%} {c['epochs']:.3g}x" if c else "-" for c in cells)
            rows.append(f"{name:<14}" + "".join(f"{cell:>18}" for cell in shown))
        return rows

    def _bars(self) -> list[str]:
        rows = []
        for temperature, values in self.mixtures.items():
            for name, cell in values.items():
                bar = "█" * max(1, round(_BAR * cell["share"]))
                rows.append(f"{temperature:>4} {name:<14}{bar:<{_BAR}} {cell['epochs']:.3g} epochs")
        return rows

    def plot(self, path: str) -> None:
        """Write the shares and epochs as an HTML page that needs no network.

        Raises:
            UserError: plotly is missing, or the name ends in something else.
        """
        check_plot(path)
        graph_objects = require("plotly.graph_objects", "--plot", extra="report")
        figure = graph_objects.Figure(
            [
                graph_objects.Bar(
                    name=name,
                    x=[f"temperature {t}" for t in self.mixtures],
                    y=[
                        100 * values[name]["share"] if name in values else 0
                        for values in self.mixtures.values()
                    ],
                    text=[
                        f"{v[name]['epochs']:.3g} epochs" if name in v else "" for v in self.mixtures.values()
                    ],
                )
                for name in self.languages
            ]
        )
        figure.update_layout(
            barmode="stack",
            yaxis_title="% of the samples",
            title=f"Mixture of {human_count(self.budget)} {self.unit}",
        )
        try:
            figure.write_html(path, include_plotlyjs=True)
        except OSError as error:
            raise UserError(
                f"--plot {path} could not be written ({error.strerror}); give another file"
            ) from None


def check_plot(path: str) -> None:
    """Refuse a plot that could not be written before a corpus is read for it.

    Raises:
        UserError: plotly is missing, or the name ends in something else.
    """
    if not path.endswith(".html"):
        raise UsageError(f"--plot must name a file ending in .html, not {path}")
    check_installed("plotly", "--plot", extra="report")


def inspect(
    corpus: list[str],
    tokenizer: str | None = None,
    token_budget: str | int | None = None,
    num_proc: int | None = None,
    language: str | None = None,
    txt_documents: str = "blank-line",
    verify: bool = False,
) -> Inspection:
    """Return what `corpus` (or one folder of token shards) consists of.

    Args:
        corpus: as `tokens.build.preprocess` takes it, or one folder that it wrote.
        tokenizer: SentencePiece .model, tokenizer folder or hub id; for a raw corpus only.
        token_budget: tokens of the run to plan ('1B'); without a tokenizer, bytes of text. None: as many as there are.
        verify: compare the hash of every file of the shards first, as after a copy from another machine.

    Raises:
        UserError: corpus or tokenizer are missing or damaged, or hold nothing; a worker process died.
    """
    if num_proc is not None and num_proc < 1:
        raise UsageError(f"--num-proc must be at least 1 worker process, not {num_proc}")
    budget = parse_count(token_budget, "--token-budget") if token_budget is not None else None
    if len(corpus) == 1 and (Path(corpus[0]) / "dataset.json").exists():
        if tokenizer is not None:
            raise UsageError("--tokenizer is not for token shards, which hold their own; leave it out")
        dataset = TokenDataset.open(corpus[0])
        if verify:
            say(f"{dataset.verify()} files of {corpus[0]} have the hashes they were written with")
        languages = of_shards(dataset)
    elif verify:
        raise UsageError(
            "--verify is for a folder of token shards; give the --output-dir of `ekiden preprocess`"
        )
    else:
        languages = of_corpus(plan_units(discover(corpus, language)), tokenizer, num_proc, txt_documents)
    return plan(languages, budget)


def plan(languages: dict[str, Language], budget: int | None) -> Inspection:
    """Return the inspection with its mixtures.

    Raises:
        UserError: there is no text at all.
    """
    counted = all(language.tokens is not None for language in languages.values())
    sizes = {
        name: (language.training_tokens if counted else language.bytes) or 0
        for name, language in languages.items()
    }
    sizes = {name: size for name, size in sizes.items() if size}
    if not sizes:
        raise UserError("the corpus holds no document; look at the reasons that `ekiden preprocess` gives")
    budget = budget or sum(sizes.values())
    mixtures = {}
    for temperature in TEMPERATURES:
        shares = plan_mixture(sizes, 1, 0, temperature).shares()
        mixtures[f"{temperature:g}"] = {
            name: {"share": share, "epochs": share * budget / sizes[name]} for name, share in shares.items()
        }
    return Inspection(languages, budget, "tokens" if counted else "bytes", mixtures)


# -- token shards --------------------------------------------------------------------------------------------


def of_shards(dataset: TokenDataset) -> dict[str, Language]:
    """Return what the languages of a folder of shards consist of; the fertility is that of a sample."""
    tokenizer = dataset.tokenizer()
    scripts = dataset.description.get("scripts", {})
    result = {}
    for name in dataset.languages:
        splits = dataset.splits[name]
        rejected = dataset.rejected.get(name, {})
        asked = (dataset.description.get("cleaning") or {}).get("dedupe")
        result[name] = Language(
            documents=sum(split.documents for split in splits.values()),
            bytes=sum(split.bytes for split in splits.values()),
            tokens=sum(split.tokens for split in splits.values()),
            training_tokens=splits["train"].tokens,
            fertility=sampled_fertility(dataset, name, tokenizer),
            rejected=rejected,
            duplicates=sum(n for why, n in rejected.items() if "duplicate" in why) if asked else None,
            scripts=scripts.get(name, {}),
        )
    return result


def sampled_fertility(dataset: TokenDataset, language: str, tokenizer: Tokenizer) -> float | None:
    """Return tokens a word of documents at equal distances in the training split; None where they hold no word."""
    stream = dataset.split(language, "train")
    tokens = words = 0
    for number in range(0, stream.documents, max(1, stream.documents // SAMPLED_DOCUMENTS)):
        ids = stream.document(number).tolist()
        tokens += len(ids)
        words += len(tokenizer.decode(ids).split())
    return tokens / words if words else None


# -- a raw corpus --------------------------------------------------------------------------------------------


def of_corpus(
    units: list[Unit], tokenizer: str | None, num_proc: int | None, txt_documents: str
) -> dict[str, Language]:
    """Return what the languages of a corpus consist of, after reading all of it in worker processes.

    Raises:
        UserError: no such tokenizer, or a worker process died.
    """
    if tokenizer is not None:
        load_tokenizer(tokenizer)  # its sentence comes before the work
    found: dict[str, dict[str, Any]] = {}
    with (
        Progress(sum(unit.bytes for unit in units), "B", "inspect") as progress,
        worker_processes(len(units), num_proc) as pool,
    ):
        futures = {pool.submit(inspect_unit, unit, tokenizer, txt_documents): unit for unit in units}
        for future in as_completed(futures):
            found[futures[future].name] = future.result()
            progress.update(futures[future].bytes)
    return _together(units, [found[unit.name] for unit in units], tokenizer is not None)


def _together(units: list[Unit], parts: list[dict[str, Any]], counted: bool) -> dict[str, Language]:
    result: dict[str, Language] = {}
    ledgers: dict[str, Ledger] = {}
    tallies: dict[str, ScriptTally] = {}
    words: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    hashes = [np.frombuffer(part["hashes"], dtype="<u8").reshape(-1, 2) for part in parts]
    ends = np.cumsum([len(some) for some in hashes])
    owners = np.searchsorted(ends, repeated(np.concatenate(hashes)), side="right")
    twice = Counter(units[owner].language for owner in owners.tolist())
    for unit, part in zip(units, parts):
        language = result.setdefault(unit.language, Language())
        language.documents += part["documents"]
        language.bytes += part["bytes"]
        words[unit.language] += part["words"]
        tokens[unit.language] += part["tokens"]
        ledgers.setdefault(unit.language, Ledger()).add(Ledger.from_dict(part["ledger"]))
        tallies.setdefault(unit.language, ScriptTally()).add(ScriptTally.from_dict(part["scripts"]))
    for name, language in result.items():
        language.rejected = dict(sorted(ledgers[name].rejected.items()))
        language.duplicates, language.scripts = twice[name], dict(tallies[name].documents)
        if counted:
            language.tokens = language.training_tokens = tokens[name]
            language.fertility = tokens[name] / words[name] if words[name] else None
        for line in [*ledgers[name].describe(), *tallies[name].warnings(name)]:
            say(line if line.startswith(name) else f"{name}: {line}")
    return result


_tokenizer = functools.lru_cache(maxsize=1)(load_tokenizer)
"""Opened once in a worker."""


def inspect_unit(unit: Unit, tokenizer: str | None, txt_documents: str) -> dict[str, Any]:
    """Return the counts of one unit, the xxh3-128 of each of its documents among them. Runs in a worker."""
    loaded = _tokenizer(tokenizer) if tokenizer is not None else None
    ends = (loaded.bos_id is not None) + (loaded.eos_id is not None) if loaded else 0
    scripts = ScriptTally()
    counts = {"documents": 0, "bytes": 0, "words": 0, "tokens": 0}
    hashes = bytearray()
    batch: list[str] = []
    size = 0

    def encode() -> None:
        if loaded is not None:
            counts["tokens"] += sum(len(ids) + ends for ids in loaded.encode_batch(batch))
        batch.clear()

    def accept(text: str, file: str, place: int) -> str:
        scripts.count(text, file, place)
        return text

    ledger = Ledger(accept=accept)
    for part in unit.parts:
        for text in read_documents(part.file, ledger, part.start, part.end, txt_documents):
            data = text.encode()
            hashes += xxhash.xxh3_128_digest(data)
            pieces = divide(text)  # as a build does it
            counts["documents"] += len(pieces)
            counts["bytes"] += len(data)
            counts["words"] += len(text.split())
            batch += pieces
            size += len(data)
            if size >= _BATCH_BYTES:
                encode()
                size = 0
    encode()
    return {**counts, "hashes": bytes(hashes), "ledger": ledger.as_dict(), "scripts": scripts.as_dict()}
