"""Described: black boxes of one kind with what was asked of them, how answers are read and scored, and what others score from the same queries."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchbay.measure import _black_boxes as numbers
from patchbay.measure import _played as played
from patchbay.measure import _string_boxes as strings
from patchbay.measure._expressions import parse
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError

NOISE = 0.1  # of a noisy function, in units of its spread


@dataclass(frozen=True)
class World:
    """Functions with their queries: `score(i, rule)` of a parsed answer (None: no expression), `rivals` the scores of what needs no understanding,
    among them `null`."""

    boxes: Sequence[Any]
    asked: Sequence[Sequence[Any]]
    seen: Sequence[Sequence[Any]]
    prompts: list[str]
    parse: Callable[[str], Any]
    score: Callable[[int, Any], Any]
    rivals: list[dict[str, Any]]
    null: str
    told: str  # the null, in words
    unit: str = "share of the variance"
    official: str = "share of functions"
    alike: str = "share of points"


def written(asked: Sequence[str], values: Sequence[str]) -> str:
    """What is shown of a function."""
    return "".join(f"f({x}) is {y}. " for x, y in zip(asked, values, strict=True)) + "f(x) is"


def _read(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return parse(text)
        except PatchbayError:
            return None

    return read


def of_numbers(kind: str, functions: int, queries: int, corruption: float, seed: int) -> World:
    """Functions of a number, asked at evenly spaced ones."""
    drawn = kind if kind in ("atomic", "approximated") else "composed"
    boxes = [numbers.make(drawn, 10_000 * seed + i, NOISE * (kind == "noisy"), corruption) for i in range(functions)]
    asked = np.linspace(numbers.LOW, numbers.HIGH, queries)
    seen = [box(asked).round(3) + 0.0 for box in boxes]

    def score(i: int, said: Any) -> Any:
        if said is None:
            nothing = float("nan") if boxes[i].interval is None else 0.0
            return numbers.Score(float("inf"), float("inf"), 0.0, nothing, nothing)
        return numbers.score(boxes[i], said, asked, said.interval, seed)

    rivals = [
        {name: numbers.score(box, said, asked, None, seed) for name, said in numbers.baselines(asked, values).items()}
        for box, values in zip(boxes, seen, strict=True)
    ]
    shown = [f"{x:g}" for x in asked]
    return World(
        boxes,
        [asked.tolist()] * functions,
        [values.tolist() for values in seen],
        [written(shown, [f"{y:g}" for y in values]) for values in seen],
        _read(parse),
        score,
        rivals,
        "table",
        f"the tables of {queries} values",
    )


def of_strings(kind: str, functions: int, queries: int, corruption: float, seed: int) -> World:
    """Functions of a word, each asked at words of its own."""
    del kind
    boxes = [strings.make(10_000 * seed + i, corruption) for i in range(functions)]
    asked = [strings.words(queries, f"asked-{seed}-{i}") for i in range(functions)]
    seen = [box(words) for box, words in zip(boxes, asked, strict=True)]

    def score(i: int, said: Any) -> Any:
        return strings.score(boxes[i], said, asked[i], None if said is None else said.interval, seed)

    rivals = [
        {name: strings.score(box, said, words, None, seed) for name, said in strings.baselines(words, values).items()}
        for box, words, values in zip(boxes, asked, seen, strict=True)
    ]
    prompts = [written(words, values) for words, values in zip(asked, seen, strict=True)]
    word = "share of words"
    return World(
        boxes, asked, seen, prompts, _read(strings.parse), score, rivals, "one edit",
        f"the single edits that fit most of {queries} words", word, word, "share of letters",
    )  # fmt: skip


def of_neurons(model: Model, functions: int, queries: int, seed: int) -> World:
    """Neurons that the model plays, each asked at words of its own draw; scored at the others."""
    words = played.words_of(model, max(played.WORDS, 2 * queries), seed)
    pool = played.words_of(model, functions + played.POOL, seed + 1)
    player, rng = played.Player(model, words, pool), random.Random(f"neurons-{seed}")
    boxes = [played.Neuron(one) for one in player.pool[:functions]]
    asked = [rng.sample(range(len(words)), queries) for _ in boxes]
    fresh = [[i for i in range(len(words)) if i not in set(some)] for some in asked]
    other = [rng.sample([one for one in player.pool if one is not box.rule], played.OF) for box in boxes]

    def score(i: int, said: Any) -> Any:
        return played.score(boxes[i].rule, said, other[i][1:], fresh[i])

    rivals = [
        {"other word": score(i, played.asked_of(player, box.rule, asked[i])), "random word": score(i, other[i][0])}
        for i, box in enumerate(boxes)
    ]
    seen = [[round(float(box.rule.plays[at]), 2) for at in some] for box, some in zip(boxes, asked, strict=True)]
    named = [[words[at] for at in some] for some in asked]
    prompts = [
        "".join(f"{word}: {value:g}. " for word, value in zip(some, values, strict=True)) + "These follow the word"
        for some, values in zip(named, seen, strict=True)
    ]
    return World(
        boxes, named, seen, prompts, _read(player.say), score, rivals, "other word",
        f"the other words that fit {queries} queries best", official="share of neurons", alike="rank correlation",
    )  # fmt: skip
