"""The settings of a run, built from presets, recipes and flags; in YAML and out.

They are taken in this order, later ones winning: the defaults of `config_fields.TrainConfig`, the preset's YAML
(`presets/NAME.yaml`), the user's recipe (a YAML file that may name a `preset`), the flags. `training.loop` reads
them, `training.rundir` keeps them as `RUN/config.yaml`, and a checkpoint carries them, so that a resumed run can
refuse, by name, a change that would make it another run. `config_checks` refuses values that no run could use.
"""

from __future__ import annotations

import dataclasses
import typing
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from ekiden.config_checks import AUTO, validate
from ekiden.config_fields import RESUME_FREE, TrainConfig, field_help, field_types
from ekiden.errors import UsageError, nearest
from ekiden.values import to_bool, to_int, to_weights

__all__ = [
    "RESUME_FREE",
    "TrainConfig",
    "build_config",
    "coerce",
    "field_help",
    "field_types",
    "load_preset",
    "parse_yaml",
    "preset_names",
    "to_yaml",
]

DROPPED = frozenset({"final_min_share"})
"""Settings that earlier versions wrote into `config.yaml`; they decided the order, which every checkpoint holds."""

KINDS = {
    int: "a whole number, such as 500 or 20k",
    float: "a number, such as 0.1 or 3e-4",
    bool: "true or false",
    str: "text",
}
"""What a value of each type is called in a message."""


def preset_names() -> list[str]:
    """Return the names of the presets that come with Ekiden."""
    folder = resources.files("ekiden") / "presets"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def load_preset(name: str) -> dict[str, Any]:
    """Return the fields that preset `name` sets.

    Raises:
        UsageError: there is no such preset.
    """
    names = preset_names()
    if name not in names:
        raise UsageError(
            f"preset {name!r} does not exist{nearest(name, names)} (there are: {', '.join(names)})"
        )
    path = resources.files("ekiden") / "presets" / f"{name}.yaml"
    return parse_yaml(path.read_text(encoding="utf-8"), f"presets/{name}.yaml")


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """Return the settings in YAML `text`, checked; `where` names the file in error messages.

    Raises:
        UsageError: the text is not YAML, not a mapping, or a key or value is not one of TrainConfig's.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UsageError(f"{where}{line} is not valid YAML ({getattr(error, 'problem', error)})") from None
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{where}:1 must hold `setting: value` lines")
    settings: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = f"{where}:{key_node.start_mark.line + 1}"
        name = str(key_node.value)
        if name in DROPPED:
            continue
        if name not in field_types():
            raise UsageError(f"{line}: unknown setting {name!r}{nearest(name, field_types())}")
        if name in settings:
            raise UsageError(f"{line}: {name} is set twice")
        try:
            value = yaml.SafeLoader("").construct_object(value_node, deep=True)
        except (yaml.YAMLError, ValueError):  # ValueError: a date that is none
            raise UsageError(
                f"{line}: {name} holds a value that is not plain YAML ({value_node.tag})"
            ) from None
        settings[name] = coerce(name, value, line)
    return settings


def coerce(name: str, value: Any, where: str) -> Any:
    """Return `value` (from YAML, a flag or Python) as the type of field `name`.

    Raises:
        UsageError: it cannot be one; the sentence begins with `where`.
    """
    kind = field_types()[name]
    must = "must be" if where.startswith("--") else f"{name} must be"
    origin = typing.get_origin(kind)
    try:
        if origin is Literal:
            # YAML 1.1 reads a bare on/off as a boolean.
            choice = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
            if choice not in typing.get_args(kind):
                allowed = ", ".join(typing.get_args(kind))
                raise UsageError(f"{where}: {must} one of {allowed}, not {value!r}")
            return choice
        if kind is bool:
            return to_bool(value)
        if kind is int:
            return AUTO if name == "batch_size" and value == "auto" else to_int(value)
        if kind is float:
            if isinstance(value, bool):
                raise ValueError
            return float(value)
        if kind is str:
            if isinstance(value, (dict, list, bool)):
                raise ValueError
            return "" if value is None else str(value)
        if origin is list:
            return [str(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
        if origin is dict:
            return to_weights(value)
    except (LookupError, ValueError, TypeError, AttributeError):
        pass
    wanted = KINDS.get(kind, "NAME=SHARE pairs, such as hindi=0.7,dutch=0.3")
    wanted += ", or auto" if name == "batch_size" else ""
    raise UsageError(f"{where}: {must} {wanted}, not {value!r}")


def build_config(recipe: str | None = None, **settings: Any) -> TrainConfig:
    """Return the settings of a run from a preset or recipe and explicit `settings` (as from flags).

    Args:
        recipe: a preset's name or the path of a YAML file; None: the default preset.
        settings: field=value; they win over recipe and preset.

    Raises:
        UsageError: an unknown preset, file, key or value.
    """
    explicit = {}
    for name, value in settings.items():
        if name not in field_types():
            raise UsageError(f"unknown setting {name!r}{nearest(name, field_types())}")
        explicit[name] = coerce(name, value, "--" + name.replace("_", "-"))
    chosen: dict[str, Any] = {}
    if recipe and (recipe.endswith((".yaml", ".yml")) or "/" in recipe):
        path = Path(recipe)
        if not path.is_file():
            raise UsageError(
                f"recipe {recipe} does not exist; give a YAML file or one of {', '.join(preset_names())}"
            )
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"recipe {recipe} cannot be read ({error}); give a YAML file in UTF-8") from None
        chosen = parse_yaml(text, recipe)
    elif recipe:
        chosen = {"preset": recipe}
    merged = {**chosen, **explicit}
    preset = load_preset(merged.get("preset", TrainConfig.preset))
    if merged.get("global_batch_size"):  # a preset's accumulation makes a global batch of its own
        preset.pop("gradient_accumulation_steps", None)
    return validate(TrainConfig(**{**preset, **merged}))


def to_yaml(config: TrainConfig) -> str:
    """Return `config` as YAML, each field under its help text as a comment."""
    lines = []
    for name, value in dataclasses.asdict(config).items():
        lines.append(f"# {field_help()[name]}")
        lines.append(
            yaml.safe_dump({name: value}, allow_unicode=True, default_flow_style=False, width=1000).rstrip()
        )
    return "\n".join(lines) + "\n"
