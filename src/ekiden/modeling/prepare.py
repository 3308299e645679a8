"""A model made ready for training: attention, fast parts, activations computed again, a compiled decoder where that works.

`training.start` calls `prepare_model` once, after the model has moved to its device.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from ekiden.config import TrainConfig
from ekiden.config_checks import AUTO
from ekiden.modeling.attention import DOCUMENT_MASK, Attention, document_boundary, install
from ekiden.modeling.attention_choice import choose_attention
from ekiden.modeling.build import blocks, body, hidden_states
from ekiden.modeling.device import Precision, in_fp32
from ekiden.modeling.fast_parts import install_fast_parts
from ekiden.modeling.fp16 import protect_from_overflow
from ekiden.modeling.half import install_half_products
from ekiden.modeling.kernels import library
from ekiden.modeling.own_parts import install_own_parts
from ekiden.progress import say

ARITHMETIC = 4
"""Raised with every change of what a step computes that may show in the last bits; a run resumed across it says so."""


def prepare_model(
    model: PreTrainedModel,
    config: TrainConfig,
    device: torch.device,
    precision: Precision,
    sharded: bool = False,
    attention: Attention | None = None,
) -> bool:
    """Make `model` ready as the settings say; return whether its decoder is compiled.

    Args:
        sharded: the weights will be divided among ranks, so that blocks are compiled one by one, if asked for, and
            untried: they have no weights on the device yet.
        attention: as it is; None: chosen by trying.
    """
    boundary = document_boundary(model.config) if config.document_mask else None
    if boundary is not None:
        setattr(model.config, DOCUMENT_MASK, True)  # for whoever evaluates what was trained
    install(model, attention or choose_attention(config, device, precision, boundary))
    install_fast_parts(model)
    half = in_fp32(device, precision.dtype)
    if half:
        for block in blocks(model):
            install_half_products(block)
    if device.type == "cpu" and (half or precision.dtype == torch.float32) and library() is not None:
        install_own_parts(model, precision.dtype)
    if precision.dtype == torch.float16:
        protect_from_overflow(model)
    if config.activation_checkpointing:
        checkpoint_activations(model)
    if sharded:
        for block in blocks(model) if config.compile == "on" else []:
            block.compile()
        return config.compile == "on"
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        return compile_body(model, config, device, precision)
    return False


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep each block's input alone and compute the block again in the backward pass (Chen et al. 2016, arXiv:1604.06174).

    There is no dropout, so no random numbers have to be put back (which would make the host wait).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it has another name from transformers 5.23 on
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False}
        )


def compile_body(
    model: PreTrainedModel, config: TrainConfig, device: torch.device, precision: Precision
) -> bool:
    """Compile the decoder, trying it forward and backward with a microbatch; say why and go on without where it fails.

    Compilers are missing, GPUs too old for Triton, graphs not understood: all of it shows only in the first call,
    which this one is. Its result is thrown away.
    """
    say("compiling the decoder, which takes a while at every start (--compile off: none, and slower steps)")
    body(model).compile()
    # An automatic microbatch is not known yet: one sample shows whether anything compiles.
    ids = torch.zeros((max(1, config.batch_size), config.max_length), dtype=torch.int64, device=device)
    try:
        with torch.autocast(device.type, precision.dtype, enabled=precision.dtype != torch.float32):
            hidden_states(model, ids).sum().backward()
    except torch.OutOfMemoryError:
        pass  # it compiled; the trial before the first step finds the microbatch
    except Exception as error:  # whatever a compiler may raise
        body(model)._compiled_call_impl = None  # as before `compile`
        torch.compiler.reset()
        reason = next(iter(str(error).splitlines()), "")
        say(
            f"torch.compile does not work here ({type(error).__name__}: {reason}); training without it, more slowly"
        )
        return False
    finally:
        model.zero_grad(set_to_none=True)
    if config.batch_size == AUTO:
        forget_compiled(model)
    return True


def forget_compiled(model: PreTrainedModel) -> None:
    """Let the decoder be compiled anew for the next shape that it sees.

    Compiled for a second shape it would be for any, slower and with other sums than a resumed run's, whose first shape
    that is.
    """
    if body(model)._compiled_call_impl is not None:
        torch.compiler.reset()


@contextlib.contextmanager
def uncompiled(model: torch.nn.Module) -> Iterator[None]:
    """Run the decoder as it is, for a shape that comes once."""
    decoder = body(model)
    compiled, decoder._compiled_call_impl = decoder._compiled_call_impl, None
    try:
        yield
    finally:
        decoder._compiled_call_impl = compiled
