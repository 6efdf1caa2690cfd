"""What a survey found, put together: each head's score and adjusted p in each role, how roles agree, what knockouts cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.find._statistics import student_p
from patchbay.model.model import Model
from patchbay.results.result import Result
from patchbay.signal.port import Part

KNOCKOUT = (
    ("knockout", "difference", "the task's unit"),
    ("knockout_low", "difference_low", "the task's unit"),
    ("knockout_high", "difference_high", "the task's unit"),
    ("knockout_p", "p", "probability"),
)


def adjusted(result: Result) -> Tensor:
    """Adjusted p of every head [layer, head]: the finder's own, or Student's test over prompts of its score against its null; NaN without."""
    if "p_adjusted" in result and result["p_adjusted"].shape == result.values.shape:
        return result["p_adjusted"].double()
    if "standard_error" not in result:
        return torch.full_like(result.values, torch.nan, dtype=torch.float64)
    null = next((result[name].double() for name in ("null_mean", "uniform") if name in result), torch.zeros(()))
    z = (result.values.double() - null) / result["standard_error"].double()
    one_sided = "null_mean" in result or "uniform" in result
    n_prompts = len((result.provenance.get("task") or {}).get("clean", ()))
    if n_prompts < 2:  # nothing says how many were averaged: no p
        return torch.full_like(z, torch.nan)
    p = student_p(z, torch.tensor(n_prompts - 1.0))
    p = torch.where(z > 0, p / 2.0, 1.0 - p / 2.0) if one_sided else p
    flat, seen = p.flatten(), ~p.flatten().isnan()
    flat[seen] = maths.benjamini_hochberg(flat[seen])
    return flat.view(p.shape)


def evidence(
    model: Model,
    found: Mapping[str, Result],
    curves: Mapping[str, Result],
    others: list[dict[str, Any]],
    lacking: list[dict[str, str]],
) -> Result:
    """The Result of a survey: what `find_all` documents, from each role's Result and curve, and the lines of the others."""
    heads = [Part(layer, "head", head) for layer in range(model.n_layers) for head in range(model.n_heads(layer))]
    pick = (torch.tensor([h.layer for h in heads]), torch.tensor([h.index for h in heads]))
    score = torch.stack([result.values.double()[pick] for result in found.values()])  # [role, head]
    p = torch.stack([adjusted(result)[pick] for result in found.values()])
    names = list(found)
    agreement = torch.tensor([[maths.spearman(a, b) for b in score] for a in score], dtype=torch.float64)
    grid = ("condition", "part")
    variables: dict[str, Any] = {
        "evidence": (-p.clamp(min=1e-12).log10(), grid, "-log10 of adjusted p"),
        "score": (score, grid, "each role's own unit"),
        "p_adjusted": (p, grid, "probability"),
        "agreement": (agreement, ("condition", "choice"), "Spearman's correlation over heads"),
    }
    coords: dict[str, Any] = {"condition": names, "choice": names}
    if curves:
        coords["n_parts"] = next(iter(curves.values())).labels_of("n_parts")
        none = torch.full((len(coords["n_parts"]),), torch.nan)
        for new, old, unit in KNOCKOUT:
            rows = [curves[name][old] if name in curves else none for name in names]
            variables[new] = (torch.stack([row.double() for row in rows]), ("condition", "n_parts"), unit)
    return Result(
        variables,
        coords=coords,
        parts=heads,
        tables={"roles": _best(found), "knockout": _knockouts(curves), "others": others, "not run": lacking},
        notes=_notes(found, curves),
    )


def _best(found: Mapping[str, Result], n: int = 3) -> list[dict[str, Any]]:
    """The first heads of each role."""
    rows = []
    for name, result in found.items():
        p = adjusted(result)
        for part in result.top(n):
            place = (part.layer, part.index)
            value, of = float(result.values[place]), float(p[place])
            rows.append({"role": name, "head": str(part), "score": value, "unit": result.unit, "p_adjusted": of})
    return rows


def _knockouts(curves: Mapping[str, Result]) -> list[dict[str, Any]]:
    """The end of each joint curve: what the first heads cost more than random heads, together."""
    rows = []
    for name, curve in curves.items():
        task = curve.provenance.get("task") or {}
        ends = {key: float(curve[key][-1]) for key in ("effect", "null_mean", "difference_low", "difference_high", "p")}
        size = curve.labels_of("n_parts")[-1]
        rows.append({"role": name, "task": task.get("name", ""), "heads": size, **ends, "unit": curve.unit})
    return rows


def _notes(found: Mapping[str, Result], curves: Mapping[str, Result]) -> list[str]:
    sure = {name: int((adjusted(result) <= 0.05).sum()) for name, result in found.items()}
    none = [name for name, result in found.items() if adjusted(result).isnan().all()]
    notes = ["heads at adjusted p <= 0.05: " + ", ".join(f"{name} {n}" for name, n in sure.items() if name not in none)]
    if none:
        notes.append(f"no null, so no p: {', '.join(none)}")
    proved = [name for name, curve in curves.items() if bool((curve["p_adjusted"] <= 0.05).any())]
    if curves:
        notes.append(
            f"heads that cost more together than random heads (adjusted p <= 0.05 at some size): {', '.join(proved) or 'of no role'}; "
            "a score is not a cause"
        )
    return notes
