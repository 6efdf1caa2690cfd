"""Laundry list: things on a list, all but one dealt with; name the one that is left.

`On the list are the hat, the cup and the pen. Mary has washed the pen and the hat. Mary still has to wash the` -> `
cup`

The right answer is the thing that is mentioned once, the wrong ones are all the others. In the corrupted twin another
thing is left: one mention of the second sentence is exchanged for the missing thing, and nothing else differs. Things
and both orders are drawn anew for every prompt, so no place in the text gives the answer away. The idea is that of
"Talking Heads" (Merullo, Eickhoff, Pavlick 2024); the wording is this project's own.

It tests whether a model finds the one that is not repeated. It does not show that a model inhibits what it has seen:
one attention layer that adds the first list and subtracts the second does as well.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from patchbay.errors import by_kind
from patchbay.tasks import words
from patchbay.tasks.spell import Draft, at_least, choose_words, spans, spans_in_order, spell

if TYPE_CHECKING:
    from patchbay.model.model import Model
    from patchbay.tasks.task import Task


@by_kind
def laundry_list(model: Model, n: int = 100, *, objects: int = 8, seed: int = 0) -> Task:
    """Name the one of `objects` listed things (3 to 20) that has not been dealt with.

    Marks: `objects` (in listed order), `missing`, `done` (the second mentions), `swapped` (the mention that the twin
    exchanges). Labels: `missing_index` and `twin_index`, places in the list; `n_objects`.
    """
    at_least("objects", objects, 3, 20)
    things = choose_words(model, "laundry_list", "objects", words.OBJECTS, objects)
    return spell(
        "laundry_list", model, _drafts(things, objects, random.Random(f"laundry_list-{seed}")), n,
        seed=seed, options={"objects": objects},
    )  # fmt: skip


def _drafts(things: list[str], n_objects: int, rng: random.Random) -> Iterator[Draft]:
    while True:
        listed = rng.sample(things, n_objects)
        done = rng.sample(listed, n_objects - 1)
        missing = next(word for word in listed if word not in done)
        swapped = rng.choice(done)
        twin = [missing if word == swapped else word for word in done]
        name, chore = rng.choice(words.NAMES), rng.randrange(len(words.CHORES))
        prompt, answer = words.render_laundry(listed, done, name=name, chore=chore)
        end = prompt.index(".")
        second = spans_in_order(prompt, done, end)
        yield Draft(
            prompt,
            answer,
            tuple(f" {word}" for word in done),
            words.render_laundry(listed, twin, name=name, chore=chore).prompt,
            marks={
                "objects": spans_in_order(prompt, listed),
                "missing": spans(prompt, missing),
                "done": second,
                "swapped": [second[done.index(swapped)]],
            },
            labels={
                "missing_index": listed.index(missing),
                "twin_index": listed.index(swapped),
                "n_objects": n_objects,
            },
        )
