"""The relay through the real client, with every fault that Kaggle is known for, and killed at random."""

from __future__ import annotations

import datetime
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from campaign import Outcome, outcome
from sessions import Faults, Zygote
from stand_in import HttpFault, SessionFault, StandIn, Version, copy_datasets

from ekiden.errors import UserError
from ekiden.kaggle import launcher
from ekiden.kaggle import relay as relays
from ekiden.kaggle.client import Kaggle, KaggleError, Quota
from ekiden.kaggle.inputs import PACK_MANIFEST
from ekiden.kaggle.relay import Patience, run_relay
from ekiden.kaggle.results import describe, load_relay, pull, quota_now
from ekiden.kaggle.state import Attempt, RelaySettings, RelayState
from ekiden.training.history import read_history

POLL = 0.1
QUOTA = "Maximum weekly GPU quota of 30.00 hours reached."
SESSIONS = "Maximum batch GPU session count of 2 reached."
OUTPUT_LIMIT = 1_300_000
"""In place of Kaggle's 20 GB: room for three checkpoints of 350 kB, where four, a best and a final model would be kept."""


@pytest.fixture
def ready(stand_in: StandIn, packed: dict[str, Path], zygote: Zygote, recipe: str, tmp_path: Path) -> StandIn:
    """Return the server with the corpus on it; its sessions do 4 steps and pause."""
    copy_datasets(stand_in, packed)
    stand_in.python, stand_in.steps_a_leg = str(zygote.python), 4
    (tmp_path / "tiny.yaml").write_text(recipe)
    return stand_in


@pytest.fixture
def start(
    ready: StandIn, kaggle: Kaggle, packed: dict[str, Path], tmp_path: Path
) -> Callable[..., RelayState]:
    """Return what runs the relay to its end."""

    def run(**options: Any) -> RelayState:
        settings = {"corpus": sorted(packed), "gpus": 1, "patience": Patience(poll=POLL), **options}
        return run_relay(str(tmp_path / "tiny.yaml"), tmp_path / "relay", kaggle, **settings)

    return run


class Impatience:
    """A `Patience` that gives up at once on a session that will never begin, and on no other, however slow the machine."""

    poll, wait = POLL, staticmethod(time.sleep)

    def __init__(self, ready: StandIn) -> None:
        self.ready = ready

    @property
    def stuck(self) -> float:
        scripts = list(self.ready.kernels.values())  # the server's threads push
        return 0.0 if any(version.never for versions in scripts for version in versions) else math.inf


def whole(run: Path, reference: Outcome) -> None:
    """Assert that a run that came home is the uninterrupted one."""
    assert outcome(run) == reference
    assert (run / "final_model" / "model.safetensors").is_file()


def starts(run: Path) -> int:
    return sum(record.get("event") in ("start", "resume") for record in read_history(run / "history.jsonl"))


