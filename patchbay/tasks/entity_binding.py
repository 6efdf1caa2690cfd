"""Entity binding: things in boxes; say what a box holds, or which box holds a thing.

`The apple is in box A. The pear is in box B. Box A contains the` -> ` apple`                 (query="box")
`The apple is in box A. The pear is in box B. The pear is in box` -> ` B`                     (query="object")

Things, box letters, their order and the one that is asked are drawn anew for every prompt. In the corrupted twin the
asked thing and one other have changed places, and nothing else; the wrong answers are all the others, the twin's among
them.

It tests whether a model keeps pairs apart. It does not say how: by the order of the pairs, by the words themselves or
by a pointer all give right answers, and only interchange interventions tell them apart.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from patchbay.errors import by_kind
from patchbay.signal.port import PatchbayError, suggest
from patchbay.tasks import words
from patchbay.tasks.spell import Draft, at_least, choose_words, spans, spans_in_order, spell

if TYPE_CHECKING:
    from patchbay.model.model import Model
    from patchbay.tasks.task import Task

QUERIES = ("box", "object")
THINGS = tuple(word for word in words.OBJECTS if word != "box")


@by_kind
def entity_binding(model: Model, n: int = 100, *, boxes: int = 4, query: str = "box", seed: int = 0) -> Task:
    """Find the partner of one of `boxes` pairs (2 to 20) of thing and box, asked by box or by object.

    Marks: `objects` and `boxes` (in order), `answer` (where the right answer stands), `query` (the word asked with, in
    the question) and `partner` (the same word in its pair). Labels: `asked` and `twin`, places in the order.
    """
    at_least("boxes", boxes, 2, 20)
    things, letters = words_for(model, "entity_binding", boxes, query)
    drafts = _drafts(things, letters, boxes, query, random.Random(f"entity_binding-{seed}"))
    return spell("entity_binding", model, drafts, n, seed=seed, options={"boxes": boxes, "query": query})


def _drafts(things: list[str], letters: list[str], n_boxes: int, query: str, rng: random.Random) -> Iterator[Draft]:
    by_box = query == "box"
    while True:
        objects, boxes = rng.sample(things, n_boxes), rng.sample(letters, n_boxes)
        asked, other = rng.sample(range(n_boxes), 2)
        swapped = list(objects)
        swapped[asked], swapped[other] = objects[other], objects[asked]
        prompt, answer = _render(objects, boxes, asked, query)
        twin = _render(swapped, boxes, asked if by_box else other, query)
        labels = {"asked": asked, "twin": other}
        yield Draft(
            prompt, answer, **others_and_marks(prompt, objects, boxes, asked, query), corrupted=twin[0], labels=labels
        )


def words_for(model: Model, task: str, boxes: int, query: str) -> tuple[list[str], list[str]]:
    """The things and the letters of boxes that this model can be asked about by one token."""
    if query not in QUERIES:
        raise PatchbayError(f"asked for query={query!r}; possible: {', '.join(QUERIES)}{suggest(query, QUERIES)}")
    things = choose_words(model, task, "objects", THINGS, boxes)
    return things, choose_words(model, task, "box letters", words.LETTERS, boxes)


def others_and_marks(prompt: str, objects: list[str], boxes: list[str], asked: int, query: str) -> dict[str, Any]:
    """The answers to the other pairs, all wrong, and where things, boxes, the answer, its partner and the word asked with stand."""
    placed = {"objects": spans_in_order(prompt, objects), "boxes": spans_in_order(prompt, boxes)}
    named = {"objects": objects, "boxes": boxes}
    answers, partners = ("objects", "boxes") if query == "box" else ("boxes", "objects")
    return {
        "wrong": tuple(f" {word}" for i, word in enumerate(named[answers]) if i != asked),
        "marks": {
            **placed,
            "answer": [placed[answers][asked]],
            "partner": [placed[partners][asked]],
            "query": spans(prompt, named[partners][asked])[-1:],
        },
    }


def _render(objects: list[str], boxes: list[str], asked: int, query: str) -> tuple[str, str]:
    by_box = words.render_binding(objects, boxes, asked)
    if query == "box":
        return by_box.prompt, by_box.answer
    facts = by_box.prompt.rsplit(" Box ", 1)[0]
    return f"{facts} The {objects[asked]} is in box", f" {boxes[asked]}"
