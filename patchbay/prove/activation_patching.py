"""Activation patching: which signals, put from one run into another, carry the answer with them.

Each prompt has a corrupted twin that differs in what decides the answer. At one site (a layer's stream, its attention,
its MLP, a head's z, a neuron, an expert) and at some positions, one run is given the other's values, and goes on from
there:

    denoising   effect = score(corrupted run, clean values put in) - score(corrupted run)
    noising     effect = score(clean run) - score(clean run, corrupted values put in)
    share       = mean effect / mean (score(clean) - score(corrupted))

both positive where the site carries the answer (the sign is turned for rank and kl, where more is worse; kl is taken
from the clean run). A share of 1 is the whole gap between the two runs, 0 is none; where the gap itself is not clear
of 0, read `effect`. Denoising finds what is enough to bring the answer back, noising what is needed: they differ where
parts stand in for one another (either of two is enough, neither is needed) or work together. Every cell is exact,
through `sweep`: the layers below the site and the positions left of it are not computed again. Intervals are 95 %
bootstraps over prompts; `p` flips the signs of the effects prompt by prompt, `p_adjusted` holds the share of false
finds over all cells (Benjamini and Hochberg).

Heimersheim and Nanda 2024, "How to use and interpret activation patching"; earlier as causal tracing (Meng et al.
2022). It shows that a signal carries what differs between the twins, not what the part computes; a stream at all
positions carries everything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchbay import maths
from patchbay.model.asked import n_parts
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.prove._cells import batches, check_twins, doubtful, held_out, intervals, listed, p_values, rounding
from patchbay.prove._first_order import along, two_runs
from patchbay.prove._removal import check_top, given_parts
from patchbay.prove._sites import INDEXED, MANY, SIGNAL, Layout, Site, Way, columns_of, layers_of, patched
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError, Port
from patchbay.tasks.task import Task


@method(paper="heimersheim2024")
def activation_patching(
    model: Model,
    task: Task,
    *,
    site: Site = "resid_in",
    positions: str | None = None,
    way: Way = "denoising",
    parts: Result | list[Part] | None = None,
    top: int | None = None,
    batch_size: int = 32,
) -> Result:
    """The share of the clean answer that each site brings back (`denoising`) or takes away (`noising`), one by one.

    `positions`: "each", "all" (together), "last", "marks" (each group of the task in turn) or names of groups,
    "subject,verb"; without, each for streams, attention and MLPs (of prompts of different lengths the task's groups and
    the rest, or without groups those that all have, from the end) and all for heads, neurons and experts. `parts`: only
    these heads, neurons, experts or features; a Result gives its first `top`. `top` alone: those of the largest first-order
    effect on half of the prompts, patched on the other half. Main variable `share` with `low` and `high`; `effect` and
    its ends in the task's unit, `p`, `p_adjusted`, and the scores `clean` and `corrupted`. Axes: (layer, position),
    (layer), (layer, head) or (part).

    `site`: which signals: resid_in, resid_mid, resid_out, attn_out, mlp_out, head, neuron, expert, or features of a dictionary (feature,
    mlp_feature, attn_feature). `way`: put clean
    values into the corrupted run ("denoising"), or corrupted ones into the clean run ("noising"). `top`: how many parts
    of a Result, or of the largest first-order effect.
    """
    layers = layers_of(model, site, way)
    check_top(top)
    check_twins(model, task)
    chosen = _given(model, site, parts, top)
    task, notes = held_out(task, parts)
    if chosen is None and top is not None:
        dev, task = task.split()
        chosen = _first_order(model, dev, layers, site, way, top, batch_size)
        notes.append(
            f"{listed(chosen)}: chosen on {len(dev)} prompts by first-order effect, patched on the other {len(task)}"
        )
    ports = _ports(model, layers, site, chosen)
    columns = columns_of(model, task, site, positions)
    effects, clean, corrupted = patched(model, task, ports, columns, way, batch_size)
    gap = task.sign * (clean - corrupted)
    share = intervals(effects, gap)
    effect = intervals(effects)
    p = p_values(effects, rounding(clean, corrupted))
    layout = Layout(model, site, ports, chosen, columns)
    named = dict(zip(("share", "low", "high"), share, strict=True))
    named |= dict(zip(("effect", "effect_low", "effect_high", "p", "p_adjusted"), (*effect, *p), strict=True))
    units = {"effect": task.unit, "effect_low": task.unit, "effect_high": task.unit, "p": "probability"}
    units["p_adjusted"] = "probability"
    return Result(
        {name: (layout(value), layout.axes, units.get(name, "share of the gap")) for name, value in named.items()}
        | {"clean": (clean.mean(), (), task.unit), "corrupted": (corrupted.mean(), (), task.unit)},
        coords=layout.coords,
        parts=layout.parts,
        notes=_notes(task, way, layout, share[0], p[1], gap) + notes,
    )


# --- what is patched ----------------------------------------------------------------------------------


def _given(model: Model, site: str, parts: Result | list[Part] | None, top: int | None) -> list[Part] | None:
    """The parts that were named, each once; None where all of the site are meant."""
    if site not in INDEXED:
        if parts is not None or top is not None:
            raise PatchbayError(
                f"parts and top choose heads, neurons, experts or features; site={site!r} is patched layer by layer"
            )
        return None
    if parts is None:
        if site in MANY and top is None:
            total = sum(n_parts(model, site, layer) for layer in range(model.n_layers))
            raise PatchbayError(f"the model has {total:,} {site}s: name some, parts=..., or say how many, top=20")
        return None
    chosen = given_parts(parts, top, "patch")
    for part in chosen:
        if part.kind != site:
            raise PatchbayError(f"{part} is no {site}, and site={site!r} was asked")
        model.require(part.port())
    return chosen


def _ports(model: Model, layers: list[int], site: str, chosen: list[Part] | None) -> list[Port]:
    if chosen is not None:
        return [part.port() for part in chosen]
    if site not in INDEXED:
        return [Port(SIGNAL[site], layer) for layer in layers]
    return [Port(SIGNAL[site], layer, i) for layer in layers for i in range(n_parts(model, site, layer))]


def _first_order(
    model: Model, task: Task, layers: list[int], site: str, way: str, top: int, batch_size: int
) -> list[Part]:
    """The `top` parts with the largest mean of (value put in - value there) . gradient of the score, either sign."""
    ports = [Port(SIGNAL[site], layer) for layer in layers]
    smooth = task.metric if task.metric in ("logit_diff", "probability", "log_probability") else "log_probability"
    sums = [torch.zeros(0)] * len(ports)
    for prompts in batches(task, batch_size):
        some = task[prompts].with_metric(smooth)
        donor = run(model, two_runs(some, way)[1], taps=ports, logits="last")
        for trace, score in along(model, some, ports, 1, way):
            for i, (port, gradient) in enumerate(zip(ports, trace.gradient(score, *ports), strict=True)):
                product = (gradient * (donor[port] - trace[port].detach())).double()  # [prompt, position, part, ...]
                total = (product.flatten(3).sum((0, 1, 3)) if product.ndim > 3 else product.sum((0, 1))).cpu()
                sums[i] = total if not len(sums[i]) else sums[i] + total
    ranked = [
        (float(-abs(x)), Part(layer, site, n))
        for layer, row in zip(layers, sums, strict=True)
        for n, x in enumerate(row)
    ]
    return [part for _, part in sorted(ranked)[:top]]


# --- the result ---------------------------------------------------------------------------------------


def _notes(task: Task, way: str, layout: Layout, share: Tensor, adjusted: Tensor, gap: Tensor) -> list[str]:
    """The largest cell in words, how many cells are clear of 0, and whether there was a gap to share."""
    flat = share.nan_to_num(-torch.inf).flatten()
    row, column = divmod(int(flat.argmax()), share.shape[1])
    port, where = layout.ports[row], layout.columns[column].label
    place = f"{port}" + (f" at {where}" if len(layout.columns) > 1 else "")
    clear = maths.clear(adjusted)
    does = "brings back" if way == "denoising" else "takes away"
    notes = [f"{place} {does} most: {float(flat.max()):.3g} of the gap" + (f"; {clear}" if clear else "")]
    if len(gap) == 1:
        notes.append(
            f"one pair, whose gap is {float(gap):.3g} {task.unit}: what each site does to it, with no interval and no p"
        )
    if unsure := doubtful(gap, task.unit):
        notes.append(
            f"the clean runs do not score clearly better than the corrupted ones (gap {unsure}): shares mean little, read effect"
        )
    return notes
