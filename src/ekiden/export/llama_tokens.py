"""A SentencePiece vocabulary as llama.cpp holds it, and the ids that llama.cpp gives a text with it.

`export.gguf` writes the vocabulary; `export.token_check` compares the ids with SentencePiece's before a GGUF file is
published, where llama.cpp itself is not at hand. llama.cpp has an algorithm of its own for each kind: "llama" merges
the best-scored pair of characters (BPE), "t5" finds the best-scored segmentation (unigram). A unigram vocabulary
declared as "llama" loads, runs and gives other ids.

Followed here is what src/llama-vocab.cpp of llama.cpp does (as in llama-cpp-python 0.3.36), with one omission: pieces
that look like other models' control tokens ("<|im_end|>") are turned into control tokens there.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ekiden.errors import UserError
from ekiden.tokenizer.huggingface import SPACE
from ekiden.tokenizer.load import SENTENCEPIECE_FILE, SentencePieceTokenizer, Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of pieces; SentencePiece and GGUF number them alike."""

KINDS = {"bpe": "llama", "unigram": "t5"}
STOPS = -1
"""Stands for a byte without a piece, at which llama.cpp ends the program ("llama" without byte fallback)."""

_UNKNOWN_PENALTY = 10.0


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF keeps of a SentencePiece model.

    Attributes:
        kind: "llama" or "t5". texts, scores (fp32), types: of each id; rows of the model without a piece are UNUSED.
        charsmap: SentencePiece's compiled normalisation rules, empty for none.
    """

    kind: str
    texts: list[str]
    scores: list[float]
    types: list[int]
    unk_id: int
    add_space_prefix: bool
    remove_extra_whitespaces: bool
    charsmap: bytes

    @property
    def normalises(self) -> bool:
        """Whether SentencePiece changes a text before it segments it."""
        return bool(self.charsmap) or self.remove_extra_whitespaces


def vocabulary(tokenizer: Tokenizer, rows: int) -> Vocabulary:
    """Return the vocabulary of a SentencePiece model, filled up to the `rows` of the model's embedding.

    Raises:
        UserError: llama.cpp has no equal of this tokenizer.
    """
    kind = KINDS.get(tokenizer.model_type)
    if not isinstance(tokenizer, SentencePieceTokenizer) or kind is None:
        raise UserError(
            f"GGUF needs a SentencePiece tokenizer, BPE or unigram, and this model's is {tokenizer.kind} "
            f"{tokenizer.model_type}; export it with --format hf"
        )
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2  # its classes are made at run time
    model = proto.ModelProto()
    model.ParseFromString(tokenizer.files[SENTENCEPIECE_FILE])
    normal = model.normalizer_spec
    # User-defined pieces are searched for in the raw text, where a space is a space.
    texts = [p.piece.replace(SPACE, " ") if p.type == USER_DEFINED else p.piece for p in model.pieces]
    extra = range(len(texts), rows)
    return Vocabulary(
        kind=kind,
        texts=texts + [f"[PAD{number}]" for number in extra],
        scores=[piece.score for piece in model.pieces] + [0.0] * len(extra),
        types=[piece.type for piece in model.pieces] + [UNUSED] * len(extra),
        unk_id=model.trainer_spec.unk_id,
        add_space_prefix=normal.add_dummy_prefix,
        remove_extra_whitespaces=normal.remove_extra_whitespaces,
        charsmap=bytes(normal.precompiled_charsmap),
    )


class LlamaTokens:
    """Texts to the ids that llama.cpp gives, BOS and EOS apart."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._ids = {text: number for number, text in enumerate(vocabulary.texts)}
        separate = [t for t, kind in zip(vocabulary.texts, vocabulary.types) if kind == USER_DEFINED]
        self._separate = sorted(separate, key=lambda text: -len(text.encode()))

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; `STOPS` where llama.cpp would end the program."""
        ids: list[int] = []
        after_special = True
        for fragment in self._fragments(text):
            if isinstance(fragment, int):
                ids.append(fragment)
                after_special = True
            elif self.vocabulary.kind == "t5":
                ids += self._best_segmentation(self._normalised(fragment))
            else:
                # llama.cpp puts the prefix after every user-defined piece, SentencePiece only before the text.
                prefix = " " if self.vocabulary.add_space_prefix and after_special else ""
                ids += self._merged((prefix + fragment).replace(" ", SPACE))
                after_special = False
        return ids

    def _fragments(self, text: str) -> list[str | int]:
        """Return `text` cut at the user-defined pieces, the longest looked for first, and their ids between."""
        fragments: list[str | int] = [text] if text else []
        for piece in self._separate:
            cut: list[str | int] = []
            for fragment in fragments:
                if isinstance(fragment, int) or piece not in fragment:
                    cut.append(fragment)
                    continue
                for position, part in enumerate(fragment.split(piece)):
                    cut += ([self._ids[piece]] if position else []) + ([part] if part else [])
            fragments = cut
        return fragments

    def _merged(self, text: str) -> list[int]:
        """Merge the best-scored adjacent pair that is a piece, the leftmost of equals, until there is none."""
        symbols = list(text)
        before, after = list(range(-1, len(symbols) - 1)), [*range(1, len(symbols)), -1]
        queue: list[tuple[float, int, int, int]] = []

        def consider(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                number = self._ids.get(symbols[left] + symbols[right])
                if number is not None:
                    size = len(symbols[left]) + len(symbols[right])
                    heapq.heappush(queue, (-self.vocabulary.scores[number], left, right, size))

        for right in range(1, len(symbols)):
            consider(right - 1, right)
        while queue:
            _score, left, right, size = heapq.heappop(queue)
            # One of the two has been merged since.
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != size:
                continue
            symbols[left], symbols[right] = symbols[left] + symbols[right], ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            consider(before[left], left)
            consider(left, after[left])
        return [number for symbol in symbols if symbol for number in self._spelt(symbol)]

    def _spelt(self, symbol: str) -> list[int]:
        """Return the id of a symbol, or those of its bytes."""
        if symbol in self._ids:
            return [self._ids[symbol]]
        return [
            self._ids.get(f"<0x{byte:02X}>", self._ids.get(chr(byte), STOPS) if byte < 128 else STOPS)
            for byte in symbol.encode()
        ]

    @cached_property
    def _pieces(self) -> tuple[dict[str, tuple[int, float]], set[str], float]:
        """Return the pieces that a segmentation may use, the beginnings of them, and the score of an unknown one."""
        known = self.vocabulary
        pieces = {
            text: (number, 0.0 if kind == USER_DEFINED else score)
            for number, (text, score, kind) in enumerate(zip(known.texts, known.scores, known.types))
            if kind in (NORMAL, USER_DEFINED, UNUSED)
        }
        beginnings = {text[:end] for text in pieces for end in range(1, len(text) + 1)}
        lowest = min(score for score, kind in zip(known.scores, known.types) if kind == NORMAL)
        return pieces, beginnings, float(np.float32(lowest) - np.float32(_UNKNOWN_PENALTY))

    def _best_segmentation(self, text: str) -> list[int]:
        """Return the segmentation with the highest sum of scores, in double; neighbouring unknowns become one."""
        pieces, beginnings, unknown_score = self._pieces
        unk_id = self.vocabulary.unk_id
        scores = [0.0] + [-np.inf] * len(text)
        best: list[tuple[int, int]] = [(unk_id, 0)] * (len(text) + 1)
        for start in range(len(text)):
            end, alone = start + 1, False
            while end <= len(text) and (piece := text[start:end]) in beginnings:
                if piece in pieces:
                    number, score = pieces[piece]
                    alone |= end == start + 1
                    if scores[start] + score > scores[end]:
                        scores[end], best[end] = scores[start] + score, (number, start)
                end += 1
            if not alone and scores[start] + unknown_score > scores[start + 1]:
                scores[start + 1], best[start + 1] = scores[start] + unknown_score, (unk_id, start)
        ids: list[int] = []
        end = len(text)
        while end > 0:
            number, end = best[end]
            if not (number == unk_id and ids and ids[-1] == unk_id):
                ids.append(number)
        return ids[::-1]

    def _normalised(self, text: str) -> str:
        """Return `text` as the normalisation rules leave it, with its spaces as pieces spell them."""
        known = self.vocabulary
        changed = self._charsmap.apply(text) if known.charsmap else text
        result: list[str] = []
        prefixed = in_word = False
        for character in changed:
            if character == " ":
                in_word = False
                if not known.remove_extra_whitespaces:
                    result.append(SPACE)
                continue
            if not in_word:
                in_word = True
                if known.remove_extra_whitespaces or (known.add_space_prefix and not prefixed):
                    result.append(SPACE)
                    prefixed = True
            result.append(character)
        return "".join(result)

    @cached_property
    def _charsmap(self) -> CharactersMap:
        return CharactersMap(self.vocabulary.charsmap)


class CharactersMap:
    """SentencePiece's compiled rules: a double-array trie of prefixes, each with the text that replaces it.

    Layout: 4 bytes, size of the trie; its nodes, uint32 (bit 8: has a value; bit 9: offset is scaled by 256; bits
    10-30: offset; bits 0-7 and 31: label; a value is in bits 0-30); the replacements, each ended by a zero byte.
    """

    def __init__(self, data: bytes) -> None:
        size = int.from_bytes(data[:4], "little")
        self._nodes = np.frombuffer(data[4 : 4 + size], dtype="<u4").tolist()
        self._replacements = data[4 + size :]

    def apply(self, text: str) -> str:
        """Return `text` with the longest prefix that has a rule replaced, again and again from left to right."""
        data, position, result = text.encode(), 0, bytearray()
        while position < len(data):
            length, replacement = self._longest(data, position)
            if not length:
                lead = data[position]
                length = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
                replacement = data[position : position + length]
            result += replacement
            position += length
        return result.decode("utf-8", errors="replace")

    def _longest(self, data: bytes, position: int) -> tuple[int, bytes]:
        node, length, replacement = self._offset(0), 0, b""
        for index in range(position, len(data)):
            byte = data[index]
            node ^= byte
            if byte == 0 or node >= len(self._nodes) or self._nodes[node] & 0x800000FF != byte:
                break
            has_value = self._nodes[node] >> 8 & 1
            node ^= self._offset(node)
            if has_value:
                begin = self._nodes[node] & 0x7FFFFFFF
                length = index - position + 1
                replacement = self._replacements[begin : self._replacements.index(b"\0", begin)]
        return length, replacement

    def _offset(self, node: int) -> int:
        packed = self._nodes[node]
        return packed >> 10 << ((packed & 1 << 9) >> 6)
