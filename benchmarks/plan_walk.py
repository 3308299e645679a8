"""Every preset on every device with small and large vocabularies: does each plan end, and does what it proposes fit?

    python benchmarks/plan_walk.py [--presets gemma3-4b ...] [--devices t4x2 ...] [--vocab-sizes 16000 ...]

Each plan is made as it stands and with `batch_size: auto`; where it names a change, the plan is made again with it, as a
user would. Nothing is trained. The last line is one JSON object; `broken` has to be empty.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from ekiden.config import build_config, preset_names
from ekiden.errors import UserError
from ekiden.planning.devices import NAMES
from ekiden.planning.plan import Plan, make_plan

WIDTH = 100


def walk(preset: str, device: str, vocab_size: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a plan said, and what is wrong with it, if anything."""
    row: dict[str, Any] = {"preset": preset, "device": device, "vocab_size": vocab_size, **settings}
    try:
        first = make_plan(build_config(preset, **settings), vocab_size, device)
    except UserError as error:
        return {**row, "refused": str(error)}
    row |= {"fits": first.fits, "change": first.change, "peak_gib": round(first.peak.total / 2**30, 2)}
    wrong = wrong_lines(first)
    if first.change and device != "cpu":  # whose free memory is another at the second look
        second = make_plan(build_config(preset, **{**settings, **first.change}), vocab_size, device)
        assert first.changed_peak is not None
        row["changed_gib"] = round(second.peak.total / 2**30, 2)
        if not second.fits:
            wrong.append("the change that was named does not fit")
        if second.peak.total != first.changed_peak.total:
            wrong.append("the change has another peak than was said")
    return {**row, "wrong": wrong} if wrong else row


def wrong_lines(plan: Plan) -> list[str]:
    """Return what is wrong with the lines of a plan."""
    lines = plan.text().split("recipe: ")[0].splitlines()
    wrong = [f"{len(line)} characters: {line}" for line in lines if len(line) > WIDTH]
    wrong += [
        f"begins with a unit: {line}" for line in lines if line.split()[0] in ("GiB", "MiB", "GB", "MB")
    ]
    if plan.peak.estimated:
        wrong.append(f"estimated: {plan.peak.estimated}")
    return wrong


def main() -> None:
    """Walk, say every plan in a line, and count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="*", default=preset_names())
    parser.add_argument("--devices", nargs="*", default=NAMES)
    parser.add_argument("--vocab-sizes", nargs="*", type=int, default=[16_000, 64_000, 262_144])
    options = parser.parse_args()
    began, rows = time.process_time(), []
    for preset in options.presets:
        own = build_config(preset)
        whole = own.batch_size * own.gradient_accumulation_steps
        for vocab_size in options.vocab_sizes:
            for settings in ({}, {"batch_size": "auto", "global_batch_size": whole}):
                for device in options.devices:
                    rows.append(walk(preset, device, vocab_size, settings))
                    print(json.dumps(rows[-1]), flush=True)
    result = {
        "plans": len(rows),
        "fit": sum(row.get("fits", False) for row in rows),
        "fit_with_a_change": sum(bool(row.get("change")) for row in rows),
        "fit_with_none": sum(row.get("fits") is False and not row["change"] for row in rows),
        "refused": sum("refused" in row for row in rows),
        "broken": [row for row in rows if "wrong" in row],
        "cpu_s": round(time.process_time() - began, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
