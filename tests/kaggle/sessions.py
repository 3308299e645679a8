"""One session as Kaggle runs it: inputs that may only be read, an output with a limit, a hard kill at the wall, and
the output kept only where the script ended with status 0."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import zygote
from forked import Served

HERE = Path(__file__).parent
BOOTSTRAP = (
    "import runpy, sys; sys.executable, path = sys.argv[1:]; runpy.run_path(path, run_name='__main__')"
)


class Zygote:
    """The process that legs' training commands are forked from, and the `python` that asks it to."""

    def __init__(self, folder: Path) -> None:
        self.python = folder / "python"
        path = folder / "socket"
        self._process = Served(zygote.begin, folder / "zygote.log", str(path))
        self._process.ask("are you there?")
        self._process.give("serve")
        self.python.write_text(
            f'#!/bin/sh\nexec {sys.executable} -S -E {HERE / "zygote_client.py"} {path} "$@"\n'
        )
        self.python.chmod(0o755)

    def close(self) -> None:
        """End it."""
        self._process.kill()


@dataclass
class Faults:
    """What goes wrong in a session. kill_after: seconds after which the wall comes. exit_status: of the script, whatever it
    did. gpus: how many nvidia-smi lists. stop_after_steps: training is asked to pause after so many. litter: bytes of a file
    that it leaves beside its output."""

    kill_after: float = 600
    exit_status: int | None = None
    gpus: int = 1
    stop_after_steps: int = 0
    hide_inputs: bool = False
    litter: int = 0


@dataclass
class Session:
    """One run of a script; `run` returns Kaggle's status, message and, where kept, the output folder.

    inputs: folder of each input by its kind and name ("datasets/owner/slug", "notebooks/owner/slug"). flat: the older
    layout of mounts. output_bytes: that the script left; more than output_limit are lost.
    """

    folder: Path
    source: str
    inputs: dict[str, Path]
    python: str = sys.executable
    flat: bool = False
    output_limit: int = 20_000_000_000
    faults: Faults = field(default_factory=Faults)
    log: str = ""
    verdict_text: str = "{}"
    output_bytes: int = 0

    @property
    def working(self) -> Path:
        """The output folder."""
        return self.folder / "working"

    def run(self) -> tuple[str, str]:
        """Run the script; return status and failure message."""
        self._mount()
        before = self._input_state()
        script = self.folder / "src" / "script.py"
        script.parent.mkdir()
        script.write_text(self.source, encoding="utf-8")
        with (self.folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", BOOTSTRAP, self.python, script],
                cwd=self.working,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
            )
            status, message = self._wait(process)
        self.log = (self.folder / "log").read_text(errors="replace")
        if self._input_state() != before:
            status, message = "ERROR", "the script wrote to its inputs"
        if self.faults.litter:
            (self.working / "litter").write_bytes(b"")
            os.truncate(self.working / "litter", self.faults.litter)
        self.output_bytes = sum(path.stat().st_size for path in self.working.rglob("*") if path.is_file())
        if status == "COMPLETE" and self.output_bytes > self.output_limit:
            status, message = "ERROR", "Output exceeds the limit."
        with contextlib.suppress(OSError):
            self.verdict_text = (self.working / "result.json").read_text()
        if status != "COMPLETE":
            shutil.rmtree(self.working)
            self.working.mkdir()
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)
        subprocess.run(["chmod", "-R", "u+w", self.folder / "input"], check=True)
        shutil.rmtree(self.folder / "input")
        return status, message

    def _wait(self, process: subprocess.Popen[bytes]) -> tuple[str, str]:
        try:
            code = process.wait(self.faults.kill_after)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(process.pid).children(recursive=True)
                process.kill()
                for child in children:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
            process.wait()
            time.sleep(0.1)
            message = "Your notebook was stopped because it exceeded the max allowed execution duration."
            return "CANCEL_ACKNOWLEDGED", message
        code = code if self.faults.exit_status is None else self.faults.exit_status
        return ("COMPLETE", "") if code == 0 else ("ERROR", f"exit status {code}")

    def _mount(self) -> None:
        for name in ("input", "working", "tmp"):
            (self.folder / name).mkdir(parents=True)
        for name, source in {} if self.faults.hide_inputs else self.inputs.items():
            kind, owner, slug = name.split("/")
            target = Path(slug) if self.flat else Path(kind, owner, slug)
            shutil.copytree(source, self.folder / "input" / target)
        for path in (self.folder / "input").rglob("*"):
            path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))

    def _input_state(self) -> dict[str, tuple[int, int]]:
        # As root a write to a read-only file succeeds: what is there is compared instead.
        paths = (self.folder / "input").rglob("*")
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}

    def _environment(self) -> dict[str, str]:
        tools = self.folder / "bin"
        tools.mkdir()
        listing = "".join(f"GPU {i}: Tesla T4 (UUID: GPU-{i})\\n" for i in range(self.faults.gpus))
        (tools / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{listing}'\n")
        (tools / "nvidia-smi").chmod(0o755)
        kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        return kept | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "TMPDIR": str(self.folder / "tmp"),
            "EKIDEN_KAGGLE_ROOT": str(self.folder),
            "KAGGLE_KERNEL_RUN_TYPE": "Batch",
            "OMP_NUM_THREADS": "1",
            "STOP_AFTER_STEPS": str(self.faults.stop_after_steps),
            # Nothing outside is reached.
            "HTTPS_PROXY": "http://127.0.0.1:9",
            "HTTP_PROXY": "http://127.0.0.1:9",
        }

    def verdict(self) -> dict[str, object]:
        """Return the leg's `result.json`."""
        value: dict[str, object] = json.loads((self.working / "result.json").read_text())
        return value
