"""A conversation on a terminal: beginnings typed by somebody, continued by the model, settings changed on the way.

`run` calls `converse`; texts come from `streaming`. Lines typed earlier come back with the arrow keys, in the next session
too: readline keeps them in the user's state folder.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from transformers import PreTrainedModel

from ekiden.errors import UsageError, UserError, nearest
from ekiden.generation.sampling import Sampling
from ekiden.generation.streaming import stream
from ekiden.tokenizer.load import Tokenizer

HELP = """Type the beginning of a text and the model continues it; what you type next goes on from there.
An empty line lets it write on. Ctrl-C stops it. A text that begins with / is typed with //.
  /temperature 0.8   /top-k 40   /top-p 0.95   /min-p 0.05   /repetition-penalty 1.1
  /max-new-tokens 128   /seed 0
  /settings          the settings as they are
  /history           the text so far
  /undo              take back the last line and what the model made of it
  /reset             forget the text so far
  /quit              the end, as Ctrl-D
"""
HISTORY_LINES = 1000


def converse(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    sampling: Sampling,
    ask: Callable[[], str | None],
    write: Callable[[str], None],
    prompts: list[str] | None = None,
) -> None:
    """Continue what `ask` returns, again and again, each on top of the text so far, until None or /quit.

    Args:
        ask: returns a line, None at the end of the input.
        write: shows text, adding nothing.
        prompts: continued first, each a new text; the last one is the text so far.
    """
    conversation = Conversation(model, tokenizer, sampling, write)
    for prompt in prompts or []:
        conversation.text = ""
        conversation.answer(prompt)
    write("/help lists the commands, /quit ends\n")
    while (line := ask()) is not None:
        if line.startswith("/") and not line.startswith("//"):
            if not conversation.command(line[1:].split()):
                return
        else:
            conversation.answer(line.removeprefix("/") if line.startswith("//") else line)


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
        self.earlier: list[str] = []
        """The text before each line, for /undo."""

    def answer(self, line: str) -> None:
        """Add `line` to the text, and what the model makes of it; show both."""
        self.earlier.append(self.text)
        space = " " if self.text and line and not self.text[-1].isspace() else ""
        self.text += space + line
        self.write(line)
        try:
            for piece in stream(self.model, self.tokenizer, self.text, self.sampling):
                self.text += piece
                self.write(piece)
        except KeyboardInterrupt:
            self.write(" [stopped]")
        except UserError as error:
            self.text = self.earlier.pop()
            self.write(f"{error}")
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
        elif name == "undo":
            self.text = self.earlier.pop() if self.earlier else ""
            self.write(f"{self.text}\n")
        elif name == "reset":
            self.text, self.earlier = "", []
        elif name in settings:
            self._set(name, words[1:])
        else:
            commands = ["help", "settings", "history", "undo", "reset", "quit", *settings]
            self.write(f"there is no /{name}{nearest(name, commands)}\n")
        return True

    def _set(self, name: str, values: list[str]) -> None:
        field = name.replace("-", "_")
        kind = type(getattr(self.sampling, field))
        try:
            self.sampling = dataclasses.replace(self.sampling, **{field: kind(values[0])})
        except (IndexError, ValueError):
            number = "whole number" if kind is int else "number"
            self.write(f"/{name} needs a {number}, as /{name} {getattr(self.sampling, field)}\n")
        except UsageError as error:
            self.write(f"{error}\n")
        else:
            self.write(f"{name} {getattr(self.sampling, field)}\n")


# -- on a terminal --------------------------------------------------------------------------------------------


def ask_on_terminal() -> str | None:
    """Return the next line that is typed or piped in, None at the end.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None
    except UnicodeDecodeError:
        raise UserError(
            "standard input is not UTF-8; set the terminal to UTF-8, or convert the file"
        ) from None


@contextmanager
def line_history() -> Iterator[None]:
    """Give `input` line editing and the lines of earlier sessions, where somebody types."""
    try:
        import readline
    except ImportError:  # not on Windows
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    path = history_file()
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)


def history_file() -> Path:
    """Return where typed lines are kept: the state folder of the XDG base directories."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "ekiden" / "prompts"
