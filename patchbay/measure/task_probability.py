"""Task probability: whether answers are right where the output is likely, rather than where the task is easy ("embers of autoregression").

    logit P(right) = b0 + b_output ln p(output) + b_input ln p(input) + b_share ln share(task)

a logistic fit to standardised inputs (ridge 1e-3). `value` is b_output, with its interval over items; p from `DRAWS` deals of what was right to the items,
and `null` is 0. ln p of a text is the sum over its tokens after the start token. `coefficient` [condition] has all of them; table `terciles` the
accuracy by how likely the output is. Right is what is likeliest token by token, or of the choices where a row has some. Tasks may be made from
texts: shift_3 asks for the text behind a cipher, pig_latin, reversal, article_swap, acronym and counting likewise.

McCoy et al. 2023, "Embers of Autoregression". Neither way is better: a positive coefficient is the ember. Probabilities are the model's own, so that they
tell what it finds likely; under a knob they move with it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.measure import _estimates as estimates
from patchbay.measure._answers import scores
from patchbay.measure._asked import hit, place_of
from patchbay.measure._ciphers import ciphered
from patchbay.measure._items import resolved, rows_of, texts_only
from patchbay.measure._meter import reading
from patchbay.measure._runs import comparing
from patchbay.measure._texts import losses, whole_texts
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.table import Row

DRAWS = 500
LEAST = 12  # items
UNIT = "logits per standard deviation"


@method(paper="mccoy2023")
def task_probability(
    model: Model,
    items: str | list[dict[str, Any]],
    *,
    frame: str = "Input: {}\nOutput:",
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """How much surer a model is to be right where the output is likely, beside what the input's probability and the task's share do.

    `right`, `output`, `input` (and `share`) [prompt]; `coefficient` [condition]; `accuracy`; table `terciles`.

    `items`: rows with the fields prompt and answer, and where wanted choices, input and output (texts whose probability counts; without, prompt and answer) and
    share (how common the task is); or rows with task and text. `frame`: the prompt of rows with a task, {} where its input stands.
    """
    rows, said = rows_of(resolved(model, items), (), ("prompt", "answer", "choices", "input", "output", "share", "task", "text"), lists=())  # fmt: skip
    if len(rows) < LEAST or frame.count("{}") != 1:
        raise PatchbayError(f"{len(rows)} items and frame={frame!r}: {LEAST} items or more, and {{}} once in the frame")
    asked = [_asked(row, frame) for row in rows]
    shares = [row.values.get("share") for row in rows]
    if any(x is None for x in shares) and any(x is not None for x in shares):
        raise PatchbayError("share is given for every item or for none")
    right = _right(model, rows, asked, batch_size)
    columns = {name: _logp(model, [one[name] for one in asked], [row.where for row in rows], batch_size) for name in ("output", "input")}  # fmt: skip
    if shares[0] is not None:
        columns["share"] = torch.tensor([_share(x, row) for x, row in zip(shares, rows, strict=True)]).log()
    table = torch.stack([right, *columns.values()], 1)
    fit = estimates.standardised_logistic(table)
    interval = _interval(table, seed) if not comparing() else None
    value = _first(table)
    p = maths.draws_p(value, _dealt(table, seed), two_sided=True) if value == value and not comparing() else None
    names = list(columns)
    coefficients = [{"of": name, "coefficient": float(x)} for name, x in zip(names, fit[1:], strict=True)]
    notes = [*said, "probabilities are the model's own"]
    if value != value:
        notes.append("all items are right, or none is: there is nothing to fit")
    return reading(
        {"right": right, **columns},
        UNIT,
        better="neither",
        made="coefficient",
        null=0.0,
        p=p,
        interval=interval,
        more={"accuracy": (right.mean(), (), "share of items")},
        units={"right": "right", "output": "nats", "input": "nats", "share": "ln share"},
        tables={"coefficients": coefficients, "terciles": _terciles(right, columns["output"])},
        notes=notes,
        seed=seed,
    )


def _first(items: Tensor) -> float:
    return float(estimates.standardised_logistic(items)[1])


def _asked(row: Row, frame: str) -> dict[str, str]:
    """The prompt, the answer, and the texts whose probability counts."""
    values = row.values
    if "task" in values and "text" in values:
        given, answer = ciphered(str(values["text"]), str(values["task"]))
        return {"prompt": frame.replace("{}", given), "answer": f" {answer}", "input": given, "output": f" {answer}"}
    lacking = next((name for name in ("prompt", "answer") if name not in values), None)
    if lacking:
        raise PatchbayError(f"{row.where} lacks the field {lacking!r}: prompt and answer, or task and text")
    texts_only([row], ("prompt", "input", "output"))
    choices = values.get("choices")
    answer = values["answer"] if choices is None else choices[place_of(values["answer"], choices, row.where)]
    return {"prompt": values["prompt"], "answer": answer, "input": values.get("input", values["prompt"]), "output": values.get("output", str(answer))}  # fmt: skip


def _right(model: Model, rows: list[Row], asked: list[dict[str, str]], batch_size: int) -> Tensor:
    """1 where the answer is the best of the choices, or without any the likeliest text token by token, [item]."""
    choices = [row.values.get("choices") or [one["answer"]] for row, one in zip(rows, asked, strict=True)]
    found = scores(model, [one["prompt"] for one in asked], choices, where=[row.where for row in rows], boundary="back_up", batch_size=batch_size)  # fmt: skip
    place = torch.tensor([list(each).index(one["answer"]) for each, one in zip(choices, asked, strict=True)])
    alone = torch.tensor([len(each) == 1 for each in choices])
    return torch.where(alone, found.greedy[:, 0].double(), hit(found.logp, place))


def _logp(model: Model, texts: list[str], where: list[str], batch_size: int) -> Tensor:
    return -torch.stack([loss.sum() for loss in losses(model, whole_texts(model, texts, where), batch_size=batch_size)])


def _share(given: Any, row: Row) -> float:
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 < value <= 1:
        raise PatchbayError(f"{row.where}: share lies in (0, 1], got {given!r}")
    return value


def _interval(table: Tensor, seed: int) -> maths.Interval:
    """The output's coefficient and its percentile bootstrap over items; draws that are all right, or none, are left out."""
    drawn = torch.randint(len(table), (DRAWS, len(table)), generator=torch.Generator().manual_seed(seed))
    found = estimates.standardised_logistic(table[drawn])[:, 1]
    ends = torch.nanquantile(found, torch.tensor([0.025, 0.975], dtype=torch.float64))
    return maths.Interval(_first(table), *ends.tolist())


def _dealt(table: Tensor, seed: int) -> Tensor:
    """The coefficient when what was right is dealt to the items at random, [draw]."""
    order = torch.rand(DRAWS, len(table), generator=torch.Generator().manual_seed(seed)).argsort(1)
    dealt = torch.cat([table[order, :1], table[:, 1:].expand(DRAWS, -1, -1)], -1)
    return estimates.standardised_logistic(dealt)[:, 1]


def _terciles(right: Tensor, output: Tensor) -> list[dict[str, Any]]:
    order = output.argsort(stable=True)
    return [
        {"output": name, "n": len(at), "ln p": float(output[at].mean()), "accuracy": float(right[at].mean())}
        for name, at in zip(("unlikely", "middling", "likely"), order.tensor_split(3), strict=True)
    ]
