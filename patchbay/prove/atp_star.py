"""AtP*: attribution patching that sees through saturated attention, and through effects that cancel.

    effect = (clean signal - corrupted signal) . d score / d signal                       values, z, MLP outputs, neurons
    effect = (clean pattern - pattern with the key, or the query, of the other run) . d score / d pattern      keys and queries
    score  = mean over prompts of 1 / (n_layers - 1) sum over layers l of |effect with the gradient of layer l dropped|      GradDrop

in the task's unit. The pattern with a changed key or query is what the model itself computes with it, softmax, mask, bias and cap included: a
gradient at the scores would be 0 wherever attention is saturated. Dropped is the gradient through what attention and MLP of layer l add, so that the
stream alone passes there: a direct effect and one of the opposite sign through that layer then no longer cancel. A site inside layer l has the
effect 0 there, hence the n_layers - 1. Exact where all that follows the pattern is linear. Cost: two runs, one backward pass a layer, and for
queries one run a layer, for keys one a layer and step of the position axis.

`exact=True` patches every cell as well and tells `pearson` [layer], the correlation of effects with exact ones over prompts and cells:
streams are long from early layers to the score, and what it says there needs the check. `plain` is attribution patching's own estimate (one
gradient, at keys and queries themselves).

Kramár, Lieberum, Shah and Nanda 2024, "AtP*: An efficient and scalable method for localizing LLM behaviour to components". An
estimate, no proof: first order after the pattern. GradDrop has no sign: `effect` has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from patchbay.errors import one_of
from patchbay.model.asked import n_parts
from patchbay.model.model import Model
from patchbay.model.run import Trace, run
from patchbay.prove._cells import batches, check_twins, intervals, p_values, rounding
from patchbay.prove._first_order import agreed, along, check_smooth, two_runs
from patchbay.prove._sites import Column, Layout, Way, columns_of, patched, placed
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError, Port
from patchbay.tasks.task import Task

Kind = Literal["query", "key", "value", "head", "mlp_out", "neuron"]
KINDS = {
    "query": "attn.q",
    "key": "attn.k",
    "value": "attn.v",
    "head": "attn.z",
    "mlp_out": "mlp.out",
    "neuron": "mlp.act",
}
ROWS = {"query": "head", "head": "head", "neuron": "neuron"}  # others: layers, or listed groups of keys and values


@method(paper="kramar2024")
def atp_star(
    model: Model,
    task: Task,
    *,
    site: Kind = "key",
    positions: str = "all",
    way: Way = "noising",
    exact: bool = False,
    batch_size: int = 32,
) -> Result:
    """The size of the effect of patching each site between the twins, with exact softmax and with gradients dropped layer by layer.

    Main variable `score`, which has no sign; `effect` (softmax exact, nothing dropped) with `low`, `high`, `p`, `p_adjusted`; `plain`, one
    gradient alone; the scores `clean` and `corrupted`; with `exact` also `exact`, `spearman`, `overlap` and `pearson` [layer].

    `site`: which signals: query, key, value, head (z), mlp_out or neuron; keys and values are of whole groups of heads. `positions`: "all" (patched
    together), "each", "last", "marks" or names of groups. `way`: the gradient of the clean run ("noising"), or of the corrupted one
    ("denoising"). `exact`: also patch every cell, and report how well effects agree, layer by layer.
    """
    one_of("site", site, KINDS)
    one_of("way", way, ("denoising", "noising"))
    needs = {KINDS[site], "attn.pattern"} if site in ("query", "key") else {KINDS[site]}
    ports = [Port(KINDS[site], layer) for layer in range(model.n_layers) if needs <= set(model.signals(layer))]
    if not ports:
        model.require(Port(sorted(needs)[0], 0))  # raises, and says what the family lacks
    check_twins(model, task)
    if task.metric == "kl" and way == "noising":
        raise PatchbayError(
            'kl is at its lowest in the clean run, where its gradient is 0: way="denoising", or another metric'
        )
    check_smooth(task, 1, way)
    columns = columns_of(model, task, "head", positions)
    cells = [part for port in ports for part in _parts(model, site, port)]
    found = _Estimates(task, len(cells), len(columns))
    for prompts in batches(task, batch_size):
        found.add(model, task, prompts, (site, ports, columns, way))
    return _result(model, task, site, cells, columns, way, found, exact, batch_size)


def _parts(model: Model, site: str, port: Port) -> list[Part]:
    layer = port.layer or 0
    if site == "mlp_out":
        return [Part(layer, "mlp")]
    if site in ("key", "value"):
        return [Part(layer, "group", i) for i in range(model.n_groups(layer))]
    return [Part(layer, ROWS[site], i) for i in range(n_parts(model, ROWS[site], layer))]


class _Estimates:
    """Effects [prompt, cell, column], with each layer's gradient dropped in turn, and scores of both runs [prompt]."""

    def __init__(self, task: Task, n_cells: int, n_columns: int) -> None:
        shape = (len(task), n_cells, n_columns)
        self.effect, self.plain, self.score = (torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(3))
        self.clean, self.corrupted = (torch.zeros(len(task), dtype=torch.float64) for _ in range(2))

    def add(
        self, model: Model, task: Task, prompts: list[int], asked: tuple[str, list[Port], list[Column], str]
    ) -> None:
        site, ports, columns, way = asked
        some = task[prompts]
        here, there = two_runs(some, way)
        look = [Port("attn.pattern", p.layer) for p in ports] if site in ("query", "key") else ports
        streams = [Port(name, i) for i in range(model.n_layers) for name in ("resid_in", "resid_out")]
        donor = run(model, there, taps=ports, logits="last")
        ((trace, score),) = along(model, some, [*dict.fromkeys([*look, *ports, *streams])], 1, way)
        spans = [[column.spans[i] for i in prompts] for column in columns]
        changes = list(_changes(model, here, trace, donor, site, ports, spans))
        n_groups = [model.n_groups(p.layer or 0) if site == "key" else 0 for p in ports]
        sign = task.sign * (-1.0 if way == "noising" else 1.0)
        dropped = [
            _cells(site, changes, g, n_groups) for g in _gradients(model, trace, score, look)
        ]  # the first: nothing dropped
        self.effect[prompts] = sign * dropped[0]
        self.score[prompts] = torch.stack([d.abs() for d in dropped[1:] or dropped]).sum(0) / max(1, model.n_layers - 1)
        own = trace.gradient(score, *ports)
        moved = [_masked(p, donor[p] - trace[p].detach(), spans) for p in ports]
        self.plain[prompts] = sign * _cells("value" if site in ("query", "key") else site, moved, own, [0] * len(ports))
        for j, column in enumerate(columns):
            lacking = [i for i in prompts if not column.spans[i]]
            for values in (self.effect, self.score, self.plain):
                values[lacking, :, j] = torch.nan
        scores = [
            some.score(t.last_logits, (trace if way == "noising" else donor).last_logits).detach().double().cpu()
            for t in (trace, donor)
        ]
        self.clean[prompts], self.corrupted[prompts] = scores if way == "noising" else scores[::-1]


