"""Compare: several knobs turned on the same prompts, side by side: what each does, what it costs, and how far each may be turned.

Each knob's curve is that of `measure.dose_response`, with the same strengths, prompts, neutral texts, cap and seed: effect on the score
by strength, divergence and loss on neutral text, fluency of what it writes, random knobs beside it, and one strength recommended or none.
No prompt on which any of the knobs was fitted is used; where one of them leads from a task's twins to its prompts, all are measured
on the twins. What a recommended strength does is reported of prompts and texts that chose nothing.

    strength   that is recommended, or none
    effect     at that strength, on the prompts that chose nothing, with its interval
    KL         at that strength, on the texts that chose nothing, in nats per token
    own loss   of what it writes at that strength, under the model as it is, in nats per token
    verdict    whether that effect, and the one beyond random knobs, stay on one side of 0 with their intervals
    random     the lowest and highest effect of random knobs at that strength

Where none is recommended, `best` is the strength of largest effect whose divergence is within the cap, on all prompts, which chose it:
it says what was there to gain, and is no estimate. Cost: that of as many dose-response curves.

Rimsky et al. 2024, "Steering Llama 2 via Contrastive Activation Addition", whose vectors are compared by what they do at what cost.
Knobs are not tested against one another: intervals that overlap say nothing of which is better.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patchbay.knobs.knob import Knob
from patchbay.measure._choice import sign
from patchbay.measure._prompts import prompts_for
from patchbay.measure.dose_response import STRENGTHS, dose_response
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

CURVES = {"effect": "effect", "low": "effect_low", "high": "effect_high", "kl": "kl", "loss": "loss"}
CURVES |= {"chance_low": "chance_low", "chance_high": "chance_high", "own_loss": "own_loss"}
SINGLE = ("chosen", "test_effect", "test_effect_low", "test_effect_high", "test_kl", "p")


@method(paper="rimsky2024")
def compare(
    model: Model,
    task: Task,
    knobs: list[Knob],
    neutral: list[str] | list[list[int]] | None = None,
    *,
    strengths: list[float] | tuple[float, ...] = STRENGTHS,
    cap: float = 0.5,
    draws: int = 3,
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """Effect and side effects of each knob at each strength, and the strength that is recommended for it, or none.

    Main variable `effect` [condition, strength], a condition for each knob by its name, with `low` and `high`, `chance_low` and
    `chance_high` of random knobs, with `neutral` also `kl` and `loss`; `chosen`, `test_effect`, `test_kl` and `p` [condition] at
    the recommended strength, NaN where none is. The table `knobs` has one row for each.

    `knobs`: those to compare, of one neutral strength. `neutral`: texts that have nothing to do with the task, for the side effects.
    `strengths`: the strengths to turn each to. `cap`: the divergence on neutral text, in nats per token, up to which a strength is
    recommended. `draws`: random knobs beside each, each at every strength.
    """
    names = _names(knobs)
    prompts, said = prompts_for(task, *knobs)
    same = replace(prompts, corrupted=None)  # chosen for all: no knob chooses its own
    options: dict[str, Any] = {
        "strengths": list(strengths),
        "cap": cap,
        "draws": draws,
        "seed": seed,
        "batch_size": batch_size,
    }
    curves = [dose_response(model, same, knob, neutral, **options) for knob in knobs]
    rows = [_row(name, curve, cap, sign(task)) for name, curve in zip(names, curves, strict=True)]
    told = [f"knobs: {line}" for line in said]
    told += [f"knobs: {name}: {line}" for name, curve in zip(names, curves, strict=True) for line in _verdicts(curve)]
    return Result(
        _variables(curves),
        coords={"condition": names, "strength": [float(step) for step in strengths]},
        tables={"knobs": rows},
        notes=told,
        shown=["knobs"],
        highlights=[edit.port.part for knob in knobs for edit in knob.edits],
    )


def _names(knobs: list[Knob]) -> list[str]:
    """One name for each knob, numbered where several share one. Raises where they cannot stand on one axis."""
    if not isinstance(knobs, (list, tuple)) or not all(isinstance(knob, Knob) for knob in knobs):
        raise PatchbayError('knobs takes a list of Knobs: pb.load_knob("file.knob") reads one, pb.turn makes one')
    if len(knobs) < 2:
        raise PatchbayError(f"{len(knobs)} knobs: two or more are compared; of one, measure.dose_response says all")
    neutral = {knob.neutral for knob in knobs}
    if len(neutral) > 1:
        shown = ", ".join(f"{knob.name!r} at {knob.neutral:g}" for knob in knobs)
        raise PatchbayError(
            f"these knobs are neutral at different strengths ({shown}): one axis of strengths would mislead; compare them apart"
        )
    names = [knob.name for knob in knobs]
    return [f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _variables(curves: list[Result]) -> dict[str, Any]:
    """What the curves have in common: over strengths, and at the recommended strength, NaN where a curve lacks it."""
    over = {name: _stacked(curves, held, curves[0].sizes["strength"]) for name, held in CURVES.items()}
    made: dict[str, Any] = {
        name: (*found, ("condition", "strength")) for name, found in over.items() if found is not None
    }
    for name in SINGLE:
        found = _stacked(curves, name, None)
        if found is not None:
            made[name] = (*found, ("condition",))
    return {name: (values, axes, unit) for name, (values, unit, axes) in made.items()}


def _stacked(curves: list[Result], name: str, width: int | None) -> tuple[Tensor, str] | None:
    """A variable of every curve as rows, with its unit; None where no curve has it."""
    unit = next((curve.units[name] for curve in curves if name in curve), None)
    if unit is None:
        return None
    absent = torch.tensor(torch.nan) if width is None else torch.full((width,), torch.nan)
    held = [curve[name] if name in curve.variables else absent for curve in curves]
    return torch.stack([values.double() for values in held]), unit


def _row(name: str, curve: Result, cap: float, up: float) -> dict[str, Any]:
    """One knob: the recommended strength and what it does there, or what was there to gain within the cap; None where unknown."""
    steps = [float(step) for step in curve.labels_of("strength")]

    def of(variable: str) -> float | None:
        return float(curve[variable]) if variable in curve.variables else None

    chosen, best = of("chosen"), None
    if chosen is None:
        within = [i for i in range(len(steps)) if "kl" not in curve or float(curve["kl"][i]) <= cap]
        at = max(within, key=lambda i: up * float(curve["effect"][i]), default=0)
        best = f"{steps[at]:g}: {float(curve['effect'][at]):.3g}" if within else "none within the cap"
    else:
        at = steps.index(chosen)
    own = float(curve["own_loss"][at]) if "own_loss" in curve else None
    chance = [float(curve[end][at]) for end in ("chance_low", "chance_high") if end in curve]
    return {
        "knob": name,
        "strength": "none" if chosen is None else f"{chosen:g}",
        "effect": of("test_effect"),
        "low": of("test_effect_low"),
        "high": of("test_effect_high"),
        "verdict": None if chosen is None else "holds" if _holds(curve, up) else "NOT confirmed",
        "KL": of("test_kl"),
        "own loss": None if own is None or own != own else own,
        "random": " to ".join(f"{end:.3g}" for end in chance) or None,
        "p": of("p"),
        "best": best,
    }


def _holds(curve: Result, up: float) -> bool:
    """Whether the effect on prompts that chose nothing, and that beyond random knobs, are on the right side of 0 with their intervals."""
    ends = [f"{name}_{end}" for name in ("test_effect", "test_against_random") for end in ("low", "high")]
    return all(up * float(curve[name]) > 0 for name in ends if name in curve)


def _verdicts(curve: Result) -> list[str]:
    """What the curve says of its strength, or why it recommends none."""
    return [
        note
        for note in curve.notes
        if note.startswith("strength ") or "recommended" in note or "was chosen" in note or "too few" in note
    ]
