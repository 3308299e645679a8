"""Every record is a document or counted under its reason, however the file is cut."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from ekiden.corpus import documents
from ekiden.corpus.documents import read_documents
from ekiden.corpus.formats import SourceFile
from ekiden.corpus.ledger import Ledger, line_number
from ekiden.corpus.sources import discover
from ekiden.errors import UserError


def source(path: Path) -> SourceFile:
    return next(iter(discover([str(path)], "any").values()))[0]


def read(path: Path, **options: object) -> tuple[list[str], Ledger]:
    ledger = Ledger()
    texts = list(read_documents(source(path), ledger, **options))
    assert ledger.read == ledger.kept + sum(ledger.rejected.values())
    assert ledger.kept == len(texts)
    return texts, ledger


BAD = [
    (b'{"text": "caf\xe9"}', "invalid UTF-8"),
    (b'{"text": "cut', "invalid JSON"),
    (b'{"text": "raw \x00 nul"}', "invalid JSON"),
    (b"not json", "invalid JSON"),
    (b'{"text": "\\ud800"}', "lone surrogate"),
    (b'{"body": "x"}', "no text field"),
    (b'{"text": null}', "text is null"),
    (b'{"text": 5}', "text is not a string"),
    (b'{"text": {"text": "x"}}', "text is not a string"),
    (b'{"text": ["x"]}', "text is not a string"),
    (b'{"text": ""}', "text is empty"),
    (b'{"text": " \\n\\t "}', "text is empty"),
    (b"[1, 2]", "not a JSON object"),
    (b'"text"', "not a JSON object"),
    (b"", "blank line"),
    (b"   ", "blank line"),
    (b"[" * 100_000, "nested too deeply"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_a_bad_record_is_counted_with_its_line(
    tmp_path: Path, line: bytes, reason: str, ending: bytes
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(ending.join([b'{"text": "one"}', line, b'{"text": "two"}', b""]))
    texts, ledger = read(path)
    assert texts == ["one", "two"]
    assert dict(ledger.rejected) == {reason: 1}
    assert ledger.describe()[0].endswith(f"{reason} ({path}:2)")


GOOD = [
    (b'\xef\xbb\xbf{"text": "x"}', "x"),
    (b'{"text": "x", "score": NaN}', "x"),
    (b'{"text": "\\u0000 nul"}', "\0 nul"),
    (b'{"text": "\\ud83d\\ude00"}', "\U0001f600"),
    (b'{"n": 1e400, "text": "x"}', "x"),
    ('{"text": "कोंकणी"}'.encode(), "कोंकणी"),
    (b'{"text": "a", "text": "b"}', "b"),
]


@pytest.mark.parametrize(("line", "text"), GOOD)
def test_an_unusual_record_is_kept(tmp_path: Path, line: bytes, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line)
    assert read(path)[0] == [text]


def test_a_long_line_is_read_and_a_longer_one_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * 5_000_000 + b'"}\n{"text": "two"}\n')
    assert [len(text) for text in read(path)[0]] == [5_000_000, 3]
    monkeypatch.setattr(documents, "MAX_RECORD_BYTES", 1_000_000)
    texts, ledger = read(path)
    assert texts == ["two"]
    assert dict(ledger.rejected) == {documents.TOO_LONG: 1}


lines = st.lists(
    st.one_of(
        st.text(st.characters(codec="utf-8"), max_size=20).map(lambda t: json.dumps({"text": t}).encode()),
        st.sampled_from([b"", b"{", b'{"text": 1}']),
        st.text(st.characters(codec="utf-8"), max_size=20).map(
            lambda t: json.dumps({"text": t}, ensure_ascii=False).encode()
        ),
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(lines, st.sampled_from([b"\n", b"\r\n"]), st.booleans(), st.lists(st.integers(0, 400), max_size=4))
def test_any_cut_of_a_file_gives_the_same_documents(
    tmp_path_factory: pytest.TempPathFactory, records: list[bytes], ending: bytes, last: bool, cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    path.write_bytes(ending.join(records) + (ending if last else b""))
    file = source(path)
    check_cuts(file, cuts)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(["one", "two words", "", " ", "कोंकणी", "x" * 30]), max_size=14),
    st.sampled_from(["\n", "\r\n"]),
    st.lists(st.integers(0, 200), max_size=4),
)
def test_any_cut_of_a_text_file_gives_the_same_documents(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], ending: str, cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    path.write_bytes(ending.join(rows).encode())
    check_cuts(source(path), cuts)


def check_cuts(file: SourceFile, cuts: list[int]) -> None:
    whole = Ledger()
    expected = list(read_documents(file, whole))
    borders = [0, *sorted(min(c, file.size) for c in cuts), max(file.size, 1)]
    parts = Ledger()
    found = [t for a, b in zip(borders, borders[1:]) if a < b for t in read_documents(file, parts, a, b)]
    assert found == expected
    assert (parts.read, parts.kept, parts.rejected) == (whole.read, whole.kept, whole.rejected)


def test_paragraphs_or_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\nmore\n\n \r\ntwo\n\n\nthree")
    assert read(path)[0] == ["one\nmore", "two", "three"]
    assert len(read(path, txt_documents="file")[0]) == 1


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_are_read_and_a_damaged_rest_is_counted(tmp_path: Path, suffix: str) -> None:
    data = b"".join(
        json.dumps({"text": f"document {i} " + str(i * 7919) * 20}).encode() + b"\n" for i in range(5000)
    )
    packed = gzip.compress(data) if suffix == ".gz" else zstandard.compress(data)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed)
    assert len(read(path)[0]) == 5000
    path.write_bytes(packed[: len(packed) // 2])
    texts, ledger = read(path)
    assert 0 <= len(texts) < 5000
    assert sum(ledger.rejected.values()) >= 1
    path.write_bytes(b"not compressed at all")
    assert dict(read(path)[1].rejected) == {"damaged compressed file": 1}


@pytest.mark.parametrize("isal", [True, False])
def test_a_flipped_bit_of_a_gz_file_is_counted(
    tmp_path: Path, isal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not isal:
        monkeypatch.setitem(sys.modules, "isal", None)
    lines = [json.dumps({"text": f"document {i * 7919}"}).encode() + b"\n" for i in range(200)]
    packed = gzip.compress(b"".join(lines))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(packed)
    assert len(read(path)[0]) == 200
    for place in range(12, len(packed), max(1, len(packed) // 60)):
        data = bytearray(packed)
        data[place] ^= 16
        path.write_bytes(data)
        assert sum(read(path)[1].rejected.values()) >= 1


def test_parquet_by_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    values = ["one", None, "", "two", "three", "four"]
    parquet.write_table(pyarrow.table({"text": values, "n": range(6)}), path, row_group_size=2)
    texts, ledger = read(path)
    assert texts == ["one", "two", "three", "four"]
    assert dict(ledger.rejected) == {"text is null": 1, "text is empty": 1}
    assert read(path, start=1, end=2)[0] == ["two"]
    path.write_bytes(b"PAR1 nothing")
    assert dict(read(path)[1].rejected) == {"damaged parquet file": 1}
    other = tmp_path / "b.parquet"
    parquet.write_table(pyarrow.table({"body": ["x", "y"]}), other)
    assert dict(read(other)[1].rejected) == {"no text field": 2}


def test_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"a\nbb\nccc\n")
    assert [line_number(str(path), offset) for offset in (0, 2, 5)] == [1, 2, 3]


def test_discover_merges_folders_by_language_and_names_what_is_wrong(tmp_path: Path) -> None:
    for part, language in (("p1", "dutch"), ("p2", "dutch"), ("p2", "hindi")):
        folder = tmp_path / part / language
        folder.mkdir(parents=True)
        (folder / f"{part}.jsonl").write_text('{"text": "x"}\n')
    found = discover([str(tmp_path / "p1"), str(tmp_path / "p2")])
    assert {name: len(files) for name, files in found.items()} == {"dutch": 2, "hindi": 1}
    with pytest.raises(UserError, match="does not exist"):
        discover([str(tmp_path / "p3")])
    with pytest.raises(UserError, match="add --language"):
        discover([str(tmp_path / "p1" / "dutch" / "p1.jsonl")])
    with pytest.raises(UserError, match="outside any language's folder"):
        discover([str(tmp_path / "p1" / "dutch")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \.jsonl"):
        discover([str(tmp_path / "empty")])


@pytest.mark.parametrize("language", ["", "../up", ".hidden"])
def test_a_language_that_cannot_be_a_folder_is_refused(tmp_path: Path, language: str) -> None:
    with pytest.raises(UserError, match="--language"):
        discover([str(tmp_path)], language)


def test_a_hub_address_needs_a_language() -> None:
    with pytest.raises(UserError, match="write LANGUAGE=hf://datasets/owner/name, or add --language"):
        discover(["hf://datasets/owner/name"])


def test_hidden_files_and_folders_are_no_text(tmp_path: Path) -> None:
    for name in (
        "text.jsonl",
        "more/text.jsonl",
        ".ipynb_checkpoints/text-checkpoint.jsonl",
        ".hidden.jsonl",
    ):
        (tmp_path / "english" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "english" / name).write_text('{"text": "a"}\n')
    assert [file.name for file in discover([str(tmp_path)])["english"]] == ["more/text.jsonl", "text.jsonl"]


def test_a_link_to_nothing_and_a_pipe_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "corpus" / "dutch"
    folder.mkdir(parents=True)
    (folder / "a.jsonl").write_text('{"text": "goed"}\n')
    (folder / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    os.mkfifo(folder / "c.txt")
    assert [Path(file.path).name for file in discover([str(tmp_path / "corpus")])["dutch"]] == ["a.jsonl"]
    said = capsys.readouterr().err
    assert "b.jsonl is not read, being a link to what is not there" in said
    assert "c.txt is not read, being no ordinary file" in said
