"""The account of llama.cpp's tokenizers, and what counts as an exception."""

from __future__ import annotations

import io

import pytest
import sentencepiece
from special_tokenizers import special_tokenizer

from ekiden.errors import UserError
from ekiden.export import token_check
from ekiden.export.llama_tokens import STOPS, LlamaTokens, vocabulary
from ekiden.export.token_check import check_tokens, classify, compare_tokens, read_texts, sample_texts
from ekiden.tokenizer.load import SENTENCEPIECE_FILE, SentencePieceTokenizer
from ekiden.tokenizer.train import run_trainer
from small_models import TEXT, small_tokenizer

HARD = [
    *TEXT,
    " two  spaces ",
    "tabs\tand\nlines\n\n",
    "",
    "नदी\u200dपहाड़",
    "<eos> <pad> <0x41>",
    "aaaaaaa river river",
    "ﬁne ①② Ａ　Ｂ é e\u0301",
    "x\u00a0y",
]
OUTSIDE = ["☂ Ω umbrella", "𝔘𝔫𝔦 日本語 text"]


def encoder(tokenizer):
    return LlamaTokens(vocabulary(tokenizer, tokenizer.vocab_size)).encode


def of_ekiden(model_type):
    """Return a tokenizer with the settings of `ekiden tokenizer train`."""
    data = run_trainer(TEXT * 4, 344, model_type)
    return SentencePieceTokenizer({SENTENCEPIECE_FILE: data})


def test_bpe_gives_sentencepieces_ids(tmp_path):
    for tokenizer in (of_ekiden("bpe"), small_tokenizer(tmp_path, "bpe")):
        encode = encoder(tokenizer)
        for text in HARD + OUTSIDE:
            assert encode(text) == tokenizer.encode(text), text


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {},
        {"normalization_rule_name": "nfkc_cf", "remove_extra_whitespaces": False, "add_dummy_prefix": False},
    ],
)
def test_unigram_gives_sentencepieces_ids_but_for_unknown_characters(options):
    tokenizer = special_tokenizer(**options)
    compared = compare_tokens(tokenizer, encoder(tokenizer), HARD + OUTSIDE, "here")
    assert (compared.texts, compared.different) == (len(HARD + OUTSIDE), 0), compared.example
    assert compared.outside >= len(OUTSIDE)
    assert compared.equal >= len(TEXT) + 3


def test_ekidens_own_unigram():
    tokenizer = of_ekiden("unigram")
    compared = compare_tokens(tokenizer, encoder(tokenizer), HARD + OUTSIDE, "here")
    assert compared.different == 0, compared.example
    assert encoder(tokenizer)("☂ Ω") == [tokenizer.unk_id, *tokenizer.encode(" "), tokenizer.unk_id]


def test_a_prefix_after_the_users_pieces_is_an_actual_difference(tmp_path):
    tokenizer = small_tokenizer(tmp_path, "bpe", user_defined_symbols=["\n"])
    encode = encoder(tokenizer)
    assert encode("The river") == tokenizer.encode("The river")
    assert encode("a\nriver") != tokenizer.encode("a\nriver")


def test_without_byte_pieces_llama_cpp_stops(tmp_path):
    tokenizer = special_tokenizer(
        "bpe",
        byte_fallback=False,
        vocab_size=110,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    encode, known = encoder(tokenizer), vocabulary(tokenizer, 110)
    assert encode("The river") == tokenizer.encode("The river")
    assert STOPS in encode("☂")
    with pytest.raises(UserError, match=r"it needs byte pieces"):
        check_tokens(tmp_path / "no.gguf", tokenizer, known, ["The river", "☂"])


def made_by_hand(scores):
    """Return a unigram tokenizer of these pieces."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    small = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abc"]),
        model_writer=small,
        vocab_size=8,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    model.ParseFromString(small.getvalue())
    del model.pieces[3:]
    for piece, score in scores.items():
        model.pieces.add(piece=piece, score=score)
    return SentencePieceTokenizer({SENTENCEPIECE_FILE: model.SerializeToString()})


def test_what_is_a_tie_and_what_is_not():
    tokenizer = made_by_hand({"▁": -3, "a": -4, "b": -4, "c": -4, "ab": -2, "bc": -2, "cb": -2.001})
    ids = {piece: tokenizer.processor.piece_to_id(piece) for piece in ("▁", "a", "b", "c", "ab", "bc", "cb")}
    first, second = [ids["ab"], ids["c"]], [ids["a"], ids["bc"]]
    assert classify(tokenizer, first, first) == token_check.EQUAL
    assert classify(tokenizer, first, second) == token_check.TIE
    assert classify(tokenizer, [ids["b"], *first], [ids["b"], *second]) == token_check.TIE
    assert classify(tokenizer, [ids["b"], ids["cb"]], [ids["bc"], ids["b"]]) == token_check.DIFFERENT
    # Another text of the same score is no tie, nor is more text.
    assert classify(tokenizer, first, [ids["bc"], ids["a"]]) == token_check.DIFFERENT
    assert classify(tokenizer, first, [*first, ids["c"]]) == token_check.DIFFERENT
    assert classify(tokenizer, first, [*first, tokenizer.unk_id]) == token_check.DIFFERENT


def test_a_unigram_read_as_llama_differs_on_most_texts(tmp_path):
    from dataclasses import replace

    tokenizer = small_tokenizer(tmp_path)
    wrong = LlamaTokens(replace(vocabulary(tokenizer, 340), kind="llama"))
    compared = compare_tokens(tokenizer, wrong.encode, TEXT, "here")
    assert compared.different >= 4
    assert "differ" in str(compared)


def test_texts_of_the_runs_test_split(language_folder, tmp_path):
    import ekiden
    from ekiden.tokenizer.load import load_tokenizer
    from ekiden.tokenizer.train import train_tokenizer

    train_tokenizer([str(language_folder)], str(tmp_path / "t.model"), vocab_size=430, model_type="bpe")
    ekiden.preprocess(
        [str(language_folder)], str(tmp_path / "t.model"), str(tmp_path / "shards"), test_split=0.3
    )
    tokenizer = load_tokenizer(tmp_path / "t.model")
    texts = sample_texts(tokenizer, tmp_path / "shards")
    originals = "\n".join(path.read_text() for path in language_folder.rglob("*.jsonl"))
    assert len(texts) > 10
    assert all(text.splitlines()[1] in originals for text in texts)
    assert compare_tokens(tokenizer, encoder(tokenizer), texts, "here").equal == len(texts)
    with pytest.raises(UserError, match="another tokenizer than the model's; give --check-text"):
        sample_texts(small_tokenizer(tmp_path), tmp_path / "shards")


def test_texts_of_a_file(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_texts(path) == ["one", "two"]
    path.write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="holds no text"):
        read_texts(path)
    for name in ("missing.txt", "text.doc"):
        with pytest.raises(UserError, match=r"is not a \.jsonl"):
            read_texts(tmp_path / name)
