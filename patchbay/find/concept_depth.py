"""Concept depth: from which layer on a linear probe can read a property of the text.

At each layer an L2-penalised logistic regression reads the label from the stream at the prompt's last token, and

    accuracy[layer] = share of prompts that the probe which did not see them labels right, `folds`-fold stratified
    variation[layer] = accuracy[layer] / accuracy[layer before]                 (none right before counts as one right)
    jump = first i / n_layers with variation >= 1.1        converge = last i / n_layers with |variation - 1| < 0.03

with i = 0 the embedding and i = n the last layer. `auc` is the mean over classes of one against the rest. The null is
the same probe on shuffled labels, `draws` times, the same shuffles at every layer: `null_mean`, `null_high` (95 %) and `p`, that
shuffled labels are read as well at ANY layer, so that it holds for all layers together; low and high are a 95 % bootstrap over prompts. States are centred and scaled by one number, so that a turned stream gives
the same. `conditions` repeat it under "noise 0.5" (Gaussian noise on the embedding, as a multiple of its root mean
square at the last tokens) or "int8", "int4" (matrices of the layers rounded to nearest, one scale for each row as stored): a robust
concept keeps its depth. One forward pass for each condition (two for noise), (1 + draws) x folds small regressions for each layer.

Jin et al. 2024, "Exploring Concept Depth: How Large Language Models Acquire Knowledge at Different Layers?"; the bounds 1.1
and 0.03 are theirs. Their code reads the MLP's normed input, `site="mlp.in"`.

A probe says that the property can be read, not that the model does: follow with `prove.activation_patching`. Prompts that share
words with their label make every layer look wise; the embedding's row says how much the last token alone gives away.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.edits.edit import Edit
from patchbay.find._probe import auc, held_out_scores, scaled, stratified
from patchbay.find._states import depth, exceeded, last_states, permutations
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.task import Task

JUMP, SETTLED = 1.1, 0.03
CONDITION = re.compile(r"(noise) (\d+(?:\.\d+)?)|(int)([2-8])")


@method(paper="jin2024", unit="share of prompts")
def concept_depth(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    labels: Sequence[str | int],
    *,
    site: str = "resid_out",
    folds: int = 5,
    draws: int = 40,
    conditions: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """Held-out accuracy of a linear probe for `labels` (one per prompt) at each layer, against shuffled labels.

    `site`: resid_out (with the embedding before it), resid_in, resid_mid, attn.out, mlp.in or mlp.out. Table `depth` holds jump,
    converge and the first layer with p < 0.05 (`emerges`) of each condition; `accuracy_under` [condition, layer] the curves.

    `labels`: the property, one value for each prompt. `folds`: parts of the prompts, each read by a probe of the
    others. `draws`: shuffles of the labels that make the null. `conditions`: repeats under "noise 0.5", "int8" or
    "int4".
    """
    encoded, named = _once(model.encode(prompts), [str(label) for label in labels])
    classes = sorted(set(named))
    if len(classes) < 2:
        raise PatchbayError(f"labels hold the one class {classes}: a probe needs two or more")
    if draws < 1:
        raise PatchbayError(f"draws={draws}: at least one shuffle, for the null")
    target = torch.tensor([classes.index(label) for label in named])
    problems = _shuffled(target, stratified(target, folds, seed), draws, seed)
    names, ports = depth(model, site)
    curves = {}
    for condition in ("plain", *conditions):
        read, edits = _under(model, condition, encoded, seed, batch_size)
        states = last_states(read, encoded, ports, batch_size, edits)  # [layer, prompt, d_model]
        curves[condition] = _curve(states, *problems)
    plain = curves["plain"]
    shares = {key: (plain[key], ("layer",), "share of prompts") for key in ("accuracy", "low", "high", "null_mean")}
    variables = shares | {
        "null_high": (plain["null_high"], ("layer",), "share of prompts"),
        "auc": (plain["auc"], ("layer",), "probability"),
        "p": (plain["p"], ("layer",), "p value"),
        "variation": (plain["variation"], ("layer",), "ratio"),
        "chance": (target.bincount().max() / len(target), (), "share of prompts"),
    }
    if conditions:
        for key in ("accuracy", "low", "high", "null_high"):
            stacked = torch.stack([curve[key] for curve in curves.values()])
            variables[f"{key}_under"] = (stacked, ("condition", "layer"), "share of prompts")
    rows = [_points(condition, curve, names, model.n_layers) for condition, curve in curves.items()]
    again = len(named) < len(list(labels))
    notes = [f"{len(list(labels)) - len(named)} prompts that came again were left out"] if again else []
    coords = {"layer": names} | ({"condition": list(curves)} if conditions else {})
    return Result(variables, coords=coords, tables={"depth": rows}, notes=[*notes, *map(_said, rows)])


def _once(encoded: list[list[int]], labels: list[str]) -> tuple[list[list[int]], list[str]]:
    """Each prompt once, with its label: a prompt in two folds would be its own teacher."""
    if len(encoded) != len(labels):
        raise PatchbayError(f"{len(encoded)} prompts and {len(labels)} labels: one label per prompt")
    found: dict[tuple[int, ...], str] = {}
    for ids, label in zip(encoded, labels, strict=True):
        if found.setdefault(tuple(ids), label) != label:
            raise PatchbayError(f"one prompt has two labels, {found[tuple(ids)]!r} and {label!r}: {ids[:12]}")
    return [list(ids) for ids in found], list(found.values())


def _shuffled(target: Tensor, fold: Tensor, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """Labels and folds [1 + draw, prompt]: as they are, then moved together to other prompts, so that folds stay stratified."""
    order = torch.cat([torch.arange(len(target))[None], permutations(len(target), draws, seed)])
    return target[order], fold[order]


def _curve(states: Tensor, labels: Tensor, folds: Tensor) -> dict[str, Tensor]:
    """What the probes read at each layer, each [layer]."""
    rows: dict[str, list[float]] = {}
    best: Tensor | None = None
    for state in states:  # [prompt, d_model]
        scores = held_out_scores(scaled(state), labels, folds)  # [1 + draw, prompt, class]
        right = (scores.argmax(-1) == labels).double()
        null = right[1:].mean(1)  # [draw]
        mean, low, high = maths.bootstrap_interval(right[0])
        areas = [
            auc(scores[0, held, label], labels[0, held] == label)
            for held in (folds[0] == fold for fold in range(int(folds.max()) + 1))
            for label in range(scores.shape[2])
        ]
        cell = {"accuracy": mean, "low": low, "high": high, "auc": torch.tensor(areas).nanmean()}
        cell |= {"null_mean": null.mean(), "null_high": null.quantile(0.95)}
        best = null if best is None else torch.maximum(best, null)
        for name, value in cell.items():
            rows.setdefault(name, []).append(float(value))
    found = {name: torch.tensor(values, dtype=torch.float64) for name, values in rows.items()}
    before = torch.cat([torch.tensor([torch.nan], dtype=torch.float64), found["accuracy"][:-1]])
    assert best is not None
    least = 1.0 / labels.shape[1]  # one prompt right
    ratio = torch.where(found["accuracy"] == before, 1.0, found["accuracy"] / before.clamp_min(least))
    return found | {"p": exceeded(found["accuracy"], best[:, None]), "variation": ratio}


def _points(condition: str, curve: dict[str, Tensor], names: list[str], n_layers: int) -> dict[str, Any]:
    """Jump and converging points as shares of the depth (None where there is none), and the first layer above the null."""
    places = [names.index(name) + (names[0] != "embed") for name in names]  # i of L0 is 1
    variation = curve["variation"].tolist()
    jumps = [i for i, step in zip(places, variation, strict=True) if step >= JUMP]
    settled = [i for i, step in zip(places, variation, strict=True) if abs(step - 1.0) < SETTLED]
    above = [name for name, p in zip(names, curve["p"].tolist(), strict=True) if p < 0.05]
    return {
        "condition": condition,
        "jump": jumps[0] / n_layers if jumps else None,
        "converge": settled[-1] / n_layers if settled else None,
        "emerges": above[0] if above else None,
        "last_accuracy": float(curve["accuracy"][-1]),
    }


def _said(row: dict[str, Any]) -> str:
    def number(value: float | None) -> str:
        return "none" if value is None else f"{value:.2f} of the depth"

    first = f"above shuffled labels from {row['emerges']} on" if row["emerges"] else "no layer above shuffled labels"
    return f"{row['condition']}: jump {number(row['jump'])}, converge {number(row['converge'])}, {first}"


# --- noise and quantisation -----------------------------------------------------------------------


def _under(
    model: Model, condition: str, encoded: list[list[int]], seed: int, batch_size: int
) -> tuple[Model, Callable[[int, int], list[Edit]] | None]:
    """The model to read and the edits of each batch under a condition."""
    if condition == "plain":
        return model, None
    found = CONDITION.fullmatch(condition)
    if found is None:
        raise PatchbayError(f"condition {condition!r}; possible are 'noise 0.5' (any multiple) and 'int2' to 'int8'")
    if found[3]:
        return _rounded(model, int(found[4])), None
    embedded = last_states(model, encoded, [Port("embed")], batch_size)
    size = float(embedded.square().mean().sqrt()) * float(found[2])

    def noise(start: int, stop: int) -> list[Edit]:
        """Noise of each prompt's own, whatever the batch: one value for each row and position."""
        width = max(map(len, encoded[start:stop]))
        value = torch.zeros(stop - start, width, model.d_model)  # [prompt, position, d_model]
        for row, ids in enumerate(encoded[start:stop]):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + start + row)
            value[row, : len(ids)] = size * torch.randn(len(ids), model.d_model, generator=generator)
        return [edit.add(Port("embed"), value.to(model.dtype), rows=list(range(stop - start)))]

    return model, noise


def _rounded(model: Model, bits: int) -> Model:
    """A copy of the model with the layers' matrices rounded to the nearest of 2**bits - 1 levels for each row."""
    if model.active_edits():
        raise PatchbayError(f"int{bits}: rounding copies the model, which cannot be done inside an `edited` block")
    copied, levels = copy.deepcopy(model.hf), 2 ** (bits - 1) - 1
    inside = {id(p) for at in Model(copied, family=model.family).modules for p in at.layer.parameters() if p.ndim > 1}
    with torch.no_grad():
        for parameter in copied.parameters():
            if id(parameter) in inside:
                step = parameter.abs().amax(-1, keepdim=True).clamp_min(1e-12) / levels
                parameter.copy_((parameter / step).round() * step)
    return Model(copied, family=model.family, source=model.source)
