"""Needle retrieval: a secret hidden in a long text, asked for at the end.

`(filler) The secret of Mary is cup. (filler) The secret of Mary is` -> ` cup`

The filler is made of sentences about other people. Unless `decoy=False`, somebody else has a secret too, before or
after: the wrong answer is theirs, and in the corrupted twin the two secrets have changed places. Without a decoy the
twin has another secret in the same place, which is the wrong answer. With secrets of several words the right answer is
the first; the mark `needle` holds the places of all. A needle test in the sense of Wu et al. 2024, "Retrieval Head".

It tests looking up one literal phrase. It says nothing about reasoning over a long text, and the filler is simple: the
phrase `The secret of` is enough to find the place.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from patchbay.errors import by_kind
from patchbay.signal.port import PatchbayError
from patchbay.tasks import words
from patchbay.tasks.spell import Draft, at_least, choose_words, replaced, spans, spans_in_order, spell

if TYPE_CHECKING:
    from patchbay.model.model import Model
    from patchbay.tasks.task import Task


@by_kind
def needle_retrieval(
    model: Model,
    n: int = 100,
    *,
    length: int = 40,
    depth: float | None = None,
    secret_words: int = 1,
    decoy: bool = True,
    seed: int = 0,
) -> Task:
    """Say the secret hidden in about `length` words of filler, at `depth` (0 the start, 1 the end; None: anywhere).

    Marks: `needle` (the secret's words), `decoy` (the other secret's, if any), `name` (in the needle), `query` (the
    name in the question). Labels: `depth` (share of the filler's sentences in front), `sentences` (how many).
    """
    at_least("length", length, 0)
    at_least("secret_words", secret_words, 1, 8)
    if depth is not None and not 0.0 <= depth <= 1.0:
        raise PatchbayError(f"asked for depth={depth}; possible: 0.0 (the start) to 1.0 (the end), None for anywhere")
    names = choose_words(model, "needle_retrieval", "names", words.NAMES, 4)
    secrets = choose_words(model, "needle_retrieval", "secret words", words.OBJECTS, 2 * secret_words)
    options = {"length": length, "depth": depth, "secret_words": secret_words, "decoy": decoy}
    drafts = _drafts(names, secrets, length, depth, secret_words, decoy, random.Random(f"needle_retrieval-{seed}"))
    return spell("needle_retrieval", model, drafts, n, seed=seed, options=options)


def _drafts(
    names: list[str], pool: list[str], length: int, depth: float | None, n_words: int, decoy: bool, rng: random.Random
) -> Iterator[Draft]:
    while True:
        name, other, *people = rng.sample(names, 4)
        drawn = rng.sample(pool, 2 * n_words)
        secret, second = drawn[:n_words], drawn[n_words:]
        filler = _filler(rng, length, people)
        at = rng.randint(0, len(filler)) if depth is None else round(depth * len(filler))
        before, after = filler[:at], filler[at:]
        if decoy:
            side = rng.choice((before, after))
            side.insert(rng.randint(0, len(side)), f" The secret of {other} is {' '.join(second)}.")
        prompt = words.render_needle(name, secret, before="".join(before)[1:], after="".join(after)).prompt.lstrip()
        needle, query = (span[0] for span in spans(prompt, f"The secret of {name} is"))
        placed = {"needle": spans_in_order(prompt, secret, needle), "decoy": []}
        if decoy:
            placed["decoy"] = spans_in_order(prompt, second, prompt.index(f"The secret of {other} is"))
        changes = [
            *zip(placed["needle"], second, strict=True),
            *zip(placed["decoy"], secret if decoy else [], strict=True),
        ]
        yield Draft(
            prompt,
            f" {secret[0]}",
            (f" {second[0]}",),
            replaced(prompt, dict(changes)),
            marks={
                **placed,
                "name": spans_in_order(prompt, [name], needle),
                "query": spans_in_order(prompt, [name], query),
            },
            labels={"depth": at / len(filler) if filler else 0.0, "sentences": len(filler)},
        )


def _filler(rng: random.Random, length: int, people: list[str]) -> list[str]:
    """Sentences, each with a leading space, of at most `length` words together."""
    found: list[str] = []
    while True:
        sentence = words.sentences(rng, 1, people)
        length -= len(sentence.split())
        if length < 0:
            return found
        found.append(sentence)
