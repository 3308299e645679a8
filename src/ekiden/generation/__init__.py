"""Text from a trained model: batches of prompts, a stream of one, a conversation, a benchmark.

Takes a model and its tokenizer (`export.load`), gives continuations. A text depends on the seed, its prompt and its
settings, never on the prompts beside it.
"""

from __future__ import annotations

from ekiden.generation.batch import Continuation, continue_prompts, generate, plan_batches, share_batches
from ekiden.generation.benchmark import benchmark_generation
from ekiden.generation.interactive import Conversation, converse
from ekiden.generation.prompts import read_prompts
from ekiden.generation.run import run_benchmark, run_generate
from ekiden.generation.sampling import Sampling, choose
from ekiden.generation.streaming import REPLACEMENT, TextStream, continuation, next_tokens, prompt_ids, stream

__all__ = [
    "REPLACEMENT",
    "Continuation",
    "Conversation",
    "Sampling",
    "TextStream",
    "benchmark_generation",
    "choose",
    "continuation",
    "continue_prompts",
    "converse",
    "generate",
    "next_tokens",
    "plan_batches",
    "prompt_ids",
    "read_prompts",
    "run_benchmark",
    "run_generate",
    "share_batches",
    "stream",
]
