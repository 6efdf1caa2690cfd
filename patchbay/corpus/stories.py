"""Stories: short texts about two people from a seeded grammar, and a grader that says how far any text is one.

    grade(text) = share of its sentences that the grammar parses and that speak of the two people of its opening alone

A story is an opening, which brings two people, and two to six sentences about them. It stands in the place of TinyStories' texts, which a large model
wrote, and the grader in the place of the large model that graded: here what is right is known. `told` gives the pieces as the built-in models read them.

Eldan and Li 2023, "TinyStories: How Small Can Language Models Be and Still Speak Coherent English?". The grammar is a few sentences wide: that a model writes
it says nothing of English.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from patchbay.corpus.reading import several
from patchbay.errors import PatchbayError
from patchbay.tasks import words
from patchbay.tasks.words import fresh_words, sentences

GIVING = (" Then {first} gave the {thing} to", " {second}", ".")  # the second name follows from what came before
SLOTS = {
    "first": words.NAMES, "second": words.NAMES, "thing": words.OBJECTS, "thing2": words.OBJECTS, "place": words.PLACES, "animal": words.ANIMALS,
    "adjective": words.ADJECTIVES, "adjective2": words.ADJECTIVES, "weather": words.WEATHER, "day": words.DAYS, "month": words.MONTHS,
    "article": ("a", "an"),
}  # fmt: skip


class Sentence(NamedTuple):
    """A sentence as the grammar reads it: which of its wordings, and the word of each slot."""

    wording: str
    slots: dict[str, str]

    @property
    def people(self) -> list[str]:
        return [self.slots[slot] for slot in ("first", "second") if slot in self.slots]


def told(rng: random.Random) -> list[tuple[str, bool]]:
    """A story in pieces, and of each whether the story so far determines it: the other of two people, who is given something."""
    names = rng.sample(words.NAMES, 2)
    pieces = [(rng.choice(words.OPENINGS).format(**fresh_words(rng, names)), False)]
    for _ in range(rng.randint(2, 6)):
        if rng.random() < 0.3:
            slots = fresh_words(rng, names)
            pieces += [(piece.format(**slots), i == 1) for i, piece in enumerate(GIVING)]
        else:
            pieces.append((sentences(rng, 1, names), False))
    return pieces


def texts(n: int | None = None, *, seed: int = 0) -> Iterator[str]:
    """`n` stories, or stories without end; the same ones for the same seed, and the first of many are those of few."""
    if n is not None and n < 1:
        raise PatchbayError(f"n={n}: a story or more")
    rng = random.Random(f"stories {seed}")
    made = ("".join(piece for piece, _ in told(rng)) for _ in iter(int, 1))
    return made if n is None else islice(made, n)


@functools.cache
def _wordings() -> dict[str, re.Pattern[str]]:
    """Each wording without the space before it -> what it matches."""
    found = {}
    for wording in (*words.OPENINGS, *words.SENTENCES, "".join(GIVING)):
        pattern, seen = re.escape(wording.strip()).replace(r"\{", "{").replace(r"\}", "}"), set[str]()

        def slot(match: re.Match[str], seen: set[str] = seen) -> str:
            name = match[1]
            if name in seen:
                return f"(?P={name})"
            seen.add(name)
            return f"(?P<{name}>{'|'.join(SLOTS[name])})"

        found[wording.strip()] = re.compile(re.sub(r"{(\w+)}", slot, pattern))
    return found


def parsed(sentence: str) -> Sentence | None:
    """A sentence with its full stop as the grammar reads it; None where no wording of it fits."""
    for wording, pattern in _wordings().items():
        match = pattern.fullmatch(sentence.strip())
        if match is not None and _agrees(slots := match.groupdict()):
            return Sentence(wording, slots)
    return None


def _agrees(slots: dict[str, str]) -> bool:
    """Different words where two of a kind are named, and the article of the word that follows it."""
    twice = [
        (one, two)
        for one, two in (("first", "second"), ("thing", "thing2"), ("adjective", "adjective2"))
        if two in slots
    ]
    if any(slots.get(one) == slots[two] for one, two in twice):
        return False
    return "article" not in slots or slots["article"] == words.article(slots["thing"])


def parse(text: str) -> list[Sentence | None]:
    """Every sentence of a text; None for those that the grammar has not got, and for what is left after the last full stop."""
    return [parsed(one) for one in re.findall(r"[^.]+\.?", text) if one.strip()]


def is_story(text: str) -> bool:
    """Whether every sentence parses, the first and no other is an opening, and all speak of its two people."""
    found = parse(text)
    openings = [one is not None and one.wording in words.OPENINGS for one in found]
    return bool(found) and grade(text) == 1.0 and openings == [True] + [False] * (len(found) - 1)


def grade(text: str) -> float:
    """The share of sentences that parse and speak of the opening's people alone; without an opening at its start, of none."""
    found = parse(text)
    if not found or found[0] is None or found[0].wording not in words.OPENINGS:
        return 0.0
    people = set(found[0].people)
    return sum(one is not None and people.issuperset(one.people) for one in found) / len(found)


def graded(some: Sequence[str]) -> dict[str, float]:
    """Means over texts: `grade`, `parse` (share of sentences that parse), `people` (of those that parse, that speak of the opening's two), `whole` (texts that are stories)."""
    if not list(several(some)):
        raise PatchbayError("no texts to grade")
    read = [parse(text) for text in some]
    known = [(one, found[0]) for found in read for one in found if one is not None]
    same = [first is not None and set(first.people).issuperset(one.people) for one, first in known]
    return {
        "grade": sum(map(grade, some)) / len(some),
        "parse": len(known) / max(1, sum(map(len, read))),
        "people": sum(same) / max(1, len(same)),
        "whole": sum(map(is_story, some)) / len(some),
    }


def shuffled(text: str, rng: random.Random) -> str:
    """The same words and full stops in another order: the null of the grader."""
    found = re.findall(r"[^\s.]+|\.", text)
    rng.shuffle(found)
    return " ".join(found).replace(" .", ".")
