"""Arithmetic of a training step, for throughput figures and for planning."""

from __future__ import annotations

from ekiden.config import TrainConfig


def flops_per_token(config: TrainConfig, parameters: int) -> float:
    """Return the floating-point operations that training on one token takes, forward and backward.

    6 a parameter in a matrix product (the tied head counts once) and 6 L H D T for causal attention, whose windowed
    layers see at most the window (PaLM, arXiv:2204.02311, appendix B, halved for causality).

    Args:
        parameters: all of the model's, blocks and embedding.
    """
    gpt2 = config.model_type == "gpt2"
    width = config.hidden_size if gpt2 else config.num_attention_heads * config.head_dim
    attention = 0.0
    for layer in range(config.num_hidden_layers):
        local = not gpt2 and (layer + 1) % 6 != 0
        attention += (
            6 * width * (min(config.sliding_window, config.max_length) if local else config.max_length)
        )
    return 6 * parameters + attention
