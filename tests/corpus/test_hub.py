"""Datasets of the hub, read by the hub's real client from a stand-in that breaks, refuses and stalls."""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hub_stand_in import COMMIT, StandIn

from ekiden.corpus import hub
from ekiden.corpus.hub import Address, choose, parse
from ekiden.errors import UserError

BLOCK = 1000


@pytest.fixture(scope="module")
def server() -> Iterator[StandIn]:
    stand_in = StandIn()
    yield stand_in
    stand_in.close()


@pytest.fixture(autouse=True)
def fresh(server: StandIn) -> None:
    lines = [json.dumps({"text": f"document {i} of the river"}) + "\n" for i in range(200)]
    server.files = {
        "README.md": b"# texts",
        "data/train-00000-of-00002.jsonl": "".join(lines[:120]).encode(),
        "data/train-00001-of-00002.jsonl.gz": gzip.compress("".join(lines[120:]).encode()),
        "data/test.jsonl": lines[0].encode(),
    }
    server.configs, server.faults, server.asked, server.served = [], [], [], []
    server.refuse = server.refuse_files = None


@pytest.fixture(scope="module")
def client(server: StandIn) -> Iterator[Callable[..., Any]]:
    """Return a function that runs another in a process whose hub is the stand-in: the client reads the address once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", server.url)
        patch.setenv("HF_TOKEN", "hf_secret")
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(quick).result()
            yield lambda work, *arguments: pool.submit(work, *arguments).result()


def quick() -> None:
    """Make waiting short and blocks small, in the client's process."""
    import time

    time.sleep = lambda _seconds: None
    hub.BLOCK_BYTES, hub.MAX_RETRIES = BLOCK, 4


def list_files(argument: str) -> list[tuple[str, int, str]]:
    return [(file.path, file.size, file.format) for file in hub.hub_files(argument)]


def read(argument: str) -> dict[str, bytes]:
    found = {}
    for file in hub.hub_files(argument):
        with io.BufferedReader(hub.HubFile(file.path, file.size), 300) as lines:
            found[file.path] = b"".join(lines)
    return found


def read_ranges(path: str, size: int, ranges: list[tuple[int, int]]) -> list[bytes]:
    found = []
    with hub.HubFile(path, size) as file:
        for start, count in ranges:
            file.seek(start)
            found.append(file.read(count) or b"")
        file.seek(-3, io.SEEK_END)
        found.append(file.read(100) or b"")
    return found


def offline(argument: str) -> None:
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    try:
        hub.hub_files(argument)
    finally:
        constants.HF_HUB_OFFLINE = False


def unreachable(argument: str, port: int) -> None:
    from huggingface_hub import constants

    before, constants.ENDPOINT = constants.ENDPOINT, f"http://127.0.0.1:{port}"
    try:
        hub.hub_files(argument)
    finally:
        constants.ENDPOINT = before


def test_the_files_of_a_split_are_pinned_to_the_commit(server: StandIn, client: Callable[..., Any]) -> None:
    root = f"hf://datasets/owner/texts@{COMMIT}/data"
    sizes = {name: len(data) for name, data in server.files.items()}
    train = [
        (f"{root}/train-00000-of-00002.jsonl", sizes["data/train-00000-of-00002.jsonl"], ".jsonl"),
        (f"{root}/train-00001-of-00002.jsonl.gz", sizes["data/train-00001-of-00002.jsonl.gz"], ".jsonl.gz"),
    ]
    assert client(list_files, "hf://datasets/owner/texts") == train
    assert client(list_files, "hf://datasets/owner/texts:train") == train
    assert client(list_files, "hf://datasets/owner/texts:test") == [
        (f"{root}/test.jsonl", sizes["data/test.jsonl"], ".jsonl")
    ]


def test_a_broken_connection_is_taken_up_where_it_was(server: StandIn, client: Callable[..., Any]) -> None:
    plain = server.files["data/train-00000-of-00002.jsonl"]
    server.faults = [None, None, ("break", 400), ("break", 0), 503, 429, None, 500]
    found = client(read, "hf://datasets/owner/texts:train")
    assert list(found.values()) == [plain, server.files["data/train-00001-of-00002.jsonl.gz"]]
    assert not server.faults
    whole = [(first, last) for name, first, last in server.served if name.endswith("2.jsonl")]
    assert whole == [(i, min(i + BLOCK, len(plain)) - 1) for i in range(0, len(plain), BLOCK)]


