"""What `ekiden preprocess` costs, beside HF datasets and datatrove; whether its bytes are always the same.

    python benchmarks/preprocess.py peers   --corpora DIR --peer-python /tmp/peers/bin/python   (see preprocess_peers.py)
    python benchmarks/preprocess.py scale   --corpora DIR [--megabytes 2000]     memory and bytes/s of 100 MB and more
    python benchmarks/preprocess.py workers --corpora DIR                        --num-proc 1, 2, 4: bytes and wall time
    python benchmarks/preprocess.py kills   --corpora DIR                        SIGKILL at random moments, ten times

DIR has a folder of .jsonl files a language. Where it holds less text than asked for, perturbed copies fill up: in each
copy another 3 % of the words (by their hash) have their halves exchanged, so that new words keep coming, as in new text.

CPU seconds are those of the whole process tree, as the kernel counts them. Memory is the sum over the tree, read 20
times a second: RSS, and PSS where shared pages are counted once. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import xxhash

from ekiden.tokenizer.huggingface import save_huggingface_tokenizer
from ekiden.tokenizer.load import SentencePieceTokenizer, load_tokenizer
from ekiden.tokenizer.train import train_tokenizer
from ekiden.tokens.format import TokenDataset

MODELS = {"unigram": 16_000, "bpe": 32_000}
PEERS = Path(__file__).with_name("preprocess_peers.py")


class Perturbed(dict[str, str]):
    """A word's form in one copy of the corpus."""

    def __init__(self, copy: int) -> None:
        self.copy = copy

    def __missing__(self, word: str) -> str:
        half = len(word) // 2
        changed = (
            self.copy and len(word) > 3 and xxhash.xxh3_64_intdigest(word.encode(), seed=self.copy) % 32 == 0
        )
        self[word] = word[half:] + word[:half] if changed else word
        return self[word]


def made_corpus(corpora: Path, folder: Path, size: int) -> int:
    """Write `size` bytes of the corpora and their perturbed copies to `folder`; return the bytes written."""
    languages = sorted(path.name for path in corpora.iterdir() if list(path.glob("*.jsonl")))
    whole = sum(file.stat().st_size for name in languages for file in (corpora / name).glob("*.jsonl"))
    copies = [
        (corpora / name, folder / name / f"{copy:03d}.jsonl", copy, min(1.0, size / whole - copy))
        for copy in range(-(-size // whole))
        for name in languages
    ]
    with ProcessPoolExecutor() as pool:
        return sum(pool.map(perturbed_copy, *zip(*copies)))


def perturbed_copy(source: Path, target: Path, copy: int, share: float) -> int:
    """Write one copy of a language, of it the first `share` of the documents; return the bytes written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = [line for file in sorted(source.glob("*.jsonl")) for line in file.open("rb")]
    words, written = Perturbed(copy), 0
    with target.open("wb") as file:
        for line in lines[: round(len(lines) * share)]:
            text = json.loads(line)["text"]
            if copy:
                text = "".join([words[part] for part in re.split(r"(\s+)", text)])
            written += file.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
    return written


def measure(command: list[str], log: Path, memory: bool = True) -> dict[str, float]:
    """Run a command and return what it and its descendants took.

    Args:
        memory: read it as well, 20 times a second.

    Raises:
        SystemExit: it failed.
    """
    peaks = {"rss_mb": 0.0, "pss_mb": 0.0, "worker_rss_mb": 0.0}
    times: dict[int, float] = {}
    before, began = os.times(), time.monotonic()
    with log.open("w") as output:
        process = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        done = threading.Event()
        watcher = threading.Thread(target=watch, args=(process, peaks, times, done))
        if memory:
            watcher.start()
        status = process.wait()
        wall = time.monotonic() - began
        done.set()
        if memory:
            watcher.join()
    after = os.times()
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    cpu = max(
        cpu, sum(times.values())
    )  # a process whose parent did not wait for it is in the second one only
    taken = {"cpu_s": round(cpu, 2), "wall_s": round(wall, 2)}
    return taken | {name: round(peak, 1) for name, peak in peaks.items() if memory}


def watch(
    root: psutil.Process, peaks: dict[str, float], times: dict[int, float], done: threading.Event
) -> None:
    """Keep the highest memory of a process tree in `peaks`, and each one's CPU seconds in `times`, until `done`."""
    turn = 0
    while not done.wait(0.05):
        rss, pss, highest = 0, 0, 0
        turn += 1
        try:
            tree = [root, *root.children(recursive=True)]
        except psutil.Error:
            continue
        for process in tree:
            try:
                mine = process.memory_info().rss
                rss += mine
                spent = process.cpu_times()
                times[process.pid] = spent.user + spent.system
                highest = max(highest, mine if process is not root else 0)
                if turn % 10 == 0:  # costs the kernel a walk over all pages
                    pss += process.memory_full_info().pss
            except (psutil.Error, OSError):
                continue
        for name, value in (("rss_mb", rss), ("pss_mb", pss), ("worker_rss_mb", highest)):
            peaks[name] = max(peaks[name], value / 1e6)


def ekiden_command(corpus: Path, model: Path, output: Path, workers: int) -> list[str]:
    return [
        sys.executable, "-m", "ekiden", "preprocess", str(corpus), "--tokenizer", str(model), "--output-dir", str(output),
        "--num-proc", str(workers), "--test-split", "0",
    ]  # fmt: skip


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def digest(folder: Path) -> str:
    """Return the SHA-256 of all names and bytes in a folder."""
    hashes = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".lock":
            hashes.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return hashes.hexdigest()


def machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in ("sentencepiece", "numpy", "orjson")},
    }


