"""Tokenizers: nothing is lost, ids are SentencePiece's, transformers gets the same ones."""

from __future__ import annotations

import io
import json
import pickle
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from ekiden.errors import UserError
from ekiden.tokenizer.huggingface import save_huggingface_tokenizer
from ekiden.tokenizer.load import Tokenizer, load_tokenizer
from ekiden.tokenizer.train import MAX_LINE_BYTES, train_tokenizer, training_lines

sys.path.insert(0, str(Path(__file__).parent))
from comparing import compare_tokenizers

NASTY = st.text(
    st.one_of(
        st.characters(codec="utf-8", exclude_characters="\u2581"),
        st.sampled_from(
            [" ", "\n", "\t", "क", "\u093c", "\u200d", "\U0001f600", "<", "s", ">", "/", "0", "9", "\0"]
        ),
    ),
    max_size=60,
)


@pytest.fixture(scope="session")
def tiny(tiny_tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer_path)


@pytest.fixture(scope="session")
def converted(tiny: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    save_huggingface_tokenizer(tiny, folder)
    return folder


@settings(max_examples=200, deadline=None)
@given(text=NASTY)
def test_decode_gives_back_every_text(tiny: Tokenizer, text: str) -> None:
    """But for U+2581 itself, which SentencePiece uses for the space."""
    assert tiny.decode(tiny.encode(text)) == text


def test_special_ids_are_gemmas_and_never_come_from_text(tiny: Tokenizer) -> None:
    assert (tiny.pad_id, tiny.eos_id, tiny.bos_id, tiny.unk_id) == (0, 1, 2, 3)
    assert not set(tiny.encode("<pad> <eos> <bos> <unk> </s>")) & {0, 1, 2, 3}


def test_a_batch_gives_the_ids_of_single_texts_also_after_pickling(tiny: Tokenizer) -> None:
    texts = ["The river", "", "न्हंय\n\nदीसभर", "x" * 500]
    again = pickle.loads(pickle.dumps(tiny))  # noqa: S301 - our own bytes, as a worker gets them
    for other in (tiny, again):
        assert [ids.tolist() for ids in other.encode_batch(texts)] == [tiny.encode(t) for t in texts]
    assert again.sha256 == tiny.sha256


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(NASTY, min_size=1, max_size=5))
def test_transformers_gets_the_same_ids(tiny: Tokenizer, converted: Path, texts: list[str]) -> None:
    texts = [*texts, "<eos> and <pad>, <0x0A> </s><unk>"]
    result = compare_tokenizers(tiny, converted, texts)
    assert result.different == 0
    if tiny.model_type == "bpe":
        assert result.equal == result.documents


