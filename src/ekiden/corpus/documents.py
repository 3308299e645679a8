"""Documents out of one file, or out of a byte range of it; what is no document goes into the ledger.

Plain files can be read in byte ranges by several workers: a range holds the records that begin in it, so any cut of
a file into ranges gives the same documents in the same order. Memory is bounded by `MAX_RECORD_BYTES`, whatever the
length of a file or of a line.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import IO, Any

import orjson

from ekiden.corpus.formats import SourceFile
from ekiden.corpus.hub import open_source
from ekiden.corpus.ledger import Ledger

MAX_RECORD_BYTES = 16 << 20
"""A longer line or text is counted, not held in memory: it is a broken file far more often than a document."""

MAX_CHARACTERS = 1 << 20
"""A longer text is several documents: a unigram model takes 27 bytes of memory a byte of text, and its float32 sums
lose the difference between pieces over tens of megabytes."""

TOO_LONG = "longer than 16 MB"
_BOM = b"\xef\xbb\xbf"


class Rejected(Exception):
    """A record that is no document; the message is the reason."""


def text_of(line: bytes) -> str:
    """Return the text of one JSONL record.

    orjson decides the good ones; the standard library has the second word, since it reads what Python writes (NaN in
    a field that is not the text must not cost the document).

    Raises:
        Rejected: it holds no text that can be encoded.
    """
    try:
        record, encodable = orjson.loads(line), True  # it refuses lone surrogates
    except orjson.JSONDecodeError:
        record, encodable = _second_opinion(line), False
    if not isinstance(record, dict):
        raise Rejected("not a JSON object")
    if "text" not in record:
        raise Rejected("no text field")
    return checked(record["text"], encodable)


def _second_opinion(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise Rejected("invalid UTF-8") from None
    except RecursionError:
        raise Rejected("nested too deeply") from None
    except ValueError:
        raise Rejected("invalid JSON") from None


def checked(text: Any, encodable: bool = False) -> str:
    """Return `text` where it is a string that can be encoded and is not blank.

    Args:
        encodable: a string is known to be.

    Raises:
        Rejected: it is not.
    """
    if text is None:
        raise Rejected("text is null")
    if not isinstance(text, str):
        raise Rejected("text is not a string")
    if not text or text.isspace():
        raise Rejected("text is empty")
    if encodable:
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Rejected("lone surrogate") from None
    return text


def read_documents(
    file: SourceFile,
    ledger: Ledger,
    start: int = 0,
    end: int | None = None,
    txt_documents: str = "blank-line",
) -> Iterator[str]:
    """Yield the texts of the records that begin in [start, end) of `file`, and count every record in `ledger`.

    `ledger.position` follows the bytes of the file that were read.

    Args:
        start, end: bytes of a plain file, row groups of a parquet file; a .gz or .zst file is read as a whole.
        txt_documents: 'blank-line' (text between blank lines) or 'file' (a .txt file is one document).
    """
    ledger.position = 0
    if file.format == ".parquet":
        yield from _parquet(file, ledger, start, end)
    elif file.format == ".txt" and txt_documents == "file":
        yield from _whole_file(file, ledger)
    elif file.format == ".txt":
        yield from _paragraphs(file, ledger, start, end if end is not None else file.size)
    elif file.format == ".jsonl":
        with open_source(file) as data:
            align(data, start)
            yield from _jsonl(file.path, data, ledger, end if end is not None else file.size)
    else:
        yield from _compressed(file, ledger)


def divide(text: str) -> list[str]:
    """Return `text`, or where it is longer than MAX_CHARACTERS the documents that together are it.

    Cut after the last blank line, else the last line, else the last space in the second half of what may stay
    together; a text without any is cut where it must.
    """
    pieces, start = [], 0
    while len(text) - start > MAX_CHARACTERS:
        middle, limit = start + MAX_CHARACTERS // 2, start + MAX_CHARACTERS
        ends = (text.rfind(mark, middle, limit) + len(mark) for mark in ("\n\n", "\n", " "))
        end = next((end for end in ends if end > middle), limit)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]] if pieces else [text]


def align(data: IO[bytes], start: int) -> None:
    """Move to the first line that begins at or after `start`."""
    if start > 0:
        data.seek(start - 1)
        while (piece := data.readline(1 << 20)) and not piece.endswith(b"\n"):
            pass


def _lines(data: IO[bytes]) -> Iterator[tuple[bytes | None, int]]:
    """Yield (line, its length); None for a line that is too long, of which only a piece is ever held."""
    while line := data.readline(MAX_RECORD_BYTES + 1):
        size = len(line)
        if size <= MAX_RECORD_BYTES:
            yield line, size
            continue
        while not line.endswith(b"\n") and (line := data.readline(1 << 20)):
            size += len(line)
        yield None, size


def _jsonl(
    name: str, data: IO[bytes], ledger: Ledger, end: int | None, number_records: bool = False
) -> Iterator[str]:
    """Yield the texts of the lines that begin before `end`; examples are byte offsets, or line numbers."""
    offset = 0 if number_records else data.tell()
    if end is not None and offset >= end:
        return
    begin = offset
    for number, (line, size) in enumerate(_lines(data), start=1):
        if not number_records:
            ledger.position = offset + size - begin
        place = number if number_records else offset
        if line is not None and number == 1 and offset == 0:
            line = line.removeprefix(_BOM)
        try:
            if line is None:
                raise Rejected(TOO_LONG)
            if not line.strip():
                raise Rejected("blank line")
            text = ledger.accepted(text_of(line), name, place)
        except Rejected as reason:
            ledger.reject(str(reason), name, place)
        else:
            ledger.keep()
            yield text
        offset += size
        if end is not None and offset >= end:
            return


def _compressed(file: SourceFile, ledger: Ledger) -> Iterator[str]:
    """Yield the texts of a .jsonl.gz or .jsonl.zst file; a damaged rest is one rejected record."""
    import pyarrow

    gzip_file, damaged = _gzip()
    before = ledger.read
    with open_source(file) as data, pyarrow.PythonFile(data, mode="r") as packed:
        try:
            if file.format.endswith(".gz"):
                plain: Any = gzip_file(fileobj=packed, mode="rb")
            else:
                # Not through the zstandard module: it takes a file that was cut off for a whole one.
                plain = pyarrow.CompressedInputStream(packed, "zstd")
            with io.BufferedReader(plain, 1 << 18) as lines:
                for text in _jsonl(file.path, lines, ledger, None, number_records=True):
                    ledger.position = packed.tell()
                    yield text
        except (OSError, EOFError, damaged):
            ledger.reject("damaged compressed file", file.path, ledger.read - before + 1)


def _gzip() -> tuple[Any, Any]:
    """Return what reads .gz files and its own error for damaged ones, beside OSError and EOFError."""
    try:
        from isal import igzip, isal_zlib
    except (
        ImportError
    ):  # Kaggle's images lack it, and a session may have no network: slower, and the same texts
        return gzip.GzipFile, zlib.error
    return igzip.IGzipFile, isal_zlib.error


def _whole_file(file: SourceFile, ledger: Ledger) -> Iterator[str]:
    if file.size > MAX_RECORD_BYTES:
        ledger.reject(TOO_LONG, file.path, 0)
        return
    with open_source(file) as source:
        data = source.read()
    ledger.position = len(data)
    yield from _text(data.removeprefix(_BOM), file, ledger, 0)


def _text(data: bytes, file: SourceFile, ledger: Ledger, offset: int) -> Iterator[str]:
    try:
        text = ledger.accepted(checked(data.decode("utf-8"), encodable=True), file.path, offset)
    except UnicodeDecodeError:
        ledger.reject("invalid UTF-8", file.path, offset)
    except Rejected as reason:
        ledger.reject(str(reason), file.path, offset)
    else:
        ledger.keep()
        yield text


def _paragraphs(file: SourceFile, ledger: Ledger, start: int, end: int) -> Iterator[str]:
    """Yield the texts between blank lines.

    A text belongs to the range that holds the blank line before it (the file's first text: to the range from 0), so
    that a worker can tell from its own range which texts are its own.
    """
    with open_source(file) as data:
        align(data, start)
        position = data.tell()
        blank_before = -1 if start == 0 else None  # where the last blank line began; None: not seen yet
        parts: list[bytes] = []
        size, begin = 0, 0
        for line, length in _lines(data):
            stripped = b"" if line is None else (line.removeprefix(_BOM) if position == 0 else line).strip()
            if line is not None and not stripped:
                if parts:
                    yield from _paragraph(parts, size, file, ledger, begin)
                    parts, size = [], 0
                blank_before = position
                if position >= end:
                    return
            elif blank_before is not None and blank_before < end:
                if not parts:
                    begin = position
                size += length
                if line is None or size > MAX_RECORD_BYTES:
                    parts = [b""]
                    size = max(size, MAX_RECORD_BYTES + 1)
                else:
                    parts.append(line.removeprefix(_BOM) if position == 0 else line)
            elif position >= end:
                return
            position += length
            ledger.position = max(0, position - start)
        if parts:
            yield from _paragraph(parts, size, file, ledger, begin)


def _paragraph(parts: list[bytes], size: int, file: SourceFile, ledger: Ledger, offset: int) -> Iterator[str]:
    if size > MAX_RECORD_BYTES:
        ledger.reject(TOO_LONG, file.path, offset)
    else:
        yield from _text(b"".join(parts).replace(b"\r\n", b"\n").rstrip(b"\n"), file, ledger, offset)


def _parquet(file: SourceFile, ledger: Ledger, start: int, end: int | None) -> Iterator[str]:
    """Yield the texts of row groups [start, end); places are row numbers."""
    import pyarrow
    from pyarrow import parquet

    try:
        # Read in blocks, and few long texts at once: a row group may be larger than the memory.
        table = parquet.ParquetFile(open_source(file), buffer_size=1 << 20, pre_buffer=False)
        metadata = table.metadata
        last = metadata.num_row_groups if end is None else min(end, metadata.num_row_groups)
        row = sum(metadata.row_group(group).num_rows for group in range(start))
        first, has_text = row, "text" in table.schema_arrow.names
        for group in range(start, last):
            rows = max(1, metadata.row_group(group).num_rows)
            if not has_text:
                for _ in range(metadata.row_group(group).num_rows):
                    row += 1
                    ledger.reject("no text field", file.path, row)
                continue
            at_once = max(1, min(1024, (1 << 20) * rows // max(1, metadata.row_group(group).total_byte_size)))
            for batch in table.iter_batches(at_once, row_groups=[group], columns=["text"]):
                for value in _values(batch.column(0)):
                    row += 1
                    ledger.position = file.size * (row - first) // max(1, metadata.num_rows)
                    yield from _value(value, file, ledger, row)
    except (pyarrow.ArrowException, OSError):
        ledger.reject("damaged parquet file", file.path, ledger.read + 1)


def _values(column: Any) -> list[Any]:
    """Return the values of an Arrow column, strings as bytes: one that is not UTF-8 must not cost its neighbours."""
    import pyarrow

    kind = column.type
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        column = column.cast(pyarrow.large_binary())
    return column.to_pylist()


def _value(value: Any, file: SourceFile, ledger: Ledger, row: int) -> Iterator[str]:
    """Yield the text of one value of a parquet column, or count it as rejected."""
    if isinstance(value, bytes) and len(value) <= MAX_RECORD_BYTES:
        yield from _text(value, file, ledger, row)
        return
    try:
        text = ledger.accepted(checked(value), file.path, row) if not isinstance(value, bytes) else None
    except Rejected as reason:
        ledger.reject(str(reason), file.path, row)
        return
    if text is None:
        ledger.reject(TOO_LONG, file.path, row)
    else:
        ledger.keep()
        yield text


def row_groups(file: SourceFile) -> int:
    """Return the row groups of a parquet file; 1 where it cannot be read (reading it will count that)."""
    import pyarrow
    from pyarrow import parquet

    try:
        return max(1, parquet.ParquetFile(file.path).num_row_groups)
    except (pyarrow.ArrowException, OSError):
        return 1
