"""Which exact encoder stands before a tokenizer: `bpe_cache`, `unigram_search`, or none."""

from __future__ import annotations

from ekiden.tokenizer.load import SentencePieceTokenizer, Tokenizer
from ekiden.tokens.bpe_cache import BpeCache
from ekiden.tokens.exact import NASTY, Differs, Encoder, NotProvable, check
from ekiden.tokens.unigram_search import UnigramSearch

NAMES = {"bpe": "BPE cache", "unigram": "unigram search"}


def exact_encoder(tokenizer: Tokenizer) -> Encoder:
    """Return what gives the ids of `tokenizer` faster than itself.

    Raises:
        NotProvable: nothing does.
    """
    if tokenizer.model_type == "unigram" and isinstance(tokenizer, SentencePieceTokenizer):
        return UnigramSearch(tokenizer)
    return BpeCache(tokenizer)


def refusal(tokenizer: Tokenizer, texts: list[str]) -> str | None:
    """Return in words why a tokenizer is used alone, None where its exact encoder gave its ids for all of `texts`."""
    try:
        check(exact_encoder(tokenizer), tokenizer, [*NASTY, *texts])
    except NotProvable as reason:
        return str(reason)
    except Differs as text:
        return f"it gave other ids for {text}"
    return None
