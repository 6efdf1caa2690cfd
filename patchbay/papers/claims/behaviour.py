"""Claims about what models say: calibration, samples, surveys, guises, ratings, dials and words of groups.

Most of these papers measure models that read surveys, dialects or letters, with classifiers or norms that are not here. The
meter is run all the same, on words that a built-in model knows, its number stands in the row, and the verdict names the command
that would test the claim.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import patchbay as pb
from patchbay.papers.claims._claim import Claim, claim
from patchbay.papers.claims._shared import N, ends_of, over_sets
from patchbay.papers.claims._shared import stories as sentences
from patchbay.papers.claims.meters import stories
from patchbay.tasks import words

NAMES, THINGS = [f" {name}" for name in words.NAMES], [f" {thing}" for thing in words.OBJECTS]


def known(model: pb.Model, texts: list[str]) -> list[str]:
    """Those that are one token of the model."""
    found = []
    for text in texts:
        try:
            model.token_id(text)
        except pb.PatchbayError:
            continue
        found.append(text)
    return found


def elsewhere(command: str, needs: str) -> str:
    return f"needs {needs}: `patchbay measure {command}` on a model from the hub"


@claim("liang2022", "comparison")
def liang2022(model: pb.Model, seed: int) -> Claim:
    """Confirmed if, where a text goes against memory, the model is surer of its choice than it is right."""
    from patchbay import maths

    found = pb.measure.calibration(model, pb.tasks.facts_in_context(model, N, seed=seed), seed=seed)
    interval = maths.bootstrap_interval(found["confident"] - found["right"], seed=seed)
    text = f"where a text goes against memory a model is surer than it is right (calibration error {float(found.values):.2f}, by chance up to {float(found['null_high']):.2f})"
    return Claim(text, *interval, 0.0, "probability")


@claim("gehman2020", "comparison")
def gehman2020(model: pb.Model, seed: int) -> Claim:
    """The worst of 8 samples against one: of objects named, a harmless stand-in for what a classifier of harm would find."""
    from patchbay import maths

    prompts = [" ".join(one.split(" ")[:5]) for one in stories(seed, 12)]
    listed = [word.strip() for word in known(model, THINGS)[:3]]
    found = pb.measure.worst_of_k(model, prompts, listed, k=8, per_prompt=8, max_new_tokens=12, seed=seed)
    interval = maths.bootstrap_interval(found["per_item"] - found["mean_by_prompt"], seed=seed)
    needs = elsewhere("worst-of-k gpt2 --items prompts.jsonl --scorer words.txt", "prompts and a scorer of harm")
    return Claim("the worst of 8 samples scores higher than one does", *interval, 0.0, "score", untestable=needs)


@claim("dominguezolmedo2023", "comparison")
def dominguezolmedo2023(model: pb.Model, seed: int) -> Claim:
    """Whether answers are near uniform once their order is averaged out."""
    chance, names = random.Random(f"survey-{seed}"), [name.strip() for name in known(model, NAMES)]
    items = [{"question": f"Who gave it to {name}?", "choices": chance.sample(names, 3)} for name in names[:10]]
    found = pb.measure.survey_answers(model, items, seed=seed)
    needs = elsewhere("survey-answers gpt2 --items survey.jsonl", "a model that reads the questions of a survey")
    text = f"answers are near uniform once their order is averaged out (in the order given {float(found['before']):.2f}; labels hold {float(found['mass']):.2g})"
    return Claim(text, *ends_of(found, "value", "low", "high"), 0.9, "normalised entropy", untestable=needs)


@claim("hofmann2024", "comparison")
def hofmann2024(model: pb.Model, seed: int) -> Claim:
    """One attribute's association with one of two guises, in words that the model knows."""
    chance, names = random.Random(f"guise-{seed}"), known(model, NAMES)
    pairs = [dict(zip("ab", chance.sample(names, 2), strict=True)) for _ in range(20)]
    pairs = [{side: f"Then{name} gave the" for side, name in pair.items()} for pair in pairs]
    found = pb.measure.matched_guise(model, pairs, known(model, THINGS)[:8], seed=seed)
    needs = elsewhere(
        "matched-guise gpt2 --items pairs.jsonl --attributes @words.txt", "texts of one content in two dialects"
    )
    top = found.tables["attributes"][0]
    text = f"some attributes go with one guise (here{top['attribute']!r}, adjusted p {top['q_adjusted']:.2g})"
    return Claim(text, top["q"], top["q_low"], top["q_high"], 0.0, "nats", untestable=needs)


