"""Evaluation and samples on real files: text to shards to a model folder to figures."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from ekiden.checkpoint.manifest import NAME as MANIFEST
from ekiden.config import TrainConfig, build_config
from ekiden.errors import UserError
from ekiden.evaluation.loss import check_tokenizer, evaluate_model, format_evaluation
from ekiden.evaluation.samples import sample_texts
from ekiden.export.huggingface import export_huggingface
from ekiden.export.load import load_model
from ekiden.modeling.build import build_model
from ekiden.tokenizer.load import load_tokenizer
from ekiden.tokenizer.train import train_tokenizer
from ekiden.tokens.batches import Batches
from ekiden.tokens.build import preprocess
from ekiden.tokens.format import TokenDataset
from ekiden.tokens.shares import plan_mixture
from ekiden.training.history import read_history
from ekiden.training.loop import train

WORDS = {
    "english": "the a river house bird green old walks sings under over morning and with light stone".split(),
    "hindi": "नदी घर पक्षी हरा पुराना चलता गाता सुबह और साथ पत्थर रोशनी के ऊपर नीचे एक".split(),
}


def documents(words: list[str], seed: int, count: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(words, draw.integers(15, 60))) + "." for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make corpus/, three tokenizers, shards/ and a model/ that was never trained."""
    folder = tmp_path_factory.mktemp("evaluation")
    for seed, (language, words) in enumerate(WORDS.items()):
        (folder / "corpus" / language).mkdir(parents=True)
        lines = [json.dumps({"text": text}) for text in documents(words, seed, 300)]
        (folder / "corpus" / language / "part.jsonl").write_text("\n".join(lines) + "\n")
    corpus = [str(folder / "corpus")]
    for name, size, kind in (("tokenizer", 360, "bpe"), ("other", 350, "bpe"), ("unigram", 360, "unigram")):
        train_tokenizer(corpus, str(folder / f"{name}.model"), vocab_size=size, model_type=kind)
    preprocess(corpus, str(folder / "tokenizer.model"), str(folder / "shards"), test_split=0.1, num_proc=1)
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    config = TrainConfig(
        model_type="gpt2",
        initialization="huggingface",
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        max_length=32,
    )
    model = build_model(
        config, tokenizer.vocab_size, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, seed=0
    )
    export_huggingface(model, tokenizer, folder / "model")
    return folder


def test_a_model_without_training_knows_nothing_and_a_unigram_model_something(folder):
    dataset = TokenDataset.open(folder / "shards")
    result = evaluate_model(folder / "model", folder / "shards", device="cpu")
    for language in WORDS:
        row, stream = result["languages"][language], dataset.split(language, "test")
        assert row["tokens"] == stream.tokens - 1 > 100
        assert row["bytes"] == stream.bytes
        assert row["loss"] == pytest.approx(math.log(dataset.vocab_size), abs=0.15)
        assert row["unigram_loss"] < row["loss"] - 0.5
        assert row["bits_per_byte"] == pytest.approx(
            row["loss"] / math.log(2) * (stream.tokens - 1) / stream.bytes
        )
    assert json.loads(json.dumps(result)) == result
    assert "unigram loss" in format_evaluation(result)
    capped = evaluate_model(folder / "model", folder / "shards", max_tokens=70, device="cpu")
    assert [row["tokens"] for row in capped["languages"].values()] == [70, 70]


def test_bytes_are_those_of_the_text_of_the_test_split(folder):
    dataset = TokenDataset.open(folder / "shards")
    for language in WORDS:
        stream = dataset.split(language, "test")
        text = [dataset.tokenizer().decode(stream.document(i)) for i in range(stream.documents)]
        assert stream.bytes == sum(len(part.encode()) for part in text)


def test_a_model_with_another_tokenizer_is_refused(folder):
    dataset = TokenDataset.open(folder / "shards")
    with pytest.raises(UserError, match="another tokenizer"):
        check_tokenizer(load_tokenizer(folder / "other.model"), Path("model"), dataset)
    same_size = load_tokenizer(folder / "unigram.model")
    assert same_size.vocab_size == dataset.vocab_size
    with pytest.raises(UserError, match="another tokenizer"):
        check_tokenizer(same_size, Path("model"), dataset)


def test_a_tokenizer_in_another_file_with_the_same_ids_is_accepted(folder):
    dataset = TokenDataset.open(folder / "shards")
    converted = load_tokenizer(folder / "model" / "tokenizer.json")
    assert converted.sha256 != dataset.tokenizer_sha256
    check_tokenizer(converted, Path("model"), dataset)


