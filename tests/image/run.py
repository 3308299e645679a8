"""The suite and one leg of a relay in environments with the versions of Kaggle's images, nothing of which is replaced.

    python tests/image/run.py --folder /tmp/images [--image torch-2.10] [--workers 1] [--tests tests/training tests/kaggle]

Both go side by side; what pytest says of each stands in FOLDER/IMAGE-suite.log and FOLDER/IMAGE-leg.log. Each environment
weighs 5 to 8 GB and is kept in `--folder`: PyPI's torch brings CUDA's libraries along, which it needs even to be imported,
and runs on a CPU, too. Differences that remain: torch 2.11 is built for CUDA 13 there and for 12.8 in the image, and of the
image's several hundred packages only those below are installed. Ekiden is installed as Kaggle would get it: its wheel
without dependencies, and of these only what the image lacks. Whatever of the image has another version afterwards is a
failure. What passed on a commit is not run on it again, so that an interrupted run goes on. The last line printed is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHARED = "click filelock fsspec orjson packaging psutil pyyaml requests tqdm xxhash zstandard"
IMAGES = {
    # googlecolab/backend-info, pip-freeze.gpu.txt of 2026-05-14: Kaggle's image v170.
    "torch-2.10": (
        "3.12",
        "torch==2.10.0 transformers==5.0.0 tokenizers==0.22.2 numpy==2.0.2 pandas==2.2.2 pyarrow==18.1.0 safetensors==0.7.0 "
        "sentencepiece==0.2.1 huggingface_hub==1.11.0 protobuf==5.29.5 hf-xet==1.4.3 accelerate==1.13.0 datasets==4.0.0 "
        "kaggle==2.0.2 kagglesdk==0.1.20 matplotlib",
    ),
    # The same of 2026-08-19: what came after it.
    "torch-2.11": (
        "3.13",
        "torch==2.11.0 transformers==5.15.0 tokenizers==0.22.2 numpy==2.1.3 pandas==2.2.3 pyarrow==18.1.0 safetensors==0.8.0 "
        "sentencepiece==0.2.2 huggingface_hub==1.27.0 protobuf==5.29.5 hf-xet==1.6.0 accelerate==1.14.0 datasets==4.0.0 "
        "kaggle==2.0.2 kagglesdk==0.1.37 matplotlib",
    ),
}
TOOLS = "pytest pytest-timeout hypothesis pytest-xdist"


def frozen(python: Path) -> dict[str, str]:
    """Return the version of every installed distribution, by name."""
    listed = subprocess.run(
        [python, "-m", "pip", "freeze", "--all"], capture_output=True, text=True, check=True
    ).stdout
    pairs = (line.split("==", 1) for line in listed.splitlines() if "==" in line)
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def interpreter_of(version: str) -> str:
    """Return an installed Python of a version; the running one, said aloud, where there is none."""
    kept = sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python"))
    for found in (shutil.which(f"python{version}"), *map(str, kept)):
        if found and not subprocess.run([found, "--version"], capture_output=True, check=False).returncode:
            return found
    print(f"no Python {version} here: {sys.version.split()[0]} takes its place")
    return sys.executable


def make_image(folder: Path, pins: str, interpreter: str) -> Path:
    """Create an environment with an image's versions; return its python. One that is there is taken as it is."""
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir"]
        subprocess.run([*install, *pins.split(), *SHARED.split()], check=True)
        (folder / ".ready").touch()
    return python


def snapshot(folder: Path) -> Path:
    """Copy what is tried to `folder`, so that wheel and tests stay of one moment while the sources are worked on."""
    for name in ("src", "tests", "benchmarks", "notebooks", "docs"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in ("pyproject.toml", "Makefile", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def install_ekiden(python: Path, source: Path) -> list[str]:
    """Install the wheel and what the image lacks of its dependencies; return what was installed beside it."""
    with tempfile.TemporaryDirectory() as name:
        build = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            name,
            ".",
        ]
        subprocess.run(build, cwd=source, check=True)
        wheel = next(Path(name).glob("ekiden-*.whl"))
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall"]
        subprocess.run([*install, wheel], check=True)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"(?ms)^dependencies = \[(.*?)^\]", project)
    assert listed
    names = [re.split(r"[<>=!~]", item)[0].lower() for item in re.findall(r'"(.*?)"', listed[1])]
    missing = [name for name in names if name.replace("_", "-") not in frozen(python)]
    if missing:
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *missing], check=True)
    return missing


