"""Claims about sharper probes of behaviour: consistency, coherence, languages, heads on states, novel words, routes and styles.

As in `behaviour`: where a paper's own data or models cannot be had at this size, the meter is run on words that a built-in model
knows, its number stands in the row, and the verdict names the command that would test the claim.
"""

from __future__ import annotations

import math
import random
from typing import Any

import patchbay as pb
from patchbay.papers.claims._claim import Claim, claim
from patchbay.papers.claims._shared import ends_of, over_sets
from patchbay.papers.claims.behaviour import NAMES, THINGS, elsewhere, known
from patchbay.papers.claims.meters import stories
from patchbay.tasks import words


def facts(model: pb.Model, seed: int, n: int) -> list[tuple[str, str]]:
    """Some places and their capitals, of those that are one token."""
    listed = [(place, city) for place, city in words.FACTS.items() if known(model, [f" {place}", f" {city}"])[1:]]
    return random.Random(f"facts-{seed}").sample(listed, min(n, len(listed)))


@claim("agrawal2023", "mechanism")
def agrawal2023(model: pb.Model, seed: int) -> Claim:
    """Confirmed if answers about places that a model knows are more consistent than those about what has no capital."""
    things = [thing.strip() for thing in known(model, THINGS)]
    rows: list[dict[str, Any]] = [
        {"text": f"The capital of {place} is", "label": 1} for place, _ in facts(model, seed, 40)
    ]
    rows += [{"text": f"The capital of {thing} is", "label": 0} for thing in things[:40]]
    found = pb.measure.self_consistency(model, rows, per_prompt=8, max_new_tokens=1, seed=seed)
    text = f"answers about known places are more consistent than about other things (the likeliest token's probability tells them apart with {float(found['auroc_most']):.2f})"
    return Claim(text, *ends_of(found, "auroc", "auroc_low", "auroc_high"), 0.5, "area under the curve")


@claim("qiu2023", "comparison")
def qiu2023(model: pb.Model, seed: int) -> Claim:
    """How often a question of two names and its reverse are answered alike."""
    chance, names = random.Random(f"before-{seed}"), [name.strip() for name in known(model, NAMES)]
    rows = []
    for _ in range(30):
        a, b = chance.sample(names, 2)
        asked = [f"{a} went to the park. Then {b} went to the park. {x} went to the park before" for x in (a, b)]
        rows.append({"prompt": asked[0], "reverse": asked[1], "choices": [f" {b}", f" {a}"], "answer": 0})
    found = pb.measure.incoherence(model, rows, seed=seed)
    needs = elsewhere("incoherence gpt2 --items pairs.jsonl", "a model that reads questions about time")
    text = f"of a question and its reverse exactly one is answered right (both in {float(found['both']):.2f})"
    return Claim(text, *ends_of(found, "value", "low", "high"), 0.2723, "share of pairs", untestable=needs)


@claim("li2023b", "comparison")
def li2023b(model: pb.Model, seed: int) -> Claim:
    """How often one question in three wordings has three answers that are not all one."""
    listed = facts(model, seed, 20)
    frames = ("The capital of {} is", "Then {0} was here. The capital of {0} is", "The city of {} is")
    rows = []
    for i, (place, city) in enumerate(listed):
        cities = [city, listed[i - 1][1], listed[i - 2][1]]
        for at, frame in enumerate(frames):
            choices = [f" {one}" for one in cities]
            rows.append({"item": place, "variant": str(at), "prompt": frame.format(place), "choices": choices, "keys": cities})  # fmt: skip
    found = pb.measure.concurrence(model, rows, seed=seed)
    needs = elsewhere(
        "concurrence gpt2 --items borders.jsonl", "a model of several languages, and territories with claimants"
    )
    text = "one question in several wordings is answered alike"
    return Claim(text, *ends_of(found, "value", "low", "high"), 1.0, "share of pairs", above=False, untestable=needs)


@claim("lou2024", "comparison")
def lou2024(model: pb.Model, seed: int) -> Claim:
    """Confirmed if the error of a head peaks where it reads as many directions as it has examples."""

    def peak(at: int) -> float:
        rows = [{"text": one, "target": len(one.split(" ")[-1]) + len(one.split(" ")[-2])} for one in stories(at, 40)]
        found = pb.measure.head_risk(model, rows, sizes=[0, 20, model.d_model], draws=9, seed=at)
        none, full, _ = (row["risk"] for row in found.tables["sizes"])
        return math.log10(full / none)

    text = "the error of a head on as many directions as examples is above that of no head at all"
    return Claim(text, *over_sets(peak, seed), 0.0, "decades")


@claim("zhang2025b", "comparison")
def zhang2025b(model: pb.Model, seed: int) -> Claim:
    """Confirmed if states lie as predictions do, beyond states dealt to the tokens at random."""

    def beyond(at: int) -> float:
        found = pb.measure.predictive_geometry(model, stories(at, 6), twin=False, seed=at)
        return float(found["alignment"][-1] - found["alignment_shuffled"][-1])

    text = "the last states lie as the predictions do, beyond states dealt at random (an untrained network's may lie closer)"
    return Claim(text, *over_sets(beyond, seed), 0.0, "CKA")