@pytest.mark.parametrize("missing", ["model", "shards"])
def test_what_is_missing_is_said(folder, missing):
    paths = {"model": folder / "model", "shards": folder / "shards"} | {missing: folder / "nowhere"}
    with pytest.raises(UserError, match="nowhere"):
        evaluate_model(paths["model"], paths["shards"], device="cpu")


def test_samples_continue_openings_of_each_language_and_repeat_exactly(folder):
    dataset, loaded = TokenDataset.open(folder / "shards"), load_model(folder / "model", "cpu")
    texts = sample_texts(loaded.model, loaded.tokenizer, dataset, max_new_tokens=8, seed=1)
    assert sorted(texts) == sorted(WORDS)
    for language, words in WORDS.items():
        for sample in texts[language]:
            assert set(sample["prompt"].rstrip(".").split()) <= set(words)
            assert sample["text"]
    assert sample_texts(loaded.model, loaded.tokenizer, dataset, max_new_tokens=8, seed=1) == texts
    assert sample_texts(loaded.model, loaded.tokenizer, dataset, max_new_tokens=8, seed=2) != texts
    given = sample_texts(loaded.model, loaded.tokenizer, dataset, prompts=["the river"], max_new_tokens=4)
    assert [sample["prompt"] for sample in given["prompts"]] == ["the river"]


def test_batches_of_real_shards_are_the_same_for_every_number_of_ranks(folder):
    """The windows that 1, 2, 3 and 4 ranks read from the files, against the documents read one by one."""
    dataset = TokenDataset.open(folder / "shards")
    texts = {name: dataset.split(name, "train") for name in dataset.languages}
    mixture = plan_mixture({name: stream.tokens for name, stream in texts.items()}, 32, seed=5)
    rings = []
    for name in mixture.languages:
        whole = np.concatenate([texts[name].document(i) for i in range(texts[name].documents)])
        rings.append(np.concatenate([whole, whole]))
    samples = np.arange(7 * 12, 8 * 12, dtype=np.uint64)
    expected = [rings[number][start : start + 33] for number, start, _ in zip(*mixture.locate(samples))]
    for world in (1, 2, 3, 4):
        read = []
        for rank in range(world):
            with Batches(dataset, mixture, global_batch=12) as batches:
                for inputs, targets in batches.microbatches(7, 2, rank, world):
                    read.extend(np.hstack([inputs, targets[:, -1:]]))
        assert np.array_equal(read, expected)


@pytest.mark.parametrize("preset", ["gpt2-10m", "gemma3-tiny"])
def test_a_run_with_masked_documents_is_evaluated_as_it_was_trained(
    folder: Path, tmp_path: Path, preset: str
) -> None:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2 if preset == "gpt2-10m" else 1, "head_dim": 8}
    config = build_config(
        preset,
        dataset_path=str(folder / "shards"),
        output_dir=str(tmp_path / "run"),
        hidden_size=16,
        num_hidden_layers=2,
        intermediate_size=32,
        max_length=64,
        sliding_window=24,
        batch_size=4,
        max_steps=20,
        learning_rate=0.03,
        warmup_steps=1,
        eval_tokens=0,
        eval_steps=0,
        sample_tokens=1,
        report=False,
        document_mask=True,
        device="cpu",
        num_threads=1,
        **heads,
    )
    train(config)
    history = read_history(tmp_path / "run" / "history.jsonl")
    during = next(record for record in history if record["kind"] == "eval")["languages"]
    model = tmp_path / "run" / "final_model"
    settings = json.loads((model / "config.json").read_text())
    assert settings["document_mask"] is True
    assert "saw its own document alone" in (model / "README.md").read_text()

    def losses(path: Path) -> dict[str, float]:
        found = evaluate_model(path, folder / "shards", device="cpu")
        return {name: row["loss"] for name, row in found["languages"].items()}

    assert losses(model) == pytest.approx({name: row["loss"] for name, row in during.items()}, rel=1e-6)
    # The same weights, all documents of a window seen: another loss.
    unmasked = tmp_path / "unmasked"
    shutil.copytree(model, unmasked)
    (unmasked / MANIFEST).unlink()
    del settings["document_mask"]
    (unmasked / "config.json").write_text(json.dumps(settings))
    assert losses(unmasked) != pytest.approx(losses(model), rel=1e-4)
