"""What a relay knows, on disk: its settings, every session that it pushed, and the outputs that a leg can go on from.

`RELAY_DIR/relay.json` is replaced as a whole before and after everything that Kaggle is asked to do; so a relay that is
killed at any moment finds on its next start either that a push is still to be made, or that it must be looked for.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ekiden.checkpoint import files
from ekiden.errors import UserError

FORMAT_VERSION = 1
FILE = "relay.json"
SLUGS = ("a", "b", "c")
"""Three scripts in turn: the last two good outputs are never pushed over, whatever version Kaggle mounts of them."""


@dataclass
class RelaySettings:
    """What is fixed at a relay's first start.

    name: of its scripts, NAME-a to NAME-c. recipe: YAML of all settings of the run. corpus: datasets (owner/slug).
    fingerprint: of the packed corpus. gpus: that a leg must find; 0: none. accelerator: Kaggle's name. max_steps: of the
    run; 0: known to the legs only. tokens_per_step: of one optimizer step.
    """

    name: str
    recipe: str
    corpus: list[str]
    fingerprint: str
    gpus: int
    accelerator: str
    max_steps: int
    tokens_per_step: int


@dataclass
class Attempt:
    """One pushed session.

    leg: number of the leg, counted by progress; a leg that is lost is pushed again under its number. nonce: stands in
    the pushed source and in the verdict. source: the entry of `good` that it goes on from. tried: a push was begun, so
    it may have happened. state: pushing, running or ended. outcome: the verdict's status, or lost, stuck. progress: its
    output became one that a leg can start from.
    """

    leg: int
    slug: str
    source: dict[str, Any] | None
    seconds: int
    nonce: str = field(default_factory=lambda: secrets.token_hex(8))
    tried: bool = False
    state: str = "pushing"
    pushed: str = ""
    ended: str = ""
    outcome: str = ""
    progress: bool = False
    reason: str = ""
    verdict: dict[str, Any] = field(default_factory=dict)


@dataclass
class RelayState:
    """Everything in `relay.json`.

    good: outputs that a leg can start from, oldest first: {"ref", "leg", "step", "tokens", "manifest_sha256"}. forgiven:
    number of sessions for whose failures the relay has stopped before; started again, it tries as often again.
    """

    id: str
    user: str
    settings: RelaySettings
    attempts: list[Attempt] = field(default_factory=list)
    good: list[dict[str, Any]] = field(default_factory=list)
    completed: bool = False
    forgiven: int = 0

    @property
    def current(self) -> Attempt | None:
        """The session that has not ended."""
        return self.attempts[-1] if self.attempts and self.attempts[-1].state != "ended" else None

    @property
    def fruitless(self) -> list[Attempt]:
        """The sessions that ended since the last progress, or since the relay last stopped for want of it."""
        ended = [attempt for attempt in self.attempts if attempt.state == "ended"]
        last = max((number for number, attempt in enumerate(ended, 1) if attempt.progress), default=0)
        return ended[max(last, self.forgiven) :]

    def ref(self, slug: str) -> str:
        """Return owner/slug of one of the relay's scripts."""
        return f"{self.user}/{slug}"

    def save(self, folder: Path) -> None:
        """Write it, durably."""
        value = {"format": FORMAT_VERSION, **dataclasses.asdict(self)}
        files.write_atomic(folder / FILE, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> RelayState | None:
        """Return the state in `folder`, None where no relay was started there.

        Raises:
            UserError: it is damaged or of another version.
        """
        path = folder / FILE
        try:
            value = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read ({error}); restore it, or give another --relay-dir"
            ) from None
        try:
            if value.pop("format") != FORMAT_VERSION:
                raise UserError(f"{path} is of another version of Ekiden; use that one to finish the relay")
            value["settings"] = RelaySettings(**value["settings"])
            value["attempts"] = [Attempt(**attempt) for attempt in value["attempts"]]
            return cls(**value)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); restore it, or give another --relay-dir") from None


def now() -> str:
    """Return the time as it is recorded."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def age(stamp: str) -> float:
    """Return the seconds since a recorded time."""
    then = datetime.datetime.fromisoformat(stamp)
    return (datetime.datetime.now(datetime.UTC) - then).total_seconds()
