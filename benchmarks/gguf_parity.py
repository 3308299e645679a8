"""llama.cpp against transformers and SentencePiece: GGUF exports of both families with a BPE and a unigram vocabulary.

    pip install 'ekiden[gguf]' llama-cpp-python
    python benchmarks/gguf_parity.py --corpus CORPUS --folder OUT

Trains two tokenizers and four small models on a part of CORPUS (a folder a language), exports them in fp32 and counts,
with llama.cpp itself: documents whose ids are SentencePiece's, each exception classified; prompts from held-out text
whose greedy continuation is transformers'; and what becomes of a unigram vocabulary that is declared as "llama". Run
again, it takes the tokenizers and models that are there. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch

from ekiden.corpus.documents import read_documents
from ekiden.corpus.ledger import Ledger
from ekiden.corpus.sources import discover
from ekiden.export import llama_tokens
from ekiden.export.gguf import export_gguf
from ekiden.export.llama_tokens import LlamaTokens, vocabulary
from ekiden.export.load import LoadedModel, load_model
from ekiden.export.token_check import compare_tokens, llama_cpp_encode
from ekiden.tokenizer.load import SentencePieceTokenizer
from ekiden.tokens.format import TokenDataset

KINDS = ("bpe", "unigram")
SHAPES = {
    "gpt2-10m": [
        *("--hidden-size", 128, "--num-hidden-layers", 6),
        *("--num-attention-heads", 4, "--num-key-value-heads", 4, "--intermediate-size", 512),
    ],
    "gemma3-tiny": ["--hidden-size", 128, "--num-hidden-layers", 7, "--sliding-window", 32],
}
ACCOUNT_DOCUMENTS, ACCOUNT_CHARACTERS = 200, 1000
PROMPT, LENGTH = 32, 128
"""Tokens of a prompt, and of a prompt with its continuation; Gemma's window of 32 is passed."""


def ekiden(*arguments: object) -> None:
    """Run one verb."""
    subprocess.run([sys.executable, "-m", "ekiden", *map(str, arguments)], check=True)


