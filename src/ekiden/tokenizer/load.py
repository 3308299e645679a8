"""A tokenizer the user already has: any SentencePiece `.model`, or a Hugging Face `tokenizer.json`.

Everything else in Ekiden sees only `Tokenizer`: ids without special ones, and the special ids apart. SentencePiece
itself stays the authority on the ids of its models.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ekiden.errors import UserError

SENTENCEPIECE_FILE, HUGGINGFACE_FILE = "tokenizer.model", "tokenizer.json"
_HUGGINGFACE_FILES = (HUGGINGFACE_FILE, "tokenizer_config.json", "special_tokens_map.json")


class Tokenizer:
    """Text to ids and back; knows the special ids but never adds them.

    Made by `load_tokenizer`. Pickles as its files' bytes, so a worker process re-opens it.

    Attributes:
        kind: sentencepiece or huggingface. model_type: unigram, bpe, word, char, or the tokenizers library's name.
        vocab_size: pieces. bos_id, eos_id, pad_id, unk_id: None where the tokenizer has none.
        sha256: identity, of the model file's bytes.
    """

    kind: str
    model_type: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the model file, in hex."""
        main = self.files.get(SENTENCEPIECE_FILE) or self.files[HUGGINGFACE_FILE]
        return hashlib.sha256(main).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without BOS or EOS."""
        return [int(i) for i in self.encode_batch([text])[0]]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text, int32, in one thread: workers are processes."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.files,)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, unigram or BPE, with or without special ids."""

    kind = "sentencepiece"

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(files)
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        proto: Any = sentencepiece_model_pb2  # its classes are made at run time
        model = proto.ModelProto()
        model.ParseFromString(files[SENTENCEPIECE_FILE])
        if not model.pieces:
            raise ValueError("it has no pieces")
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=files[SENTENCEPIECE_FILE])
        self.model_type = proto.TrainerSpec.ModelType.Name(model.trainer_spec.model_type).lower()
        self.vocab_size = self.processor.get_piece_size()
        self.bos_id, self.eos_id = _or_none(self.processor.bos_id()), _or_none(self.processor.eos_id())
        self.pad_id, self.unk_id = _or_none(self.processor.pad_id()), _or_none(self.processor.unk_id())

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text, int32, by SentencePiece itself."""
        return encode_texts(self.processor, texts) if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; control ids give none."""
        return self.processor.decode([int(i) for i in ids])


def encode_texts(processor: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """Return the ids of each text by a SentencePieceProcessor, on one thread: its default is one for every core, in every
    worker.

    Up to sentencepiece 0.2.1, which Kaggle's image has, ids come as lists only.
    """
    if _returns_numpy():
        return list(processor.encode(texts, return_type="numpy", num_threads=1))
    return [np.array(ids, dtype=np.int32) for ids in processor.encode(texts, out_type=int, num_threads=1)]


@cache
def _returns_numpy() -> bool:
    import sentencepiece

    return "return_type" in inspect.signature(sentencepiece.SentencePieceProcessor.encode).parameters


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, through the tokenizers library."""

    kind = "huggingface"

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(files)
        import tokenizers

        self.backend = tokenizers.Tokenizer.from_str(files[HUGGINGFACE_FILE].decode("utf-8"))
        self.model_type = json.loads(files[HUGGINGFACE_FILE])["model"].get("type", "unknown").lower()
        self.vocab_size = self.backend.get_vocab_size(with_added_tokens=True)
        settings: dict[str, Any] = {}
        for name in reversed(_HUGGINGFACE_FILES[1:]):
            settings |= json.loads(files[name]) if name in files else {}
        self.bos_id, self.eos_id = self._special(settings, "bos_token"), self._special(settings, "eos_token")
        self.pad_id, self.unk_id = self._special(settings, "pad_token"), self._special(settings, "unk_token")

    def _special(self, settings: dict[str, Any], name: str) -> int | None:
        token = settings.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        return self.backend.token_to_id(text) if text else None

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text, int32, by the tokenizers library."""
        return [
            np.array(encoding.ids, dtype=np.int32)
            for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; special ids give none."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)


def _or_none(number: int) -> int | None:
    return number if number >= 0 else None


def load_tokenizer(path_or_id: str | Path) -> Tokenizer:
    """Return the tokenizer in a SentencePiece file, a folder, or a Hugging Face hub repository.

    Args:
        path_or_id: a `.model` file; a folder with `tokenizer.model` or `tokenizer.json`; or OWNER/NAME on the hub.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = Path(path_or_id)
    if path.is_file() and path.suffix == ".json":
        return _open(HuggingFaceTokenizer, {HUGGINGFACE_FILE: path.read_bytes()}, path)
    if path.is_file():
        return _open(SentencePieceTokenizer, {SENTENCEPIECE_FILE: path.read_bytes()}, path)
    if path.is_dir():
        return _from_folder(path)
    if (
        str(path_or_id).count("/") == 1
        and not str(path_or_id).startswith(("/", "."))
        and not path.parent.is_dir()
    ):
        return _from_folder(_download(str(path_or_id)))
    raise UserError(
        f"tokenizer {path_or_id} does not exist; give a SentencePiece .model, a tokenizer folder or a hub id"
    )


def _from_folder(folder: Path) -> Tokenizer:
    if (folder / SENTENCEPIECE_FILE).is_file():
        return _open(
            SentencePieceTokenizer, {SENTENCEPIECE_FILE: (folder / SENTENCEPIECE_FILE).read_bytes()}, folder
        )
    if (folder / HUGGINGFACE_FILE).is_file():
        found = {
            name: (folder / name).read_bytes() for name in _HUGGINGFACE_FILES if (folder / name).is_file()
        }
        return _open(HuggingFaceTokenizer, found, folder)
    raise UserError(
        f"{folder} holds neither {SENTENCEPIECE_FILE} nor {HUGGINGFACE_FILE}; give the folder of a tokenizer"
    )


def _open(kind: type[Tokenizer], files: dict[str, bytes], where: Path) -> Tokenizer:
    try:
        return kind(files)
    except Exception as error:  # the libraries raise RuntimeError, DecodeError, or a bare Exception
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        what = "SentencePiece model" if kind is SentencePieceTokenizer else "tokenizer.json"
        raise UserError(f"{where} is not a {what} ({reason}); give another --tokenizer") from None


def _download(repository: str) -> Path:
    """Return the folder of a hub tokenizer in the local cache, downloading it where it is not there yet."""
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, allow_patterns=[SENTENCEPIECE_FILE, *_HUGGINGFACE_FILES]
            )
        )
    except Exception as error:  # network, gated and missing repositories have a dozen exception types
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise UserError(
            f"tokenizer {repository} is neither a local path nor could it be fetched from the hub ({reason}); give a local "
            "path, or log in with `hf auth login` where it is gated"
        ) from None
