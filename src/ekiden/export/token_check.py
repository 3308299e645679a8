"""Whether llama.cpp will read text as the model was trained to read it: compared on real text, before a GGUF counts.

Texts come from the test split that the run was evaluated on, or from a file of the user's. Ids come from llama.cpp
itself where `llama_cpp` is installed, else from `export.llama_tokens`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from ekiden.corpus.documents import read_documents
from ekiden.corpus.formats import FORMATS, SourceFile, file_format
from ekiden.corpus.ledger import Ledger
from ekiden.errors import UserError
from ekiden.export.llama_tokens import STOPS, LlamaTokens, Vocabulary, vocabulary
from ekiden.progress import say
from ekiden.tokenizer.load import SentencePieceTokenizer, Tokenizer
from ekiden.tokens.format import TokenDataset

TEXTS, CHARACTERS = 400, 4000
"""Texts compared at most, and characters of each; about 10 seconds in Python, under one in llama.cpp."""

Encode = Callable[[str], list[int]]
EQUAL, OUTSIDE, TIE, DIFFERENT = "equal", "outside", "tie", "different"


@dataclass
class TokenComparison:
    """Texts by outcome.

    equal: the same ids. outside: the same but for characters outside the vocabulary, bytes for SentencePiece and one
    unknown piece for llama.cpp. ties: segmentations whose scores are equal within fp32's rounding (SentencePiece sums
    in fp32, llama.cpp in double). different: anything else; `example` is the first such text's beginning.
    """

    by: str
    equal: int = 0
    outside: int = 0
    ties: int = 0
    different: int = 0
    example: str = ""

    @property
    def texts(self) -> int:
        """Texts compared."""
        return self.equal + self.outside + self.ties + self.different

    def __str__(self) -> str:
        parts = [f"{self.equal} of {self.texts} texts have the same ids by {self.by}"]
        if self.outside:
            parts.append(
                f"{self.outside} hold characters outside the vocabulary, which llama.cpp reads as unknown"
            )
        if self.ties:
            parts.append(f"{self.ties} hold an exact tie of scores")
        if self.different:
            parts.append(f"{self.different} differ")
        return "; ".join(parts)


def compare_tokens(
    tokenizer: SentencePieceTokenizer, encode: Encode, texts: list[str], by: str
) -> TokenComparison:
    """Compare the ids that `encode` gives with SentencePiece's, text by text.

    Args:
        by: what `encode` is, to be shown.
    """
    result = TokenComparison(by)
    for text, expected in zip(texts, tokenizer.encode_batch(texts)):
        outcome = classify(tokenizer, expected.tolist(), encode(text))
        if outcome == DIFFERENT and not result.example:
            result.example = text[:60]
        result.equal += outcome == EQUAL
        result.outside += outcome == OUTSIDE
        result.ties += outcome == TIE
        result.different += outcome == DIFFERENT
    return result


def classify(tokenizer: SentencePieceTokenizer, expected: list[int], found: list[int]) -> str:
    """Return EQUAL, OUTSIDE, TIE or DIFFERENT for SentencePiece's ids and llama.cpp's; a text with both exceptions
    is a TIE."""
    if expected == found:
        return EQUAL
    if tokenizer.model_type != "unigram" or STOPS in found:
        return DIFFERENT
    ours, theirs = _known_runs(tokenizer, expected), _known_runs(tokenizer, found)
    if ours == theirs:
        return OUTSIDE
    if len(ours) != len(theirs):
        return DIFFERENT
    total = 0.0
    for left, right in zip(ours, theirs):
        if not is_tie(tokenizer, left, right, total):
            return DIFFERENT
        total += sum(abs(tokenizer.processor.get_score(i)) for i in left)
    return TIE


def _known_runs(tokenizer: SentencePieceTokenizer, ids: list[int]) -> list[list[int]]:
    """Return the ids between unknown pieces; bytes in a row are one unknown piece."""
    runs: list[list[int]] = [[]]
    unknown = False
    for number in ids:
        if number == tokenizer.unk_id or tokenizer.processor.is_byte(number):
            if not unknown:
                runs.append([])
            unknown = True
            continue
        unknown = False
        runs[-1].append(number)
    return runs


def is_tie(tokenizer: SentencePieceTokenizer, left: list[int], right: list[int], before: float) -> bool:
    """Return whether two segmentations of one text are equal, or differ only where fp32 cannot tell them apart.

    Args:
        before: sum of the scores before it, without sign: rounding grows with the sum.
    """
    piece, score = tokenizer.processor.id_to_piece, tokenizer.processor.get_score
    if "".join(map(piece, left)) != "".join(map(piece, right)):
        return False
    for ours, theirs in _differing_spans(left, right, piece):
        reached = before + sum(abs(score(i)) for i in left)
        # Each addition rounds by half a unit in the last place of the sum so far.
        rounding = (len(ours) + len(theirs)) * float(np.spacing(np.float32(reached)))
        if abs(sum(map(score, ours)) - sum(map(score, theirs))) > rounding:
            return False
    return True


def _differing_spans(
    left: list[int], right: list[int], piece: Callable[[int], str]
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the stretches between common borders where two segmentations of one text differ."""
    i = j = 0
    while i < len(left):
        if left[i] == right[j]:
            i, j = i + 1, j + 1
            continue
        first_i, first_j = i, j
        ends = [len(piece(left[i])), len(piece(right[j]))]
        i, j = i + 1, j + 1
        while ends[0] != ends[1]:
            if ends[0] < ends[1]:
                ends[0] += len(piece(left[i]))
                i += 1
            else:
                ends[1] += len(piece(right[j]))
                j += 1
        yield left[first_i:i], right[first_j:j]


