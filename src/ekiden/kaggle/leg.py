"""One leg of a relay: what runs on Kaggle, from its first line to `result.json`.

The relay pushes one file (`script.py`, filled in by `launcher.render`), which unpacks the package and calls `main`; the
notebook uses the same functions. From `/kaggle/input` come the corpus (`pack`) and the previous leg's output
(`inputs`); to `/kaggle/working` go `run/`, a run directory, and `result.json`, the leg's verdict. It always ends with
status 0: Kaggle throws the output of a failed session away, and the checkpoint with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ekiden.kaggle.inputs import checkpoints_of, find_pack, identity, take_over, unpack
from ekiden.kaggle.session import (
    BEGAN,
    Ended,
    install_missing,
    read_json,
    require_gpus,
    say,
    scratch_folder,
)

VERDICT = "result.json"


# -- training -----------------------------------------------------------------------------------------------------


def train_command(recipe: Path, dataset: Path, run: Path, gpus: int, flags: Iterable[str] = ()) -> list[str]:
    """Return the command that trains, on all GPUs; `start` adds `--max-time`."""
    places = ["--dataset-path", str(dataset), "--output-dir", str(run), "--devices", str(max(1, gpus))]
    return [sys.executable, "-u", "-m", "ekiden", "train", str(recipe), *places, *flags]


def start(
    command: list[str], seconds: float, scratch: Path, log: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start training that is to end by itself within `seconds`; what it prints goes to `log`, or where this prints."""
    environment = dict(os.environ) | {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"HF_HOME": str(scratch / "hub"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [*command, "--max-time", f"{max(1, int(seconds))}s"]
    say(" ".join(command))
    output = log.open("ab") if log else None
    return subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
    )


def wait(process: subprocess.Popen[bytes], seconds: float, grace: float) -> int:
    """Wait for training; where it overruns `seconds` by `grace`, ask it to stop, and after another `grace` kill it."""
    with contextlib.suppress(ValueError):  # a notebook's cell runs in no main thread
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
    for number, limit in ((signal.SIGTERM, max(0.0, seconds) + grace), (signal.SIGKILL, grace)):
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            say(f"training has overrun its time; sending {number.name}")
            if number == signal.SIGKILL:
                kill_all(process)
            else:  # only once: a second one ends training without a checkpoint
                process.send_signal(number)
    return process.wait()


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Kill training with its ranks, which live in a session of their own and would save while the output is judged."""
    import psutil

    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    process.kill()


def judge(run: Path, code: int, source: Path | None) -> dict[str, Any]:
    """Return what training came to: its own `result.json`, or where it left none, what its files say."""
    result = read_json(run / "result.json")
    if not isinstance(result, dict):
        ended = f"signal {-code} (out of memory?)" if code < 0 else f"status {code}"
        result = {"status": "failed", "reason": f"training ended with {ended} and left no result.json"}
    newest = next(iter(checkpoints_of(run)), None)
    if newest is None:
        return {**result, "step": 0, "tokens": 0, "checkpoint": None}
    before = int(source.name.removeprefix("step-")) if source else 0
    facts = (read_json(newest / "MANIFEST.json") or {}).get("run", {})
    found = identity(newest)
    last = {"loss": None, "tokens_per_second": None}
    with contextlib.suppress(OSError):
        for line in (run / "history.jsonl").read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if record.get("kind") == "train":
                    last = {"loss": record["loss"], "tokens_per_second": record["tokens_per_second"]}
    return {
        **result,
        **last,
        "step": found["step"],
        "steps_done": found["step"] - before,
        "tokens": facts.get("tokens", result.get("tokens", 0)),
        "checkpoint": found,
    }


def keep_within(working: Path, limit: int) -> None:
    """Remove what a killed save left, then the oldest checkpoints but two, where the output exceeds `limit` bytes."""
    run = working / "run"
    for pattern in (".tmp-*", ".trash-*", ".half-*"):
        for path in (run / "checkpoints").glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    for checkpoint in reversed(checkpoints_of(run)[1:]):
        size = sum(path.stat().st_size for path in working.rglob("*") if path.is_file())
        if size <= limit:
            return
        say(f"the output has {size / 1e9:.1f} GB: giving up {checkpoint.name}")
        shutil.rmtree(checkpoint, ignore_errors=True)


def run_leg(settings: dict[str, Any], root: Path, verdict: dict[str, Any]) -> None:
    """Go the leg; what is known at each moment stands in `verdict`.

    Raises:
        Ended: there is nothing to train with.
    """
    working, scratch = root / "working", scratch_folder(root)
    run, source = working / "run", None
    if settings.get("previous"):
        source = take_over(root, settings["previous"], settings["expected"], run)
        verdict |= {"carried": identity(source), "checkpoint": identity(source)}
        verdict |= {"step": verdict["carried"]["step"], "tokens": settings["expected"].get("tokens", 0)}
        say(f"carried {source.name} forward")
    write_verdict(working, verdict)
    require_gpus(settings["gpus"])
    manifest, chunks = find_pack(root, settings["datasets"], settings["fingerprint"])
    began = time.monotonic()
    dataset = unpack(manifest, chunks, scratch / "dataset")
    say(f"corpus {manifest['name']} unpacked in {time.monotonic() - began:.0f}s")
    install_missing()
    recipe = scratch / "recipe.yaml"
    recipe.write_text(settings["recipe"], encoding="utf-8")
    (run / "result.json").unlink(missing_ok=True)
    # 90 % of the output for checkpoints, as `training.rundir` would give; best/ and final_model/ take the rest.
    flags = ["--checkpoint-budget", str(int(0.8 * settings["output_bytes"]))]
    left = settings["seconds"] - (time.monotonic() - BEGAN)
    process = start(train_command(recipe, dataset, run, settings["gpus"], flags), left, scratch)
    code = wait(process, left, settings["grace"])
    verdict |= judge(run, code, source)
    say(f"{verdict['status']} at step {verdict['step']}: {verdict['reason']}")


def write_verdict(working: Path, verdict: dict[str, Any]) -> None:
    """Write `result.json`, whole or not at all."""
    working.mkdir(parents=True, exist_ok=True)
    temporary = working / f".{VERDICT}"
    temporary.write_text(
        json.dumps({**verdict, "seconds": round(time.monotonic() - BEGAN, 1)}, indent=1) + "\n"
    )
    temporary.replace(working / VERDICT)


def main(settings: dict[str, Any], root: Path) -> int:
    """Go one leg and leave its verdict; return 0 whatever happens."""
    verdict: dict[str, Any] = {name: settings.get(name) for name in ("relay", "leg", "nonce")}
    verdict |= {"status": "interrupted", "reason": "the session ended during the leg", "step": 0, "tokens": 0}
    verdict |= {"checkpoint": None, "carried": None}
    try:
        run_leg(settings, root, verdict)
    except Ended as end:
        verdict |= {"status": end.args[0], "reason": end.args[1]}
        say(f"{end.args[0]}: {end.args[1]}")
    except BaseException as error:
        traceback.print_exc()
        verdict |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    with contextlib.suppress(BaseException):
        keep_within(root / "working", settings.get("output_bytes", 20_000_000_000))
    with contextlib.suppress(BaseException):
        write_verdict(root / "working", verdict)
    return 0
