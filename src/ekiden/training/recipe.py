"""The recipe of a run in words: how it learns, and where that comes from.

`ekiden train` prints it when a run begins and `ekiden plan` before one; both take it from the settings alone.
"""

from __future__ import annotations

from ekiden.config import TrainConfig, build_config

SETTINGS = (
    "initialization local_heads optimizer learning_rate matrix_learning_rate muon_momentum muon_first_momentum "
    "muon_momentum_steps muon_even muon_first_beta1 beta1 beta2 adam_epsilon weight_decay schedule warmup_steps decay_ratio "
    "min_learning_rate_ratio max_grad_norm temperature final_temperature final_share small_language_share "
    "max_epochs_per_language language_weights final_language_weights"
).split()
"""The settings that make the recipe."""

SOURCE = "measured on models of 3.5M parameters (docs/recipe.md, benchmarks/learning.py)"


def describe_recipe(config: TrainConfig, languages: int | None = None) -> list[str]:
    """Return the recipe of `config` in sentences: initialisation, optimizer, schedule, mixture, and its source.

    Args:
        languages: how many the data has, where that is known; one has no mixture.
    """
    if config.optimizer == "muon":
        optimizer = (
            f"Muon on the blocks' matrices at {config.matrix_learning_rate:g}, AdamW on the rest at "
            f"{config.learning_rate:g} (the embedding: times sqrt(256 / {config.hidden_size}))"
        )
    else:
        optimizer = f"AdamW at {config.learning_rate:g}, weight decay {config.weight_decay:g}"
    if config.schedule == "wsd":
        schedule = f"constant, then a line over the last {config.decay_ratio:.0%} of the run"
    else:
        schedule = "half a cosine"
    lines = [
        f"recipe: {config.initialization} initialisation; {optimizer}",
        f"  learning rate: {schedule}, down to {config.min_learning_rate_ratio:.0%} of the peak",
    ]
    if languages != 1:
        lines.append(f"  languages: {describe_mixture(config)}")
    changed = changed_from_preset(config)
    if changed:
        lines.append(f"  {SOURCE}, but for what you set: {', '.join(changed)}")
    else:
        lines.append(f"  {SOURCE}")
    return lines


def describe_mixture(config: TrainConfig) -> str:
    """Return in words what decides the shares of the languages."""
    to_small = f", {config.small_language_share:.0%} of it given to the smallest"
    powers = {value: f"n^{value:g}" for value in (config.temperature, config.final_temperature)}
    if config.small_language_share:
        powers = {value: text + to_small for value, text in powers.items()}
    mixture = "as --language-weights says" if config.language_weights else powers[config.temperature]
    if not config.final_share:
        return mixture
    if config.final_language_weights:
        return f"{mixture}; as --final-language-weights says in the last {config.final_share:.0%}"
    if config.language_weights:
        return mixture
    return f"{mixture}; {powers[config.final_temperature]} in the last {config.final_share:.0%}"


def changed_from_preset(config: TrainConfig) -> list[str]:
    """Return the recipe's settings that differ from the preset's, as name=value (the preset's value)."""
    preset = build_config(config.preset)
    return [
        f"{name}={getattr(config, name)} (preset: {getattr(preset, name)})"
        for name in SETTINGS
        if getattr(config, name) != getattr(preset, name)
    ]
