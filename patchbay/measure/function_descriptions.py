"""Function descriptions: how well whoever interprets black boxes says what they do, beside a table of the same queries.

    f(-8) is 3.2. f(0) is 1.1. f(8) is 9.4. f(x) is            answered by an expression: 2.5 if 3 <= x <= 9 else 1.1*x + 2
    f(bodu) is udobudob. f(era) is areare. f(x) is             double(reverse(x))

Functions are drawn by a seed: lines, polynomials, roots, steps, waves and the like (`kind="atomic"`), or two of them added, multiplied or put into one another
("composed"), or these with noise ("noisy"), or a small network fitted to such a one in its place ("approximated"); or two or three edits of a word put into one another ("strings").
In a share of them one interval holds a constant; of words, those of one or two lengths come back as they are. Whoever answers sees `queries` evenly spaced values, or words that
nobody knows. Answers are parsed, never run. Of each function: `per_item` = 1 - FVU at fresh points (0 where it is worse than a constant, or no expression), `null` that of the table of the
queries read between its rows, `official` whether the published error sum |f - g|^2 / sum f^2 at half integers is below .1, `agreement` the share of
fresh points within a tenth of the spread, `corrupted` the same inside the interval, `overlap` of the interval that the answer sets apart with the true one,
`length` of the expression. Of words `official` is the published share of fresh ones that come out exactly, `per_item` that of those that the function changes, `null` the same of the
single edit that fits most queries, `agreement` the share of letters in common. "neurons" are played by the model itself, f(w) = log p(w | the neuron's word) less its mean over words;
an answer is a text, whose neuron the model plays too: `per_item` = 1 - FVU at words that were not asked, `null` the same of the other word that fits the queries best, `official` whether the
answer's neuron goes with the true one more than with those of two other words (a random word does on some), `agreement` the rank correlation.

`official` forgives much: the table "baselines" has what a constant, a line, a polynomial and the table score by either (of words: the word itself, what the nearest query got, and
the best single edit). Higher is better; what is above the null of equal queries is understanding.

Schwettmann et al. 2023, "FIND: A Function Interpretation Benchmark for Evaluating Interpretability Methods" (functions of numbers and of strings, whose edits are our
own choice, and neurons that a language model plays, here by one word each; the model that plays also stands for the judge of three, and no sentence is read).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from patchbay.measure._described import World, of_neurons, of_numbers, of_strings
from patchbay.measure._meter import reading
from patchbay.measure._samples import texts_of
from patchbay.model.model import Model
from patchbay.model.tokens import tokenize
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError

Kind = Literal["atomic", "composed", "noisy", "approximated", "strings", "neurons"]
KINDS = ("atomic", "composed", "noisy", "approximated", "strings", "neurons")
SHARE, NEW, LEAST = "share of the variance", 40, 8


@method(paper="schwettmann2023")
def function_descriptions(
    model: Model,
    *,
    answers: list[str] | None = None,
    kind: Kind = "atomic",
    functions: int = 20,
    queries: int = 9,
    corruption: float = 0.15,
    seed: int = 0,
) -> Result:
    """How much of each function's variance the answers explain, beside a table of the same queries.

    `answers`: expressions by whoever interprets, one for each function in their order (the table "functions" of an earlier call shows the queries);
    without, the model continues the prompt. `kind`: atomic, composed, noisy (composed, with noise of a tenth of the spread in what is seen), approximated (composed, by a network), strings, or neurons.
    `functions`: how many are drawn. `queries`: values of each that are seen. `corruption`: the share of functions with an interval of its own; neurons have none.
    """
    _check(kind, functions, queries, corruption, answers)
    if kind == "neurons":
        world = of_neurons(model, functions, queries, seed)
    else:
        world = (of_strings if kind == "strings" else of_numbers)(kind, functions, queries, corruption, seed)
    said = list(answers) if answers is not None else _generated(model, world.prompts)
    parsed = [world.parse(text) for text in said]
    found = [world.score(i, one) for i, one in enumerate(parsed)]
    columns = {name: [getattr(one, name) for one in found] for name in ("agreement", "corrupted", "overlap")}
    columns = {"official": [one.passes for one in found]} | columns
    columns["length"] = [float(one.length) if one else 0.0 for one in parsed]
    units = {"official": world.official, "length": "parts", "overlap": "share", "agreement": world.alike}
    return reading(
        {"per_item": torch.tensor([one.explained for one in found], dtype=torch.float64)},
        world.unit,
        better="higher",
        null_items=torch.tensor([rival[world.null].explained for rival in world.rivals], dtype=torch.float64),
        more={
            name: (torch.tensor(row, dtype=torch.float64), ("prompt",), units.get(name, world.official))
            for name, row in columns.items()
            if not all(value != value for value in row)  # no function has an interval
        },
        tables={"baselines": _table(world), "functions": _functions(world, said, found)},
        notes=[
            f"{sum(one is not None for one in parsed)} of {functions} answers are expressions; {sum(columns['official']):.3g} pass the published score, of "
            f"{world.told} {sum(rival[world.null].passes for rival in world.rivals):.3g}"
        ],
        seed=seed,
    )


def _check(kind: str, functions: int, queries: int, corruption: float, answers: Sequence[str] | None) -> None:
    if kind not in KINDS or functions < 1 or queries < 2 or not 0 <= corruption <= 1:
        raise PatchbayError(
            f"kind={kind!r} is one of {', '.join(KINDS)}; functions={functions} 1 or more, queries={queries} 2 or more, "
            f"corruption={corruption} a share"
        )
    if answers is not None and len(answers) != functions:
        raise PatchbayError(f"{len(answers)} answers for {functions} functions: one each, in their order")


def _generated(model: Model, prompts: Sequence[str]) -> list[str]:
    """How the model goes on, up to the end of a line or sentence."""
    rows = [list(ids) for ids in tokenize(model._need_tokenizer(), list(prompts))]
    longest = max(map(len, rows))
    room = NEW if model.longest_prompt is None else min(NEW, model.longest_prompt - longest)
    if room < LEAST:
        raise PatchbayError(
            f"the longest prompt has {longest} tokens and an answer follows, where this model reads {model.longest_prompt}: ask fewer queries"
        )
    texts = texts_of(model, model.generate(rows, room, new_only=True))
    return [text.strip().split("\n")[0].removesuffix(".") for text in texts]


def _table(world: World) -> list[dict[str, Any]]:
    """What needs no understanding, by the published score and by ours."""
    return [
        {
            "baseline": name,
            "official": float(np.mean([one[name].passes for one in world.rivals])),
            "explained": float(np.mean([one[name].explained for one in world.rivals])),
            "fvu_below_.1": float(np.mean([one[name].fvu < 0.1 for one in world.rivals])),
            "agreement": float(np.mean([one[name].agreement for one in world.rivals])),
        }
        for name in world.rivals[0]
    ]


def _functions(world: World, said: Sequence[str], found: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        {
            "rule": box.rule.text,
            "low": None if box.interval is None else box.interval[0],
            "high": None if box.interval is None else box.interval[1],
            "answer": text,
            "explained": one.explained,
            "prompt": prompt,
            "asked": list(asked),
            "values": list(values),
        }
        for box, prompt, text, one, asked, values in zip(
            world.boxes, world.prompts, said, found, world.asked, world.seen, strict=True
        )
    ]
