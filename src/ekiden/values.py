"""Values as people write them, turned into numbers: 100k steps, 11h30m, 8GB, english=0.6,hindi=0.4.

`config` and the verbs read flags and YAML through here.
"""

from __future__ import annotations

import math
import re
from typing import Any

from ekiden.errors import UsageError


def to_bool(value: Any) -> bool:
    """Accept true, yes, on, 1 and their opposites; anything else is a LookupError."""
    if isinstance(value, bool):
        return value
    return {
        "true": True,
        "yes": True,
        "on": True,
        "1": True,
        "false": False,
        "no": False,
        "off": False,
        "0": False,
    }[str(value).lower()]


def to_int(value: Any) -> int:
    """Accept 1000, '1000', '1_000', '100k', '2M' and floats without a fraction (YAML reads 1e6 as a string)."""
    if isinstance(value, bool):
        raise ValueError
    if isinstance(value, int):
        return value
    scale = {"k": 10**3, "M": 10**6, "B": 10**9}
    text = str(value).replace("_", "")
    factor = scale.get(text[-1:], 1)
    number = float(text[:-1] if factor > 1 else text) * factor
    if not number.is_integer():  # nor is an infinity
        raise ValueError
    return int(number)


def to_weights(value: Any) -> dict[str, float]:
    """Accept a mapping, or english=0.6,hindi=0.4."""
    if isinstance(value, str):
        value = dict(pair.split("=", 1) for pair in value.split(",") if pair)
    return {str(name).strip(): float(weight) for name, weight in value.items()}


def finite_json(value: Any) -> Any:
    """Return `value` with NaN and infinities as strings: JSON has no numbers for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_json(item) for item in value]
    return value


def parse_duration(text: str, setting: str) -> float | None:
    """Return seconds for '11h30m', '45m', '90s' or '2h'; None for an empty text.

    Raises:
        UsageError: not such a duration.
    """
    if not text:
        return None
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.replace(" ", ""))
    if not match or not any(match.groups()):
        raise UsageError(f"{setting} must be a duration such as 11h30m, 45m or 90s, not {text!r}")
    hours, minutes, seconds = (int(group or 0) for group in match.groups())
    return float(hours * 3600 + minutes * 60 + seconds)


def parse_bytes(text: str, setting: str) -> int | None:
    """Return bytes for '8GB', '500MB' or '1000000'; None for an empty text. Units are powers of 1000.

    Raises:
        UsageError: not such a size.
    """
    if not text:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", text.strip())
    if not match:
        raise UsageError(f"{setting} must be a size such as 8GB or 500MB, not {text!r}")
    return int(float(match[1]) * 1000 ** " kMGT".index(match[2] or " "))