def llama_cpp_encode(path: Path) -> Encode | None:
    """Return llama.cpp's own tokenizer for the GGUF file at `path`; None where `llama_cpp` is not installed.

    Raises:
        UserError: llama.cpp does not load the file.
    """
    try:
        import llama_cpp
    except ImportError:
        return None
    try:
        model = llama_cpp.Llama(model_path=str(path), vocab_only=True, verbose=False)
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"llama.cpp does not load the file ({error}); export it with --format hf") from None
    return lambda text: model.tokenize(text.encode(), add_bos=False, special=False)


def check_tokens(
    path: Path, tokenizer: SentencePieceTokenizer, known: Vocabulary, texts: list[str]
) -> TokenComparison:
    """Compare the ids that llama.cpp gives with the GGUF file at `path` with SentencePiece's.

    Raises:
        UserError: they differ by more than unknown characters and ties.
    """
    by = "llama.cpp"
    # Without a piece for a byte, llama.cpp would end this program too.
    complete = known.kind == "t5" or "<0x00>" in known.texts
    encode = llama_cpp_encode(path) if complete else None
    if encode is None:
        by, encode = "Ekiden's account of llama.cpp's tokenizer", LlamaTokens(known).encode
    result = compare_tokens(tokenizer, encode, texts, by)
    if result.different:
        raise UserError(
            f"llama.cpp would not read text as the model was trained to: {result.different} of {result.texts} texts give "
            f"other ids, the first begins {result.example!r} ({_reason(known)}); export with --format hf, or train with "
            "a tokenizer of `ekiden tokenizer train --model-type bpe`"
        )
    return result


def _reason(known: Vocabulary) -> str:
    """Return what of the tokenizer llama.cpp does not do."""
    if known.kind == "llama" and known.normalises:
        return "its BPE does not normalise text"
    if known.kind == "llama" and "<0x00>" not in known.texts:
        return "it needs byte pieces for characters outside the vocabulary"
    if known.add_space_prefix:
        return "it sets the space before the text otherwise"
    return "its segmentation is another"


def sample_texts(tokenizer: Tokenizer, dataset_path: Path) -> list[str]:
    """Return texts of every language's test split, the same number of each.

    None where the tokenizer normalises text: what its ids decode to is normalised already, and shows no difference.

    Raises:
        UserError: the shards are damaged or were made with another tokenizer.
    """
    dataset = TokenDataset.open(dataset_path)
    if dataset.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(
            f"{dataset_path} was made with another tokenizer than the model's; give --check-text FILE"
        )
    if isinstance(tokenizer, SentencePieceTokenizer) and vocabulary(tokenizer, 0).normalises:
        return []
    each = -(-TEXTS // len(dataset.languages))
    texts = []
    for language in dataset.languages:
        stream = dataset.split(language, "test")
        for number in range(min(each, stream.documents)):
            texts.append(tokenizer.decode(stream.document(number)[:CHARACTERS].tolist())[:CHARACTERS])
    return [text for text in texts if text]


def read_texts(path: Path) -> list[str]:
    """Return texts from a file of documents.

    Raises:
        UserError: it is missing, of another format, or holds none.
    """
    kind = file_format(path)
    if not path.is_file() or kind is None:
        raise UserError(f"--check-text {path} is not a {', '.join(FORMATS)} file; give one with real text")
    ledger = Ledger()
    documents = read_documents(SourceFile(str(path), path.stat().st_size, kind), ledger)
    texts = [text[:CHARACTERS] for text in islice(documents, TEXTS)]
    for sentence in ledger.describe():
        say(sentence)
    if not texts:
        raise UserError(f"--check-text {path} holds no text; give a file with real text")
    return texts
