"""Panels of runs: what the instruments show in a variant less what they show in its twin, paired by seed as losses are.

Held-out documents, as the run's objective tells them, are read in `CHUNKS` groups, so that each reading of a run is a few numbers: intervals are over these
groups, signs over runs. A reading that a model has not (patterns of layers that carry a state) is left out where any arm lacks it, and said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from patchbay.late import late
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError
from patchbay.train._objectives._objective import Document, Objective
from patchbay.train._paired import paired

CHUNKS = 4
REPEATS = 8  # strings said twice, for induction
Readings = dict[str, list[float]]


def read(model: Model, held: Sequence[Document], aim: Objective, n: int) -> Readings:
    """Every reading of the panel, a number for each group of documents; `why` in place of numbers where there is none."""
    texts = [ids for ids in (aim.told(one) for one in held) if len(ids) >= 4][:n]
    groups = [texts[i::CHUNKS] for i in range(CHUNKS) if texts[i::CHUNKS]]
    found: Readings = {}
    for group in groups:
        try:
            rows = late("panel")(model, group, length=max(map(len, group)), repeats=REPEATS).tables["panel"]
        except PatchbayError:
            return {}
        for row in rows:
            found.setdefault(row["reading"], []).append(float(row["value"]))
    return {
        name: values for name, values in found.items() if len(values) == len(groups) and all(map(math.isfinite, values))
    }


def means(panel: Readings) -> dict[str, float]:
    """Each reading of a run as one number."""
    return {name: sum(values) / len(values) for name, values in panel.items()}


def compared(
    panels: Mapping[str, Sequence[Readings]], *, twin: str, nulls: Sequence[str], seeds: Sequence[int]
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each reading and contrast, and what is to be said of them; `panels`: arm -> the readings of each run."""
    every = [one for runs in panels.values() for one in runs]
    names = [name for name in every[0] if all(name in one for one in every)]
    if not names:
        return [], ["the panel was not read: it needs held-out documents of 4 tokens, and attention"]
    rows = []
    for name in names:
        values = {arm: torch.tensor([one[name] for one in runs], dtype=torch.float64) for arm, runs in panels.items()}
        found = paired(values, twin=twin, nulls=nulls, unit="", seeds=seeds)
        for i, condition in enumerate(found.labels_of("condition")):
            row = {key: float(found[key][i]) for key in ("effect", "low", "high", "p")}
            runs = {"above": int(found["above"][i]), "below": int(found["below"][i])}
            rows.append({"reading": name, "condition": condition, **row, **runs})
    missing = sorted({name for one in every for name in one} - set(names))
    notes = [f"panel: {', '.join(missing)} not read in every arm"] if missing else []
    return rows, [*_said(rows, twin, nulls), *_masses(panels), *notes]


def _masses(panels: Mapping[str, Sequence[Readings]]) -> list[str]:
    """Where rows of attention do not sum to 1 in every arm, that its readings are no shares."""
    sums = {arm: [x for one in runs for x in one.get("mass_mean", [])] for arm, runs in panels.items()}
    rows = {arm: sum(some) / len(some) for arm, some in sums.items() if some}
    if all(abs(mean - 1) < 0.01 for mean in rows.values()):
        return []
    said = ", ".join(f"{arm} {mean:.3g}" for arm, mean in rows.items())
    return [
        f"a row of attention sums to {said}: alpha, previous_token and induction are sums of attention there, not shares of a row, and differ by that alone"
    ]


def _said(rows: Sequence[Mapping[str, Any]], twin: str, nulls: Sequence[str]) -> list[str]:
    """Readings that the variant changes by every seed, more than each null arm does."""
    by = {(row["reading"], row["condition"]): row for row in rows}
    told = []
    for (name, condition), row in by.items():
        arm = condition.removesuffix(f" - {twin}")
        if not condition.endswith(f" - {twin}") or arm in nulls or (row["above"] and row["below"]):
            continue
        size = [abs(by[name, f"{null} - {twin}"]["effect"]) for null in nulls]
        if (row["low"] > 0 or row["high"] < 0) and abs(row["effect"]) > max(size, default=0.0):
            told.append(f"{name} {row['effect']:+.3g} ({row['low']:+.3g} to {row['high']:+.3g})")
    lead = "panel, variant - twin, by the same sign in every run, its interval beyond 0 and more than any null arm: "
    return (
        [lead + ", ".join(told)]
        if told
        else ["panel: nothing that differs from the twin by every seed and by more than a null arm"]
    )
