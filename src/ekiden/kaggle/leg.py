"""One leg of a relay: what runs on Kaggle, from its first line to `result.json`.

The relay writes this file, with its settings and the package filled in, as the one source file of a Kaggle script
(`launcher.render`); the notebook imports the same functions. It stands alone: nothing but the standard library is
needed until training starts. From `/kaggle/input` come the corpus (`pack`) and the previous leg's output; to
`/kaggle/working` go `run/`, a run directory, and `result.json`, the leg's verdict. It always ends with status 0:
Kaggle throws the output of a failed session away, and the checkpoint with it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()
SETTINGS: dict[str, Any] = {}
PACKAGE = ""

ROOT = Path(os.environ.get("EKIDEN_KAGGLE_ROOT", "/kaggle"))
"""Where `input` and `working` are; another place is named only where Kaggle is rehearsed on one's own machine."""
PACK_MANIFEST = "ekiden-pack.json"
VERDICT = "result.json"
THREADS = 8
"""Read ahead of Kaggle's mounts, which give one reader 120-240 MB/s and sixteen 770-950."""
CARRIED = 2
"""Newest checkpoints taken along: the second is for the day on which the newest turns out damaged."""
CHUNK = 4 << 20


class Ended(Exception):
    """The leg is over before or without training; the two arguments are its status and the reason."""


def say(text: str) -> None:
    """Print a line at once: what is buffered when a session is killed is never seen."""
    print(f"[{time.monotonic() - BEGAN:7.0f}s] {text}", flush=True)


# -- what lies among the inputs -----------------------------------------------------------------------------------


def mounts(root: Path, ref: str, kind: str) -> Iterator[Path]:
    """Yield where the input `ref` (owner/slug) of a kind (datasets, notebooks) may be: Kaggle has two layouts."""
    owner, slug = ref.split("/")[:2]
    for path in (root / "input" / kind / owner / slug, root / "input" / slug, root / "input" / owner / slug):
        if path.is_dir():
            yield path


def folders_holding(root: Path, name: str, depth: int = 5) -> Iterator[Path]:
    """Yield the input folders that hold `name`, not looking below them: a walk through all files takes minutes."""
    pending = [(root / "input", depth)]
    while pending:
        folder, left = pending.pop(0)
        if (folder / name).exists():
            yield folder
        elif left and folder.is_dir():
            below = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir())
            pending += [(Path(path), left - 1) for path in below]