def run_tests(python: Path, source: Path, log: Path, workers: int, tests: list[str]) -> dict[str, int]:
    """Run tests with an image's python; return how many passed, failed and were skipped, and the seconds."""
    passed, commit = log.with_suffix(".passed.json"), clean_commit()
    if commit and passed.exists():
        record = json.loads(passed.read_text())
        if record["commit"] == commit and record["tests"] == tests:
            print(f"{log.stem}: passed before on {commit[:10]}; remove {passed} to run it again", flush=True)
            return record["counts"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    environment.setdefault("EKIDEN_CORPORA", str(ROOT.parent / "shared" / "corpora"))
    # Time limits are for what hangs; on a machine that does much else everything takes longer.
    command = [python, "-m", "pytest", "-rfEs", "-p", "no:cacheprovider", "--timeout", "900"]
    began = time.monotonic()
    with log.open("w") as file:
        done = subprocess.run(
            [*command, "-n", str(workers), *tests],
            cwd=source,
            env=environment,
            stdout=file,
            stderr=file,
            check=False,
        )
    lines = log.read_text(errors="replace").splitlines()
    said = [line for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    print("\n".join([f"{log.stem}: status {done.returncode}", *said, *lines[-1:]]), flush=True)
    counts = {
        kind: int(n)
        for n, kind in re.findall(r"(\d+) (passed|failed|errors?|skipped)", lines[-1] if lines else "")
    }
    counts = {"status": done.returncode, **counts, "seconds": round(time.monotonic() - began)}
    if commit and not done.returncode:
        passed.write_text(json.dumps({"commit": commit, "tests": tests, "counts": counts}))
    return counts


def clean_commit() -> str | None:
    """Return the commit that the sources are, or None where they differ from it or are no checkout."""
    git = ["git", "-C", str(ROOT)]
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return head.stdout.strip() if changed.returncode == head.returncode == 0 and not changed.stdout else None


def try_image(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Make an image's environment, install Ekiden, and run the suite and one leg in it; return the row of the table."""
    version, pins = IMAGES[name]
    source = snapshot(Path(tempfile.mkdtemp(prefix="ekiden-image-")))
    python = make_image(options.folder / name, pins, options.python or interpreter_of(version))
    before = frozen(python)
    added = install_ekiden(python, source)
    after = frozen(python)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *TOOLS.split()], check=True)
    tools = frozen(python)
    kept = [key for key in before if key != "ekiden"]
    replaced = sorted(key for key in kept if not before[key] == after.get(key) == tools.get(key))
    suite, leg = (options.folder / f"{name}-{part}.log" for part in ("suite", "leg"))
    row: dict[str, Any] = {"image": name, "installed": added, "replaced": replaced}
    row["suite"] = run_tests(
        python, source, suite, options.workers, ["-m", "not slow and not gpu", *options.tests]
    )
    row["leg"] = run_tests(python, source, leg, options.workers, ["-m", "slow", "tests/kaggle/test_leg.py"])
    shutil.rmtree(source)
    return row


def main() -> None:
    """Go through the images."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ekiden-images")
    parser.add_argument("--image", action="append", choices=sorted(IMAGES), help="default: all")
    parser.add_argument("--python", help="interpreter of new environments; default: the image's version")
    parser.add_argument("--workers", type=int, default=2, help="test processes of each image; default: 2")
    parser.add_argument("--tests", nargs="*", default=["tests"])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    names = options.image or sorted(IMAGES)
    with ThreadPoolExecutor(len(names)) as pool:
        rows = list(pool.map(lambda name: try_image(name, options), names))
    passed = all(not row["replaced"] and row["suite"]["status"] == row["leg"]["status"] == 0 for row in rows)
    print(json.dumps({"images": rows, "passed": passed}))
    sys.exit(not passed)


if __name__ == "__main__":
    main()
