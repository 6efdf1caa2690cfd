"""What every meter returns: one published quantity of a model, with its interval, its null and one number per item.

Variables: `value`, the quantity; `low` and `high`, its 95 % interval over the items (the largest units that are exchangeable); `null`, what
a model without the signal scores on the same items; `p`, where the two can be compared; and the ingredients by item, [prompt], in the
order of the items. The table `meter` says which way is better, and how the value is made from the ingredients: by
`MADE`, a small table of estimates, so that two readings of the same items can be compared item by item.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.measure import _estimates as estimates
from patchbay.measure._runs import comparing
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError

BETTER = ("higher", "lower", "neither")


def _mean(items: Tensor) -> float:
    return float(items[:, 0].nanmean())


def _ratio(items: Tensor) -> float:
    below = float(items[:, 1].nansum())
    return float(items[:, 0].nansum()) / below if below else float("nan")


MADE: dict[str, Callable[[Tensor], float]] = {  # of [item, ingredient]
    "mean": _mean,
    "ratio": _ratio,
    "auroc": lambda items: estimates.auroc(items[:, 0], items[:, 1]),
    "calibration_error": lambda items: estimates.calibration_error(items[:, 0], items[:, 1]),
    "spearman": lambda items: maths.spearman(items[:, 0], items[:, 1]),
    "coefficient": estimates.coefficient,
}


def reading(
    ingredients: Mapping[str, Tensor],
    unit: str,
    *,
    better: str,
    made: str = "mean",
    null: float | None = None,
    null_items: Tensor | None = None,
    p: float | None = None,
    interval: maths.Interval | None = None,
    groups: Sequence[Hashable] | None = None,
    more: Mapping[str, tuple[Any, Sequence[str], str]] | None = None,
    units: Mapping[str, str] | None = None,
    tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    notes: Sequence[str] = (),
    seed: int = 0,
) -> Result:
    """The Result of a meter: `ingredients` by name, each [item], of which `made` makes the value. `null_items` [item]: what a model
    without the signal scores on each item; the null is then their mean and p that of the differences, by sign flips."""
    if better not in BETTER:
        raise PatchbayError(f"better={better!r}: {', '.join(BETTER)}")
    columns = {name: torch.as_tensor(values).double().cpu() for name, values in ingredients.items()}
    items = torch.stack(list(columns.values()), 1)  # [item, ingredient]
    if comparing():
        interval, null_items, p = maths.Interval(MADE[made](items), float("nan"), float("nan")), None, None
    if interval is None:
        plain = made == "mean" and groups is None and not items.isnan().any()
        interval = (
            maths.bootstrap_interval(items[:, 0], seed=seed)
            if plain
            else estimates.resampled(MADE[made], items, groups=groups, seed=seed)
        )
    said = [f"better: {better}"]
    if len(items) < 2:
        said.append("one item has no interval")
    numbers = {"value": interval.mean, "low": interval.low, "high": interval.high}
    if null_items is not None:
        null = float(null_items.double().nanmean())
        p = float(maths.sign_flip_p((items[:, 0] - null_items.double())[:, None], seed=seed)[0]) if p is None else p
    numbers |= {name: number for name, number in (("null", null), ("p", p)) if number is not None}
    kept: dict[str, tuple[Any, Sequence[str], str]] = {}
    for name, number in numbers.items():
        if number == number or name == "value":
            kept[name] = (torch.tensor(number, dtype=torch.float64), (), "probability" if name == "p" else unit)
    kept |= {name: (values, ("prompt",), (units or {}).get(name, unit)) for name, values in columns.items()}
    kept |= {
        name: (torch.tensor(x, dtype=torch.float64) if isinstance(x, float) else x, axes, its)
        for name, (x, axes, its) in (more or {}).items()
    }
    table = [{"better": better, "made": made, "of": ",".join(columns)}]
    return Result(kept, tables={"meter": table, **(tables or {})}, notes=[*said, *notes])


def ingredients_of(result: Result, name: str) -> tuple[Callable[[Tensor], float], Tensor, str]:
    """How a meter's value is made, the ingredients [item, ingredient] and which way is better. Raises PatchbayError for a Result of no meter."""
    rows = result.tables.get("meter")
    if not rows or rows[0].get("made") not in MADE:
        raise PatchbayError(
            f"meter {name!r} returns no numbers by item (no `per_item`), so two readings of it cannot be compared; a meter of patchbay.measure does"
        )
    row = rows[0]
    return MADE[row["made"]], torch.stack([result[one].double() for one in row["of"].split(",")], 1), str(row["better"])