def test_three_legs_with_faults_are_one_run(
    start: Callable[..., RelayState], ready: StandIn, reference: Outcome, tmp_path: Path, kaggle: Kaggle
) -> None:
    ready.steps_a_leg = 7
    ready.session_faults = [
        SessionFault(),
        SessionFault(Faults(gpus=0)),
        SessionFault(Faults(exit_status=1)),
        SessionFault(),
        SessionFault(Faults(kill_after=0.6)),
    ]
    ready.push_errors = [SESSIONS]
    ready.http_faults["SaveKernel"] = [HttpFault(0, after=True), HttpFault(429), HttpFault(503)]
    state = start()
    whole(tmp_path / "relay" / "run", reference)
    outcomes = [attempt.outcome for attempt in state.attempts]
    assert outcomes == ["paused", "no-gpu", "lost", "paused", "lost", "completed"]
    assert [attempt.leg for attempt in state.attempts] == [1, 2, 2, 2, 3, 3]
    # Pushes whose answer was lost were found, not made again.
    assert len(ready.versions()) == len(state.attempts)
    table = describe(load_relay(tmp_path / "relay"), kaggle.quota())
    assert "complete" in table and "no-gpu" in table
    # Given again, it changes nothing.
    pushes = ready.calls("SaveKernel")
    start()
    assert ready.calls("SaveKernel") == pushes
    assert pull(tmp_path / "relay", kaggle, tmp_path / "elsewhere") == tmp_path / "elsewhere"
    whole(tmp_path / "elsewhere", reference)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_ten_legs_with_every_fault_are_one_run(
    start: Callable[..., RelayState],
    ready: StandIn,
    reference: Outcome,
    reference_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ready.steps_a_leg = 2
    ready.output_limit = OUTPUT_LIMIT
    monkeypatch.setattr(launcher, "OUTPUT_BYTES", OUTPUT_LIMIT)
    good, stale = SessionFault(), SessionFault(stale=True)
    ready.session_faults = [
        SessionFault(Faults(hide_inputs=True)),  # the corpus is not mounted
        *(SessionFault(stale_corpus=True), good),  # an older version of it is
        *(SessionFault(Faults(gpus=0)), good),  # a CPU without a word
        SessionFault(Faults(kill_after=0.5)),  # the wall: output lost
        *(SessionFault(Faults(exit_status=137)), good),  # an error: output lost
        SessionFault(Faults(litter=OUTPUT_LIMIT)),  # more than the output may hold: lost
        *(SessionFault(never=True), good, good),  # queued for ever
        *(stale, good),  # an older version is mounted
        *(SessionFault(lie="CANCEL_ACKNOWLEDGED"), good),  # finished, and shown as cancelled
        SessionFault(Faults(exit_status=1), lie="COMPLETE"),  # crashed, and shown as complete
        *(stale, stale, stale),  # and again and again: the relay goes back one output
    ]
    ready.push_errors = [SESSIONS, SESSIONS, QUOTA]
    ready.push_invalid = [["tester/tiny-corpus-1"]]
    ready.kernel_settle = 2  # status and output are for a while those of the version before
    for ref, versions in ready.datasets.items():
        older = shutil.copytree(versions[0], tmp_path / "older" / ref)
        manifest = json.loads((older / PACK_MANIFEST).read_text())
        (older / PACK_MANIFEST).write_text(json.dumps({**manifest, "fingerprint": "0" * 64}))
        versions.insert(0, older)
    ready.quota |= {"used": 107_999.0, "refresh": time.time() + 2}
    for method in (
        "SaveKernel",
        "GetKernelSessionStatus",
        "ListKernelSessionOutput",
        "GetAcceleratorQuotaStatistics",
        "GET",
    ):
        ready.http_faults[method] = [HttpFault(429, headers={"Retry-After": "1"}), HttpFault(503)]
    ready.http_faults["SaveKernel"] += [HttpFault(0, after=True), HttpFault(0)]
    asked = len(ready.push_errors + ready.push_invalid) + sum(map(len, ready.http_faults.values()))
    injected = sum(fault is not good for fault in ready.session_faults)
    state = start(patience=Impatience(ready))
    whole(tmp_path / "relay" / "run", reference)
    assert not ready.session_faults and not ready.push_errors and not any(ready.http_faults.values())
    outcomes = Counter(attempt.outcome for attempt in state.attempts)
    assert outcomes["completed"] == 1 and outcomes["paused"] >= 9
    assert (
        min(outcomes[name] for name in ("no-corpus", "no-gpu", "stuck")) == 1 and outcomes["stale-input"] == 5
    )
    assert [a.leg for a in state.attempts].count(8) == 2  # gone back to
    assert outcomes["lost"] == 4
    assert starts(tmp_path / "relay" / "run") == 10
    reasons = [attempt.reason for attempt in state.attempts]
    assert sum("Output exceeds the limit" in reason for reason in reasons) == 1
    kept = [v.session.output_bytes for v in ready.versions() if v.kept and v.session]
    assert len(kept) >= 10 and OUTPUT_LIMIT / 2 < max(kept) <= OUTPUT_LIMIT
    # What the run leaves where nothing limits it would have been lost.
    assert sum(p.stat().st_size for p in reference_run.rglob("*") if p.is_file()) > OUTPUT_LIMIT
    print(
        f"10 legs in {len(state.attempts)} sessions; {injected} faulty sessions, {asked} faulty answers, legs lost 0; "
        f"outcomes {dict(outcomes)}; largest output {max(kept)} of {OUTPUT_LIMIT} bytes"
    )


def begin(ready: StandIn, packed: dict[str, Path], tmp_path: Path) -> subprocess.Popen[bytes]:
    """Start the relay as a user does, in a process."""
    command = [sys.executable, "-m", "ekiden", "kaggle", "relay", str(tmp_path / "tiny.yaml"), "--gpus", "1"]
    command += [
        "--corpus",
        ",".join(sorted(packed)),
        "--relay-dir",
        str(tmp_path / "relay"),
        "--poll-seconds",
        "0.1",
    ]
    environment = {**os.environ, **ready.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "relay.log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def killed_relay(ready: StandIn, packed: dict[str, Path], tmp_path: Path, kills: int, seed: int) -> int:
    """Kill a relay at random moments until it is done; return how often."""
    generator, done = random.Random(seed), 0
    while True:
        process = begin(ready, packed, tmp_path)
        try:
            # Imports take a second or two; most of what there is to hit comes then.
            code = process.wait(generator.uniform(0.2, 6.0) if done < kills else 1000)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += 1
            continue
        assert code == 0, (tmp_path / "relay.log").read_text()
        return done


def no_leg_lost_none_doubled(ready: StandIn, tmp_path: Path) -> None:
    state = load_relay(tmp_path / "relay")
    legs = [attempt.leg for attempt in state.attempts]
    assert legs == list(range(1, len(legs) + 1))
    pushed = Counter(json.loads(v.session.verdict_text)["leg"] for v in ready.versions() if v.session)
    assert pushed == Counter(legs)


def test_a_relay_killed_goes_on(
    ready: StandIn, packed: dict[str, Path], reference: Outcome, tmp_path: Path
) -> None:
    ready.steps_a_leg = 10
    assert killed_relay(ready, packed, tmp_path, kills=2, seed=1) > 0
    no_leg_lost_none_doubled(ready, tmp_path)
    whole(tmp_path / "relay" / "run", reference)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_relay_killed_50_times(
    ready: StandIn, packed: dict[str, Path], reference: Outcome, tmp_path: Path
) -> None:
    ready.steps_a_leg, ready.hold_seconds = 1, 6.0
    assert killed_relay(ready, packed, tmp_path, kills=50, seed=2) == 50
    no_leg_lost_none_doubled(ready, tmp_path)
    whole(tmp_path / "relay" / "run", reference)
    print(
        f"relay killed 50 times; {len(ready.versions())} legs, lost 0, doubled 0; weights and losses bit-identical"
    )


def test_killed_at_every_write_and_request(
    ready: StandIn,
    start: Callable[..., RelayState],
    reference: Outcome,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before and after everything that the relay saves or asks in its first two legs."""

    class Killed(BaseException):
        pass

    count, limit = 0, 0

    def around(real: Callable[..., Any]) -> Callable[..., Any]:
        def work(*args: Any, **options: Any) -> Any:
            check()
            value = real(*args, **options)
            check()
            return value

        return work

    def check() -> None:
        nonlocal count
        count += 1
        if count == limit:
            raise Killed

    monkeypatch.setattr(RelayState, "save", around(RelayState.save))
    monkeypatch.setattr(Kaggle, "push", around(Kaggle.push))
    monkeypatch.setattr(Kaggle, "outputs", around(Kaggle.outputs))
    ready.steps_a_leg = 10
    kills = 0
    while True:
        # Later each time, so that every moment is met though each start makes progress.
        count, limit = 0, kills % 7 + 1
        try:
            start()
            break
        except Killed:
            kills += 1
            assert kills < 60
    assert kills >= 7
    no_leg_lost_none_doubled(ready, tmp_path)
    whole(tmp_path / "relay" / "run", reference)


def test_what_waiting_does_not_mend_ends_with_a_sentence(
    start: Callable[..., RelayState], ready: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready.push_errors = ["Your account must be phone verified."]
    with pytest.raises(KaggleError, match="refused leg 1: Your account must be phone verified"):
        start()
    monkeypatch.setattr(relays, "MAX_FRUITLESS", 2)
    ready.session_faults = [SessionFault(Faults(gpus=0)) for _ in range(2)]
    with pytest.raises(
        UserError, match=r"leg 1 was pushed 2 times without progress .*no-gpu: 0 GPUs found, 1 needed"
    ):
        start()
    # Started again, it does not stop for what it stopped for before.
    ready.session_faults = [SessionFault(Faults(gpus=0)), SessionFault(Faults(gpus=0))]
    with pytest.raises(UserError, match="leg 1 was pushed 2 times without progress"):
        start()
    assert len(load_relay(tmp_path / "relay").attempts) == 4
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("hidden_size: 32", "hidden_size: 48"))
    with pytest.raises(
        UserError, match=r"began with another recipe \(hidden_size: 32 then, hidden_size: 48 now\)"
    ):
        start()
    with (
        relays.locked(tmp_path / "relay"),
        pytest.raises(UserError, match="another relay works in"),
    ):
        start()
    with pytest.raises(UserError, match="--leg-time must be at most 11h50m"):
        start(leg_seconds=43_200)


def test_what_is_left_is_counted_in_sessions_and_days() -> None:
    settings = RelaySettings("tiny", "", ["me/tiny-1"], "f", 2, "NvidiaTeslaT4", 1000, 128)
    state = RelayState("id", "me", settings)
    for number in (1, 2):
        verdict = {"step": 100 * number, "steps_done": 100, "tokens": 12_800, "loss": 3.0, "seconds": 36_000}
        state.attempts.append(
            Attempt(
                number,
                "tiny-a",
                None,
                36_000,
                state="ended",
                outcome="paused",
                progress=True,
                verdict=verdict,
            )
        )
    state.good = [{"ref": "me/tiny-a", "leg": 2, "step": 200, "tokens": 25_600}]
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=3)
    # 8 sessions of 10 hours are 80: 20 of this week's 30, and after 3 days 30, 30 more after another week.
    table = describe(state, Quota(used=36_000, allowed=108_000, refresh=later))
    assert "step 200 of 1000, 25.6k tokens" in table
    assert "about 8 more session(s), 11.2 days" in table
    assert "quota: 10h00m of 30h00m used" in table
    assert "about 8 more session(s), 3.3 days" in describe(state, None)


def test_nothing_secret_is_pushed_or_shown(
    start: Callable[..., RelayState], ready: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ready.steps_a_leg = 0
    ready.http_faults["SaveKernel"] = [HttpFault(401)]
    with pytest.raises(KaggleError, match="sign in again") as error:
        start()
    start()
    shown = capsys.readouterr()
    texts = [
        str(error.value),
        shown.out,
        shown.err,
        (tmp_path / "relay" / "relay.json").read_text(),
        *ready.log,
    ]
    texts += [version.source for version in ready.versions()]
    assert len(texts) > 5 and not any("KGAT" in text for text in texts)


def test_a_script_of_another_relay_is_left_alone(
    start: Callable[..., RelayState], ready: StandIn, tmp_path: Path
) -> None:
    ready.kernels["tester/tiny-a"].append(Version("print('mine')", [], {}, status="COMPLETE"))
    with pytest.raises(
        UserError, match=r"tester/tiny-a is there already and not of this relay; give another"
    ):
        start()
    assert ready.calls("SaveKernel") == 0


def test_the_quota_is_not_waited_for_without_a_network(
    ready: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr(Kaggle.__init__, "__defaults__", (waits.append, 60))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert quota_now() is None
    assert "quota is not known: Kaggle, signing in: Kaggle cannot be reached" in capsys.readouterr().err
    assert sum(waits) < 30


@pytest.mark.parametrize(
    ("token", "file", "sentence"),
    [
        ("KGAT_wrong", "", "does not accept the token in KAGGLE_API_TOKEN; set KAGGLE_API_TOKEN to"),
        ("", "", "knows no credentials: set KAGGLE_API_TOKEN to a token from kaggle.com/settings"),
        ("", "{broken KGAT", r"kaggle\.json.*; set KAGGLE_API_TOKEN"),
    ],
)
def test_credentials_that_are_none(
    ready: StandIn, token: str, file: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAGGLE_API_TOKEN", token) if token else monkeypatch.delenv("KAGGLE_API_TOKEN")
    if file:
        (tmp_path / "home" / ".kaggle").mkdir(parents=True)
        (tmp_path / "home" / ".kaggle" / "kaggle.json").write_text(file)
    with pytest.raises(KaggleError, match=sentence) as raised:
        Kaggle(wait=lambda _: None)
    assert "KGAT" not in str(raised.value)


def test_a_client_too_old_is_refused(monkeypatch: pytest.MonkeyPatch, ready: StandIn) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _name: "2.0.2")
    with pytest.raises(
        KaggleError, match=r"client 2\.0\.2 is too old; pip install --upgrade 'ekiden\[kaggle\]'"
    ):
        Kaggle()