# -- the other programs --------------------------------------------------------------------------------------


def peers(options: argparse.Namespace, work: Path, models: dict[str, Path]) -> dict[str, Any]:
    """Ekiden, datasets, datatrove and Ekiden again, a model after another, and their ids."""
    corpus = work / "corpus"
    result: dict[str, Any] = {"corpus_bytes": made_corpus(options.corpora, corpus, options.megabytes * 10**6)}
    peer = [options.peer_python, str(PEERS)]
    found = subprocess.run(
        [*peer, "versions", ".", ".", ".", "0"], capture_output=True, text=True, check=True
    )
    result["versions"] = json.loads(found.stdout)
    os.environ["HF_HOME"], os.environ["HF_DATASETS_OFFLINE"] = str(work / "hf"), "1"
    for name, model in models.items():
        folder = work / f"{name}-hf"
        save_huggingface_tokenizer(load_tokenizer(model), folder)
        rows: dict[str, Any] = {}
        for what in ("ekiden", *options.against, "ekiden again"):
            output = work / f"{name}-{what.replace(' ', '-')}"
            if what.startswith("ekiden"):
                command = ekiden_command(corpus, model, output, options.workers)
            else:
                command = [*peer, what, str(corpus), str(folder), str(output), str(options.workers)]
            rows[what] = measure(command, work / "log") | {"output_mb": round(size_of(output) / 1e6, 1)}
            print(name, what, rows[what], f"load {os.getloadavg()[0]:.1f}", flush=True)
            shutil.rmtree(work / "hf", ignore_errors=True)
        ours = [rows["ekiden"]["cpu_s"], rows["ekiden again"]["cpu_s"]]
        for what in options.against:
            rows[f"{what} / ekiden, cpu"] = round(rows[what]["cpu_s"] * 2 / sum(ours), 2)
        subprocess.run([*peer, "ids", str(corpus), str(folder), str(work / "ids"), "0"], check=True)
        rows["ids"] = compare(corpus, model, work, name)
        print(name, rows["ids"], flush=True)
        result[name] = rows
    return result