def take_corpus(corpus: str, folder: Path, limit: int) -> dict[str, list[str]]:
    """Write the first `limit` bytes of text of each language under `folder`; return the documents."""
    documents: dict[str, list[str]] = {}
    for language, sources in discover([corpus]).items():
        found, size = documents.setdefault(language, []), 0
        for source in sources:
            for text in read_documents(source, Ledger()):
                if size >= limit:
                    break
                found.append(text)
                size += len(text.encode())
        (folder / language).mkdir(parents=True, exist_ok=True)
        with (folder / language / "text.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in found)
    return documents


def prepare(folder: Path, kind: str, options: argparse.Namespace) -> None:
    """Train the tokenizer of this kind and a model of each family with it, where they are not there yet."""
    model, shards = folder / f"{kind}.model", folder / f"shards-{kind}"
    if not model.exists():
        ekiden(
            *("tokenizer", "train", folder / "corpus", "--output", model, "--model-type", kind),
            *("--vocab-size", options.vocab_size),
        )
        ekiden(
            *("preprocess", folder / "corpus", "--tokenizer", model, "--output-dir", shards),
            *("--test-split", 0.05),
        )
    for preset, shape in SHAPES.items():
        run = folder / f"{preset}-{kind}"
        if (run / "final_model").is_dir():
            continue
        ekiden(
            *("train", preset, "--dataset-path", shards, "--output-dir", run, "--max-steps", options.steps),
            *("--max-length", LENGTH, "--batch-size", 8, "--gradient-accumulation-steps", 1),
            *(
                "--learning-rate",
                3e-3,
                "--eval-steps",
                0,
                "--sample-steps",
                0,
                "--num-threads",
                options.threads,
            ),
            *shape,
        )


def sample(documents: dict[str, list[str]], count: int) -> list[str]:
    """Return `count` documents, every language's in turn as long as it has some."""
    columns = [iter(texts) for texts in documents.values()]
    result: list[str] = []
    while columns and len(result) < count:
        for column in list(columns):
            text = next(column, None)
            if text is None:
                columns.remove(column)
            elif len(result) < count:
                result.append(text)
    return result


def compare_vocabulary(
    tokenizer: SentencePieceTokenizer, path: Path, rows: int, texts: list[str]
) -> dict[str, Any]:
    """Return the outcome of every document, by llama.cpp, and how often Ekiden's account of it gives the same.

    The account is Python, a thousand times slower: it is asked for the first ACCOUNT_CHARACTERS of ACCOUNT_DOCUMENTS.
    """
    encode = llama_cpp_encode(path)
    assert encode is not None
    began = time.perf_counter()
    compared = compare_tokens(tokenizer, encode, texts, "llama.cpp")
    took = time.perf_counter() - began
    account = LlamaTokens(vocabulary(tokenizer, rows)).encode
    began = time.perf_counter()
    parts = [text[:ACCOUNT_CHARACTERS] for text in texts[:ACCOUNT_DOCUMENTS]]
    same = sum(account(text) == encode(text) for text in parts)
    outcomes = {name: getattr(compared, name) for name in ("texts", "equal", "outside", "ties", "different")}
    seconds = {"llama_cpp": round(took, 2), "account": round(time.perf_counter() - began, 2)}
    return {**outcomes, "account_equal_to_llama_cpp": f"{same}/{len(parts)}", "seconds": seconds}


def declared_as_llama(loaded: LoadedModel, target: Path, texts: list[str]) -> dict[str, int]:
    """Return how a unigram vocabulary fares that is written as "llama", unchecked."""
    llama_tokens.KINDS["unigram"] = "llama"
    try:
        export_gguf(loaded.model, loaded.tokenizer, target)
    finally:
        llama_tokens.KINDS["unigram"] = "t5"
    encode = llama_cpp_encode(target)
    assert encode is not None
    assert isinstance(loaded.tokenizer, SentencePieceTokenizer)
    compared = compare_tokens(loaded.tokenizer, encode, texts, "llama.cpp")
    return {"texts": compared.texts, "equal": compared.equal}


def held_out_texts(dataset: TokenDataset, count: int) -> dict[str, list[list[int]]]:
    """Return the beginnings of `count` test documents of each language that are long enough, LENGTH ids each."""
    texts: dict[str, list[list[int]]] = {}
    for language in dataset.languages:
        stream = dataset.split(language, "test")
        documents = (stream.document(number)[:LENGTH].tolist() for number in range(stream.documents))
        texts[language] = list(islice((ids for ids in documents if len(ids) == LENGTH), count))
    return texts


class Greedy:
    """Greedy continuations by llama.cpp and by transformers, and how far their logits are apart."""

    def __init__(self, loaded: LoadedModel, path: Path, threads: int) -> None:
        self.model = loaded.model
        # fp32 keys and values; the default is fp16.
        self.llama = llama_cpp.Llama(
            model_path=str(path),
            n_ctx=LENGTH,
            logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            n_threads=threads,
            verbose=False,
        )
        self.difference = 0.0

    def of_llama_cpp(self, prompt: list[int]) -> list[int]:
        """Return prompt and continuation by llama.cpp."""
        ids = list(prompt)
        self.llama.reset()
        self.llama.eval(ids)
        while len(ids) < LENGTH:
            ids.append(int(np.argmax(self.llama.scores[len(ids) - 1])))
            self.llama.eval(ids[-1:])
        return ids

    @torch.no_grad()
    def compare(self, prompt: list[int]) -> dict[str, Any] | None:
        """Return the first difference, or None where both continue alike.

        transformers reads llama.cpp's text at once: where its likeliest token is everywhere the next one, its own
        greedy continuation is the same.
        """
        ids = self.of_llama_cpp(prompt)
        logits = self.model(torch.tensor([ids]), use_cache=False).logits[0]
        theirs = torch.from_numpy(self.llama.scores[: len(ids)].copy())
        self.difference = max(self.difference, float((logits - theirs).abs().max()))
        for position in range(len(prompt) - 1, LENGTH - 1):
            best = logits[position].topk(2)
            if int(best.indices[0]) != ids[position + 1]:
                return {"token": position + 1, "margin": float(best.values[0] - best.values[1])}
        return None

    @torch.no_grad()
    def likeliest_after(self, ids: list[int]) -> tuple[int, list[float], int]:
        """Return at how many positions of a real text both have the same likeliest token, how far apart the two
        likeliest are for transformers where not, and how many tokens are likeliest somewhere."""
        self.llama.reset()
        self.llama.eval(ids)
        theirs = torch.from_numpy(self.llama.scores[: len(ids)].copy())
        logits = self.model(torch.tensor([ids]), use_cache=False).logits[0]
        self.difference = max(self.difference, float((logits - theirs).abs().max()))
        best = logits.topk(2)
        same = best.indices[:, 0] == theirs.argmax(dim=-1)
        margins = (best.values[:, 0] - best.values[:, 1])[~same].tolist()
        return int(same.sum()), margins, len(set(best.indices[:, 0].tolist()))


def compare_generation(
    loaded: LoadedModel, path: Path, texts: dict[str, list[list[int]]], threads: int
) -> dict[str, Any]:
    """Return, of each language, the texts whose beginning both continue alike, and the positions where both expect the
    same token next; then what the others differ by."""
    greedy = Greedy(loaded, path, threads)
    result: dict[str, Any] = {"continued": {}, "expected": {}, "differences": [], "margins": []}
    for language, beginnings in texts.items():
        outcomes = [greedy.compare(ids[:PROMPT]) for ids in beginnings]
        result["continued"][language] = f"{outcomes.count(None)}/{len(outcomes)}"
        result["differences"] += [outcome for outcome in outcomes if outcome is not None]
        read = [greedy.likeliest_after(ids) for ids in beginnings]
        result["expected"][language] = f"{sum(same for same, _m, _d in read)}/{sum(map(len, beginnings))}"
        result["margins"] += [margin for _same, margins, _d in read for margin in margins]
        result["distinct"] = max(result.get("distinct", 0), *(distinct for _s, _m, distinct in read))
    result["largest_logit_difference"] = round(greedy.difference, 6)
    return result


def main() -> None:
    """Run every stage and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--bytes-per-language", type=int, default=1_500_000)
    parser.add_argument("--vocab-size", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument(
        "--prompts", type=int, default=8, help="texts of each language that are continued and read"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.folder
    documents = take_corpus(options.corpus, folder / "corpus", options.bytes_per_language)
    texts = sample(documents, options.documents)
    result: dict[str, Any] = {"llama_cpp_python": llama_cpp.__version__, "tokens": {}, "greedy": {}}
    for kind in KINDS:
        prepare(folder, kind, options)
        held_out = held_out_texts(TokenDataset.open(folder / f"shards-{kind}"), options.prompts)
        for preset in SHAPES:
            loaded = load_model(folder / f"{preset}-{kind}" / "final_model", "cpu")
            assert isinstance(loaded.tokenizer, SentencePieceTokenizer)
            path = folder / f"{preset}-{kind}.gguf"
            export_gguf(loaded.model, loaded.tokenizer, path, texts=texts[:100])
            if kind not in result["tokens"]:
                rows = loaded.model.config.vocab_size
                result["tokens"][kind] = compare_vocabulary(loaded.tokenizer, path, rows, texts)
                print(kind, result["tokens"][kind], flush=True)
            figures = compare_generation(loaded, path, held_out, options.threads)
            result["greedy"][f"{preset} {kind}"] = figures
            print(preset, kind, figures, flush=True)
    result["unigram_declared_as_llama"] = declared_as_llama(loaded, folder / "wrong.gguf", texts)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