def _masked(port: Port, change: Tensor, spans: Sequence[Sequence[tuple[int, ...]]]) -> list[Tensor]:
    """The change of a signal at each column's positions alone, its axes [prompt, position, ...]."""
    change = change.movedim(port.tapped_axis, 1)
    out = []
    for column in spans:
        mask = torch.zeros(change.shape[:2], dtype=change.dtype, device=change.device)
        for row, span in enumerate(column):
            mask[row, list(span)] = 1.0
        out.append((change * mask.reshape(*mask.shape, *[1] * (change.ndim - 2))).movedim(1, port.tapped_axis))
    return out


def _changes(
    model: Model,
    here: list[list[int]],
    trace: Trace,
    donor: Trace,
    site: str,
    ports: list[Port],
    spans: list[list[tuple[int, ...]]],
) -> Iterator[list[Tensor]]:
    """For each port, for each column, what patching changes: of the signal itself, or of the pattern that its keys or queries make."""
    for port in ports:
        if site not in ("query", "key"):
            yield _masked(port, donor[port] - trace[port].detach(), spans)
            continue
        pattern = Port("attn.pattern", port.layer)
        value = donor[port].movedim(port.tapped_axis, 1)
        made = []
        for column in spans:
            if not any(column):
                made.append(torch.zeros_like(trace[pattern]))
                continue
            changed = run(model, here, taps=[pattern], edits=[placed(port, value, column)], logits="last")[pattern]
            made.append(changed - trace[pattern].detach())
        yield made


def _gradients(model: Model, trace: Trace, score: Tensor, look: list[Port]) -> Iterator[list[Tensor]]:
    """d score / d signal of each port: as it is, then with what each layer adds held fixed."""
    outs = [Port("resid_out", i) for i in range(model.n_layers)]
    plain = trace.gradient(score, *look)
    yield plain
    if model.n_layers == 1:
        return
    ends = trace.gradient(score, *outs)
    for layer in range(model.n_layers):
        before = [i for i, port in enumerate(look) if (port.layer or 0) < layer]
        kept = [g if (port.layer or 0) > layer else torch.zeros_like(g) for port, g in zip(look, plain, strict=True)]
        if before:
            passed = torch.autograd.grad(
                trace[Port("resid_in", layer)],
                [trace[look[i]] for i in before],
                ends[layer],
                retain_graph=True,
                allow_unused=True,
            )
            for i, g in zip(before, passed, strict=True):
                kept[i] = kept[i] if g is None else g
        yield kept