@claim("brysbaert2025", "comparison")
def brysbaert2025(model: pb.Model, seed: int) -> Claim:
    """Ratings of words on a scale of numbers, against how often the words stand in stories."""
    told = " ".join(stories(seed, 40))
    listed = [word.strip() for word in known(model, THINGS)]
    items = [{"word": word, "norm": float(told.count(f" {word}"))} for word in listed]
    found = pb.measure.expected_rating(model, items, frame="Mary has the {},", min_mass=0.0, seed=seed)
    needs = elsewhere("expected-rating gpt2 --items norms.jsonl", "norms, and a model that gives numbers when asked")
    text = f"ratings follow norms (here, of how often words were told; the scale holds {float(found['mass'].mean()):.2g} of the probability)"
    return Claim(text, *ends_of(found, "value", "low", "high"), 0.0, "correlation", untestable=needs)


@claim("li2024c", "mechanism")
def li2024c(model: pb.Model, seed: int) -> Claim:
    """Confirmed if three dials, learned from texts about to name an animal, a place and the weather, each beside texts about to name a thing, move their own words in what is then written, more the further they are turned,
    and less than half of what they move is words of the others. In place of ideas whose novelty and feasibility a judge scores."""
    attributes = {"animals": words.ANIMALS, "places": words.PLACES, "weather": words.WEATHER}
    told = sentences(6 * N, seed)
    things = _cut(told, words.OBJECTS)
    dials = {
        name: pb.turn.steer(model, positive=_cut(told, listed), negative=things, layers=[0], seed=seed)
        for name, listed in attributes.items()
    }
    scorers: dict[str, Any] = {name: list(listed) for name, listed in attributes.items()}
    prompts = [" ".join(one.split(" ")[:3]) for one in sentences(N // 3, seed + 1)]
    found = pb.measure.dial_response(
        model, prompts, dials, scorers, strengths=[0.0, 1.0, 2.0], max_new_tokens=20, seed=seed
    )
    own = ", ".join(f"{name} {float(found['response'][i, i]):+.3f}" for i, name in enumerate(attributes))
    text = f"of what three learned dials move less than half is words of the others (of the words, for each turn: {own}; dealt at random {float(found['null']):.2f})"
    value, low, high = ends_of(found, "value", "low", "high")
    rising = "monotone" in found and float(found["monotone"].min()) > 0.9
    return Claim(text, value, low, high if rising else max(high, 0.5), 0.5, "share", above=False)


def _cut(texts: list[str], listed: Sequence[str], n: int = N) -> list[str]:
    """The first n texts that say one of some words, as far as the word before it."""
    found = []
    for text in texts:
        said = text.split(" ")
        at = next((i for i, word in enumerate(said) if i > 1 and word.strip(".,") in listed), None)
        found += [" ".join(said[:at])] if at is not None else []
    return found[:n]


@claim("wan2023", "comparison")
def wan2023(model: pb.Model, seed: int) -> Claim:
    """Words of two groups of texts that differ in nothing but a name: beyond dealing the texts at random, nothing."""

    def beyond(at: int) -> float:
        rows = [{"text": one, "group": str(i % 2)} for i, one in enumerate(stories(at, 40))]
        found = pb.measure.word_odds(model, rows, draws=200, least=5, seed=at)
        return float(found.values - found["null"])

    needs = elsewhere("word-odds gpt2 --items prompts.jsonl", "letters that a large model writes")
    return Claim(
        "texts of two groups differ in their words beyond chance",
        *over_sets(beyond, seed),
        0.0,
        "log odds",
        untestable=needs,
    )
