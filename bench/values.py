"""`python -m bench.values`: what every meter reads of five models, with interval, null and p; the section "values of meters" of RESULTS.md.

Few items each, made from the lists of words that the built-in models know and from their stories, so that a line says how a meter speaks and not how
good a model is: `tiny`, `tiny-llama` and `tiny-moe` know these facts, stories260K and gpt2-sp512 (of ../shared, left out where it is not at hand)
do not. "nan" stands where a meter has no value: a scale whose numbers hold next to no probability, dials that answer no word.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import torch

import patchbay as pb
from bench.report import describe, put_section
from bench.shapes import checkpoints
from patchbay.knobs.knob import Knob
from patchbay.papers.claims.meters import shuffled, stories
from patchbay.tasks import words

COLUMNS = "| meter | model | value (95 %) | unit | null | p |\n|---|---|---|---|---|---|"
Calls = dict[str, Callable[[], pb.Result]]
Items = list[Any]
measure: Any = pb.measure
LENIENT: dict[str, Any] = {"boundary": "back_up"}
WALKS = [{"edges": "tree:7", "start": "D", "goal": "G"}, {"edges": "line:4", "start": "A", "goal": "D"}]


def names(n: int) -> list[list[str]]:
    """Pairs of different names."""
    chance = random.Random(0)
    return [chance.sample(list(words.NAMES)[:16], 2) for _ in range(n)]


def facts() -> list[dict[str, Any]]:
    """Sixteen questions of a capital, each with two other lands' capitals as wrong answers."""
    known = list(words.FACTS.items())[:16]
    return [
        {
            "prompt": f"The capital of {land} is",
            "choices": [f" {city}", f" {known[i - 1][1]}", f" {known[i - 2][1]}"],
            "answer": 0,
            "group": str(i % 4),
        }
        for i, (land, city) in enumerate(known)
    ]


def turned(people: Items) -> Items:
    """Who came first, and the question the other way round."""
    return [
        {
            "prompt": f"{a} came before {b}. The first was",
            "reverse": f"{b} came before {a}. The first was",
            "choices": [f" {a}", f" {b}"],
            "answer": 0,
        }
        for a, b in people
    ]


def retold(ask: Items) -> Items:
    """Questions in two variants, the second after another sentence."""
    keyed = [{"item": r["prompt"], "choices": r["choices"], "keys": ["a", "b", "c"], "reference": "a"} for r in ask]
    return [row | {"variant": v, "prompt": f"{v}{row['item']}"} for row in keyed for v in ("", "Then Mary ran. ")]


def typed(ask: Items) -> Items:
    """Questions as they are, and as homographs: after the text has said another answer."""
    named = [row | {"word": row["prompt"]} for row in ask]
    said = [row | {"prompt": f"{row['prompt']}{row['choices'][1]}. {row['prompt']}", "answer": 1} for row in named]
    return [row | {"type": "other"} for row in named] + [row | {"type": "homograph"} for row in said]


def read(ask: Items) -> Items:
    """Questions of a context of three sentences, of which one says another answer than memory does."""
    before, after = "Then Mary ran. ", ". Then John sat. "
    contexts = [f"{before}{row['prompt']}{row['choices'][1]}{after}" for row in ask]
    return [r | {"context": c, "question": r["prompt"], "answer": 1} for r, c in zip(ask, contexts, strict=True)]


def of_answers(model: pb.Model, other: pb.Model) -> Calls:
    """Meters that read answers."""
    ask, people = facts(), names(10)
    polls = [{"question": f"Who is {a}?", "choices": [b, "John" if b != "John" else "Mary"]} for a, b in people[:6]]
    roles, swaps, glosses = (
        ["", "Then Mary ran. ", "John sat. "],
        {"Mary": "John"},
        dict(list(words.FACTS.items())[:16]),
    )
    return {
        "answer_choices": lambda: measure.answer_choices(model, ask, **LENIENT),
        "calibration": lambda: measure.calibration(model, (ask * 2)[:24], **LENIENT),
        "survey_answers": lambda: measure.survey_answers(model, polls),
        "incoherence": lambda: measure.incoherence(model, turned(people), **LENIENT),
        "concurrence": lambda: measure.concurrence(model, retold(ask[:8]), **LENIENT),
        "task_probability": lambda: measure.task_probability(model, ask),
        "cross_task": lambda: measure.cross_task(model, ask[:8], ask[8:], join=". ", **LENIENT),
        "word_types": lambda: measure.word_types(model, typed(ask[:10]), **LENIENT),
        "context_compression": lambda: measure.context_compression(model, read(ask[:8]), **LENIENT),
        "boolean_functions": lambda: measure.boolean_functions(model, bits=3, pairs=4, functions=8),
        "prompt_change": lambda: measure.prompt_change(model, ask, glosses=glosses, **LENIENT),
        "judge_network": lambda: measure.judge_network(model, ask, roles, **LENIENT),
        "score_convergence": lambda: measure.score_convergence(model, ask, other, k=1, join=". ", **LENIENT),
        "evaluation_card": lambda: measure.evaluation_card(model, ask, swaps=swaps),
    }


def datives(people: Items, things: list[str]) -> Items:
    """Who gave what to whom: three sentences to learn a verb from, the others with the verb's other construction and a twin that is none."""
    taught = [{"learn": f"Then {a} {{}} the {t} to {b}."} for (a, b), t in zip(people[:3], things, strict=False)]
    tested = [
        {"test": f"Then {a} {{}} {b} the {t}.", "twin": f"Then {a} {{}} the {b} {t}."}
        for (a, b), t in zip(people[3:], things, strict=False)
    ]
    return [*taught, *tested]


