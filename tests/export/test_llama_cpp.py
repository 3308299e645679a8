"""llama.cpp itself, where `llama_cpp` is installed: it reads, and writes, what the model does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ekiden.export.gguf import export_gguf
from ekiden.export.llama_tokens import LlamaTokens, vocabulary
from ekiden.export.token_check import compare_tokens, llama_cpp_encode
from small_models import TEXT, small_model

pytest.importorskip("gguf", reason="needs 'ekiden[gguf]'")
llama_cpp = pytest.importorskip(
    "llama_cpp", reason="needs llama.cpp: pip install llama-cpp-python (it compiles for minutes)"
)

ODD = ["☂ Ω and 😀", "  two  spaces ", "tabs\tand\nlines", "नदी\u200d", "Ünïcode", "."]


@pytest.mark.parametrize("preset", ["gpt2-10m", "gemma3-tiny"])
def test_greedy_tokens_are_transformers(preset, any_tokenizer, tmp_path):
    model = small_model(preset, any_tokenizer).eval()
    export_gguf(model, any_tokenizer, tmp_path / "m.gguf", texts=TEXT)
    # fp32 keys and values; the default is fp16.
    llama = llama_cpp.Llama(
        model_path=str(tmp_path / "m.gguf"),
        n_ctx=32,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        n_threads=1,
        verbose=False,
    )
    written = set()
    for text in TEXT:
        ids = [any_tokenizer.bos_id, *any_tokenizer.encode(text)][:12]
        llama.reset()
        llama.eval(ids)
        while len(ids) < 32:
            ids.append(int(np.argmax(llama.scores[len(ids) - 1])))
            llama.eval(ids[-1:])
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        # llama.cpp computes gelu from a table of fp16.
        theirs = torch.tensor(llama.scores[:32].copy())
        assert (logits - theirs).abs().max() < 0.02 < 0.2 < logits.std()
        assert logits[11:31].argmax(dim=-1).tolist() == ids[12:]
        written |= set(ids[12:])
    assert len(written) > 5


def test_tokens_are_those_of_the_account(any_tokenizer, tmp_path):
    model = small_model("gpt2-10m", any_tokenizer)
    export_gguf(model, any_tokenizer, tmp_path / "m.gguf")
    encode = llama_cpp_encode(tmp_path / "m.gguf")
    assert encode is not None
    account = LlamaTokens(vocabulary(any_tokenizer, 340)).encode
    for text in [*TEXT, *ODD]:
        assert encode(text) == account(text), text
    compared = compare_tokens(any_tokenizer, encode, [*TEXT, *ODD], "llama.cpp")
    assert compared.different == 0
    assert compared.outside > 0 or any_tokenizer.model_type == "bpe"
