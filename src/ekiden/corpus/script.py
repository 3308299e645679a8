"""In which scripts a folder's documents are written: a folder of Hindi that holds English pages is told of.

Every document kept is looked at while it passes (64 letters spread over it, 5 microseconds), so that nothing is read
twice. What is found is a warning and never a rejection: Konkani in Latin letters is Konkani.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

SAMPLED = 64
"""Characters looked at in a document, at equal distances."""

LEAST_LETTERS = 8
"""Fewer letters among them say nothing of a document (numbers, code, a line of dashes)."""

DOMINANT = 0.8
"""Share of the letters that makes a document one of a script: a Hindi page on Linux commands is half Latin."""

WARN_SHARE, WARN_DOCUMENTS = 0.02, 5
"""Documents in another script than the folder's majority are told of from this share and this number on."""

EXAMPLES = 3

_TOGETHER = {"CJK": "HAN AND KANA", "HIRAGANA": "HAN AND KANA", "KATAKANA": "HAN AND KANA"}
"""One language is written in all of them."""


class _Scripts(dict[str, str | None]):
    """The script of each character met: the first word of a letter's Unicode name; None: not a letter of a script."""

    def __missing__(self, character: str) -> str | None:
        script = None
        if unicodedata.category(character)[0] in "LM":
            words = (
                unicodedata.name(character, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ").split()
            )
            if words and words[0] not in ("COMBINING", "MODIFIER", "VARIATION", "MATHEMATICAL"):
                script = _TOGETHER.get(words[0], words[0])
        self[character] = script
        return script


_SCRIPT_OF = _Scripts()


def dominant_script(text: str) -> str | None:
    """Return the script of DOMINANT of the letters of `text`, such as 'DEVANAGARI'; None where no script has them."""
    looked_at = text[:: max(1, len(text) // SAMPLED)][:SAMPLED]
    scripts = [script for character in looked_at if (script := _SCRIPT_OF[character])]
    if len(scripts) < LEAST_LETTERS:
        return None
    most = max(set(scripts), key=scripts.count)
    return most if scripts.count(most) >= DOMINANT * len(scripts) else None


@dataclass
class ScriptTally:
    """Documents by dominant script, and where the first of each are.

    Attributes:
        documents: documents by script; those without one are not counted.
        examples: the first few (file, place) by script.
    """

    documents: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[str, int]]] = field(default_factory=dict)

    def count(self, text: str, file: str, place: int) -> None:
        """Count one document, which is at `place` of `file`."""
        script = dominant_script(text)
        if script is not None:
            self.documents[script] += 1
            places = self.examples.setdefault(script, [])
            if len(places) < EXAMPLES:
                places.append((file, place))

    def add(self, other: ScriptTally) -> None:
        """Take over the counts of a later part."""
        self.documents.update(other.documents)
        for script, places in other.examples.items():
            mine = self.examples.setdefault(script, [])
            mine += places[: EXAMPLES - len(mine)]

    def as_dict(self) -> dict[str, Any]:
        """Return the tally as JSON values."""
        return {"documents": dict(self.documents), "examples": self.examples}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> ScriptTally:
        """Return the tally that `as_dict` wrote."""
        examples = {s: [(file, place) for file, place in places] for s, places in value["examples"].items()}
        return cls(Counter(value["documents"]), examples)

    def warnings(self, language: str) -> list[str]:
        """Return a sentence for each script that stands out against the majority of the folder's documents."""
        from ekiden.corpus.ledger import place

        total = sum(self.documents.values())
        ranked = sorted(self.documents.items(), key=lambda item: (-item[1], item[0]))
        sentences = []
        for script, count in ranked[1:]:
            if count < WARN_DOCUMENTS or count < WARN_SHARE * total:
                continue
            places = ", ".join(place(file, offset) for file, offset in self.examples[script])
            sentences.append(
                f"{language}: warning: {count / total:.1%} of the documents are mostly in {script.title()} script, "
                f"{ranked[0][1] / total:.1%} in {ranked[0][0].title()} (see {places}); do they belong to this language?"
            )
        return sentences
