"""Sample texts per language: what the model writes now, kept in the history."""

from __future__ import annotations

from transformers import PreTrainedModel

from ekiden.generation import generate
from ekiden.tokenizer.load import Tokenizer
from ekiden.tokens.format import TokenDataset

OPENING_WORDS = 8


def sample_texts(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    dataset: TokenDataset,
    prompts: list[str] | None = None,
    max_new_tokens: int = 48,
    seed: int = 0,
) -> dict[str, list[dict[str, str]]]:
    """Return {language: [{"prompt", "text"}]}.

    Args:
        prompts: continued as they are, under the name "prompts"; None: the openings of each language's first test
            document (a language without one is left out).
    """
    was_training = model.training
    model.eval()
    by_language = {"prompts": prompts} if prompts else openings(tokenizer, dataset)
    result = {}
    for language, chosen in by_language.items():
        texts = generate(model, tokenizer, chosen, max_new_tokens=max_new_tokens, seed=seed)
        result[language] = [{"prompt": prompt, "text": text} for prompt, text in zip(chosen, texts)]
    model.train(was_training)
    return result


def openings(tokenizer: Tokenizer, dataset: TokenDataset, documents: int = 1) -> dict[str, list[str]]:
    """Return the first words of each language's first test documents."""
    found = {}
    for language in dataset.languages:
        stream = dataset.split(language, "test")
        texts = [tokenizer.decode(stream.document(i)[:200]) for i in range(min(documents, stream.documents))]
        if texts:
            found[language] = [" ".join(text.split()[:OPENING_WORDS]) for text in texts]
    return found
