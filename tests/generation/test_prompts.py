"""Prompts as users bring them: lines, JSON lines, standard input; anything wrong is refused with its line."""

from __future__ import annotations

import io
import sys

import pytest

from ekiden.errors import UsageError, UserError
from ekiden.generation.prompts import collect_prompts, piped_prompt, read_prompts


def pipe(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_a_prompt_on_each_line_blank_ones_passed_over_and_counted(tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffThe river\r\n\r\nनदी पहाड़\u2028से\n   \n last ".encode())
    assert read_prompts(str(path)) == ["The river", "नदी पहाड़\u2028से", " last "]
    assert "3 prompts, 2 blank lines passed over" in capsys.readouterr().err


def test_json_lines(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "two\\nlines", "id": 7}\n{"prompt": ""}\n')
    assert read_prompts(str(path)) == ["two\nlines", ""]


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("p.txt", b"one\n\xff\xfe two\n", r"p\.txt:2 is not UTF-8 \(byte 0xff\)"),
        ("p.jsonl", b'{"prompt": "x"}\n{"prompt": \n', r"p\.jsonl:2 is not JSON"),
        ("p.jsonl", b'["x"]\n', r'p\.jsonl:1 has no "prompt" text'),
        ("p.jsonl", b'{"prompt": 3}\n', r'p\.jsonl:1 has no "prompt" text'),
        ("p.txt", b" \n\n", r"p\.txt holds no prompts"),
    ],
)
def test_a_file_with_anything_wrong_is_refused_with_its_line(name, data, sentence, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=sentence):
        read_prompts(str(tmp_path / name))


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="is a folder; give a"):
        read_prompts(str(tmp_path))
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        read_prompts(str(tmp_path / "missing.txt"))


def test_standard_input_is_one_prompt_or_its_lines(monkeypatch, tmp_path):
    (tmp_path / "more.txt").write_text("last\n")
    pipe(monkeypatch, b"a text\nof two lines\n")
    assert collect_prompts(["first", "-"], [str(tmp_path / "more.txt")]) == [
        "first",
        "a text\nof two lines",
        "last",
    ]
    pipe(monkeypatch, b"one\ntwo\n")
    assert collect_prompts([], ["-"]) == ["one", "two"]
    with pytest.raises(UsageError, match="standard input can be read only once"):
        collect_prompts(["-"], ["-"])
    pipe(monkeypatch, b"one\n\xff\n")
    with pytest.raises(UserError, match="standard input:2 is not UTF-8"):
        collect_prompts([], ["-"])
    with pytest.raises(UsageError, match="is not UTF-8; give it in UTF-8"):
        collect_prompts(["caf\udce9"], [])


def test_what_is_piped_in_is_a_prompt_where_no_other_is(monkeypatch):
    pipe(monkeypatch, b"once upon\n")
    assert piped_prompt() == ["once upon"]
    pipe(monkeypatch, b" \n")
    assert piped_prompt() == []
    monkeypatch.setattr(sys, "stdin", None)
    assert piped_prompt() == []
