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
from patchbay.papers.claims._shared import ends, ends_of, over_sets
from patchbay.papers.claims.behaviour import NAMES, THINGS, elsewhere, known
from patchbay.papers.claims.meters import shuffled, stories
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


@claim("misra2024", "comparison")
def misra2024(model: pb.Model, seed: int) -> Claim:
    """A word seen in one dative, in frames of the other, beyond the same words in another order."""
    chance = random.Random(f"dative-{seed}")
    names, things = ([one.strip() for one in known(model, listed)] for listed in (NAMES, THINGS))
    rows = []
    for at in range(14):
        (a, b), thing = chance.sample(names, 2), chance.choice(things)
        taught = {"learn": f"Then {a} {{}} the {thing} to {b}."}
        rows.append(taught if at < 4 else {"test": f"Then {a} {{}} {b} the {thing}.", "twin": f"Then {a} {{}} the {b} {thing}."})  # fmt: skip
    found = pb.measure.novel_word(model, rows, steps=10, draws=1, seed=seed)
    needs = elsewhere("novel-word gpt2 --items datives.jsonl", "a model that knows both dative constructions")
    text = f"a word learned in one construction is expected in the other, beyond an ungrammatical one (it gains {float(found['gain_learned']):.2f} where it was learned)"
    return Claim(text, *ends(found), 0.0, "nats per token", untestable=needs)


@claim("mccoy2023", "comparison")
def mccoy2023(model: pb.Model, seed: int) -> Claim:
    """Whether what a text states is repeated where the answer is a likely word, rather than where it is an unlikely one."""
    listed = facts(model, seed, 40)
    rows = []
    for i, (place, city) in enumerate(listed):
        stated = listed[i - 1][1]
        prompt = f"The capital of {place} is {stated}. The capital of {place} is"
        rows.append({"prompt": prompt, "choices": [f" {stated}", f" {city}"], "answer": 0})
    found = pb.measure.task_probability(model, rows, seed=seed)
    needs = elsewhere("task-probability gpt2 --items ciphers.jsonl", "a model that can undo ciphers")
    text = f"answers are right where they are likely (right in {float(found['accuracy']):.2f})"
    return Claim(text, *ends(found), 0.0, "logits per standard deviation", untestable=needs)


@claim("hari2023", "comparison")
def hari2023(model: pb.Model, seed: int) -> Claim:
    """How much of what two built-in models could gain by dividing texts a router makes."""
    texts = [*stories(seed, 12), *shuffled(stories(seed + 50, 12), seed)]
    found = pb.measure.routing(model, texts, pb.load("tiny-llama"), seed=seed)
    needs = elsewhere("routing gpt2 --items texts.jsonl --other NAME", "models that are good at different texts")
    text = "a router on states gains over the better of two models"
    return Claim(text, *ends(found), 0.0, "share of the oracle's gain", untestable=needs)


@claim("soto2024", "comparison")
def soto2024(model: pb.Model, seed: int) -> Claim:
    """Confirmed if three texts are enough to tell texts from the same words in another order, of other texts."""
    told, mixed = stories(seed, 10), shuffled(stories(seed + 50, 10), seed)
    rows = [{"text": one, "author": name} for name, each in (("told", told), ("mixed", mixed)) for one in each]
    found = pb.measure.style_detection(model, rows, support=3, draws=4, seed=seed)
    text = f"three texts tell an author's other texts (named right in {float(found['accuracy']):.2f})"
    return Claim(text, *ends(found), 0.5, "area under the curve")


@claim("zhang2024b", "comparison")
def zhang2024b(model: pb.Model, seed: int) -> Claim:
    """Bits per byte of two kinds of text, side by side: the card that shows what tuning for one costs on the other."""
    needs = elsewhere(
        "text-loss gpt2 --items texts.jsonl", "a checkpoint whose language neurons were tuned, beside its base"
    )
    return card("text of one language", model, seed, needs)


@claim("maatouk2024", "comparison")
def maatouk2024(model: pb.Model, seed: int) -> Claim:
    """As zhang2024b, of a domain."""
    needs = elsewhere("text-loss gpt2 --items texts.jsonl", "a checkpoint that was trained on, beside its base")
    return card("text of one domain", model, seed, needs)


def card(what: str, model: pb.Model, seed: int, needs: str) -> Claim:
    """How many bits per byte less the kind of text trained on costs than another, from the table of groups."""

    def gap(at: int) -> float:
        rows = [{"text": one, "group": "own"} for one in stories(at, 6)]
        rows += [{"text": one, "group": "other"} for one in shuffled(stories(at, 6), at)]
        own, other = (row["value"] for row in pb.measure.text_loss(model, rows, seed=at).tables["groups"])
        return float(other - own)

    return Claim(f"{what} costs less than other text, by group", *over_sets(gap, seed), 0.0, "bits per byte", untestable=needs)  # fmt: skip


@claim("ghandeharioun2024", "mechanism")
def ghandeharioun2024(model: pb.Model, seed: int) -> Claim:
    """Confirmed if the state of a place's name, in the place of another in a question, is answered by its own capital, more often than
    the state of another place is answered so."""
    import torch

    from patchbay import maths

    asked, *known_ = facts(model, seed, 31)
    sources = [f"They talked about {place}" for place, _ in known_]
    found = pb.find.patchscopes(
        model, sources, f"The capital of {asked[0]} is", placeholder=f" {asked[0]}", layers=[1], max_new_tokens=1
    )
    said = sorted(found.tables["said"], key=lambda row: row["prompt"])
    own, other = (
        torch.tensor([row[kind] == f" {city}" for row, (_, city) in zip(said, known_, strict=True)]).double()
        for kind in ("text", "other")
    )
    value, low, high = maths.paired_interval(own, other)
    text = (
        f"what the model says of the state of a place's name, put into a question about another at layer 1, is its own capital ({float(own.mean()):.0%} of "
        f"{len(own)}; of another place's state {float(other.mean()):.0%})"
    )
    return Claim(text, value, low, high, 0.0, "share of places")
