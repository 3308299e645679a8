"""Which exact encoder stands before a tokenizer: `unigram_search`, `bpe_merges`, `bpe_cache`, or none."""

from __future__ import annotations

from ekiden.tokenizer.load import SentencePieceTokenizer, Tokenizer
from ekiden.tokens import kernel
from ekiden.tokens.bpe_cache import BpeCache
from ekiden.tokens.bpe_merges import BpeMerges
from ekiden.tokens.exact import NASTY, Differs, Encoder, NotProvable, check
from ekiden.tokens.unigram_search import UnigramSearch


def encoder_class(tokenizer: Tokenizer) -> type[UnigramSearch | BpeMerges | BpeCache] | None:
    """Return which exact encoder is made for such a tokenizer on this machine, None where there is none."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return None
    if tokenizer.model_type == "bpe":
        return BpeMerges if kernel.library() else BpeCache
    return UnigramSearch if tokenizer.model_type == "unigram" else None


def exact_encoder(tokenizer: Tokenizer) -> Encoder:
    """Return what gives the ids of `tokenizer` faster than itself.

    Raises:
        NotProvable: nothing does.
    """
    kind = encoder_class(tokenizer)
    if kind is None:
        raise NotProvable("there is none for this kind of tokenizer")
    return kind(tokenizer)


def refusal(tokenizer: Tokenizer, texts: list[str]) -> str | None:
    """Return in words why a tokenizer is used alone, None where its exact encoder gave its ids for all of `texts`."""
    try:
        check(exact_encoder(tokenizer), tokenizer, [*NASTY, *texts])
    except NotProvable as reason:
        return str(reason)
    except Differs as text:
        return f"it gave other ids for {text}"
    return None
