"""The recipe of a run in words: how it learns, and where that comes from.

`ekiden train` prints it when a run begins and `ekiden plan` before one; both take it from the settings alone.
"""

from __future__ import annotations

from ekiden.config import TrainConfig, build_config

SETTINGS = (
    "initialization optimizer learning_rate matrix_learning_rate muon_momentum muon_first_momentum "
    "muon_momentum_steps muon_even muon_first_beta1 beta1 beta2 adam_epsilon weight_decay schedule warmup_steps decay_ratio "
    "min_learning_rate_ratio max_grad_norm temperature final_temperature final_share final_min_share "
    "max_epochs_per_language language_weights final_language_weights"
).split()
"""The settings that make the recipe."""

SOURCE = "measured on models of 3.5M parameters (docs/recipe.md, benchmarks/learning.py)"


def describe_recipe(config: TrainConfig) -> list[str]:
    """Return the recipe of `config` in sentences: initialisation, optimizer, schedule, mixture, and its source."""
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
    explicit = bool(config.language_weights)
    mixture = "as --language-weights says" if explicit else f"n^{config.temperature:g}"
    if config.final_share and config.final_language_weights:
        mixture += f", as --final-language-weights says in the last {config.final_share:.0%}"
    elif config.final_share and not explicit:
        mixture += f", n^{config.final_temperature:g} in the last {config.final_share:.0%}"
        if config.final_min_share:
            mixture += f", none below {config.final_min_share:.0%}"
    lines = [
        f"recipe: {config.initialization} initialisation; {optimizer}",
        f"  learning rate: {schedule}, down to {config.min_learning_rate_ratio:.0%} of the peak; languages: {mixture}",
    ]
    changed = changed_from_preset(config)
    if changed:
        lines.append(f"  {SOURCE}, but for what you set: {', '.join(changed)}")
    else:
        lines.append(f"  {SOURCE}")
    return lines


def changed_from_preset(config: TrainConfig) -> list[str]:
    """Return the recipe's settings that differ from the preset's, as name=value (the preset's value)."""
    preset = build_config(config.preset)
    return [
        f"{name}={getattr(config, name)} (preset: {getattr(preset, name)})"
        for name in SETTINGS
        if getattr(config, name) != getattr(preset, name)
    ]
