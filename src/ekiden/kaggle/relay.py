"""The relay: push a leg, wait, read its verdict, push the next from the last good output, until the run is complete.

What counts is the verdict that a leg left (`result.json`, with the leg's nonce), never Kaggle's status alone, which was seen
to say cancelled of finished sessions and complete of crashed ones. Three scripts take turns, so that the last two good
outputs are never pushed over. Killed at any moment and started again, it finds in `relay.json` and in the source that
Kaggle has whether its last push happened. Reads and writes RELAY_DIR; asks Kaggle through `client`.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ekiden.config import build_config, to_yaml
from ekiden.errors import UsageError, UserError
from ekiden.kaggle.client import Ambiguous, Kaggle, KaggleError
from ekiden.kaggle.launcher import GRACE_SECONDS, WALL_SECONDS, write_push
from ekiden.kaggle.leg import VERDICT
from ekiden.kaggle.results import bring_home
from ekiden.kaggle.state import SLUGS, Attempt, RelaySettings, RelayState, age, now
from ekiden.kaggle.upload import check_name, shards_fingerprint, slug_of
from ekiden.progress import human_count, human_duration, say
from ekiden.values import to_int

LEG_SECONDS = 11 * 3600
"""Of the 12 hours that Kaggle gives: the last checkpoint and the upload of the output need their time, too."""
MIN_QUOTA_SECONDS = 1800
"""Of the week's quota: with less a leg costs its start and brings little."""
STUCK_SECONDS = 24 * 3600
"""After which a session that still runs is one that never will: 12 hours and a long queue."""
MAX_FRUITLESS = 6
FINAL = ("COMPLETE", "ERROR", "CANCEL_ACKNOWLEDGED")
GOOD_KEPT = 2


@dataclass(frozen=True)
class Patience:
    """poll: seconds between two looks at a session. wait: sleeps for so many seconds."""

    poll: float = 60.0
    stuck: float = STUCK_SECONDS
    wait: Callable[[float], None] = time.sleep


def settings_of(
    recipe: str | None,
    name: str | None,
    corpus: list[str],
    fingerprint: str,
    gpus: int,
    accelerator: str,
    token_budget: str | None,
) -> RelaySettings:
    """Return what a new relay fixes.

    Raises:
        UsageError: a recipe, name or budget that cannot be used.
    """
    config = build_config(recipe)
    # The global batch is that of all ranks together.
    samples = config.samples_per_step(max(1, gpus))
    tokens_per_step = samples * config.max_length
    if token_budget:
        try:
            config.max_steps = math.ceil(to_int(token_budget) / tokens_per_step)
        except ValueError:
            raise UsageError(
                f"--token-budget must be a count such as 500M or 2B, not {token_budget!r}"
            ) from None
    config.dataset_path = config.output_dir = config.max_time = ""
    own = check_name(name or slug_of(Path(recipe or config.preset).stem))
    return RelaySettings(
        own, to_yaml(config), corpus, fingerprint, gpus, accelerator, config.max_steps, tokens_per_step
    )


def run_relay(
    recipe: str | None,
    relay_dir: str | Path,
    kaggle: Kaggle,
    *,
    corpus: list[str],
    name: str | None = None,
    token_budget: str | None = None,
    gpus: int = 2,
    accelerator: str = "NvidiaTeslaT4",
    leg_seconds: int = LEG_SECONDS,
    patience: Patience | None = None,
) -> RelayState:
    """Carry a run over as many Kaggle sessions as it takes; run again, it goes on where it was.

    Args:
        recipe: a preset's name or a YAML file. corpus: the datasets that `upload` printed. token_budget: tokens of the
            whole run, as 500M; None: the recipe's max_steps or epochs. leg_seconds: of one session.

    Raises:
        UserError: another relay works in the folder, settings differ from its first start, or legs keep failing.
    """
    if not 0 < leg_seconds <= WALL_SECONDS - GRACE_SECONDS:
        raise UsageError(
            f"--leg-time must be at most {human_duration(WALL_SECONDS - GRACE_SECONDS)}: Kaggle kills at 12h"
        )
    folder = Path(relay_dir)
    with locked(folder):
        state = RelayState.load(folder)
        if state is None:
            if not corpus:
                raise UsageError(
                    "--corpus is not set; give the datasets that `ekiden kaggle corpus upload` printed"
                )
            fingerprint = shards_fingerprint(corpus, kaggle)
            settings = settings_of(recipe, name, corpus, fingerprint, gpus, accelerator, token_budget)
            state = RelayState(secrets.token_hex(4), kaggle.user, settings)
            state.save(folder)
        elif recipe:
            check_same(state.settings, recipe, corpus, token_budget)
        if state.user != kaggle.user:
            raise UserError(
                f"this relay is {state.user}'s, and {kaggle.user} is signed in; sign in as {state.user}"
            )
        Relay(state, folder, kaggle, leg_seconds, patience or Patience()).run()
        return state


