"""Sample texts: prompts from the user or from documents, the same again for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from ekiden.evaluation import samples
from ekiden.evaluation.samples import CHARACTERS, WORDS, opening, openings, sample_texts


class Characters:
    """A tokenizer of single characters; 0 begins, 1 ends, 2 is an unfinished character."""

    bos_id, eos_id, pad_id = 0, 1, None

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join("\ufffd" if i == 2 else chr(i) for i in ids if i > 1)


class Stream:
    """Documents in memory."""

    def __init__(self, texts: list[str]) -> None:
        self.texts, self.documents = texts, len(texts)

    def document(self, number: int) -> np.ndarray:
        return np.array([0, *Characters().encode(self.texts[number]), 1])


class Dataset:
    """{language: (training documents, test documents)}."""

    def __init__(self, **languages: tuple[list[str], list[str]]) -> None:
        self.languages, self.texts = sorted(languages), languages

    def split(self, language: str, split: str) -> Stream:
        return Stream(self.texts[language][split == "test"])


TOKENIZER = Characters()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Replace generation by something that says what it was asked for."""
    made: list[dict] = []

    def generate(model, tokenizer, prompts, **settings):
        made.append({"prompts": prompts, **settings})
        return [f"<{prompt}>" for prompt in prompts]

    monkeypatch.setattr(samples, "generate", generate)
    return made


def test_openings_are_the_first_words_of_the_first_test_documents(calls):
    dataset = Dataset(
        a=(["not this"], ["one two three", " \n", "four", "five"]),
        b=(["from the training text"], []),
        c=([], []),
    )
    texts = sample_texts("model", TOKENIZER, dataset, max_new_tokens=7, seed=3)  # type: ignore[arg-type]
    assert texts == {
        "a": [{"prompt": "one two three", "text": "<one two three>"}, {"prompt": "four", "text": "<four>"}],
        "b": [{"prompt": "from the training text", "text": "<from the training text>"}],
    }
    prompts = ["one two three", "four", "from the training text"]
    assert calls == [{"prompts": prompts, "max_new_tokens": 7, "seed": 3}]


def test_given_prompts_replace_the_openings(calls):
    dataset = Dataset(a=([], ["one two"]))
    texts = sample_texts("model", TOKENIZER, dataset, prompts=["x", "y"])  # type: ignore[arg-type]
    assert texts == {"prompts": [{"prompt": "x", "text": "<x>"}, {"prompt": "y", "text": "<y>"}]}


def test_no_documents_at_all_are_no_samples(calls):
    assert sample_texts("model", TOKENIZER, Dataset(a=([], ["  "])), None) == {}  # type: ignore[arg-type]
    assert calls == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b c", "a b c"),
        ("line\nbreaks  and\tspaces", "line breaks and spaces"),
        (" ".join("w" * 20), " ".join("w" * WORDS)),
        ("", ""),
        (" ".join(["looooooooong"] * 20), " ".join(["looooooooong"] * 6)),
        ("字" * 500, "字" * CHARACTERS),
    ],
)
def test_an_opening_is_whole_words_of_a_bounded_length(text, expected):
    found = opening(TOKENIZER, [0, *TOKENIZER.encode(text), 1])  # type: ignore[arg-type]
    assert found == expected and len(found) <= CHARACTERS


def test_an_opening_never_ends_in_the_middle_of_a_character():
    assert opening(TOKENIZER, [*TOKENIZER.encode("ab"), 2]) == "ab"  # type: ignore[arg-type]


def test_openings_skip_empty_documents_but_do_not_search_for_ever():
    assert openings(Dataset(a=([], [" "] * 9 + ["found"])), TOKENIZER) == {"a": ["found"]}  # type: ignore[arg-type]
    assert openings(Dataset(a=([], [" "] * 10 + ["far"])), TOKENIZER) == {}  # type: ignore[arg-type]
