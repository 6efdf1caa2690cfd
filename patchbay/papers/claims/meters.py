"""Claims about meters: what published evaluations say, asked of a small model.

Where a claim is of large models, data or classifiers that cannot be had at this size, the number is measured all the same and
the verdict says what would test it.
"""

from __future__ import annotations

import random

import patchbay as pb
from patchbay.papers.claims._claim import Claim, claim
from patchbay.papers.claims._shared import N, ends_of


def stories(seed: int, n: int = N) -> list[str]:
    """Held-out text of the kind that the built-in models were trained on."""
    from patchbay.tiny import text

    made = text.documents(seed, held_out=True)
    return [next(made).text for _ in range(n)]


def shuffled(texts: list[str], seed: int) -> list[str]:
    """The same words of each text in another order, the first where it was."""
    chance = random.Random(f"shuffled-{seed}")
    found = []
    for one in texts:
        first, *words = one.split(" ")
        chance.shuffle(words)
        found.append(" ".join([first, *words]))
    return found


@claim("correa2024", "mechanism")
def correa2024(model: pb.Model, seed: int) -> Claim:
    """Confirmed if text of the kind trained on costs fewer bits per byte than its own tokens' frequencies do."""
    from patchbay import maths

    found = pb.measure.text_loss(model, stories(seed), seed=seed)
    gain = (found["null"] * found["length"] - found["per_item"]) / found["length"]
    value, low, high = maths.bootstrap_interval(gain, seed=seed)
    return Claim(
        "a trained model needs fewer bits per byte than the texts' own token frequencies",
        value,
        low,
        high,
        0.0,
        "bits per byte",
    )


@claim("wiegreffe2023", "mechanism")
def wiegreffe2023(model: pb.Model, seed: int) -> Claim:
    """Confirmed if most answers cannot be changed by the probability that other spellings took."""
    task = pb.tasks.facts_in_memory(model, seed=seed)
    found = pb.measure.answer_choices(model, task, read="unaffected", seed=seed)
    text_ = f"of {len(task)} facts most are answered alike whatever other spellings took (the choices hold {float(found['mass'].mean()):.0%})"
    return Claim(text_, *ends_of(found, "value", "low", "high"), 0.5, "share of items")


@claim("someya2023", "mechanism")
def someya2023(model: pb.Model, seed: int) -> Claim:
    """Confirmed if a model finds texts likelier than the same words in another order, beyond what their lengths give."""
    from patchbay import maths

    good = [one for one in stories(seed) if len(set(one.split(" "))) > 3]
    pairs = [{"good": a, "bad": b} for a, b in zip(good, shuffled(good, seed), strict=True) if a != b]
    found = pb.measure.minimal_pairs(model, pairs, seed=seed)
    value, low, high = maths.bootstrap_interval(found["per_item"] - float(found["null"]), seed=seed)
    return Claim(
        "texts are likelier than the same words in another order, beyond what length gives",
        value,
        low,
        high,
        0.0,
        "share of pairs",
    )
