"""`tokenizer train`: a SentencePiece model from a corpus, with defaults that lose nothing.

SentencePiece's own defaults normalise text (newlines, tabs and zero-width joiners are lost) and silently drop lines
longer than 4,192 bytes (whole documents: 65 % of the bytes of a test corpus). Here text is kept as it is, bytes stand
in for unknown characters, documents are split at newlines and long lines at spaces, and a small language gets its
pieces: lines are drawn per language in proportion to bytes ** temperature.
"""

from __future__ import annotations

import heapq
import io
import math
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import sentencepiece
import xxhash

from ekiden.checkpoint import files
from ekiden.corpus.documents import read_documents
from ekiden.corpus.formats import SourceFile
from ekiden.corpus.ledger import Ledger
from ekiden.corpus.sources import discover
from ekiden.errors import UsageError, UserError
from ekiden.progress import Progress, say
from ekiden.tokenizer.load import SENTENCEPIECE_FILE, SentencePieceTokenizer, Tokenizer

SAMPLE_BYTES = 16 << 20
"""Text given to the trainer. More buys 1-2 % fewer tokens; memory is about 20 (unigram) or 5 (BPE) bytes a byte."""

MAX_LINE_BYTES = 4000
LEAST_PIECES = 300
HELD_OUT = 200
"""Documents of each language kept apart to measure the result on."""


@dataclass
class LanguageReport:
    """What the tokenizer does to one language: lines used, and on documents it was not trained on: bytes a token,
    share of characters that have a piece of their own, documents that decode to themselves."""

    lines: int = 0
    bytes_per_token: float = 0.0
    covered: float = 0.0
    lossless: int = 0
    documents: int = 0


@dataclass
class TokenizerReport:
    """What was made: the file, the pieces, a report a language."""

    path: str
    vocab_size: int
    languages: dict[str, LanguageReport] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [
            f"{self.path}: {self.vocab_size} pieces",
            f"{'language':<14}{'lines':>9}{'bytes/token':>13}{'covered':>9}  lossless",
        ]
        rows += [
            f"{name:<14}{r.lines:>9,}{r.bytes_per_token:>13.2f}{r.covered:>9.2%}  {r.lossless} of {r.documents}"
            for name, r in self.languages.items()
        ]
        return "\n".join(rows)


def train_tokenizer(
    corpus: list[str],
    output: str,
    vocab_size: int = 16000,
    model_type: str = "unigram",
    temperature: float = 0.3,
    language: str | None = None,
) -> TokenizerReport:
    """Train a SentencePiece model on `corpus` and write it to `output`.

    Ids: pad 0, eos 1, bos 2, unk 3, as Gemma has them. The same corpus gives the same model.

    Args:
        temperature: a language with n bytes of text is drawn in proportion to n ** temperature.

    Raises:
        UserError: the corpus is missing or empty, or too small for the vocabulary.
    """
    target = Path(output)
    if target.suffix != ".model":
        raise UsageError(f"--output {output} must end in .model")
    if vocab_size < LEAST_PIECES:
        raise UsageError(
            f"--vocab-size {vocab_size} is too small: 256 bytes, 4 control pieces and the line's end are in every vocabulary; "
            f"give {LEAST_PIECES} or more"
        )
    if not 0 <= temperature < math.inf:  # nor is "nan" between them
        raise UsageError(f"--temperature must be a number from 0 on, not {temperature}")
    check_folder(target.parent)
    sources = discover(corpus, language)
    lines, held_out = sample_corpus(sources, temperature)
    report = TokenizerReport(output, vocab_size)
    for name, chosen in lines.items():
        report.languages[name] = LanguageReport(lines=len(chosen))
    if not any(lines.values()):
        raise UserError(f"corpus {' '.join(corpus)} holds no text to train a tokenizer on; look at its files")
    data = run_trainer([line for chosen in lines.values() for line in chosen], vocab_size, model_type)
    files.write_atomic(target, data)
    tokenizer = SentencePieceTokenizer({SENTENCEPIECE_FILE: data})
    for name, texts in held_out.items():
        measure(tokenizer, texts, report.languages[name])
    return report