def compare(corpus: Path, model: Path, work: Path, name: str) -> dict[str, int]:
    """Return how many documents have other ids than SentencePiece gives: in our shards, by the tokenizers library."""
    tokenizer, dataset = load_tokenizer(model), TokenDataset.open(work / f"{name}-ekiden")
    assert isinstance(tokenizer, SentencePieceTokenizer)
    theirs, place = np.memmap(work / "ids", dtype="<u4", mode="r"), 0
    counts = {"documents": 0, "ekiden_differ": 0, "tokenizers_differ": 0}
    troves = trove_documents(work / f"{name}-datatrove")
    trove_seen = 0
    for language in dataset.languages:
        stream, number = dataset.split(language, "train"), 0
        for file in sorted((corpus / language).glob("*.jsonl")):
            texts = [json.loads(line)["text"] for line in file.open("rb")]
            for expected in tokenizer.processor.encode(texts, return_type="numpy", num_threads=1):
                mine = stream.document(number)
                around = [tokenizer.bos_id] * (tokenizer.bos_id is not None)
                after = [tokenizer.eos_id] * (tokenizer.eos_id is not None)
                same = np.array_equal(mine, np.concatenate([around, expected, after]))
                length = int(theirs[place])
                hf = theirs[place + 1 : place + 1 + length]
                place += 1 + length
                counts["documents"] += 1
                counts["ekiden_differ"] += not same
                counts["tokenizers_differ"] += not np.array_equal(hf, expected)
                key = xxhash.xxh3_128_digest(hf.astype("<u4").tobytes())
                trove_seen += key in troves
                number += 1
        assert number == stream.documents
    counts["datatrove_has_the_tokenizers_ids"] = trove_seen
    return counts


def trove_documents(folder: Path) -> set[bytes]:
    """Return the hash of the ids of every document that datatrove wrote."""
    found = set()
    for index in folder.glob("*.ds.index"):
        ends = np.fromfile(index, dtype="<u8")
        data = index.with_suffix("")
        kind = "<u2" if data.stat().st_size == 2 * int(ends[-1]) else "<u4"
        tokens, start = np.memmap(data, dtype=kind, mode="r"), 0
        for end in ends.tolist():
            found.add(xxhash.xxh3_128_digest(tokens[start:end].astype("<u4").tobytes()))
            start = end
    return found


# -- Ekiden alone --------------------------------------------------------------------------------------------


def scale(options: argparse.Namespace, work: Path, models: dict[str, Path]) -> dict[str, Any]:
    """A build of 100 MB, one of --megabytes, and one of 100 MB again."""
    result: dict[str, Any] = {}
    sizes = {"100 MB": 100, f"{options.megabytes} MB": options.megabytes}
    written = {name: made_corpus(options.corpora, work / name, mb * 10**6) for name, mb in sizes.items()}
    for model in models:
        for name in [*sizes, "100 MB"]:
            row = measure(
                ekiden_command(work / name, models[model], work / "out", options.workers), work / "log"
            )
            row["mb_per_cpu_s"] = round(written[name] / 1e6 / row["cpu_s"], 2)
            result.setdefault(model, {}).setdefault(name, []).append(row)
            print(model, name, row, f"load {os.getloadavg()[0]:.1f}", flush=True)
            shutil.rmtree(work / "out")
    return result


