"""Attribution patching: the effect of patching every site at once, estimated from one gradient.

    effect = (clean signal - corrupted signal) . d score / d signal        summed over the site's positions and features

in the task's unit, positive where the site carries the answer (turned round for kl): what `activation_patching` would
find if the score were linear in the signal. `noising` takes the gradient of the clean run, `denoising` that of the
corrupted run. With `steps` above 1 it is the mean gradient over runs whose embeddings lie on the line between the
twins, k / steps of the way to the run that is patched: closer where attention is saturated, and the effects at the
embedding then sum to the gap between the runs. Cost: two runs, and a run with its backward pass a step, for all
sites, not one run a site.

`exact=True` patches every cell as well (a sweep), and reports the agreement: Spearman's correlation of the mean
effects, and the overlap of the largest tenths. Intervals are 95 % bootstraps over prompts, `p` flips signs prompt by
prompt, `p_adjusted` holds the share of false finds over all cells (Benjamini and Hochberg).

Nanda 2023, "Attribution Patching: Activation Patching At Industrial Scale"; steps after Hanna et al. 2024. An
estimate, no proof: it fails where a signal moves far (streams of early layers, saturated attention), and a cell near
0 may matter. Heads that count are read by neurons that are flat at both twins: there the estimate sees nothing, whatever the
steps (docs/truth.md, by `python -m bench.truth`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchbay import maths
from patchbay.model.asked import n_parts
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.prove._cells import batches, check_twins, intervals, p_values, rounding
from patchbay.prove._first_order import agreed, along, check_smooth, two_runs
from patchbay.prove._sites import SIGNAL, Column, Layout, Site, Way, columns_of, layers_of, patched
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Port
from patchbay.tasks.task import Task

KNOWN = (
    "first order: blind to heads that count (average precision at most 0.18 on the compiled programs exclusive_or, histogram and "
    "more_open, 0.87 or more where circuits copy; docs/truth.md); exact=True patches every cell"
)


@method(paper="nanda2023")
def attribution_patching(
    model: Model,
    task: Task,
    *,
    site: Site = "head",
    positions: str | None = None,
    way: Way = "noising",
    steps: int = 1,
    exact: bool = False,
    batch_size: int = 32,
) -> Result:
    """The first-order effect of patching each site between the twins, for all sites of a kind at once.

    Main variable `effect` with `low` and `high`, `p`, `p_adjusted`, and
    the scores `clean` and `corrupted`; with `exact` also `exact`, `spearman` and `overlap`. Axes: (layer, position), (layer),
    (layer, head), or (part, position).

    `site`: which signals: resid_in, resid_mid, resid_out, attn_out, mlp_out, head, neuron, expert, or features of a dictionary
    (feature, mlp_feature, attn_feature). `positions`:
    "each", "all", "last", "marks" or names of groups; without, each for streams, attention and MLPs (of prompts of different lengths
    the task's groups and the rest, or without groups those that all have, from the end) and all for heads, neurons and experts. `way`: the gradient of the clean run
    ("noising"), or of the corrupted one ("denoising"). `steps`: runs between the twins whose gradients are averaged; 1
    is the plain gradient. `exact`: also patch every cell, and report how well the estimate agrees.
    """
    ports = [Port(SIGNAL[site], layer) for layer in layers_of(model, site, way)]
    check_twins(model, task)
    check_smooth(task, steps, way, everywhere=True)
    columns = columns_of(model, task, site, positions)
    effects, clean, corrupted = _estimate(model, task, ports, columns, way, steps, batch_size)
    layout = Layout(model, site, [p for whole in ports for p in _inside(model, whole)], None, columns)
    mean, low, high = intervals(effects)
    p, adjusted = p_values(effects, rounding(clean, corrupted))
    named = {"effect": mean, "low": low, "high": high, "p": p, "p_adjusted": adjusted}
    scalars: dict[str, tuple[Tensor | float, tuple[str, ...], str]]
    scalars = {"clean": (clean.mean(), (), task.unit), "corrupted": (corrupted.mean(), (), task.unit)}
    notes = [_largest(layout, mean, adjusted)]
    if exact:
        true, _, _ = patched(model, task, layout.ports, columns, way, batch_size)
        named["exact"] = intervals(true)[0]
        found, note = agreed(mean, named["exact"], rounding(clean, corrupted), "cells")
        scalars |= found
        notes.append(note)
    else:
        notes.append(KNOWN)
    units = {"p": "probability", "p_adjusted": "probability"}
    return Result(
        {name: (layout(value), layout.axes, units.get(name, task.unit)) for name, value in named.items()} | scalars,
        coords=layout.coords,
        parts=layout.parts,
        notes=notes,
    )


def _inside(model: Model, port: Port) -> list[Port]:
    """The heads, neurons, experts or features of a whole signal, or itself."""
    if port.index_axis is None:
        return [port]
    kind = Port(port.signal, port.layer, 0).part.kind
    return [Port(port.signal, port.layer, i) for i in range(n_parts(model, kind, port.layer or 0))]


def _estimate(
    model: Model, task: Task, ports: list[Port], columns: list[Column], way: str, steps: int, batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Effects [prompt, port, column], NaN where a prompt lacks the place; scores of the clean and the corrupted run [prompt]."""
    n = sum(len(_inside(model, port)) for port in ports)
    effects = torch.full((len(task), n, len(columns)), torch.nan, dtype=torch.float64)
    scores = torch.zeros(2, len(task), dtype=torch.float64)
    for prompts in batches(task, batch_size):
        some = task[prompts]
        pair = [run(model, ids, taps=ports, logits=some.reads) for ids in two_runs(some)]
        gradients: list[Tensor | float] = [0.0] * len(ports)
        for trace, score in along(model, some, ports, steps, way):
            gradients = [
                total + g.detach() / steps for total, g in zip(gradients, trace.gradient(score, *ports), strict=True)
            ]
        products = [(pair[0][port] - pair[1][port]) * g for port, g in zip(ports, gradients, strict=True)]
        products = [x[:, :, None] if port.index_axis is None else x for port, x in zip(ports, products, strict=True)]
        cells = torch.cat([x.double().cpu().flatten(3).sum(3) if x.ndim > 3 else x.double().cpu() for x in products], 2)
        for j, column in enumerate(columns):
            for i, prompt in enumerate(prompts):
                if span := column.spans[prompt]:
                    effects[prompt, :, j] = task.sign * cells[i, list(span)].sum(0)
        for row, trace in zip(scores, pair, strict=True):
            row[prompts] = some.score(trace.read(some.reads), pair[0].read(some.reads)).double().cpu()
    return effects, scores[0], scores[1]


def _largest(layout: Layout, mean: Tensor, adjusted: Tensor) -> str:
    row, column = divmod(int(mean.abs().nan_to_num(-1.0).argmax()), mean.shape[1])
    place = f"{layout.ports[row]}" + (f" at {layout.columns[column].label}" if len(layout.columns) > 1 else "")
    clear = maths.clear(adjusted)
    return (
        f"{place} has the largest estimated effect, {float(mean[row, column]):.3g}; {f'{clear}; ' if clear else ''}"
        "an estimate: prove it with prove.activation_patching"
    )
