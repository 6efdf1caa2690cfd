"""Binding counterfactuals: things in boxes, and a twin in which place, key and answer point at three different pairs.

clean   `The apple is in box A. The pear is in box B. ... Box A contains the` -> the thing of pair `asked` twin    the
same pairs, but pair c has changed its box letter with pair k and its thing with pair s; asked is the letter now at c

A model that answers the twin could have found its answer by place (pair c), by the key (the letter, which in the clean
prompt belongs to pair k) or by a pointer to the answer itself (the thing, which in the clean prompt belongs to pair s).
Put one signal of the twin's run into the clean run, and the thing that is then named tells which of the three the
signal held: that of c, of k or of s, or still the one that was asked. The four pairs are all different.

As in Gur-Arieh, Geva and Geiger 2025, "Mixing Mechanisms". It says what was retrieved, not which parts did it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from patchbay.errors import by_kind
from patchbay.tasks.entity_binding import _render, others_and_marks, words_for
from patchbay.tasks.spell import Draft, at_least, spell

if TYPE_CHECKING:
    from patchbay.model.model import Model
    from patchbay.tasks.task import Task


@by_kind
def binding_counterfactuals(model: Model, n: int = 100, *, boxes: int = 5, query: str = "box", seed: int = 0) -> Task:
    """Pairs (4 to 20) of thing and box with a counterfactual twin, for `prove.interchange` and `prove.fit_mechanisms`.

    The twin's own answer is the candidate `reflexive`. Labels, all places in the order: `asked` (the clean answer),
    `positional` (c), `lexical` (k) and `reflexive` (s). The wrong answers are all other candidates, in order. Marks:
    `objects`, `boxes`, `answer`, `partner` and `query`, as in entity_binding.
    """
    at_least("boxes", boxes, 4, 20)
    things, letters = words_for(model, "binding_counterfactuals", boxes, query)
    drafts = _drafts(things, letters, boxes, query, random.Random(f"binding_counterfactuals-{seed}"))
    options = {"boxes": boxes, "query": query}
    return spell("binding_counterfactuals", model, drafts, n, seed=seed, options=options)


def _swapped(items: list[str], a: int, b: int) -> list[str]:
    out = list(items)
    out[a], out[b] = items[b], items[a]
    return out


def _drafts(things: list[str], letters: list[str], n_boxes: int, query: str, rng: random.Random) -> Iterator[Draft]:
    by_box = query == "box"
    while True:
        objects, boxes = rng.sample(things, n_boxes), rng.sample(letters, n_boxes)
        asked, c, k, s = rng.sample(range(n_boxes), 4)
        at_object, at_box = (s, k) if by_box else (k, s)  # asked by box, the box is the key and the thing the answer
        prompt, answer = _render(objects, boxes, asked, query)
        twin, _ = _render(_swapped(objects, c, at_object), _swapped(boxes, c, at_box), c, query)
        labels = {"asked": asked, "positional": c, "lexical": k, "reflexive": s}
        yield Draft(
            prompt, answer, **others_and_marks(prompt, objects, boxes, asked, query), corrupted=twin, labels=labels
        )
