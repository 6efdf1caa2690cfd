"""Indirect object identification (IOI): of two people, the one who did not give is the one who was given to.

`When Mary and John went to the store, John gave a drink to` -> ` Mary`

The right answer is the name said once (the indirect object), the wrong one the name said twice (the subject). Half of
the prompts have the order ABBA (the giver is the second name), half BABA (the first). The corrupted twin is the ABC
text: the three mentions become three other names, all different, so nothing says who receives. Task of Wang et al.
2022, "Interpretability in the Wild"; the three sentences are this project's own.

It tests whether a model tells a repeated name from a single one. It does not show understanding of giving: the rule
"say the name that stands there once" is enough.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from patchbay.errors import by_kind
from patchbay.signal.port import PatchbayError, suggest
from patchbay.tasks import words
from patchbay.tasks.spell import Draft, choose_words, replaced, spans, spans_in_order, spell

if TYPE_CHECKING:
    from patchbay.model.model import Model
    from patchbay.tasks.task import Task

ORDERS = {"both": (0, 1), "ABBA": (0,), "BABA": (1,)}


@by_kind
def indirect_object(model: Model, n: int = 100, *, order: str = "both", seed: int = 0) -> Task:
    """Name the one of two people who was given the thing; `order` is ABBA, BABA or both.

    Marks: `io` (the name to be said), `s1` and `s2` (the giver's two mentions), `thing`. Labels: `order`, `template`.
    """
    if order not in ORDERS:
        raise PatchbayError(f"asked for order={order!r}; possible: {', '.join(ORDERS)}{suggest(order, list(ORDERS))}")
    names = choose_words(model, "indirect_object", "names", words.NAMES, 5)
    return spell(
        "indirect_object", model, _drafts(names, ORDERS[order], random.Random(f"indirect_object-{seed}")), n,
        seed=seed, options={"order": order},
    )  # fmt: skip


def _drafts(names: list[str], orders: tuple[int, ...], rng: random.Random) -> Iterator[Draft]:
    while True:
        for giver_is_first in orders:
            first, second, *others = rng.sample(names, 5)
            place, thing = rng.choice(words.PLACES), rng.choice(words.OBJECTS)
            template = rng.randrange(len(words.INDIRECT_OBJECT))
            giver, receiver = (first, second) if giver_is_first else (second, first)
            prompt, answer = words.render_indirect_object(first, second, giver, place, thing, template=template)
            said = [spans(prompt, first)[0], spans(prompt, second)[0], spans(prompt, giver)[1]]
            yield Draft(
                prompt,
                answer,
                (f" {giver}",),
                replaced(prompt, dict(zip(said, others, strict=True))),
                marks={
                    "io": spans(prompt, receiver),
                    "s1": spans(prompt, giver)[:1],
                    "s2": spans(prompt, giver)[1:],
                    "thing": spans_in_order(prompt, [giver, thing], said[2][0])[1:],
                },
                labels={"order": "BABA" if giver_is_first else "ABBA", "template": template},
            )
