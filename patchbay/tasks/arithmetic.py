"""Arithmetic: the sum of two numbers.

`12 + 34 =` -> ` 46`

In the corrupted twin the second number is another one with another sum; the wrong answers are the twin's sum and the
sum give or take one and ten (a slip, a lost carry). `examples` solved sums in front show the form to a model that has
not seen it. Only sums that are one token in the model's tokenizer are asked: one that splits numbers into digits gets
sums below ten.

It tests whether the answers to these sums come out, not whether a model adds: all pairs may be remembered. Sums that a
model has not been trained on have to be told apart by whoever knows its training.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from patchbay.errors import by_kind
from patchbay.tasks import words
from patchbay.tasks.spell import Draft, at_least, choose_words, spell

if TYPE_CHECKING:
    from patchbay.model.model import Model
    from patchbay.tasks.task import Task


@by_kind
def arithmetic(
    model: Model, n: int = 100, *, maximum: int = words.MAX_SUM_TERM, examples: int = 0, seed: int = 0
) -> Task:
    """Sums of two numbers from 0 to `maximum`, after `examples` solved ones.

    Marks: `left`, `right`, `operator`, `equals`. Labels: `left`, `right`, `sum`, `carry` (the ones add up to ten or
    more).
    """
    at_least("maximum", maximum, 2)
    at_least("examples", examples, 0)
    sums = [str(number) for number in range(2 * maximum + 1)]
    known = choose_words(model, "arithmetic", "sums", sums, 4)
    drafts = _drafts(set(map(int, known)), maximum, examples, random.Random(f"arithmetic-{seed}"))
    return spell("arithmetic", model, drafts, n, seed=seed, options={"maximum": maximum, "examples": examples})


def _drafts(known: set[int], maximum: int, examples: int, rng: random.Random) -> Iterator[Draft]:
    pairs = [(a, b) for a in range(maximum + 1) for b in range(maximum + 1) if a + b in known]
    rights: dict[int, list[int]] = {}
    for a, b in pairs:
        rights.setdefault(a, []).append(b)

    def twins(left: int, right: int) -> list[int]:
        return [b for b in rights[left] if b != right and len(str(b)) == len(str(right))]

    askable = [pair for pair in pairs if twins(*pair)]
    while askable:
        left, right = rng.choice(askable)
        shown = [pair for pair in rng.choices(pairs, k=4 * examples) if sorted(pair) != sorted((left, right))][
            :examples
        ]
        if len(shown) < examples:
            continue
        twin = rng.choice(twins(left, right))
        solved = [words.render_sum(*pair) for pair in shown]
        before = "".join(f"{prompt}{answer}. " for prompt, answer in solved)
        prompt = before + words.render_sum(left, right).prompt
        total = left + right
        near = [value for value in (left + twin, total - 1, total + 1, total - 10, total + 10) if value in known]
        plus, equals = prompt.index("+", len(before)), len(prompt) - 1
        yield Draft(
            prompt,
            words.render_sum(left, right).answer,
            tuple(f" {value}" for value in dict.fromkeys(near)),
            before + words.render_sum(left, twin).prompt,
            marks={
                "left": [(len(before), plus - 1)],
                "operator": [(plus, plus + 1)],
                "right": [(plus + 2, equals - 1)],
                "equals": [(equals, equals + 1)],
            },
            labels={"left": left, "right": right, "sum": total, "carry": left % 10 + right % 10 >= 10},
        )
