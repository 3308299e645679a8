"""The files that make a folder of weights a Hugging Face folder.

Checkpoints, `best/` and `final_model/` are all written with them, so that plain transformers loads any of them.
"""

from __future__ import annotations

import json

from transformers import GenerationConfig, PreTrainedModel

from ekiden.tokenizer.huggingface import huggingface_files
from ekiden.tokenizer.load import Tokenizer


def model_folder_files(model: PreTrainedModel, tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return every file of the folder except the weights, by name: configurations and tokenizer."""
    config = model.config.to_dict()
    # Training turns the cache off; whoever loads the model generates with it.
    config |= {"architectures": [type(model).__name__], "use_cache": True, "dtype": "float32"}
    generation = GenerationConfig(
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id
    )
    length = getattr(model.config, "max_position_embeddings", None)
    return {
        "config.json": (json.dumps(config, indent=1) + "\n").encode(),
        "generation_config.json": (json.dumps(generation.to_diff_dict(), indent=1) + "\n").encode(),
        **huggingface_files(tokenizer, length),
    }
