"""Histories as a run of several sessions leaves them, without training: for the tests of what shows a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ekiden.tokens.shares import plan_mixture

BEGAN = 1_790_000_000.0
LANGUAGES = ("dutch", "english", "hindi")


def session_event(event: str, step: int, when: float, **more: Any) -> dict[str, Any]:
    """Return the record that begins a session."""
    mixture = plan_mixture({"dutch": 400_000, "english": 900_000, "hindi": 50_000}, 64, 1)
    return {
        "kind": "event",
        "step": step,
        "event": event,
        "environment": {"device": "Tesla T4", "precision": "fp16"},
        "hardware": {"cores": 4, "memory_bytes": 31e9, "device_memory_bytes": 15.8e9, "processes": 2},
        "versions": {"python": "3.12.3", "torch": "2.13.0"},
        "model": {
            "parameters_in_blocks": 6_400_000,
            "parameters_in_embedding": 4_100_000,
            "flops_per_token": 7e7,
            "peak_flops": 65e12,
        },
        "mixture": mixture.as_dict(),
        "global_batch": 32,
        "max_steps": 1000,
        "time": when,
        **more,
    }


def write_run(run: Path, steps: int, sessions: int = 4, log_steps: int = 1, spike: int | None = None) -> Path:
    """Write a run directory with a history of `steps` steps in `sessions` sessions, all but the last killed."""
    run.mkdir(parents=True)
    when, records = BEGAN, []
    for session in range(sessions):
        first, last = session * steps // sessions, (session + 1) * steps // sessions
        when += 3600 * (session > 0)
        resumed = {"level": "L1", "differing": [], "changed": {}} if session else {}
        records.append(session_event("resume" if session else "start", first, when, **resumed))
        if session == 1:
            records.append(
                {"kind": "event", "step": first, "event": "oom", "microbatch": [16, 8], "time": when}
            )
        for step in range(first + 1, last + 1):
            when += 0.5
            if step % log_steps == 0:
                loss = 2.5 + 6 * math.exp(-step / (steps / 6)) + 0.1 * math.sin(step * 1.7)
                loss = 50.0 if step == spike else loss
                records.append(
                    {"kind": "train", "step": step, "loss": loss, "learning_rate": 1e-3 * (1 - step / steps)}
                    | {"grad_norm": 1 + 0.5 * math.sin(step), "samples": step * 32, "tokens": step * 2048}
                    | {"tokens_per_second": 41_000 + 900 * math.sin(step / 9), "memory_bytes": 11.2e9}
                    | {"seconds": step * 0.5, "time": when}
                )
            if step % max(1, steps // 12) == 0:
                records += evaluation(step, steps, when)
    records.append(
        {"kind": "event", "step": steps, "event": "stop", "status": "completed", "reason": "all steps done"}
    )
    records[-1] |= {
        "time": when,
        "seconds": {"starting": 9.0, "training": 180.0, "evaluation": 12.0, "total": 214.0},
    }
    (run / "history.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    (run / "result.json").write_text(json.dumps({"status": "completed", "reason": "all steps done"}))
    (run / "config.yaml").write_text("preset: gpt2-10m\nmax_steps: 1000\nsample_prompts: []\n")
    return run


def evaluation(step: int, steps: int, when: float) -> list[dict[str, Any]]:
    """Return an evaluation, sample texts and the time so far."""
    figures = {
        name: {
            "loss": 2.7 + i / 3 + 5 * math.exp(-step / (steps / 5)),
            "bits_per_byte": 1.1 + i / 5 + math.exp(-step / steps),
        }
        for i, name in enumerate(LANGUAGES)
    }
    macro = {key: sum(f[key] for f in figures.values()) / 3 for key in ("loss", "bits_per_byte")}
    texts = {
        "dutch": [{"prompt": "De rivier", "text": "stroomt langs de oude molen."}],
        "english": [{"prompt": "The river", "text": "</script><script>window.hacked = 1</script>"}],
        "hindi": [{"prompt": "नदी", "text": "पुरानी चक्की के पास से बहती है।"}],
    }
    seconds = {
        "starting": 8.0,
        "training": 140.0,
        "evaluation": 10.0,
        "samples": 3.0,
        "saving": 4.0,
        "total": 170.0,
    }
    return [
        {"kind": "eval", "step": step, "languages": figures, "macro": macro, "micro": macro, "time": when},
        {"kind": "event", "event": "time", "step": step, "seconds": seconds, "time": when},
        {"kind": "samples", "step": step, "languages": texts, "time": when},
    ]