def read_json(path: Path) -> Any:
    """Return the JSON value in a file, None where it is missing or is none."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_bytes())
    return None


def copy_hashed(source: Path, target: Path) -> str:
    """Copy a file, not its read-only mode; return its SHA-256."""
    digest = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
        while chunk := reader.read(CHUNK):
            digest.update(chunk)
            writer.write(chunk)
    return digest.hexdigest()


# -- the checkpoint -----------------------------------------------------------------------------------------------


def checkpoints_of(run: Path) -> list[Path]:
    """Return the finished checkpoints of a run, newest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if (path / "MANIFEST.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def identity(checkpoint: Path) -> dict[str, Any]:
    """Return what tells a checkpoint from every other: its step and the hash of its manifest, which hashes the rest."""
    manifest = (checkpoint / "MANIFEST.json").read_bytes()
    return {
        "name": checkpoint.name,
        "step": int(checkpoint.name.removeprefix("step-")),
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
    }


def copy_checkpoint(source: Path, target: Path) -> bool:
    """Copy a checkpoint file by file, hashing; return False and leave nothing where a file is not what was saved."""
    manifest = read_json(source / "MANIFEST.json") or {}
    names = list(manifest.get("files", {}))
    half = target.with_name(f".half-{target.name}")
    shutil.rmtree(half, ignore_errors=True)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            hashes = list(pool.map(lambda name: copy_hashed(source / name, half / name), names))
    except OSError as error:
        say(f"{source.name} cannot be read: {error}")
        hashes = []
    wrong = [n for n, h in zip(names, hashes) if manifest["files"][n]["sha256"] != h]
    if not names or len(hashes) != len(names) or wrong:
        say(f"{source.name} is damaged ({', '.join(wrong) or 'files missing'}) and is passed over")
        shutil.rmtree(half, ignore_errors=True)
        return False
    copy_hashed(source / "MANIFEST.json", half / "MANIFEST.json")
    half.replace(target)
    return True


def carry_forward(source: Path, run: Path) -> list[Path]:
    """Copy what a previous leg left in `source` to `run`: history, best model and the newest checkpoints that verify.

    Returns:
        The checkpoints copied, newest first.
    """
    skipped = {"checkpoints", "result.json", ".lock", ".lock-holder", "stop", "save"}
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if path.is_file() and relative.parts[0] not in skipped and not relative.parts[0].startswith(".new-"):
            copy_hashed(path, run / relative)
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    copied: list[Path] = []
    for checkpoint in checkpoints_of(source):
        target = run / "checkpoints" / checkpoint.name
        if len(copied) < CARRIED and copy_checkpoint(checkpoint, target):
            copied.append(target)
    return copied


def take_over(root: Path, previous: str, expected: dict[str, Any], run: Path) -> Path:
    """Carry the output of leg `previous` (owner/slug) forward; return the checkpoint to go on from.

    Raises:
        Ended: it is not mounted, is an older version than `expected` names, or holds no good checkpoint.
    """
    for mount in mounts(root, previous, "notebooks"):
        newest = checkpoints_of(mount / "run")
        found = identity(newest[0]) if newest else {}
        if found.get("manifest_sha256") != expected["manifest_sha256"]:
            there = f"step {found['step']}" if found else "no checkpoint"
            raise Ended(
                "stale-input", f"{mount} holds {there}, expected step {expected['step']} of the last leg"
            )
        copied = carry_forward(mount / "run", run)
        if not copied:
            raise Ended("stale-input", f"no checkpoint in {mount} is what was saved")
        return copied[0]
    raise Ended("no-checkpoint", f"the output of {previous} is not mounted")


# -- the corpus ---------------------------------------------------------------------------------------------------


def find_pack(root: Path, refs: Iterable[str], fingerprint: str) -> tuple[dict[str, Any], dict[str, Path]]:
    """Return the manifest of a packed corpus and where each of its chunks is.

    Args:
        refs: datasets (owner/slug) that hold its parts; none: all inputs are looked at.
        fingerprint: of the pack; empty: the first that is found.

    Raises:
        Ended: a part is not mounted, or another version of it is.
    """
    refs = list(refs)
    folders = [path for ref in refs for path in mounts(root, ref, "datasets")]
    if not refs:
        folders = list(folders_holding(root, PACK_MANIFEST))
    manifest: dict[str, Any] | None = None
    chunks: dict[str, Path] = {}
    others = []
    for folder in folders:
        found = read_json(folder / PACK_MANIFEST)
        if not found:
            continue
        if found["fingerprint"] != (fingerprint or found["fingerprint"]):
            others.append(str(folder))
            continue
        manifest, fingerprint = found, found["fingerprint"]
        for chunk in found["chunks"]:
            path = folder / chunk["name"]
            if path.is_file() and path.stat().st_size == chunk["bytes"]:
                chunks[chunk["name"]] = path
    if manifest is None:
        if others:
            raise Ended("stale-input", f"{', '.join(others)} holds another version of the corpus")
        raise Ended("no-corpus", f"no {PACK_MANIFEST} among the inputs ({', '.join(refs) or 'all'})")
    missing = [chunk["name"] for chunk in manifest["chunks"] if chunk["name"] not in chunks]
    if missing:
        raise Ended(
            "no-corpus", f"{', '.join(missing)} of the corpus {manifest['name']} is not among the inputs"
        )
    return manifest, chunks


def unpack(manifest: dict[str, Any], chunks: dict[str, Path], target: Path) -> Path:
    """Write the files of a pack below `target`, hashed as they are written.

    Raises:
        Ended: a file is not what was packed.
    """
    bounds, begin = [], 0
    for chunk in manifest["chunks"]:
        bounds.append((begin, begin + chunk["bytes"], chunks[chunk["name"]]))
        begin += chunk["bytes"]
    starts, position = [], 0
    for record in manifest["files"]:
        starts.append(position)
        position += record["bytes"]

    def write(record: dict[str, Any], start: int) -> str | None:
        parts = Path(record["path"]).parts
        if not parts or Path(record["path"]).is_absolute() or ".." in parts:
            return f"{record['path']!r} is not a path below the pack"
        path, digest, end = target.joinpath(*parts), hashlib.sha256(), start + record["bytes"]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb", buffering=0) as writer:
            for low, high, chunk in bounds:
                if low >= end or high <= start:
                    continue
                with chunk.open("rb", buffering=0) as reader:
                    reader.seek(max(start, low) - low)
                    left = min(end, high) - max(start, low)
                    while left and (data := reader.read(min(CHUNK, left))):
                        digest.update(data)
                        writer.write(data)
                        left -= len(data)
        return None if digest.hexdigest() == record["sha256"] else f"{record['path']} is damaged"

    with ThreadPoolExecutor(THREADS) as pool:
        problems = [problem for problem in pool.map(write, manifest["files"], starts) if problem]
    if problems:
        raise Ended("stale-input", f"the corpus cannot be used: {problems[0]}")
    return target


def scratch_folder(root: Path) -> Path:
    """Return a folder whose content is not kept as output."""
    path = (root / "tmp" if root != Path("/kaggle") else Path("/tmp")) / "ekiden"
    path.mkdir(parents=True, exist_ok=True)
    return path


# -- the machine --------------------------------------------------------------------------------------------------


def gpu_names() -> list[str]:
    """Return the GPUs that `nvidia-smi -L` lists."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in listed.stdout.splitlines() if line.startswith("GPU ")]


def require_gpus(count: int) -> None:
    """Say what GPUs there are.

    Raises:
        Ended: fewer than `count`. Kaggle falls back to a CPU without a word, and a CPU would take the whole session.
    """
    names = gpu_names()
    say("; ".join(names) or "no GPU")
    if len(names) < count:
        raise Ended("no-gpu", f"{len(names)} GPUs found, {count} needed")


NEEDED = "click filelock fsspec huggingface_hub numpy orjson psutil pyarrow yaml safetensors sentencepiece tokenizers".split()
NEEDED += "torch tqdm transformers xxhash".split()
DISTRIBUTIONS = {"yaml": "pyyaml"}


def install_missing(modules: Iterable[str] = NEEDED) -> list[str]:
    """Install the modules that the image lacks, each alone: nothing that the image has is replaced.

    Raises:
        Ended: pip failed.
    """
    missing = [DISTRIBUTIONS.get(name, name) for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        say(f"installing {', '.join(missing)}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *missing]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Ended("failed", f"pip install {' '.join(missing)} failed: {done.stderr.strip()[-300:]}")
    return missing


def install_package(scratch: Path, package: str) -> Path | None:
    """Unpack the package that came with this file; return what goes into PYTHONPATH, None where none came."""
    if not package:
        return None
    target = scratch / "package"
    with zipfile.ZipFile(io.BytesIO(base64.b85decode(package))) as archive:
        archive.extractall(target)
    return target


# -- training -----------------------------------------------------------------------------------------------------


def train_command(recipe: Path, dataset: Path, run: Path, gpus: int, flags: Iterable[str] = ()) -> list[str]:
    """Return the command that trains, under torchrun where there are several GPUs; `start` adds `--max-time`."""
    several = ["torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}", "-m"] if gpus > 1 else []
    places = ["--dataset-path", str(dataset), "--output-dir", str(run)]
    return [sys.executable, "-u", "-m", *several, "ekiden", "train", str(recipe), *places, *flags]


def start(
    command: list[str], seconds: float, scratch: Path, package: Path | None, log: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start training that is to end by itself within `seconds`; what it prints goes to `log`, or where this prints."""
    environment = dict(os.environ) | {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"HF_HOME": str(scratch / "hub"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if package:
        before = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = str(package) + (os.pathsep + before if before else "")
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
            with contextlib.suppress(ProcessLookupError):
                # Only once to each: a second signal ends training without a checkpoint, and torchrun passes it on.
                os.kill(process.pid, number) if number == signal.SIGTERM else os.killpg(process.pid, number)
    return process.wait()


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
    package = install_package(scratch, PACKAGE)
    recipe = scratch / "recipe.yaml"
    recipe.write_text(settings["recipe"], encoding="utf-8")
    (run / "result.json").unlink(missing_ok=True)
    # 90 % of the output for checkpoints, as `training.rundir` would give; best/ and final_model/ take the rest.
    flags = ["--checkpoint-budget", str(int(0.8 * settings["output_bytes"]))]
    left = settings["seconds"] - (time.monotonic() - BEGAN)
    process = start(train_command(recipe, dataset, run, settings["gpus"], flags), left, scratch, package)
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


if __name__ == "__main__":
    sys.exit(main(SETTINGS, ROOT))
