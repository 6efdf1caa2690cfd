"""Function descriptions: how well whoever interprets black boxes says what they do, beside a table of the same queries.

    f(-8) is 3.2. f(0) is 1.1. f(8) is 9.4. f(x) is            answered by an expression: 2.5 if 3 <= x <= 9 else 1.1*x + 2

Functions are drawn by a seed: lines, polynomials, roots, steps, waves and the like (`kind="atomic"`), or two of them added, multiplied or put into one another
("composed"), or these with noise ("noisy"); in a share of them one interval holds a constant. Whoever answers sees `queries` evenly spaced values. Answers are parsed,
never run. Of each function: `per_item` = 1 - FVU at fresh points (0 where it is worse than a constant, or no expression), `null` that of the table of the
queries read between its rows, `official` whether the published error sum |f - g|^2 / sum f^2 at half integers is below .1, `agreement` the share of
fresh points within a tenth of the spread, `corrupted` the same inside the interval, `overlap` of the interval that the answer sets apart with the true one,
`length` of the expression.

`official` forgives much: the table "baselines" has what a constant, a line, a polynomial and the table score by either. Higher is better; what is above the
table of equal queries is understanding.

Schwettmann et al. 2023, "FIND: A Function Interpretation Benchmark for Evaluating Interpretability Methods" (numeric functions; functions of strings and neurons
that a language model plays are not here, nor answers in words, which a judge would have to read).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from patchbay.measure._black_boxes import HIGH, LOW, BlackBox, Score, baselines, make, score
from patchbay.measure._expressions import Expression, parse
from patchbay.measure._meter import reading
from patchbay.measure._samples import texts_of
from patchbay.model.model import Model
from patchbay.model.tokens import tokenize
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError

Kind = Literal["atomic", "composed", "noisy"]
NOISE = 0.1  # of a noisy function, in units of its spread
SHARE, NEW, LEAST = "share of the variance", 40, 8
WORST = Score(float("inf"), float("inf"), 0.0, 0.0, 0.0)


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
    without, the model continues the prompt. `kind`: atomic, composed, or noisy (composed, with noise of a tenth of the spread in what is seen).
    `functions`: how many are drawn. `queries`: values of each that are seen. `corruption`: the share of functions with an interval of its own.
    """
    _check(kind, functions, queries, corruption, answers)
    boxes = [
        make("atomic" if kind == "atomic" else "composed", 10_000 * seed + i, NOISE * (kind == "noisy"), corruption)
        for i in range(functions)
    ]
    asked = np.linspace(LOW, HIGH, queries)
    seen = [box(asked).round(3) + 0.0 for box in boxes]
    prompts = [written(asked, values) for values in seen]
    said = list(answers) if answers is not None else _generated(model, prompts)
    parsed = [_parsed(text) for text in said]
    found = [_score(box, one, asked, seed) for box, one in zip(boxes, parsed, strict=True)]
    rivals = [_rivals(box, asked, values, seed) for box, values in zip(boxes, seen, strict=True)]
    columns = {
        "official": [one.passes for one in found],
        "agreement": [one.agreement for one in found],
        "corrupted": [one.corrupted for one in found],
    }
    columns |= {
        "overlap": [one.overlap for one in found],
        "length": [float(one.length) if one else 0.0 for one in parsed],
    }
    units = {"official": "share of functions", "length": "parts", "overlap": "share"}
    return reading(
        {"per_item": torch.tensor([one.explained for one in found], dtype=torch.float64)},
        SHARE,
        better="higher",
        null_items=torch.tensor([rival["table"].explained for rival in rivals], dtype=torch.float64),
        more={
            name: (torch.tensor(row, dtype=torch.float64), ("prompt",), units.get(name, "share of points"))
            for name, row in columns.items()
            if not all(value != value for value in row)  # no function has an interval
        },
        tables={"baselines": _table(rivals), "functions": _functions(boxes, prompts, said, found, asked, seen)},
        notes=[
            f"{sum(one is not None for one in parsed)} of {functions} answers are expressions; {sum(columns['official']):.0f} pass the published score, of the tables "
            f"of {queries} values {sum(rival['table'].passes for rival in rivals):.0f}"
        ],
        seed=seed,
    )


def _check(kind: str, functions: int, queries: int, corruption: float, answers: Sequence[str] | None) -> None:
    if kind not in ("atomic", "composed", "noisy") or functions < 1 or queries < 2 or not 0 <= corruption <= 1:
        raise PatchbayError(
            f"kind={kind!r} is atomic, composed or noisy; functions={functions} 1 or more, queries={queries} 2 or more, "
            f"corruption={corruption} a share"
        )
    if answers is not None and len(answers) != functions:
        raise PatchbayError(f"{len(answers)} answers for {functions} functions: one each, in their order")


def written(asked: Any, values: Any) -> str:
    """What is shown of a function."""
    return "".join(f"f({x:g}) is {y:g}. " for x, y in zip(asked, values, strict=True)) + "f(x) is"


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


def _parsed(text: str) -> Expression | None:
    try:
        return parse(text)
    except PatchbayError:
        return None


def _score(box: BlackBox, said: Expression | None, asked: Any, seed: int) -> Score:
    if said is None:
        nothing = float("nan") if box.interval is None else 0.0
        return Score(WORST.official, WORST.fvu, 0.0, nothing, nothing)
    return score(box, said, asked, said.interval, seed)


def _rivals(box: BlackBox, asked: Any, values: Any, seed: int) -> dict[str, Score]:
    return {name: score(box, said, asked, None, seed) for name, said in baselines(asked, values).items()}


def _table(rivals: Sequence[dict[str, Score]]) -> list[dict[str, Any]]:
    """What needs no understanding, by the published score and by ours."""
    return [
        {
            "baseline": name,
            "official": float(np.mean([one[name].passes for one in rivals])),
            "explained": float(np.mean([one[name].explained for one in rivals])),
            "fvu_below_.1": float(np.mean([one[name].fvu < 0.1 for one in rivals])),
            "agreement": float(np.mean([one[name].agreement for one in rivals])),
        }
        for name in rivals[0]
    ]


def _functions(
    boxes: Sequence[BlackBox],
    prompts: Sequence[str],
    said: Sequence[str],
    found: Sequence[Score],
    asked: Any,
    seen: Sequence[Any],
) -> list[dict[str, Any]]:
    return [
        {
            "rule": box.rule.text,
            "low": None if box.interval is None else box.interval[0],
            "high": None if box.interval is None else box.interval[1],
            "answer": text,
            "explained": one.explained,
            "prompt": prompt,
            "asked": [float(x) for x in asked],
            "values": [float(y) for y in values],
        }
        for box, prompt, text, one, values in zip(boxes, prompts, said, found, seen, strict=True)
    ]
