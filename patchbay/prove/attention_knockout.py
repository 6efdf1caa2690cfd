"""Attention knockout: in which layers the answer needs what some tokens tell others by attention.

Attention from the queries of one group of tokens to the keys of another is cut before the softmax, in every head of a
window of layers; what is left of each row renormalises. A query is never cut from its own position. For an edge (keys
-> queries) and the window of `window` layers centred at layer l,

    relative = mean over prompts of (p_cut - p) / p,    p the probability of the right answer

so that -1 is an answer lost and 0 an edge that is not used there. `everywhere` cuts the edge in all layers: the upper
bound. Windows are cut off at the ends of the model. The control cuts, from the same queries, as many other keys drawn
at random among those that they see (`draws` times; `control` is its mean); `p` tests relative minus control by
flipping signs prompt by prompt, `p_adjusted` holds the share of false finds over the map. Exact, through `sweep`:
layers below the window and positions left of the first query are not computed again. Intervals are 95 % bootstraps
over prompts.

Zhang, Yadav, Han and Shutova 2025, "Cross-modal Information Flow in Multimodal Large Language Models"; the method is
that of Geva et al. 2023, "Dissecting Recall of Factual Associations". It shows the direct edges alone: what a token
told a third one, in other layers or to other tokens, still flows. To make the answer independent of a span, cut it
from "all".
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchbay.edits import edit
from patchbay.edits.edit import Edit
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.prove._cells import intervals, p_values, swept_batches
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port, suggest
from patchbay.sweeps.sweep import sweep
from patchbay.tasks.task import Task

Span = tuple[int, ...]
OWN = ("last", "rest", "all")  # groups that every task has


@dataclass(frozen=True)
class Edge:
    """Keys and queries of each prompt."""

    label: str
    keys: list[Span]
    queries: list[Span]


@method(paper="zhang2025", unit="relative change of p(answer)")
def attention_knockout(
    model: Model,
    task: Task,
    *,
    keys: list[str] | None = None,
    queries: list[str] | None = None,
    window: int | None = None,
    draws: int = 3,
    batch_size: int = 16,
    seed: int = 0,
) -> Result:
    """The relative change of p(answer) when attention from `queries` to `keys` is cut, window by window, edge by edge.

    Groups are the task's marks, "last" (each prompt's last position), "rest" (in no mark and not the last) and "all".
    Every key group is cut from every query group; without, all marks and the rest from the last. `window`: layers cut
    together, without: a fifth of the model, at least 1. Main variable `relative` [layer, key] with `low` and `high`;
    `change` of p, `p`, `p_adjusted`, `control` (`draws` random key sets of the same size), `everywhere` [key] with its
    ends and `control_everywhere`.

    `keys`: groups that are no longer looked at. `queries`: groups that no longer look. `draws`: random key sets of the
    same size, as the control; p is over prompts, each of which draws its own sets, so that few are enough.
    """
    if not any("attn.pattern" in model.signals(layer) for layer in range(model.n_layers)):
        model.require(Port("attn.pattern", 0))  # raises: no layer has it
    task.check(model.vocab_size)
    window = max(1, round(0.2 * model.n_layers)) if window is None else window
    if not 1 <= window <= model.n_layers:
        raise PatchbayError(
            f"window={window}: the model has {model.n_layers} layers, a window has 1 to {model.n_layers}"
        )
    if draws < 0:
        raise PatchbayError(f"draws={draws}: 0 (no control) or more")
    edges = _edges(task, keys, queries)
    windows = _windows(model, window)
    cuts = [edges] + [[_control(edge, task, draw, seed) for edge in edges] for draw in range(draws)]
    p_cut, p = _measure(model, task, cuts, windows, batch_size)  # [prompt, cut, edge, window], [prompt]
    relative = (p_cut - p[:, None, None, None]) / p[:, None, None, None]
    change = (p_cut[:, 0] - p[:, None, None]).nanmean(0)
    cut, control = relative[:, 0], relative[:, 1:].nanmean(1)  # [prompt, edge, window]; the last window is all layers
    tested = cut - control if draws else cut
    mean, low, high = intervals(cut)
    p_value, adjusted = p_values(tested[..., :-1], 1e-5)
    unit, probability = "relative change of p(answer)", "probability"
    values: dict[str, tuple[Tensor, tuple[str, ...], str]] = {
        name: (value[:, :-1].T, ("layer", "key"), unit)
        for name, value in (("relative", mean), ("low", low), ("high", high))
    }
    values["change"] = (change[:, :-1].T, ("layer", "key"), probability)
    values["p"], values["p_adjusted"] = ((x.T, ("layer", "key"), probability) for x in (p_value, adjusted))
    values |= {
        name: (value[:, -1], ("key",), unit)
        for name, value in (("everywhere", mean), ("everywhere_low", low), ("everywhere_high", high))
    }
    if draws:
        values["control"] = (control.nanmean(0)[:, :-1].T, ("layer", "key"), unit)
        values["control_everywhere"] = (control.nanmean(0)[:, -1], ("key",), unit)
    values["probability"] = (p.mean(), (), probability)
    return Result(
        values,
        coords={"key": [edge.label for edge in edges]},
        notes=_notes(edges, windows, mean, adjusted, control),
    )


# --- edges --------------------------------------------------------------------------------------------


def _edges(task: Task, keys: list[str] | None, queries: list[str] | None) -> list[Edge]:
    """Every key group with every query group; an edge that no prompt has is refused."""
    groups = _groups(task)
    default = [name for name in (*task.marks, "rest") if any(groups[name])]
    found = []
    for from_name in default if keys is None else keys:
        for to_name in ["last"] if queries is None else queries:
            for name in (from_name, to_name):
                if name not in groups:
                    raise PatchbayError(
                        f"no group {name!r} in task {task.name}; possible are {', '.join(groups)}"
                        + suggest(name, list(groups))
                    )
            edge = Edge(f"{from_name} -> {to_name}", groups[from_name], groups[to_name])
            if not any(k and q for k, q in zip(edge.keys, edge.queries, strict=True)):
                raise PatchbayError(f"{edge.label}: no prompt of task {task.name} has tokens of both groups")
            found.append(edge)
    if not found:
        raise PatchbayError(f"task {task.name}: no edge to cut; groups are {', '.join(groups)}")
    return found


def _groups(task: Task) -> dict[str, list[Span]]:
    last: list[Span] = [(len(ids) - 1,) for ids in task.clean]
    every = [tuple(range(len(ids))) for ids in task.clean]
    marked = [{at for groups in task.marks.values() for at in groups[i]} for i in range(len(task))]
    rest = [tuple(sorted({*all_} - named - {*end})) for all_, named, end in zip(every, marked, last, strict=True)]
    own: dict[str, list[Span]] = dict(zip(OWN, (last, rest, every), strict=True))
    return {name: [tuple(sorted(set(span))) for span in groups] for name, groups in task.marks.items()} | {
        name: spans for name, spans in own.items() if name not in task.marks
    }


def _pairs(keys: Span, queries: Span) -> bool:
    """Whether some query sees some key that is not its own position."""
    return bool(keys and queries) and min(keys) < max(queries)


def _control(edge: Edge, task: Task, draw: int, seed: int) -> Edge:
    """As many other keys that the same queries see, drawn for each prompt by its tokens; fewer where few are left."""
    drawn: list[Span] = []
    for ids, keys, queries in zip(task.clean, edge.keys, edge.queries, strict=True):
        if not _pairs(keys, queries):
            drawn.append(())
            continue
        rng = random.Random(f"attention_knockout-{seed}-{draw}-{edge.label}-{ids}")
        n = sum(key < max(queries) for key in keys)
        others = [at for at in range(max(queries)) if at not in keys]
        drawn.append(tuple(sorted(rng.sample(others, min(n, len(others))))))
    return Edge(f"{edge.label} ({draw})", drawn, edge.queries)


def _windows(model: Model, width: int) -> list[list[int]]:
    """Layers of the window centred at each layer, those that have attention; and at the end all layers."""
    has = [layer for layer in range(model.n_layers) if "attn.pattern" in model.signals(layer)]
    starts = [layer - width // 2 for layer in range(model.n_layers)]
    return [[layer for layer in has if start <= layer < start + width] for start in starts] + [has]


# --- the runs -----------------------------------------------------------------------------------------


def _measure(
    model: Model, task: Task, cuts: list[list[Edge]], windows: list[list[int]], batch_size: int
) -> tuple[Tensor, Tensor]:
    """p(answer) under every cut [prompt, cut, edge, window], and without [prompt].

    Where no query sees a key of its edge, nothing is cut and p is what it was. NaN: the prompt has no tokens of that
    name, no other key could be drawn as a control, or the window has no attention.
    """
    p_cut = torch.full((len(task), len(cuts), len(cuts[0]), len(windows)), torch.nan, dtype=torch.float64)
    p = torch.full((len(task),), torch.nan, dtype=torch.float64)
    for prompts in swept_batches(task, batch_size):
        some, at = task[prompts], torch.tensor(prompts)
        cells: list[tuple[int, int, int]] = []
        entries: list[list[Edit]] = []
        for i, j in ((i, j) for i, edges in enumerate(cuts) for j in range(len(edges))):
            blocks = _blocks([cuts[i][j].keys[n] for n in prompts], [cuts[i][j].queries[n] for n in prompts])
            for k, layers in enumerate(windows):
                if blocks and layers:
                    cells.append((i, j, k))
                    entries.append([_block(layer, *block) for layer in layers for block in blocks])
        if entries:
            swept = sweep(model, some, entries, "probability")
            base, values = swept["base"].double(), swept["value"].double()
        else:
            logits = run(model, some, logits="last").last_logits
            base, values = some.with_metric("probability").score(logits).double().cpu(), torch.zeros(0)
        p[at] = base
        for i, j in ((i, j) for i, edges in enumerate(cuts) for j in range(len(edges))):
            named = torch.tensor([bool(cuts[i][j].keys[n] and cuts[i][j].queries[n]) for n in prompts])
            for k in (k for k, layers in enumerate(windows) if layers):
                p_cut[at, i, j, k] = torch.where(named, base, torch.nan)
        for (i, j, k), row in zip(cells, values, strict=True):
            seen = torch.tensor([_pairs(cuts[i][j].keys[n], cuts[i][j].queries[n]) for n in prompts])
            p_cut[at[seen], i, j, k] = row[seen]
    return p_cut, p


def _blocks(keys: list[Span], queries: list[Span]) -> list[tuple[list[Span], list[Span]]]:
    """(queries, keys) of each prompt for one block edit, as many as needed so that no query loses its own position."""
    kept = [(k, q) if _pairs(k, q) else ((), ()) for k, q in zip(keys, queries, strict=True)]
    apart = [(tuple(at for at in q if at not in k), k) for k, q in kept]
    both = [[at for at in q if at in k] for k, q in kept]
    blocks = [apart]
    for n in range(max(map(len, both))):
        blocks.append(
            [
                (tuple(own[n : n + 1]), tuple(key for key in k if key not in own[n : n + 1]))
                for own, (k, _) in zip(both, kept, strict=True)
            ]
        )
    sees = [block for block in blocks if any(_pairs(k, q) for q, k in block)]
    return [([q for q, _ in block], [k for _, k in block]) for block in sees]


def _block(layer: int, queries: list[Span], keys: list[Span]) -> Edit:
    """The edit for prompts with these spans: plain positions where all are alike, else a mask for each prompt."""
    port = Port("attn.pattern", layer)
    if len(set(queries)) == 1 and len(set(keys)) == 1:
        return edit.block(port, query=queries[0], key=keys[0])
    return edit.block(port, query=_mask(queries), key=_mask(keys))


def _mask(spans: list[Span]) -> Tensor:
    """bool [prompt, position], as wide as the furthest position."""
    mask = torch.zeros(len(spans), 1 + max(max(span, default=0) for span in spans), dtype=torch.bool)
    for row, span in enumerate(spans):
        mask[row, list(span)] = True
    return mask


# --- the notes ----------------------------------------------------------------------------------------


def _notes(
    edges: Sequence[Edge], windows: list[list[int]], mean: Tensor, adjusted: Tensor, control: Tensor
) -> list[str]:
    """Each edge's strongest window in words, beside its control."""
    notes = []
    for edge, row, against in zip(edges, mean, control.nanmean(0), strict=True):
        if row[:-1].isnan().all():
            continue
        layer = int(row[:-1].nan_to_num(torch.inf).argmin())
        inside = windows[layer]
        where = f"layer {inside[0]}" if len(inside) == 1 else f"layers {inside[0]} to {inside[-1]}"
        beside = "" if against[layer].isnan() else f" (random keys {float(against[layer]):.2g})"
        notes.append(f"{edge.label}: {float(row[layer]):.2g} in {where}{beside}, {float(row[-1]):.2g} in all layers")
    more = mean[:, :-1].abs() > control.nanmean(0)[:, :-1].abs().nan_to_num(0.0)
    clear, tested = int(((adjusted <= 0.05) & more).sum()), int((~adjusted.isnan()).sum())
    if not tested:
        return notes  # one prompt has no p
    than = " more than random keys do" if not control.isnan().all() else ""
    return [*notes, f"{clear} of {tested} cells change the answer{than}, at adjusted p <= 0.05"]