def check_folder(folder: Path) -> None:
    """Make the folder of the result before minutes of training, and see that it takes a file.

    Raises:
        UserError: it does not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"--output's folder {folder} cannot be written ({files.reason(error)}); give one on a writable disk with space"
        ) from None


def sample_corpus(
    sources: dict[str, list[SourceFile]], temperature: float
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return (lines to train on, held-out documents) of each language.

    One pass keeps, of each language, the lines with the smallest hashes within SAMPLE_BYTES: an unbiased sample in
    bounded memory that depends on the text alone. Then each language is cut to its share.
    """
    candidates: dict[str, list[tuple[int, str]]] = {}
    sizes: dict[str, int] = {}
    held_out: dict[str, list[str]] = {}
    with Progress(sum(f.size for fs in sources.values() for f in fs), "B", "read") as progress:
        for name, source_files in sources.items():
            sampler, documents = SmallestHashes(SAMPLE_BYTES), SmallestHashes(HELD_OUT * 20_000)
            for file in source_files:
                ledger = Ledger()
                for text in read_documents(file, ledger):
                    # 1 document in 50 is measured on, not trained on.
                    if xxhash.xxh3_64_intdigest(text.encode(), seed=2) % 50 == 0:
                        documents.add(text[:20_000])
                        continue
                    for line in training_lines(text):
                        sampler.add(line)
                progress.update(file.size)
                for sentence in ledger.describe():
                    say(f"{name}: {sentence}")
            candidates[name], sizes[name] = sampler.sorted(), sampler.seen_bytes
            held_out[name] = [text for _hash, text in documents.sorted()][:HELD_OUT]
    weights = {name: size**temperature for name, size in sizes.items() if size}
    total = min(SAMPLE_BYTES, sum(sizes.values()))
    # The share is cut from the largest budget that some language fills, so that a small one is used whole.
    budget = {name: total * weight / sum(weights.values()) for name, weight in weights.items()}
    return {name: take(candidates[name], budget.get(name, 0.0)) for name in sources}, held_out


def take(candidates: list[tuple[int, str]], budget: float) -> list[str]:
    """Return lines up to `budget` bytes; a language with less is repeated, at most 4 times, to weigh its share."""
    chosen: list[str] = []
    while candidates and budget > 0 and len(chosen) < 4 * len(candidates):
        for _hash, line in candidates:
            budget -= len(line.encode())
            if budget < 0:
                break
            chosen.append(line)
    return chosen or [line for _hash, line in candidates[:1]]


class SmallestHashes:
    """The texts with the smallest hashes, within a number of bytes."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity, self.kept_bytes, self.seen_bytes = capacity_bytes, 0, 0
        self._heap: list[tuple[int, str]] = []

    def add(self, text: str) -> None:
        """Offer a text."""
        data = text.encode()
        self.seen_bytes += len(data)
        rank = xxhash.xxh3_64_intdigest(data, seed=3)
        if self.kept_bytes + len(data) > self.capacity and self._heap and rank > -self._heap[0][0]:
            return
        heapq.heappush(self._heap, (-rank, text))
        self.kept_bytes += len(data)
        while self.kept_bytes > self.capacity:
            self.kept_bytes -= len(heapq.heappop(self._heap)[1].encode())

    def sorted(self) -> list[tuple[int, str]]:
        """Return (hash, text), smallest hash first."""
        return sorted((-negative, text) for negative, text in self._heap)


def training_lines(text: str) -> Iterator[str]:
    """Yield the lines of a document, those over MAX_LINE_BYTES cut at spaces (or anywhere, where there are none)."""
    for line in text.splitlines():
        while len(line.encode()) > MAX_LINE_BYTES:
            limit = max(1, MAX_LINE_BYTES // 4)  # characters: at most 4 bytes each
            cut = line.rfind(" ", 1, limit)
            cut = cut if cut > 0 else limit
            yield line[:cut]
            line = line[cut:]
        if line.strip():
            yield line


def run_trainer(lines: list[str], vocab_size: int, model_type: str) -> bytes:
    """Return the bytes of a SentencePiece model trained on `lines`.

    Raises:
        UserError: the text does not give that many pieces.
    """
    result = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=result,
            vocab_size=vocab_size,
            model_type=model_type,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.9999,
            # Documents are split at newlines for training, so no learned piece holds one; as a piece of its own it
            # costs 1 token instead of a byte piece's 1, but survives in tokenizers without byte fallback.
            user_defined_symbols=["\n"],
            max_sentence_length=MAX_LINE_BYTES + 192,
            input_sentence_size=0,
            num_threads=4,  # fixed: the sums, and so the pieces, depend on it
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            pad_piece="<pad>",
            eos_piece="<eos>",
            bos_piece="<bos>",
            unk_piece="<unk>",
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        most = re.search(r"too high .* value <= (\d+)", reason)
        raise UserError(
            f"--vocab-size {vocab_size} cannot be reached with this corpus"
            + (
                f"; give at most {most[1]}, or more text"
                if most
                else f" ({reason}); give another, or more text"
            )
        ) from None
    return result.getvalue()


def measure(tokenizer: Tokenizer, texts: list[str], report: LanguageReport) -> None:
    """Fill in what the tokenizer does to held-out documents."""
    tokens = size = characters = covered = 0
    for text, ids in zip(texts, tokenizer.encode_batch(texts)):
        report.documents += 1
        report.lossless += tokenizer.decode(ids.tolist()) == text
        tokens += len(ids)
        size += len(text.encode())
        characters += len(text)
        covered += characters_with_pieces(tokenizer, ids.tolist())
    if tokens:
        report.bytes_per_token = size / tokens
        report.covered = covered / characters


def characters_with_pieces(tokenizer: Tokenizer, ids: list[int]) -> int:
    """Return the characters of a text that are in pieces, not spelt out in bytes or unknown."""
    assert isinstance(tokenizer, SentencePieceTokenizer)
    processor = tokenizer.processor
    return sum(
        len(processor.id_to_piece(i)) for i in ids if not processor.is_byte(i) and i != tokenizer.unk_id
    )