def workers(options: argparse.Namespace, work: Path, models: dict[str, Path]) -> dict[str, Any]:
    """Builds by 1, 2 and 4 workers in turn, --rounds times, nothing else at work; the least time of each counts.

    Beside each what as many processes reach that share nothing: virtual cores seldom are whole ones.
    """
    made = made_corpus(options.corpora, work / "c", options.megabytes * 10**6)
    result: dict[str, Any] = {"corpus_bytes": made, "rounds": options.rounds}
    for model in models:
        rows: dict[int, dict[str, Any]] = {count: {"runs": []} for count in (1, 2, 4)}
        digests = set()
        for _ in range(options.rounds):
            for count, row in rows.items():
                output = work / "out"
                command = ekiden_command(work / "c", models[model], output, count)
                alone = hashing_speed(count)
                row["runs"].append(measure(command, work / "log", memory=False) | {"hashing_gb_per_s": alone})
                print(model, count, row["runs"][-1], f"load {os.getloadavg()[0]:.1f}", flush=True)
                digests.add(digest(output))
                shutil.rmtree(output)
        for count, row in rows.items():
            row["wall_s"] = min(run["wall_s"] for run in row["runs"])
            row["efficiency"] = round(rows[1]["wall_s"] / count / row["wall_s"], 2)
            row["hashing_gb_per_s"] = statistics.median(run["hashing_gb_per_s"] for run in row["runs"])
            row["efficiency_hashing"] = round(
                row["hashing_gb_per_s"] / count / rows[1]["hashing_gb_per_s"], 2
            )
        result[model] = {str(count): row for count, row in rows.items()} | {"identical": len(digests) == 1}
    return result


def hash_for(seconds: float) -> float:
    """Hash the same 64 KB, which stay in a core's own cache, for some seconds; return GB/s."""
    data, rounds, began = bytes(1 << 16), 0, time.monotonic()
    while time.monotonic() - began < seconds:
        hashlib.sha256(data).digest()
        rounds += 1
    return rounds * len(data) / (time.monotonic() - began) / 1e9


def hashing_speed(processes: int, seconds: float = 4.0) -> float:
    """Return the GB/s that `processes` reach together."""
    with ProcessPoolExecutor(processes) as pool:
        return round(sum(pool.map(hash_for, [seconds] * processes)), 3)


def kills(options: argparse.Namespace, work: Path, models: dict[str, Path]) -> dict[str, Any]:
    """Builds killed at random moments until ten kills have met one at work, each compared with an undisturbed one."""
    made_corpus(options.corpora, work / "c", options.megabytes * 10**6)
    result: dict[str, Any] = {}
    draw = random.Random(options.seed)
    for model in models:
        command = ekiden_command(work / "c", models[model], work / "whole", options.workers)
        whole = measure(command, work / "log")["wall_s"]
        expected, moments, builds, same = digest(work / "whole"), [], 0, 0
        command[command.index(str(work / "whole"))] = str(work / "killed")
        while len(moments) < 10:
            with (work / "log").open("w") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log)
                try:
                    process.wait(draw.uniform(0.3, whole))
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    receipts = list((work / "killed").glob(".receipts/[!.]*"))
                    moments.append(len(receipts))
                    continue
            if process.returncode:
                sys.exit((work / "log").read_text())
            builds += 1
            same += digest(work / "killed") == expected
            shutil.rmtree(work / "killed")
        measure(command, work / "log")
        builds, same = builds + 1, same + (digest(work / "killed") == expected)
        result[model] = {
            "kills": len(moments),
            "units_done_at_each": moments,
            "builds": builds,
            "identical": same,
        }
        print(model, result[model], flush=True)
        shutil.rmtree(work / "killed")
        shutil.rmtree(work / "whole")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["peers", "scale", "workers", "kills"])
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--megabytes", type=int)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--against", nargs="*", default=["datasets", "datatrove"])
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--model-folder", type=Path, help="Keeps the tokenizers that are trained for this.")
    parser.add_argument("--rounds", type=int, default=3, help="Of `workers`.")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.megabytes = options.megabytes or (2000 if options.what == "scale" else 110)
    run = {"peers": peers, "scale": scale, "workers": workers, "kills": kills}[options.what]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = options.model_folder or work
        models = {kind: folder / f"{kind}-{MODELS[kind]}.model" for kind in options.models}
        languages = [str(path) for path in sorted(options.corpora.iterdir()) if list(path.glob("*.jsonl"))]
        for kind, model in models.items():
            if not model.exists():
                train_tokenizer(languages, str(model), MODELS[kind], kind, language="all")
        result = {"what": options.what, **machine(), "workers": options.workers, **run(options, work, models)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
