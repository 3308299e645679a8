"""Two ranks over gloo: the same samples, the same losses, one decision about everything that befalls one of them."""

from __future__ import annotations

import dataclasses
import datetime
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
import scenarios
from common import small_shards
from forked import Served

from ekiden.config import build_config
from ekiden.errors import UserError
from ekiden.training.exact import check_tree
from ekiden.training.ranks import Ranks, store_of_this_start
from ekiden.training.sharding import wants_shards


class Left:
    """What each scenario left, by name; it is done when it is first asked for."""

    def __init__(self, process: Served) -> None:
        self._process = process

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self._process.ask(name)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Left]:
    """Yield what scenarios leave."""
    folder = tmp_path_factory.mktemp("ranks")
    process = Served(scenarios.begin, folder / "log", small_shards(folder), folder)
    yield Left(process)
    process.close()


def events(scenario: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [event for event in scenario["events"] if event["event"] == kind]


def same_losses(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert dict(found["losses"]) == pytest.approx(dict(expected["losses"]), rel=1e-5)


@pytest.mark.parametrize(("name", "ranks"), [("ddp", 2), ("hybrid", 4)])
def test_ranks_take_the_same_samples_to_the_same_losses(left: Left, name: str, ranks: int) -> None:
    """Copies, and shards of two machines of two ranks each, beside one process."""
    one, several = left["one"], left[name]
    assert several["statuses"] == [0] * ranks, several["log"]
    assert several["samples"] == one["samples"] and len(one["samples"]) == 4
    same_losses(several, one)
    assert several["evaluations"] == pytest.approx(one["evaluations"], rel=1e-5) and one["evaluations"]
    assert several["checkpoints"] == one["checkpoints"]
    assert several["log"].count("evaluation") == one["log"].count("evaluation"), "one rank speaks"


@pytest.mark.parametrize("preset", ["gemma3-tiny", "gpt2-10m"])
def test_shards_of_half_precision_train_evaluate_and_write_samples(left: Left, preset: str) -> None:
    one, two = left[f"half {preset} 1"], left[f"half {preset} 2"]
    assert two["statuses"] == [0, 0], two["log"]
    assert dict(two["losses"]) == pytest.approx(dict(one["losses"]), rel=2e-3)
    assert two["evaluations"] == pytest.approx(one["evaluations"], rel=2e-3) and one["evaluations"]
    assert "sample" in two["log"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_signal_to_one_rank_stops_both_and_one_rank_goes_on(left: Left, parallel: str) -> None:
    stopped, resumed = left[f"{parallel} stopped"], left[f"{parallel} resumed on 1"]
    assert stopped["statuses"] == [0, 0], stopped["log"]
    assert stopped["result"]["status"] == "paused" and stopped["result"]["reason"] == "SIGTERM"
    assert stopped["checkpoints"] == [f"step-{stopped['result']['step']:08d}"]
    assert resumed["statuses"] == [0] and resumed["result"]["status"] == "completed"
    same_losses(resumed, left["one"])
    assert stopped["samples"] and resumed["samples"]
    assert stopped["samples"] + resumed["samples"] == left["one"]["samples"]
    assert "ranks was 2" in resumed["log"]


@pytest.mark.parametrize("name", ["masked ddp", "masked fsdp"])
def test_masked_documents_resume_to_the_last_bit(left: Left, name: str) -> None:
    whole, stopped, resumed = left[name], left[f"{name} stopped"], left[f"{name} resumed"]
    assert stopped["result"]["status"] == "paused" and resumed["result"]["status"] == "completed", resumed[
        "log"
    ]
    assert resumed["statuses"] == [0, 0]
    assert resumed["losses"] == whole["losses"] and resumed["weights"] == whole["weights"]


def test_a_fixed_tree_gives_the_same_bits_on_two_ranks(left: Left) -> None:
    one, two = left["exact one"], left["exact two"]
    assert two["statuses"] == [0, 0], two["log"]
    assert two["losses"] == one["losses"] and two["weights"] == one["weights"]
    assert two["weights"] is not None


@pytest.mark.parametrize(
    ("batch", "microbatch", "world", "words"),
    [(12, 1, 2, "needs 1, 2, 4"), (8, 3, 2, "needs 1, 2, 4"), (8, 1, 3, "not on 3"), (4, 2, 4, "not on 4")],
)
def test_a_fixed_tree_refuses_what_is_no_tree(batch: int, microbatch: int, world: int, words: str) -> None:
    check_tree(8, 2, 4)
    with pytest.raises(UserError, match=words):
        check_tree(batch, microbatch, world)


def test_no_memory_on_one_rank_halves_the_microbatch_on_both(left: Left) -> None:
    """In the forward pass, the backward pass and the update of one run; the last goes back to the newest checkpoint."""
    found = left["oom ddp"]
    assert found["statuses"] == [0, 0], found["log"]
    seen = events(found, "oom")
    assert [event["microbatch"] for event in seen] == [[8, 4], [4, 2], [2, 1]]
    assert [event["rank"] for event in seen] == [1, 1, 1]
    assert "did not fit; back at step 2" in found["log"]
    assert found["samples"] == left["one"]["samples"]
    assert found["checkpoints"] == left["one"]["checkpoints"]
    same_losses(found, left["one"])


def test_an_automatic_microbatch_is_that_of_the_rank_with_least_memory(left: Left) -> None:
    found = left["auto"]
    assert found["statuses"] == [0, 0], found["log"]
    assert [event["samples"] for event in events(found, "microbatch")] == [2]
    assert found["samples"] == left["one"]["samples"]
    same_losses(found, left["one"])
    refused = left["auto fsdp"]
    assert refused["statuses"] == [1, 1]
    assert "--batch-size auto cannot try what fits with --parallel fsdp" in refused["log"]


@pytest.mark.parametrize("phase", ["forward", "backward", "update"])
def test_no_memory_amid_shards_ends_the_run_and_names_the_rank(left: Left, phase: str) -> None:
    ended = left[f"oom fsdp {phase}"]
    assert ended["statuses"] == [1, 1] and "rank 1: out of memory" in ended["log"], ended["log"]


def test_after_no_memory_amid_shards_the_next_start_takes_half(left: Left) -> None:
    sizes = [f"it takes microbatches of {size}" for size in (4, 2, 1)]
    for phase, words in zip(("forward", "backward", "update"), sizes):
        assert words in left[f"oom fsdp {phase}"]["log"]
    again = left["oom fsdp "]
    assert again["statuses"] == [0, 0], again["log"]
    same_losses(again, left["one"])


def test_an_infinite_loss_on_one_rank_is_skipped_on_both(left: Left) -> None:
    found = left["infinite"]
    assert found["statuses"] == [0, 0], found["log"]
    assert [event["step"] for event in events(found, "skip")] == [2]


def test_a_deadline_on_one_rank_first_stops_both(left: Left) -> None:
    found = left["deadline"]
    assert found["statuses"] == [0, 0], found["log"]
    assert found["result"]["reason"] == "time limit" and len(found["checkpoints"]) == 1


def test_a_rank_that_ends_while_they_meet_is_told_of_in_a_sentence(left: Left) -> None:
    gone = left["killed while meeting"]
    assert gone["statuses"] == [1, -9]
    assert "rank 0 could not meet the other 1" in gone["log"] and "Traceback" not in gone["log"]


def test_a_rank_that_dies_is_named_and_the_others_end(left: Left) -> None:
    killed, again = left["killed"], left["killed, again"]
    assert killed["statuses"] == [1, -9]
    assert "rank 1 (process" in killed["log"] and "was ended from outside" in killed["log"]
    assert killed["result"]["status"] == "failed" and "rank 1" in killed["result"]["reason"]
    assert again["statuses"] == [0, 0], again["log"]
    assert again["losses"] == left["ddp"]["losses"] and again["weights"] == left["ddp"]["weights"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer_moments": "bf16", "optimizer": "adamw"}, "leave out --optimizer-moments"),
        ({"cpu_offload": True, "optimizer": "adamw"}, "leave out --optimizer-moments and --cpu-offload"),
        ({"elastic_exact": True}, "--elastic-exact sums whole gradients; give --parallel ddp"),
    ],
)
def test_shards_refuse_what_they_cannot_divide(settings: dict[str, Any], words: str) -> None:
    two = Ranks(0, 2)
    config = build_config("gemma3-tiny", parallel="fsdp", **settings)
    with pytest.raises(UserError, match=words):
        wants_shards(config, two, 1000, torch.device("cpu"))
    automatic = dataclasses.replace(config, parallel="auto")
    assert not wants_shards(automatic, two, 1 << 40, torch.device("cpu"))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_shards_are_taken_where_they_are_asked_for(optimizer: str) -> None:
    config = build_config("gemma3-tiny", parallel="fsdp", optimizer=optimizer)
    assert wants_shards(config, Ranks(0, 2), 1000, torch.device("cpu"))
    assert not wants_shards(config, Ranks(), 1000, torch.device("cpu"))


def test_ranks_of_a_start_meet_beside_what_a_dead_start_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the store of torchrun's agent, which lives on; nodes count their restarts differently."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agent = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    for name, value in {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(port))
    agent.set("ekiden/hello/1", "of a dead rank")
    for start in range(2):
        with ThreadPoolExecutor(3) as pool:
            stores = list(pool.map(lambda rank: store_of_this_start(rank, 3), range(3)))
        stores[0].set("address", f"of start {start}")
        assert [store.get("address") for store in stores] == [f"of start {start}".encode()] * 3
    monkeypatch.setattr("ekiden.training.ranks.GROUP_TIMEOUT", datetime.timedelta(seconds=0.2))
    with pytest.raises(RuntimeError, match="not all of them came"):
        store_of_this_start(0, 3)