def check_same(settings: RelaySettings, recipe: str, corpus: list[str], token_budget: str | None) -> None:
    """Refuse a recipe that is not the one the relay began with.

    Raises:
        UserError: it differs.
    """
    asked = settings_of(recipe, settings.name, [], "", settings.gpus, "", token_budget).recipe
    if asked != settings.recipe:
        then, wanted = settings.recipe.splitlines(), asked.splitlines()
        line = next((f"{a} then, {b} now" for a, b in zip(then, wanted) if a != b), "another length")
        raise UserError(
            f"this relay began with another recipe ({line}); give that one, or another --relay-dir"
        )
    if corpus and corpus != settings.corpus:
        raise UserError(
            f"this relay began with --corpus {','.join(settings.corpus)}; give that, or another --relay-dir"
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a relay's folder: two relays would push each leg twice.

    Raises:
        UserError: another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"another relay works in {folder}; wait for it or stop it") from None


class Relay:
    """The running relay: every step reads and leaves a state from which the next one, or another process, goes on."""

    def __init__(
        self, state: RelayState, folder: Path, kaggle: Kaggle, leg_seconds: int, patience: Patience
    ) -> None:
        self.state, self.folder, self.kaggle = state, folder, kaggle
        self.leg_seconds, self.patience = leg_seconds, patience

    def run(self) -> None:
        """Go on until the run is complete and at home.

        Raises:
            UserError: legs keep ending without progress.
        """
        while not self.state.completed:
            attempt = self.state.current
            if attempt is None:
                self._begin()
            elif attempt.state == "pushing":
                self._push(attempt)
            else:
                self._watch(attempt)
        bring_home(self.state, self.kaggle, self.folder / "run")

    def _save(self) -> None:
        self.state.save(self.folder)

    # -- the next leg -------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Decide from where and for how long the next leg runs."""
        self._check_progress()
        seconds = self._affordable_seconds()
        state = self.state
        source = state.good[-1] if state.good else None
        used = {good["ref"] for good in state.good}
        slugs = [f"{state.settings.name}-{letter}" for letter in SLUGS]
        slug = next(slug for slug in slugs if state.ref(slug) not in used)
        state.attempts.append(Attempt((source["leg"] if source else 0) + 1, slug, source, seconds))
        self._save()

    def _check_progress(self) -> None:
        """Wait before a leg is tried again; go back one output where the last one cannot be mounted.

        Raises:
            UserError: it has been tried often enough.
        """
        fruitless = self.state.fruitless
        if not fruitless:
            return
        last = fruitless[-1]
        same = [a for a in fruitless if a.outcome == "failed" and a.reason == last.reason]
        if last.outcome == "failed" and len(same) >= 2:
            self._forgive()
            raise UserError(
                f"leg {last.leg} failed twice: {last.reason}; mend that and start the relay again"
            )
        unusable = [a for a in fruitless if a.outcome in ("stale-input", "no-checkpoint")]
        if len(unusable) == 3 and last in unusable and len(self.state.good) > 1:
            given_up = self.state.good.pop()
            say(
                f"the output of leg {given_up['leg']} cannot be mounted: going back to step {self.state.good[-1]['step']}"
            )
            self._save()
        elif len(fruitless) >= MAX_FRUITLESS:
            self._forgive()
            reasons = "; ".join(f"{a.outcome}: {a.reason}" for a in fruitless[-3:])
            raise UserError(
                f"leg {last.leg} was pushed {len(fruitless)} times without progress ({reasons}); see "
                f"kaggle.com/code/{self.state.ref(last.slug)}, and start the relay again"
            )
        else:
            self.patience.wait(self.patience.poll)

    def _forgive(self) -> None:
        self.state.forgiven = len(self.state.attempts)
        self._save()

    def _affordable_seconds(self) -> int:
        """Return how long the next leg may run; wait for the week's new quota where too little is left."""
        if not self.state.settings.gpus:
            return self.leg_seconds
        while (quota := self.kaggle.quota()).left < min(MIN_QUOTA_SECONDS, self.leg_seconds):
            until = (quota.refresh.timestamp() - time.time()) if quota.refresh else 0.0
            say(
                f"{human_duration(quota.left)} of this week's GPU quota left; new in {human_duration(max(0, until))}"
            )
            # In slices: the quota floats, and sometimes comes early.
            self.patience.wait(min(max(until, self.patience.poll), 15 * self.patience.poll))
        return int(min(self.leg_seconds, quota.left))

    # -- pushing ------------------------------------------------------------------------------------------------

    def _push(self, attempt: Attempt) -> None:
        """Push a leg, unless a push of it that was begun before turns out to have happened."""
        ref = self.state.ref(attempt.slug)
        if attempt.tried:
            self.patience.wait(self.patience.poll)  # what was just pushed may not be shown at once
            if attempt.nonce in self.kaggle.source(ref):
                say(f"leg {attempt.leg}: had been pushed to {ref}")
                self._pushed(attempt)
                return
        else:
            self._check_free(attempt, ref)
        attempt.tried, attempt.reason = True, ""
        self._save()
        with tempfile.TemporaryDirectory() as name:
            write_push(Path(name), self.state, attempt)
            try:
                accelerator = self.state.settings.accelerator if self.state.settings.gpus else None
                limit = min(attempt.seconds + 3 * GRACE_SECONDS, WALL_SECONDS - 60)
                answer = self.kaggle.push(Path(name), accelerator, limit)
            except Ambiguous as problem:
                say(f"leg {attempt.leg}: {problem}")
                return
        if answer.error:
            self._refused(attempt, answer.error)
            return
        if answer.invalid:
            say(f"leg {attempt.leg}: Kaggle left out {', '.join(answer.invalid)}; it will end at once")
            attempt.reason = f"Kaggle left out {', '.join(answer.invalid)}"
        self._pushed(attempt)
        say(
            f"leg {attempt.leg}: pushed to {ref}, version {answer.version}, for {human_duration(attempt.seconds)}"
        )

    def _check_free(self, attempt: Attempt, ref: str) -> None:
        """Leave a script of the same name that is not this relay's alone: another relay may go on from its output.

        Raises:
            UserError: there is one.
        """
        used = any(other.slug == attempt.slug for other in self.state.attempts[:-1])
        source = "" if used else self.kaggle.source(ref)
        if source and self.state.id not in source:
            raise UserError(
                f"{ref} is there already and not of this relay; give another --name and --relay-dir, or delete it on kaggle.com"
            )

    def _pushed(self, attempt: Attempt) -> None:
        attempt.state, attempt.pushed = "running", attempt.pushed or now()
        self._save()

    def _refused(self, attempt: Attempt, error: str) -> None:
        """Wait for what a refused push lacks; the next one has a nonce of its own.

        Raises:
            KaggleError: refused for a reason that waiting does not mend.
        """
        attempt.nonce, attempt.tried = secrets.token_hex(8), False
        text = error.lower()
        if "quota" in text:
            self.state.attempts.pop()  # how long the leg may run is decided anew
            self._save()
            say(f"leg {attempt.leg}: {error}")
            self.patience.wait(15 * self.patience.poll)
        elif "session count" in text or "maximum batch" in text:
            self._save()
            say(f"leg {attempt.leg}: {error} Waiting for one to end.")
            self.patience.wait(10 * self.patience.poll)
        else:
            attempt.reason = error
            self._save()
            raise KaggleError(f"Kaggle refused leg {attempt.leg}: {error}")

    # -- waiting ------------------------------------------------------------------------------------------------

    def _watch(self, attempt: Attempt) -> None:
        """Wait for a session's end and judge it."""
        ref = self.state.ref(attempt.slug)
        for look in range(6):
            status, message = self.kaggle.session(ref)
            if status not in FINAL:
                if age(attempt.pushed) > self.patience.stuck:
                    self._stuck(attempt, ref)
                    return
                self.patience.wait(self.patience.poll)
                return
            verdict = self._verdict(attempt, ref)
            if verdict is not None:
                self._judge(attempt, ref, verdict)
                return
            # The status may be the version's before this one, and an output appears some time after its session's end.
            if status != "COMPLETE" and look >= 2:
                break
            self.patience.wait(self.patience.poll)
        self._end(attempt, "lost", f"{status.lower()}: {message or 'no verdict in its output'}")

    def _stuck(self, attempt: Attempt, ref: str) -> None:
        """Delete a script whose session never ends: no good output is in it, and no call cancels a session."""
        say(f"leg {attempt.leg}: no end after {human_duration(age(attempt.pushed))}; deleting {ref}")
        self.kaggle.delete_script(ref)
        self._end(attempt, "stuck", "its session never ended")

    def _verdict(self, attempt: Attempt, ref: str) -> dict[str, Any] | None:
        """Return this attempt's verdict, None where the output has none (yet)."""
        address = self.kaggle.outputs(ref).get(VERDICT)
        if not address:
            return None
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / VERDICT
            try:
                self.kaggle.fetch(address, path)
                value = json.loads(path.read_bytes())
            except (KaggleError, ValueError):
                return None
        return value if isinstance(value, dict) and value.get("nonce") == attempt.nonce else None

    def _judge(self, attempt: Attempt, ref: str, verdict: dict[str, Any]) -> None:
        """Take a leg's output as the next source where it made progress."""
        attempt.verdict = verdict
        checkpoint = verdict.get("checkpoint") or {}
        before = attempt.source["step"] if attempt.source else 0
        status = str(verdict.get("status"))
        if checkpoint.get("step", 0) > before or status == "completed":
            good = {"ref": ref, "leg": attempt.leg, "tokens": verdict["tokens"], **checkpoint}
            self.state.good = [*self.state.good, good][-GOOD_KEPT:]
            attempt.progress = True
        self.state.completed = status == "completed"
        self._end(attempt, status, attempt.reason or str(verdict.get("reason")))

    def _end(self, attempt: Attempt, outcome: str, reason: str) -> None:
        attempt.state, attempt.ended, attempt.outcome, attempt.reason = "ended", now(), outcome, reason
        self._save()
        step, loss = attempt.verdict.get("step"), attempt.verdict.get("loss")
        figures = f" at step {step}, {human_count(attempt.verdict['tokens'])} tokens" if step else ""
        say(f"leg {attempt.leg}: {outcome}{figures}{f', loss {loss:.4f}' if loss else ''} ({reason})")
