"""The prompts of `ekiden generate`: given one by one, in a file, or on standard input.

Gives plain strings to `run`. A file with anything wrong in it is refused with its line, because the texts are to stand
beside their prompts; only blank lines are passed over, and counted.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import orjson

from ekiden.errors import UsageError, UserError
from ekiden.progress import say

STDIN = "-"


def collect_prompts(prompts: list[str], files: list[str]) -> list[str]:
    """Return all prompts: the given ones, those of the files, or where there are none, what is piped in as one.

    A prompt `-` is all of standard input, a file `-` its lines.

    Raises:
        UsageError: standard input is asked for twice, or a prompt is not UTF-8.
        UserError: a file cannot be read, holds no prompts, or is not what its name says.
    """
    if [*prompts, *files].count(STDIN) > 1:
        raise UsageError(
            "standard input can be read only once; give `-` to --prompt or to --prompt-file, one time"
        )
    for prompt in prompts:
        if not _is_text(prompt):
            raise UsageError(
                f"--prompt {prompt!r} is not UTF-8; give it in UTF-8, or put it in a file for --prompt-file"
            )
    found = [_one_prompt(read_stdin()) if prompt == STDIN else prompt for prompt in prompts]
    for name in files:
        found += read_prompts(name)
    return found


def piped_prompt() -> list[str]:
    """Return what is piped in as one prompt, or nothing: no pipe, or an empty one.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        if sys.stdin is None or sys.stdin.isatty():
            return []
        text = read_stdin()
    except (OSError, ValueError):  # closed, or not a stream that can be read
        return []
    return [_one_prompt(text)] if text.strip() else []


def read_stdin() -> str:
    """Return all of standard input.

    Raises:
        UserError: it is not UTF-8.
    """
    binary = getattr(sys.stdin, "buffer", None)
    return _decode(binary.read(), "standard input") if binary is not None else sys.stdin.read()


def _one_prompt(text: str) -> str:
    """Return a text without the line end that `echo` and editors put behind it."""
    return text.removesuffix("\n").removesuffix("\r")


def read_prompts(name: str) -> list[str]:
    """Return the prompts of a file: one a line, or the "prompt" of every object of a .jsonl file.

    Args:
        name: a path, or - for the lines of standard input.

    Raises:
        UserError: it cannot be read, a line is not UTF-8 or not what it should be, or it holds no prompts.
    """
    where = "standard input" if name == STDIN else name
    lines = _lines(read_stdin() if name == STDIN else _decode(_read(Path(name)), where))
    prompts = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UserError(f"--prompt-file {where} holds no prompts; put one on each line")
    if blank := len(lines) - len(prompts):
        say(f"{where}: {len(prompts)} prompts, {blank} blank lines passed over")
    if Path(name).suffix.lower() in (".jsonl", ".ndjson"):
        return [_of_object(line, f"{where}:{number}") for number, line in prompts]
    return [line for _, line in prompts]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except IsADirectoryError:
        raise UserError(
            f"--prompt-file {path} is a folder; give a .txt or .jsonl file with a prompt on each line"
        ) from None
    except OSError as error:
        raise UserError(
            f"--prompt-file {path} cannot be read ({error.strerror or error}); give a .txt or .jsonl file"
        ) from None


def _lines(text: str) -> list[str]:
    """Return the lines of a text, however they end; no other character ends one (U+2028 may stand in JSON)."""
    return [line.removesuffix("\n") for line in io.StringIO(text, newline=None)]


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{where}:{line} is not UTF-8 (byte 0x{data[error.start]:02x}); save it as UTF-8"
        ) from None


def _of_object(line: str, where: str) -> str:
    """Return the prompt of one line of JSONL."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(
            f'{where} is not JSON ({error}); each line must be an object like {{"prompt": "Once"}}'
        ) from None
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str):
        raise UserError(
            f'{where} has no "prompt" text; each line must be an object like {{"prompt": "Once"}}'
        )
    return prompt


def _is_text(prompt: str) -> bool:
    """Return whether a command line's argument was UTF-8: other bytes come as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in prompt)