def test_ranges_and_seeks(server: StandIn, client: Callable[..., Any]) -> None:
    data = bytes(range(256)) * 40
    server.files["data/x.jsonl"] = data
    path = f"hf://datasets/owner/texts@{COMMIT}/data/x.jsonl"
    ranges = [(0, 10), (5000, 10), (4990, 30), (5005, 10), (9999, 5000), (20_000, 4)]
    found = client(read_ranges, path, len(data), ranges)
    assert b"".join(found[:1]) == data[:10]
    assert found[1] == data[5000:5010]
    assert found[2] == data[4990:5020]
    assert found[3] == data[5005:5015]
    assert found[4] == data[9999:]
    assert found[5] == b""
    assert found[6] == data[-3:]


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (403, "GatedRepo", "is gated; accept its conditions on https://huggingface.co/datasets/owner/texts, then log in by "
                           "`hf auth login` or set HF_TOKEN"),
        (404, "RepoNotFound", "is not on the hub, or is private"),
        (401, "RepoNotFound", "is not on the hub, or is private"),
        (403, "", r"is refused to this token \(status 403\)"),
        (429, "", "too many requests"),
        (503, "", "answers with status 503"),
        (418, "", "answers with status 418"),
    ],
)  # fmt: skip
def test_a_refusal_is_one_sentence(
    server: StandIn, client: Callable[..., Any], status: int, code: str, sentence: str
) -> None:
    server.refuse = (status, code)
    with pytest.raises(UserError, match=f"^corpus hf://datasets/owner/texts .*{sentence}"):
        client(list_files, "hf://datasets/owner/texts")


def test_gated_files_of_a_visible_dataset_are_told_before_the_build(
    server: StandIn, client: Callable[..., Any]
) -> None:
    server.refuse_files = (403, "GatedRepo")
    with pytest.raises(UserError, match="is gated; accept its conditions on"):
        client(list_files, "hf://datasets/owner/texts")


def test_offline_and_unreachable_are_one_sentence(client: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="cannot be read offline; unset HF_HUB_OFFLINE"):
        client(offline, "hf://datasets/owner/texts")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(
        UserError, match=r"the hub cannot be reached .*mend the network and run the same command again"
    ):
        client(unreachable, "hf://datasets/owner/texts", port)


def test_what_stays_broken_ends_in_a_sentence(server: StandIn, client: Callable[..., Any]) -> None:
    server.faults = [("break", 10)] * 50
    with pytest.raises(UserError, match=r"the hub cannot be reached .*finished shards are kept"):
        client(read, "hf://datasets/owner/texts:test")
    server.faults = [404]
    with pytest.raises(UserError, match=r"status 404|is gone"):
        client(read, "hf://datasets/owner/texts:test")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("hf://datasets/a/b", Address("a/b", None, None)),
        ("hf://datasets/a/b.c-d@hin_Deva:train", Address("a/b.c-d", "hin_Deva", "train")),
        ("hf://datasets/a/b:test", Address("a/b", None, "test")),
        ("hf://datasets/a/b@2024-10", Address("a/b", "2024-10", None)),
    ],
)
def test_addresses(argument: str, expected: Address) -> None:
    assert parse(argument) == expected


@pytest.mark.parametrize(
    "argument", ["hf://datasets/a", "hf://a/b", "hf://datasets/a/b/c", "hf://datasets/a/b@", "hf://"]
)
def test_what_is_no_address_is_refused(argument: str) -> None:
    with pytest.raises(UserError, match=r"write hf://datasets/OWNER/NAME\[@config\]\[:split\]"):
        parse(argument)


PATHS = [
    "README.md",
    "en/train/0000.parquet",
    "en/train/deep/0001.parquet",
    "en/test/0000.parquet",
    "hi/train.jsonl",
    "hi/constrained.jsonl",
    "hi/data.csv",
]
CONFIGS: list[dict[str, Any]] = [
    {
        "config_name": "en",
        "data_files": [{"split": "train", "path": "en/train/*"}, {"split": "test", "path": ["en/test/*"]}],
    },
    {"config_name": "hi", "data_dir": "hi", "data_files": "*.jsonl"},
    {"config_name": "all", "data_files": ["**/*.parquet"]},
    {"config_name": "table", "data_files": "hi/*.csv"},
]