def guesses(cut: list[list[str]]) -> Items:
    """Stories in words, of which one word is another in the guess."""
    return [
        {
            "prompt": " ".join(w[:3]),
            "guess": " " + " ".join([*w[3:8], w[2], *w[9:12]]),
            "truth": " " + " ".join(w[3:12]),
        }
        for w in cut
        if len(w) > 12
    ]


def real_and_invented(things: list[str]) -> Items:
    """Lands that a model knows, and things that have no capital."""
    lands = [{"text": row["prompt"], "label": 1} for row in facts()[:8]]
    return [*lands, *({"text": f"The capital of {thing} is", "label": 0} for thing in things)]


def dials(model: pb.Model, things: list[str]) -> dict[str, Knob]:
    """A knob for each thing, which adds to the logit of its word's last token."""
    found = {}
    for thing in things:
        row = torch.eye(model.vocab_size)[model.encode([f"Then {thing}"])[0][-1]]
        found[thing] = Knob(thing, [pb.add(pb.Port("logits"), 3.0 * row)], 1.0)
    return found


def of_texts(model: pb.Model, other: pb.Model) -> Calls:
    """Meters that read texts."""
    told, people, things = stories(0, 10), names(10), list(words.OBJECTS)[:8]
    mixed, cut = shuffled(told, 0), [text.split(" ") for text in told]
    pairs = [{"good": a, "bad": b} for a, b in zip(told, mixed, strict=True) if a != b]
    guises = [{"a": f"Then {a} saw the", "b": f"Then {b} saw the"} for a, b in people]
    grouped = [{"text": text, "group": str(i % 2)} for i, text in enumerate(told)]
    rated = [{"word": thing, "norm": float(i)} for i, thing in enumerate(things)]
    by_author = [{"text": x, "author": of} for of, texts in (("told", told), ("mixed", mixed)) for x in texts]
    ends = [{"text": text, "target": len(text.split(" ")[-1])} for text in told + mixed]
    return {
        "text_loss": lambda: measure.text_loss(model, told),
        "minimal_pairs": lambda: measure.minimal_pairs(model, pairs),
        "matched_guise": lambda: measure.matched_guise(model, guises, [f" {thing}" for thing in things[:4]]),
        "word_odds": lambda: measure.word_odds(model, grouped, draws=200, least=2),
        "expected_rating": lambda: measure.expected_rating(model, rated),
        "head_risk": lambda: measure.head_risk(model, ends, draws=3),
        "predictive_geometry": lambda: measure.predictive_geometry(model, [" ".join(w[:20]) for w in cut[:5]]),
        "novel_word": lambda: measure.novel_word(model, datives(people, things), steps=6, draws=1),
        "routing": lambda: measure.routing(model, told + mixed, other),
        "style_detection": lambda: measure.style_detection(model, by_author, support=3, draws=3),
        "doubtful_tokens": lambda: measure.doubtful_tokens(model, guesses(cut), tau=0.05),
    }


def of_samples(model: pb.Model) -> Calls:
    """Meters of what a model writes."""
    things = list(words.OBJECTS)[:8]
    starts = [" ".join(text.split(" ")[:4]) for text in stories(0, 10)[:5]]
    turns, few = dials(model, things[:2]), {"per_prompt": 2, "max_new_tokens": 8}
    strong: dict[str, Any] = {"strengths": [0.0, 1.0, 2.0], **few}
    return {
        "worst_of_k": lambda: measure.worst_of_k(model, starts, things, k=3, per_prompt=4, max_new_tokens=10),
        "dial_response": lambda: measure.dial_response(
            model, ["Then Mary", "Then John"], turns, {t: [t] for t in turns}, **strong
        ),
        "self_consistency": lambda: measure.self_consistency(
            model, real_and_invented(things), per_prompt=4, max_new_tokens=2
        ),
        "graph_planning": lambda: measure.graph_planning(model, WALKS, **few),
    }


def line(name: str, on: str, call: Callable[[], pb.Result]) -> str:
    """A line of the table; where a meter refuses, what it says."""
    try:
        found = call()
    except pb.PatchbayError as error:
        return f"| {name} | {on} | refused: {str(error)[:120]} | | | |"
    one = {key: float(found[key]) for key in ("low", "high", "null", "p") if key in found}
    value = f"{float(found.values.double().mean()):.3g}"
    value += f" ({one['low']:.3g} to {one['high']:.3g})" if {"low", "high"} <= set(one) else ""
    return f"| {name} | {on} | {value} | {found.unit} | {format(one['null'], '.3g') if 'null' in one else ''} | {format(one['p'], '.2g') if 'p' in one else ''} |"


def main() -> None:
    there = checkpoints()
    trained = {"stories260K": "stories260K", "gpt2-sp512": "gpt2-sp512-tinystories-0.28m"}
    models = {name: pb.load(name) for name in ("tiny", "tiny-llama", "tiny-moe")}
    models |= {name: pb.load(there[path]) for name, path in trained.items() if path in there}
    others = {
        "tiny": "tiny-llama",
        "tiny-llama": "tiny",
        "tiny-moe": "tiny-llama",
        "stories260K": "gpt2-sp512",
        "gpt2-sp512": "stories260K",
    }
    load, lines = os.getloadavg()[0], []
    for on, model in models.items():
        other = models.get(others[on], models["tiny"])
        for name, call in (of_texts(model, other) | of_samples(model) | of_answers(model, other)).items():
            lines.append(line(name, on, call))
            print(lines[-1], flush=True)
    setting = describe("cpu", torch.float32, "wall", load)
    method = __doc__.split("\n\n", 1)[1].replace("\n", " ").strip()
    put_section("values of meters", "\n".join([setting, "", method, "", COLUMNS, *lines]))


if __name__ == "__main__":
    main()
