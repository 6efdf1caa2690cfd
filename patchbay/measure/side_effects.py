"""Side effects: any meters with and without a knob, on the same items, against random knobs.

    difference = value under the knob - value without,    item by item where the value is made of items

Each meter is read three ways: as the model is, under the knob, and under `draws` random knobs (random directions of the same norm,
or random parts of the same kind), on the same items and the same sample seeds. `low` and `high`: 95 % bootstrap of the difference over items. `p`: the two readings
exchanged item by item at random (sign flips where the value is a mean); `q`: Benjamini-Hochberg over the meters. `p_draw`: the
knob's place among the random ones, (1 + as large ones) / (1 + different draws). Verdicts:

    more than random    q <= 0.05 and p_draw <= 0.05
    changed             q <= 0.05
    unchanged           the whole interval lies within the margin that was given
    not shown           none of these: too little is known to say either

A p above 0.05 is no sign of "no effect"; only a margin is. The interval is over items and takes the random knobs as they were
drawn: a knob may differ clearly from their mean while one of five random heads does the same, hence a place and not a mean. Fewer
than 19 different random knobs cannot show 0.05. The model as it is runs once; knobs start from the first layer that they edit.

Liang et al. 2022, "Holistic Evaluation of Language Models": beside what a change is for, everything else is measured too. It says
nothing of meters that were not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits.edit import Edit
from patchbay.knobs.knob import Knob
from patchbay.measure import _estimates as estimates
from patchbay.measure._controls import random_knobs
from patchbay.measure._items import resolved
from patchbay.measure._meter import MADE, ingredients_of
from patchbay.measure._runs import shared
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.replay import find_method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError

LEVEL = 0.05
ROUNDING = 1e-5  # of the largest number of an item: runs from different layers on differ by less


class Call(NamedTuple):
    """A meter as it is called: its name among the results, the method, its items and options."""

    name: str
    meter: Callable[..., Result]
    items: Any
    options: dict[str, Any]


class Seen(NamedTuple):
    """What a meter said under one condition: its ingredients [item, ingredient], how the value is made, and what it was read with."""

    items: Tensor
    made: str
    better: str
    unit: str


@method(paper="liang2022")
def side_effects(
    model: Model,
    knob: Knob,
    meters: dict[str, Any] | list[str],
    *,
    draws: int = 19,
    margin: float | dict[str, float] | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """What a knob does to each of several meters: the difference with its interval, its place among random knobs, and a verdict.

    Main variable `difference` [condition], one step a meter, with `low`, `high`, `p`, `q`, `without`, `under`, `random` [draw, condition] the
    differences of the random knobs, and `p_draw`. The table `meters` has the columns that print.

    `knob`: the knob that is turned, at its strength. `meters`: name -> {"meter": NAME, "items": ITEMS, options}; "meter" may be left out
    where the name is a meter's, and a Task or a file of it may stand for the whole, as in "text_loss=stories.txt" or
    "answer_choices=facts_in_context:n=300". `draws`: random knobs beside it. `margin`: how small a difference counts as none, in the
    meter's unit, one number or one for each meter; without, nothing is called unchanged.
    """
    if draws < 0:
        raise PatchbayError(f"draws={draws}: 0 or more random knobs")
    knob.check(model)
    calls = _calls(model, meters, seed, batch_size)
    margins = _margins(calls, margin)
    edits = _checked(model, knob)
    drawn, said = _drawn(model, knob, draws, seed)
    seen = {call.name: _readings(model, call, [[], edits, *drawn]) for call in calls}
    found = {name: compared(readings[0], readings[1], seed) for name, readings in seen.items()}
    random = {name: [_value(one) - _value(readings[0]) for one in readings[2:]] for name, readings in seen.items()}
    return _result(calls, seen, found, random, margins, said)


class Compared(NamedTuple):
    """A difference with its interval and p."""

    difference: float
    low: float
    high: float
    p: float


def compared(without: Seen, under: Seen, seed: int, n: int = 10_000) -> Compared:
    """Two readings of the same items, by what the value is made of; `n` random flips of signs."""
    a, b = without.items, under.items
    if a.shape != b.shape:
        raise PatchbayError(
            f"a meter gave {len(a)} items without the knob and {len(b)} under it: they cannot be compared item by item"
        )
    floor = ROUNDING * float(a.nan_to_num(0.0).abs().max())
    gap = torch.where((b - a).abs() <= floor, 0.0, b - a)
    if without.made == "mean":
        value, low, high = (float(x) for x in maths.intervals(gap[:, :1], seed=seed))
        p = float(maths.sign_flip_p(gap[:, 0:1], n=n, seed=seed)[0])
    elif without.made == "ratio" and torch.equal(a[:, 1], b[:, 1]):
        value, low, high = (float(x) for x in maths.intervals(gap[:, :1], a[:, 1], seed=seed))
        p = float(maths.sign_flip_p(gap[:, 0:1], n=n, seed=seed)[0])
    else:
        make = MADE[without.made]
        value, low, high = estimates.resampled(make, a + gap, less=a, seed=seed)
        p = estimates.exchanged(make, a, a + gap, seed=seed)
    return Compared(value, low, high, p)


def verdict(q: float, p_draw: float, low: float, high: float, margin: float | None) -> str:
    """What may be said of a difference; within a margin only where the whole interval is."""
    within = margin is not None and -margin <= low and high <= margin
    if q <= LEVEL:
        name = "more than random" if p_draw <= LEVEL else "changed"
        return f"{name}, within the margin" if within else name
    return "unchanged" if within else "not shown"


# --- the meters ---------------------------------------------------------------------------------------


def _calls(model: Model, meters: Any, seed: int, batch_size: int) -> list[Call]:
    given = _named(meters) if isinstance(meters, list | tuple) else meters
    if not isinstance(given, Mapping) or not given:
        raise PatchbayError(
            'meters are {"text_loss": {"items": ...}, ...} or ["text_loss=FILE", ...], and at least one'
        )
    calls = []
    for name, what in given.items():
        told = dict(what) if isinstance(what, Mapping) else {"items": what}
        meter = find_method(f"measure.{str(told.pop('meter', name)).replace('-', '_')}")
        if "items" not in told:
            raise PatchbayError(f"meter {name!r} has no items: a Task, a list, or a file")
        items = resolved(model, told.pop("items"))
        calls.append(Call(str(name), meter, items, {"seed": seed, "batch_size": batch_size} | told))
    return calls


def _named(listed: Sequence[Any]) -> dict[str, Any]:
    """`NAME=ITEMS` as a mapping; a piece whose name is no meter belongs to the items before it, as `seed=5` of a task does."""
    found: dict[str, Any] = {}
    last = ""
    for piece in listed:
        name, equals, items = str(piece).partition("=")
        if not equals:
            raise PatchbayError(f"meters are written NAME=ITEMS, got {piece!r}")
        if last and not _is_meter(name) and isinstance(found[last], str):
            found[last] += f",{piece}"
            continue
        last = name.strip().replace("-", "_")
        found[last] = items.strip()
    return found


def _is_meter(name: str) -> bool:
    try:
        find_method(f"measure.{name.strip().replace('-', '_')}")
    except PatchbayError:
        return False
    return True


def _margins(calls: Sequence[Call], margin: Any) -> dict[str, float | None]:
    names = [call.name for call in calls]
    if isinstance(margin, Mapping):
        unknown = [name for name in margin if name not in names]
        if unknown or any(not value > 0 for value in margin.values()):
            raise PatchbayError(f"margin={dict(margin)}: a number above 0 for some of {', '.join(names)}")
        return {name: margin.get(name) for name in names}
    if margin is not None and not margin > 0:
        raise PatchbayError(f"margin={margin}: a number above 0, in the meter's unit")
    return dict.fromkeys(names, margin)


# --- the conditions -----------------------------------------------------------------------------------


def _checked(model: Model, knob: Knob) -> list[Edit]:
    for edit in knob.edits:
        model.require(edit.port)
        if edit.by_row:
            raise PatchbayError(
                f"{edit} treats prompts by their place in a batch, and meters run their items in batches of their own: give a knob that does not"
            )
    return knob.edits_at()


def _drawn(model: Model, knob: Knob, draws: int, seed: int) -> tuple[list[list[Edit]], list[str]]:
    """The edits of different random knobs, and what is to be said of them."""
    if not draws:
        return [], ["no random knobs were tried (draws=0): whether others do the same is not known"]
    made, said = random_knobs(model, knob, draws, seed)
    different: list[list[Edit]] = []
    for other in made:
        edits = other.edits_at()
        if edits not in different:
            different.append(edits)
    notes = [said]
    if different and len(different) < draws:
        notes.append(f"only {len(different)} of them are different: the model has no more parts of that kind")
    if different and 1 / (1 + len(different)) > LEVEL:
        notes.append(
            f"with {len(different)} random knobs p_draw is at least {1 / (1 + len(different)):.2g}, whatever the knob: none is shown to do more than they do"
        )
    return different, notes


def _readings(model: Model, call: Call, conditions: Sequence[list[Edit]]) -> list[Seen]:
    """A meter under each list of edits, without any first; what lies below an edit is run once."""
    found = []
    with shared():
        for edits in conditions:
            with model.edited(*edits) if edits else nullcontext():
                result = call.meter(model, call.items, **call.options)
            _, items, better = ingredients_of(result, call.name)
            found.append(Seen(items, str(result.tables["meter"][0]["made"]), better, result.unit))
    return found


def _value(seen: Seen) -> float:
    return MADE[seen.made](seen.items)


# --- the Result ---------------------------------------------------------------------------------------


def _result(
    calls: Sequence[Call],
    seen: Mapping[str, Sequence[Seen]],
    found: Mapping[str, Compared],
    random: Mapping[str, Sequence[float]],
    margins: Mapping[str, float | None],
    said: Sequence[str],
) -> Result:
    names = [call.name for call in calls]
    q = dict(
        zip(
            names,
            maths.benjamini_hochberg(torch.tensor([found[name].p for name in names], dtype=torch.float64)).tolist(),
            strict=True,
        )
    )
    n_draws = len(random[names[0]])
    rows, numbers = [], []
    for name in names:
        one, (without, under, *_) = found[name], seen[name]
        p_draw = (
            maths.draws_p(one.difference, torch.tensor(random[name], dtype=torch.float64), two_sided=True)
            if n_draws
            else float("nan")
        )
        numbers.append([one.difference, one.low, one.high, one.p, q[name], p_draw, _value(without), _value(under)])
        rows.append({
            "meter": name, "n": len(without.items), "without": _value(without), "under": _value(under), "difference": one.difference,
            "95 %": f"{one.low:+.3g} to {one.high:+.3g}", "q": q[name],
            **({"random": f"{min(random[name]):+.3g} to {max(random[name]):+.3g}", "p_draw": p_draw} if n_draws else {}),
            "better": without.better, "unit": without.unit, "verdict": verdict(q[name], p_draw, one.low, one.high, margins[name]),
        })  # fmt: skip
    columns = torch.tensor(numbers, dtype=torch.float64).T
    units = ("each meter's own unit",) * 3 + ("probability",) * 3 + ("each meter's own unit",) * 2
    keys = ("difference", "low", "high", "p", "q", "p_draw", "without", "under")
    variables: dict[str, Any] = {
        key: (column, ("condition",), unit)
        for key, column, unit in zip(keys, columns, units, strict=True)
        if not bool(column.isnan().all())
    }
    if n_draws:
        variables["random"] = (
            torch.tensor([random[name] for name in names], dtype=torch.float64).T,
            ("draw", "condition"),
            "each meter's own unit",
        )
    notes = [*said, *_unproved(rows)]
    return Result(variables, coords={"condition": names}, tables={"meters": rows}, notes=notes)


def _unproved(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """That what was not shown may still be there."""
    names = [str(row["meter"]) for row in rows if row["verdict"] == "not shown"]
    return (
        [
            f"{', '.join(names)}: no change was shown, which is not that there is none; margin= says how small a change would count as none"
        ]
        if names
        else []
    )
