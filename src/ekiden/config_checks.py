"""Settings that no run could use, each refused by the name of its flag, before data or a device is looked at.

`config.build_config` calls `validate`, and so does everything that changed a setting afterwards.
"""

from __future__ import annotations

import math

from ekiden.config_fields import TrainConfig
from ekiden.errors import UsageError, nearest
from ekiden.values import parse_bytes, parse_duration

AUTO = 0
"""`batch_size` where the largest microbatch that fits is to be found."""
TRACKER_NAMES = ("tensorboard", "trackio", "wandb")
POSITIVE = tuple(
    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size max_length "
    "gradient_accumulation_steps loss_chunk_size log_steps sliding_window rope_scaling_factor max_bad_steps "
    "learning_rate matrix_learning_rate adam_epsilon".split()
)
NOT_NEGATIVE = tuple(
    "max_steps epochs eval_steps eval_tokens sample_steps sample_tokens save_steps warmup_steps weight_decay decay_steps "
    "max_grad_norm max_rollbacks num_threads max_epochs_per_language muon_momentum_steps batch_size "
    "global_batch_size".split()
)


def validate(config: TrainConfig) -> TrainConfig:
    """Return `config` after checking what can be checked without data or device.

    Raises:
        UsageError: a value that no run could use, naming the setting.
    """
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{name.replace('_', '-')} must be a finite number, not {value}")
    for name in POSITIVE:
        if getattr(config, name) <= 0:
            raise UsageError(f"--{name.replace('_', '-')} must be above 0, not {getattr(config, name)}")
    for name in NOT_NEGATIVE:
        if getattr(config, name) < 0:
            raise UsageError(f"--{name.replace('_', '-')} must not be negative, not {getattr(config, name)}")
    if config.max_checkpoints < 2:
        raise UsageError("--max-checkpoints must be at least 2: the newest may be the one being written")
    if config.model_type == "gpt2" and config.hidden_size % config.num_attention_heads:
        raise UsageError(
            f"--hidden-size {config.hidden_size} must be a multiple of --num-attention-heads {config.num_attention_heads}"
        )
    if config.model_type != "gpt2" and config.num_attention_heads % config.num_key_value_heads:
        raise UsageError(
            f"--num-attention-heads {config.num_attention_heads} must be a multiple of --num-key-value-heads "
            f"{config.num_key_value_heads}"
        )
    for name in ("decay_ratio", "final_share", "small_language_share", "min_learning_rate_ratio"):
        if not 0 <= getattr(config, name) <= 1:
            raise UsageError(
                f"--{name.replace('_', '-')} must be a share from 0 to 1, not {getattr(config, name)}"
            )
    for name in ("muon_momentum", "muon_first_momentum", "muon_first_beta1", "beta1", "beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise UsageError(
                f"--{name.replace('_', '-')} must be from 0 to below 1, not {getattr(config, name)}"
            )
    if config.devices < 1 or config.max_restarts < 0:
        raise UsageError("--devices must be at least 1, and --max-restarts at least 0")
    parse_duration(config.max_time, "--max-time")
    if not parse_duration(config.rank_timeout, "--rank-timeout"):
        raise UsageError("--rank-timeout must be a time, such as 1m")
    parse_bytes(config.checkpoint_budget, "--checkpoint-budget")
    parse_trackers(config.trackers)
    _check_together(config)
    return config


def _check_together(config: TrainConfig) -> None:
    """Refuse settings of which each alone is good."""
    if config.batch_size == AUTO and not config.global_batch_size:
        raise UsageError(
            "--batch-size auto needs --global-batch-size: the samples of one step on all devices together"
        )
    if config.batch_size == AUTO and config.elastic_exact:
        raise UsageError("--elastic-exact needs microbatches of one size; give a number as --batch-size")
    if config.global_batch_size and config.gradient_accumulation_steps != 1:
        raise UsageError(
            "--global-batch-size already says how many microbatches are added up; leave --gradient-accumulation-steps out"
        )
    if config.cpu_offload and config.optimizer == "muon":
        raise UsageError("--cpu-offload works with --optimizer adamw; muon's products are a GPU's work")
    if config.optimizer_moments in ("bf16", "fp16") and config.beta2 > 0.98:
        raise UsageError(
            f"--optimizer-moments {config.optimizer_moments} rounds away a second moment that moves as slowly as with "
            f"--beta2 {config.beta2}; give --beta2 0.98 or less, or --optimizer-moments fp32 or 8bit"
        )
    if config.final_language_weights and not config.final_share:
        raise UsageError(
            "--final-language-weights needs --final-share: the share of the run, at its end, that they hold for"
        )
    if config.max_steps == 0 and config.epochs == 0:
        raise UsageError("one of --max-steps and --epochs must be above 0")
    if config.decay_from and (config.init_from or config.resume_from != "auto"):
        raise UsageError(
            "--decay-from already says where the run goes on; leave --init-from and --resume-from out"
        )
    if config.init_from and config.resume_from != "auto":
        raise UsageError(
            "--init-from begins at step 0 and --resume-from goes on where the other ended; give one of them"
        )


def parse_trackers(items: list[str]) -> list[str]:
    """Return the trackers in `items`, names or several separated by commas.

    Raises:
        UsageError: there is no such tracker.
    """
    asked = [name.strip() for item in items for name in item.split(",") if name.strip()]
    for name in asked:
        if name not in TRACKER_NAMES:
            raise UsageError(
                f"--trackers {name} is not one of {', '.join(TRACKER_NAMES)}{nearest(name, TRACKER_NAMES)}"
            )
    return asked
