"""Sample texts while training: what the model makes of the beginnings of texts it has not seen.

The training loop writes them into the history every `sample_steps`. Prompts are the user's, or the openings of each
language's first test documents; the same prompts at every step, each with its own random stream, so that texts of
different steps differ by what was learned.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from ekiden.generation import REPLACEMENT, generate
from ekiden.tokenizer.load import Tokenizer
from ekiden.tokens.format import TokenDataset

GIVEN = "prompts"
"""Where the texts of given prompts stand: nobody said which language they are in."""
WORDS, CHARACTERS = 12, 80
"""Length of an opening; characters for scripts that put no spaces between words."""
OPENINGS = 2
"""Documents a language."""


def sample_texts(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    dataset: TokenDataset,
    prompts: list[str] | None = None,
    max_new_tokens: int = 48,
    seed: int = 0,
) -> dict[str, list[dict[str, str]]]:
    """Return continuations of `prompts`, or of the openings of each language's first test documents.

    Args:
        prompts: continued instead of openings; their texts stand under "prompts".
        max_new_tokens: length of a text at most.
        seed: same seed, weights and device: same texts.

    Returns:
        {language: [{"prompt", "text"}]}, at least one of each; `text` is without the prompt. A language without
        test documents gives the openings of its first training documents; one without any text is left out.
    """
    by_language = {GIVEN: prompts} if prompts else openings(dataset, tokenizer)
    flat = [prompt for chosen in by_language.values() for prompt in chosen]
    texts = iter(generate(model, tokenizer, flat, max_new_tokens=max_new_tokens, seed=seed) if flat else [])
    return {
        language: [{"prompt": prompt, "text": next(texts)} for prompt in chosen]
        for language, chosen in by_language.items()
    }


def openings(dataset: TokenDataset, tokenizer: Tokenizer) -> dict[str, list[str]]:
    """Return the first words of the first documents of each language that has any."""
    found: dict[str, list[str]] = {}
    for language in dataset.languages:
        streams = [dataset.split(language, split) for split in ("test", "train")]
        stream = next((stream for stream in streams if stream.documents), None)
        # Some documents are white space only; ten are enough to find two that are not.
        numbers = range(min(10, stream.documents)) if stream else range(0)
        texts = (opening(tokenizer, stream.document(number).tolist()) for number in numbers if stream)
        chosen = [text for text in texts if text][:OPENINGS]
        if chosen:
            found[language] = chosen
    return found


def opening(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return the first words of a document: at most WORDS of them, at most CHARACTERS, none of them cut."""
    begin = [i for i in ids[: 8 * WORDS] if i not in (tokenizer.bos_id, tokenizer.eos_id)]
    text = tokenizer.decode(begin).rstrip(REPLACEMENT)
    words = text.split()
    if len(ids) > 8 * WORDS and 1 < len(words) <= WORDS:
        words = words[:-1]
    first = " ".join(words[:WORDS])
    if len(first) <= CHARACTERS:
        return first
    return first[: first.rfind(" ", 0, CHARACTERS)] if " " in first[:CHARACTERS] else first[:CHARACTERS]