@pytest.mark.parametrize(
    ("argument", "configs", "expected"),
    [
        ("a/b@en", CONFIGS, ["en/train/0000.parquet"]),
        ("a/b@en:test", CONFIGS, ["en/test/0000.parquet"]),
        ("a/b@hi", CONFIGS, ["hi/train.jsonl", "hi/constrained.jsonl"]),
        ("a/b@all", CONFIGS, PATHS[1:4]),
        ("a/b", CONFIGS[:1], ["en/train/0000.parquet"]),
        ("a/b@hi", [], ["hi/train.jsonl"]),
        ("a/b@hi:test", [], "has no file of a split 'test'"),
        ("a/b", [], ["en/train/0000.parquet", "en/train/deep/0001.parquet", "hi/train.jsonl"]),
        ("a/b@en:test", [], ["en/test/0000.parquet"]),
        ("a/b", CONFIGS, "several configurations; write hf://datasets/a/b@CONFIG.* all, en, hi, table"),
        ("a/b@enn", CONFIGS, "no configuration 'enn'; did you mean 'en'"),
        ("a/b@enn", [], "no configuration 'enn'; did you mean 'en'"),
        ("a/b@en:tset", CONFIGS, "no split 'tset'; did you mean 'test'"),
        ("a/b@table", CONFIGS, "holds no .jsonl.* file of @table .its files end in csv"),
    ],
)
def test_configurations_and_splits(
    argument: str, configs: list[dict[str, Any]], expected: list[str] | str
) -> None:
    address = parse(f"hf://datasets/{argument}")
    if isinstance(expected, list):
        assert choose(address, PATHS, configs) == expected
    else:
        with pytest.raises(UserError, match=expected):
            choose(address, PATHS, configs)


# -- a whole build --------------------------------------------------------------------------------------------


def built(argument: str, tokenizer: str, out: str) -> str | None:
    """Build in the client's process; return its sentence where it failed."""
    from concurrent.futures import ThreadPoolExecutor

    from ekiden.tokens import build, units

    units.UNIT_BYTES = 2000
    try:
        build.preprocess([argument], tokenizer, out, test_split=0.1, executor=ThreadPoolExecutor(1))
    except UserError as error:
        return str(error)
    return None


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "english").iterdir()}


def test_a_build_from_the_hub_is_taken_up_where_it_was_and_equals_one_from_files(
    server: StandIn,
    client: Callable[..., Any],
    language_folder: Path,
    tmp_path: Path,
) -> None:
    from ekiden.tokenizer.train import train_tokenizer

    model = str(tmp_path / "bpe.model")
    train_tokenizer([str(language_folder)], model, vocab_size=430, model_type="bpe")
    (tmp_path / "corpus" / "english").mkdir(parents=True)
    for name, data in server.files.items():
        if "train-" in name:
            (tmp_path / "corpus" / "english" / name.rsplit("/", 1)[-1]).write_bytes(data)
    argument = "english=hf://datasets/owner/texts:train"
    out, local = tmp_path / "out", tmp_path / "local"
    server.faults = [None, 503, ("break", 300), None, None, *[500] * 40]
    refused = client(built, argument, model, str(out))
    assert refused is not None and "corpus hf://datasets/owner/texts cannot be read" in refused
    assert "status 500" in refused and "\n" not in refused
    done = len(list((out / ".receipts").glob("[!.]*")))
    assert done >= 1
    server.faults, server.served = [], []
    assert client(built, argument, model, str(out)) is None
    again = sum(last + 1 - first for name, first, last in server.served if name.endswith(".jsonl"))
    assert client(built, argument, model, str(tmp_path / "whole")) is None
    assert (
        again
        < sum(last + 1 - first for name, first, last in server.served if name.endswith(".jsonl")) - again
    )
    assert client(built, str(tmp_path / "corpus"), model, str(local)) is None
    assert shards(out) == shards(local) == shards(tmp_path / "whole")
    assert len(shards(local)) > 4
