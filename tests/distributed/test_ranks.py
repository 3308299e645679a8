"""Two ranks over gloo: the same samples, the same losses, one decision about everything that befalls one of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
import campaign

from ekiden.errors import UserError
from ekiden.training.exact import check_tree

SCENARIOS = Path(__file__).with_name("scenarios.py")


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what every scenario left; they run in a process of their own, which forks the ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    shards = campaign.make_shards(folder)
    done = subprocess.run(
        [sys.executable, str(SCENARIOS), str(shards), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def events(scenario: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [event for event in scenario["events"] if event["event"] == kind]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_take_the_same_samples_to_the_same_losses(left: dict[str, Any], parallel: str) -> None:
    one, two = left["one"], left[parallel]
    assert two["statuses"] == [0, 0], two["log"]
    assert two["samples"] == one["samples"] and len(one["samples"]) == 6
    assert [loss for _step, loss in two["losses"]] == pytest.approx([x for _s, x in one["losses"]], rel=1e-5)
    assert two["evaluations"] == pytest.approx(one["evaluations"], rel=1e-5)
    assert two["checkpoints"] == one["checkpoints"]
    assert two["log"].count("evaluation") == one["log"].count("evaluation"), "one rank speaks"


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_signal_to_one_rank_stops_both_and_one_rank_goes_on(left: dict[str, Any], parallel: str) -> None:
    stopped, resumed = left[f"{parallel} stopped"], left[f"{parallel} resumed on 1"]
    assert stopped["statuses"] == [0, 0], stopped["log"]
    assert stopped["result"]["status"] == "paused" and stopped["result"]["reason"] == "SIGTERM"
    assert stopped["checkpoints"][-1] == f"step-{stopped['result']['step']:08d}"
    assert resumed["statuses"] == [0] and resumed["result"]["status"] == "completed"
    expected = dict(left["one"]["losses"])
    assert dict(resumed["losses"]) == pytest.approx(expected, rel=1e-5)
    assert stopped["samples"] + resumed["samples"] == left["one"]["samples"]
    assert "ranks was 2" in resumed["log"]


def test_shards_of_two_machines_train_like_one_process(left: dict[str, Any]) -> None:
    hybrid = left["hybrid"]
    assert hybrid["statuses"] == [0] * 4, hybrid["log"]
    assert dict(hybrid["losses"]) == pytest.approx(dict(left["one"]["losses"]), rel=1e-5)
    assert hybrid["samples"] == left["one"]["samples"]


def test_a_fixed_tree_gives_the_same_bits_on_two_ranks(left: dict[str, Any]) -> None:
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


@pytest.mark.parametrize("phase", ["backward", "update"])
def test_no_memory_on_one_rank_halves_the_microbatch_on_both(left: dict[str, Any], phase: str) -> None:
    found = left[f"oom {phase}"]
    assert found["statuses"] == [0, 0], found["log"]
    [event] = events(found, "oom")
    assert event["rank"] == 1 and event["microbatch"] == [2, 1]
    assert found["samples"] == left["one"]["samples"]
    assert dict(found["losses"]) == pytest.approx(dict(left["one"]["losses"]), rel=1e-5)


def test_no_memory_amid_shards_ends_the_run_and_the_next_start_takes_less(left: dict[str, Any]) -> None:
    ended, again = left["oom in shards"], left["oom in shards, again"]
    assert all(ended["statuses"]) and "rank 1: out of memory" in ended["log"]
    assert again["statuses"] == [0, 0], again["log"]
    assert dict(again["losses"]) == pytest.approx(dict(left["one"]["losses"]), rel=1e-5)


def test_an_infinite_loss_on_one_rank_is_skipped_on_both(left: dict[str, Any]) -> None:
    found = left["infinite"]
    assert found["statuses"] == [0, 0], found["log"]
    assert [event["step"] for event in events(found, "skip")] == [3]


def test_a_deadline_on_one_rank_first_stops_both(left: dict[str, Any]) -> None:
    found = left["deadline"]
    assert found["statuses"] == [0, 0], found["log"]
    assert found["result"]["reason"] == "time limit" and len(found["checkpoints"]) == 1


def test_a_rank_that_dies_is_named_and_the_others_end(left: dict[str, Any]) -> None:
    killed, again = left["killed"], left["killed, again"]
    assert killed["statuses"] == [1, -9]
    assert "rank 1 (process" in killed["log"] and "was ended from outside" in killed["log"]
    assert killed["result"]["status"] == "failed" and "rank 1" in killed["result"]["reason"]
    assert again["statuses"] == [0, 0], again["log"]
    assert again["losses"] == left["ddp"]["losses"]
