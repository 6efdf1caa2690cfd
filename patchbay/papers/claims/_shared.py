"""What several claims share: reading a number and its interval off a Result, and repeating a measurement on fresh prompts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import patchbay as pb
from patchbay.papers.claims._claim import Claim
from patchbay.signal.port import PatchbayError
from patchbay.tasks import words
from patchbay.tasks.spell import single_tokens, tokenizer_of

N = 60  # prompts
SETS = 8  # sets of fresh prompts, where a number has no interval over prompts of its own
STUDENT = 2.365  # 97.5 % of Student's t with SETS - 1 degrees of freedom

Interval = tuple[float, float, float]  # a number and the ends of its 95 % interval


def at_part(result: Any, name: str, part: Any) -> float:
    """A variable of a Result [layer, head] at a head."""
    return float(result[name][part.layer, part.index])


def at_best(result: Any, name: str) -> float:
    """A variable of a Result [layer, head] at its best head."""
    return at_part(result, name, result.top(1)[0])


def ends_of(result: Any, *names: str) -> Interval:
    """A number of a Result and the ends of its interval."""
    value, low, high = (float(result[name]) for name in names)
    return value, low, high


def joint(model: pb.Model, parts: Any, task: Any, seed: int, text: str) -> Claim:
    """That parts cost more, taken away together, than as many random ones of their layers; paired over prompts."""
    found = pb.prove.ablation(model, task, parts, seed=seed)
    value, low, high = ends_of(found, "difference", "difference_low", "difference_high")
    low = low if float(found["p"]) <= 0.05 else min(low, 0.0)  # more than random ones only by the call's own p too
    return Claim(text, value, low, high, 0.0, task.unit)


def against(one: Interval, other: Interval) -> Interval:
    """The difference of two numbers, with the ends of their intervals against each other: at least 95 %, however they go together."""
    return one[0] - other[0], one[1] - other[2], one[2] - other[1]


def over_sets(measure: Callable[[int], float], seed: int) -> Interval:
    """The mean of what is measured on SETS sets of prompts of their own, with Student's interval."""
    return student([measure(100 * (seed + 1) + at) for at in range(SETS)])


def student(values: Sequence[float]) -> Interval:
    """Mean of SETS values and the ends of Student's 95 % interval."""
    assert len(values) == SETS
    mean = sum(values) / SETS
    spread = (sum((value - mean) ** 2 for value in values) / (SETS - 1)) ** 0.5
    half = STUDENT * spread / SETS**0.5
    return mean, mean - half, mean + half


def stories(n: int, seed: int) -> list[str]:
    """Texts of three sentences about nothing in particular."""
    rng = random.Random(f"claims-{seed}")
    return [words.sentences(rng, 3)[1:] for _ in range(n)]


def known_words(model: pb.Model, listed: Sequence[str]) -> list[str]:
    """The words that are one token with their space in this model's tokenizer, with that space."""
    found = single_tokens(tokenizer_of(model, "this claim"), listed)
    if len(found) < 2:
        raise PatchbayError(
            f"of {', '.join(listed[:5])} and their like {len(found)} are single tokens here; two are needed"
        )
    return [f" {word}" for word in found]


def untrained(model: pb.Model, seed: int) -> pb.Model:
    """A network of the same form, with the weights that it starts training with and the model's own tokenizer."""
    from patchbay.find.concept_neurons import untrained as made_new

    made = made_new(model, seed)
    if isinstance(made, str):
        raise PatchbayError(f"an untrained network of this form is asked for and there is none: {made}")
    return pb.load(made.hf, tokenizer=model.tokenizer, family=model.family)


def beside_untrained(
    model: pb.Model, measure: Callable[[pb.Model, int], float], seed: int
) -> tuple[Interval, tuple[float, float]]:
    """What is measured on SETS sets of prompts, and the limits between which 95 % of untrained networks of this form lie.

    The limits are Student's for one more network, from SETS of them: what the form alone gives.
    """
    places = [100 * (seed + 1) + at for at in range(SETS)]
    own = student([measure(model, at) for at in places])
    mean, low, high = student([measure(untrained(model, at), at) for at in places])
    wide = (SETS + 1) ** 0.5  # from the mean's interval to one more draw's
    return own, (mean - wide * (mean - low), mean + wide * (high - mean))
