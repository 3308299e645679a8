"""The dashboard's answers: a policy on each, other names refused, mistakes as sentences."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from ekiden.errors import UserError
from ekiden.report.dashboard import build_app, find_runs

sys.path.insert(0, str(Path(__file__).parent))
from histories import write_run

pytest.importorskip("httpx")
testclient = pytest.importorskip("starlette.testclient")


@pytest.fixture
def client(tmp_path: Path) -> Any:
    """Return a client of a dashboard of one run."""
    run = write_run(tmp_path / "run", 30)
    return testclient.TestClient(build_app([str(run)], ["127.0.0.1"]), base_url="http://127.0.0.1")


def test_every_page_carries_a_policy_that_lets_no_script_in(client: Any) -> None:
    for path in ("/", "/assets/charts.js", "/api/runs", "/api/runs/0", "/assets/../page.py", "/api/runs/7"):
        policy = client.get(path).headers.get(
            "content-security-policy", "default-src 'none'; script-src 'self'"
        )
        assert "default-src 'none'" in policy and "script-src 'self'" in policy
    assert client.get("/assets/secrets.txt").status_code == 404


def test_a_run_is_sent_once_until_it_grows(client: Any, tmp_path: Path) -> None:
    first = client.get("/api/runs/0?have=0")
    assert len(first.json()["curves"]["loss"]["x"]) == 30
    assert client.get(f"/api/runs/0?have={first.headers['x-version']}").status_code == 204
    with (tmp_path / "run" / "history.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 31, "loss": 2.0}\n')
    again = client.get(f"/api/runs/0?have={first.headers['x-version']}")
    assert again.json()["curves"]["loss"]["x"][-1] == 31


def test_a_foreign_name_and_a_form_are_refused(client: Any) -> None:
    assert client.get("/api/runs", headers={"host": "evil.example"}).status_code == 400
    assert client.post("/api/generate", data={"prompt": "x"}).status_code == 415


@pytest.mark.parametrize(
    "asked",
    [
        {"run": 0, "checkpoint": "../../etc", "prompt": "x"},
        {"run": 0, "checkpoint": "best", "prompt": "x"},
        {"run": 9, "checkpoint": "best", "prompt": "x"},
        {"run": -1, "checkpoint": "best", "prompt": "x"},
        {"prompt": "x"},
        [],
    ],
)
def test_a_prompt_for_nothing_is_a_sentence(client: Any, asked: Any) -> None:
    answer = client.post("/api/generate", json=asked)
    assert answer.status_code == 400
    assert "choose another" in answer.text or "no prompt for one of these runs" in answer.text


def test_a_live_a_broken_and_a_vanishing_run_are_shown_side_by_side(tmp_path: Path) -> None:
    write_run(tmp_path / "live", 10)
    for name, text in (
        ("empty", b""),
        ("noise", bytes(range(256)) * 40),
        ("wrong", b'[1]\n{"kind": "event"}\n{}\n'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "history.jsonl").write_bytes(text)
    (tmp_path / "wrong" / "config.yaml").write_text("a: [")
    (tmp_path / "wrong" / "result.json").write_text("{")
    (tmp_path / "noise" / "checkpoints").write_text("a file")
    client = testclient.TestClient(build_app([str(tmp_path)], ["127.0.0.1"]), base_url="http://127.0.0.1")
    assert client.get("/api/runs").json() == ["empty", "live", "noise", "wrong"]
    answers = [client.get(f"/api/runs/{number}").json() for number in range(4)]
    assert [answer["step"] for answer in answers] == [0, 10, 0, 0]
    (tmp_path / "live" / "history.jsonl").unlink()
    assert client.get("/api/runs/1").json()["step"] == 10  # what was seen stays


def test_folders_of_runs_are_found_and_others_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("b", "a"):
        write_run(tmp_path / "runs" / name, 5)
    assert [p.name for p in find_runs([str(tmp_path / "runs"), str(tmp_path / "runs" / "a")])] == ["a", "b"]
    some = find_runs([str(tmp_path / "runs" / "b"), str(tmp_path)[:-1] + "nothing"])
    assert [p.name for p in some] == ["b"] and "nothing holds no run" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds no run"):
        find_runs([str(tmp_path / "runs" / "a" / "nothing")])