def _cells(site: str, changes: Sequence[list[Tensor]], gradients: Sequence[Tensor], n_groups: Sequence[int]) -> Tensor:
    """Effects [prompt, cell, column]: change times gradient, summed over all but heads, groups or neurons.

    `n_groups`: of each port, where patterns are what its keys make, whose heads are summed by group; else 0."""
    out = []
    for columns, gradient, groups in zip(changes, gradients, n_groups, strict=True):
        products = [(change * gradient).double().cpu() for change in columns]
        out.append(torch.stack([_summed(site, x, groups) for x in products], -1))  # [prompt, cell of this port, column]
    return torch.cat(out, 1)


def _summed(site: str, x: Tensor, n_groups: int) -> Tensor:
    """[prompt, cell] of a product in its signal's own axes."""
    if site in ("query", "key", "value"):  # [prompt, head, ...]
        each = x.flatten(2).sum(2)
        return each.unflatten(1, (n_groups, -1)).sum(2) if n_groups else each
    if site == "head":  # [prompt, position, head, d_head]
        return x.sum((1, 3))
    return x.sum((1, 2))[:, None] if site == "mlp_out" else x.sum(1)


# --- what is told ---------------------------------------------------------------------------------------


def _result(
    model: Model,
    task: Task,
    site: str,
    cells: list[Part],
    columns: list[Column],
    way: str,
    found: _Estimates,
    exact: bool,
    batch_size: int,
) -> Result:
    signal = {"query": "q", "key": "k", "value": "v"}.get(site)
    ports = [cell.port(signal) for cell in cells]
    layout = Layout(
        model,
        "head" if site in ("query", "key", "value") else site,
        ports,
        cells if site in ("key", "value") else None,
        columns,
    )
    layout.parts = None if layout.parts is None else cells
    mean, low, high = intervals(found.effect)
    floor = rounding(found.clean, found.corrupted)
    p, adjusted = p_values(found.effect, floor)
    named = {
        "score": intervals(found.score)[0],
        "effect": mean,
        "low": low,
        "high": high,
        "p": p,
        "p_adjusted": adjusted,
    }
    named["plain"] = intervals(found.plain)[0]
    more: dict[str, Any] = {name: (getattr(found, name).mean(), (), task.unit) for name in ("clean", "corrupted")}
    notes = [_largest(cells, columns, named["score"])]
    if exact:
        true, _, _ = patched(model, task, ports, columns, way, batch_size)
        named["exact"] = intervals(true)[0]
        agreement, note = agreed(mean, named["exact"], floor, "cells")
        layers = torch.tensor([cell.layer or 0 for cell in cells])
        pearson = torch.stack(
            [_pearson(found.effect[:, layers == i], true[:, layers == i]) for i in range(model.n_layers)]
        )
        more |= agreement | {"pearson": (pearson, ("layer",), "correlation")}
        notes += [note, _by_layer(pearson)]
    else:
        notes.append(
            "an estimate: exact=True patches every cell, which the early layers need (`pearson` [layer] says how much)"
        )
    units = {"p": "probability", "p_adjusted": "probability"}
    return Result(
        {name: (layout(value), layout.axes, units.get(name, task.unit)) for name, value in named.items()} | more,
        coords=layout.coords,
        parts=layout.parts,
        notes=notes,
    )


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """The correlation of two lots of effects where both have one; NaN where fewer than three have, or all are alike."""
    both = ~(a.isnan() | b.isnan())
    if int(both.sum()) < 3:
        return torch.tensor(torch.nan, dtype=torch.float64)
    return torch.corrcoef(torch.stack([a[both], b[both]]))[0, 1]


def _by_layer(pearson: Tensor) -> str:
    if bool(pearson.isnan().all()):
        return "no layer has three effects to correlate"
    told = ", ".join(f"L{i} {value:.2f}" for i, value in enumerate(pearson.tolist()) if value == value)
    least = int(pearson.nan_to_num(2.0).argmin())
    return f"correlation with exact patching by layer: {told}; least at L{least}, whose cells to check exactly first"


def _largest(cells: list[Part], columns: list[Column], score: Tensor) -> str:
    row, column = divmod(int(score.nan_to_num(-1.0).argmax()), score.shape[1])
    place = f"{cells[row]}" + (f" at {columns[column].label}" if len(columns) > 1 else "")
    return f"{place} has the largest score, {float(score[row, column]):.3g}: prove it with prove.activation_patching or prove.path_patching"