@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("about", ["<{} 0xA1 </>", "{} 0xA1 k", "<{}", "{}> s>"])
def test_control_pieces_spelt_in_a_text_are_text_for_a_unigram_model(
    tmp_path: Path, language_folder: Path, about: str, byte_fallback: bool
) -> None:
    """Also where the model knows only some of their characters."""
    texts = [
        about.format(json.loads(line)["text"].replace("<", "").replace(">", ""))
        for line in (language_folder / "english" / "text.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(tmp_path / "m"),
        vocab_size=320 if byte_fallback else 70,
        byte_fallback=byte_fallback,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path / "m.model")
    save_huggingface_tokenizer(tokenizer, tmp_path / "hf")
    texts += [
        "a <s> b</s>",
        "<s> the </s>",
        "<0xA1>",
        "< 0xA1>",
        "<unk>",
        "the <unk><unk> x",
        "\u0915<s>\u0915</s><",
    ]
    assert not set(tokenizer.encode("a <s> b</s>")) & {1, 2}
    assert compare_tokenizers(tokenizer, tmp_path / "hf", texts).different == 0


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "special", [{}, {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": 2}, {"bos_id": -1, "eos_id": -1}]
)
def test_models_of_sentencepieces_own_defaults(
    tmp_path: Path, language_folder: Path, model_type: str, special: dict[str, int]
) -> None:
    texts = [
        json.loads(line)["text"]
        for path in sorted(language_folder.glob("*/*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    data = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=data,
        vocab_size=120,
        model_type=model_type,
        minloglevel=2,
        **special,
    )
    path = tmp_path / "own.model"
    path.write_bytes(data.getvalue())
    tokenizer = load_tokenizer(path)
    expected = {"pad_id": None, "bos_id": 1, "eos_id": 2}
    expected |= {name: None if value < 0 else value for name, value in special.items() if name != "unk_id"}
    assert {name: getattr(tokenizer, name) for name in expected} == expected
    processor = sentencepiece.SentencePieceProcessor(model_proto=data.getvalue())
    assert [tokenizer.encode(t) for t in texts[:20]] == [processor.encode(t) for t in texts[:20]]
    save_huggingface_tokenizer(tokenizer, tmp_path / "hf")
    assert compare_tokenizers(tokenizer, tmp_path / "hf", texts).different == 0


def test_a_converted_folder_loads_as_a_tokenizer_of_its_own(
    tiny: Tokenizer, converted: Path, tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((converted / name).read_bytes())
    other = load_tokenizer(tmp_path)
    assert other.kind == "huggingface"
    assert (other.pad_id, other.eos_id, other.bos_id, other.unk_id) == (0, 1, 2, 3)
    assert other.encode("The river runs") == tiny.encode("The river runs")


@pytest.mark.parametrize("data", [b"", b"garbage" * 100, b"\x0a\x0b\x0c"])
def test_what_is_no_model_is_one_sentence(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.model"
    path.write_bytes(data)
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        load_tokenizer(path)


def test_missing_tokenizers_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "none.model")
    with pytest.raises(UserError, match="holds neither"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="hub"):
        load_tokenizer("nobody-has/this-tokenizer")


def test_training_is_the_same_twice_and_reports_every_language(tmp_path: Path, language_folder: Path) -> None:
    reports = [
        train_tokenizer([str(language_folder)], str(tmp_path / f"{i}.model"), 430, "unigram")
        for i in range(2)
    ]
    assert (tmp_path / "0.model").read_bytes() == (tmp_path / "1.model").read_bytes()
    assert set(reports[0].languages) == {"english", "dutch", "hindi", "konkani"}
    for report in reports[0].languages.values():
        assert report.lines > 0
        assert report.lossless == report.documents
    assert "bytes/token" in str(reports[0])


def test_a_document_without_newlines_is_trained_on(tmp_path: Path) -> None:
    """SentencePiece itself would drop a sentence of 100 KB without a word."""
    text = " ".join(f"zebra{i % 7} quokka" for i in range(8000))
    pieces = list(training_lines(text))
    assert "".join(pieces) == text
    assert max(len(p.encode()) for p in pieces) <= MAX_LINE_BYTES
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": text}) + "\n" + json.dumps({"text": text + "!"}) + "\n"
    )
    train_tokenizer([str(tmp_path / "a.jsonl")], str(tmp_path / "a.model"), 300, "bpe", language="animal")
    assert len(load_tokenizer(tmp_path / "a.model").encode(" quokka")) <= 2


def test_a_vocabulary_that_the_text_cannot_fill_is_one_sentence(
    tmp_path: Path, language_folder: Path
) -> None:
    with pytest.raises(
        UserError, match=r"--vocab-size 50000 cannot be reached with this corpus; give at most \d+, or more"
    ):
        train_tokenizer([str(language_folder)], str(tmp_path / "a.model"), 50_000)
    assert not (tmp_path / "a.model").exists()


def test_real_text_gets_identical_ids(corpora: Path, tmp_path: Path) -> None:
    texts = [
        json.loads(line)["text"][:4000]
        for name in ("english", "hindi", "konkani", "dutch")
        for line in (corpora / name / "part-000.jsonl").read_text(encoding="utf-8").splitlines()[:50]
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    train_tokenizer([str(tmp_path / "t.jsonl")], str(tmp_path / "t.model"), 4000, "bpe", language="all")
    tokenizer = load_tokenizer(tmp_path / "t.model")
    save_huggingface_tokenizer(tokenizer, tmp_path / "hf")
    result = compare_tokenizers(tokenizer, tmp_path / "hf", texts)
    assert (result.documents, result.equal) == (200, 200)
    assert all(tokenizer.decode(tokenizer.encode(t)) == t for t in texts if "\u2581" not in t)
