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

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from patchbay import edit, maths
from patchbay.edit import Edit
from patchbay.method import method
from patchbay.model import Model
from patchbay.port import Part, PatchbayError, Port, suggest
from patchbay.prove._cells import batches, check_twins, held_out, intervals, listed, p_values, rounding, sign_of
from patchbay.prove._first_order import along, two_runs
from patchbay.result import Result
from patchbay.run import run
from patchbay.sweep import sweep
from patchbay.task import Task

Site = Literal["resid_in", "resid_mid", "resid_out", "attn_out", "mlp_out", "head", "neuron", "expert"]
Way = Literal["denoising", "noising"]
SIGNAL = {"resid_in": "resid_in", "resid_mid": "resid_mid", "resid_out": "resid_out", "attn_out": "attn.out"}
SIGNAL |= {"mlp_out": "mlp.out", "head": "attn.z", "neuron": "mlp.act", "expert": "experts.out"}
INDEXED = ("head", "neuron", "expert")


class Column(NamedTuple):
    """One step of the position axis: its label, and the positions that it means in each prompt (maybe none)."""

    label: str | int
    spans: list[tuple[int, ...]]


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
    "subject,verb"; without, each for streams, attention and MLPs and all for heads, neurons and experts. `parts`: only
    these heads, neurons or experts; a Result gives its first `top`. `top` alone: those of the largest first-order
    effect on half of the prompts, patched on the other half. Main variable `share` with `low` and `high`; `effect` and
    its ends in the task's unit, `p`, `p_adjusted`, and the scores `clean` and `corrupted`. Axes: (layer, position),
    (layer), (layer, head) or (part).
    """
    _check(model, site, way, top)
    check_twins(model, task)
    chosen = _given(model, site, parts, top)
    task, notes = held_out(task, parts)
    if chosen is None and top is not None:
        dev, task = task.split()
        chosen = _first_order(model, dev, site, way, top, batch_size)
        notes.append(
            f"{listed(chosen)}: chosen on {len(dev)} prompts by first-order effect, patched on the other {len(task)}"
        )
    ports = _ports(model, site, chosen)
    columns = _columns(model, task, ("all" if site in INDEXED else "each") if positions is None else positions)
    effects, clean, corrupted = _measure(model, task, ports, columns, way, batch_size)
    gap = sign_of(task) * (clean - corrupted)
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


def _check(model: Model, site: str, way: str, top: int | None) -> None:
    if site not in SIGNAL:
        raise PatchbayError(f"site={site!r}; possible are {', '.join(SIGNAL)}" + suggest(site, list(SIGNAL)))
    if way not in ("denoising", "noising"):
        raise PatchbayError(f"way={way!r}; possible are denoising and noising")
    if top is not None and top < 1:
        raise PatchbayError(f"top={top}: at least one part is patched")
    if not any(SIGNAL[site] in model.signals(layer) for layer in range(model.n_layers)):
        model.require(Port(SIGNAL[site], 0))  # raises: no layer has it


def _given(model: Model, site: str, parts: Result | list[Part] | None, top: int | None) -> list[Part] | None:
    """The parts that were named, each once; None where all of the site are meant."""
    if site not in INDEXED:
        if parts is not None or top is not None:
            raise PatchbayError(
                f"parts and top choose heads, neurons or experts; site={site!r} is patched layer by layer"
            )
        return None
    if parts is None:
        if site == "neuron" and top is None:
            total = sum(model.n_neurons(layer) for layer in range(model.n_layers))
            raise PatchbayError(f"the model has {total:,} neurons: name some, parts=..., or say how many, top=20")
        return None
    if isinstance(parts, Result):
        if top is None:
            raise PatchbayError("parts is a Result: say how many of its parts, top=10, or pass result.top(10)")
        parts = parts.top(top)
    chosen = list(dict.fromkeys(parts[:top]))
    if not chosen:
        raise PatchbayError("no parts to patch were given")
    for part in chosen:
        if part.kind != site:
            raise PatchbayError(f"{part} is no {site}, and site={site!r} was asked")
        model.require(part.port())
    return chosen


def _ports(model: Model, site: str, chosen: list[Part] | None) -> list[Port]:
    if chosen is not None:
        return [part.port() for part in chosen]
    layers = [layer for layer in range(model.n_layers) if SIGNAL[site] in model.signals(layer)]
    if site not in INDEXED:
        return [Port(SIGNAL[site], layer) for layer in layers]
    count = model.n_heads if site == "head" else model.n_experts
    return [Port(SIGNAL[site], layer, i) for layer in layers for i in range(count(layer))]


def _first_order(model: Model, task: Task, site: str, way: str, top: int, batch_size: int) -> list[Part]:
    """The `top` parts with the largest mean of (value put in - value there) . gradient of the score, either sign."""
    layers = [layer for layer in range(model.n_layers) if SIGNAL[site] in model.signals(layer)]
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


# --- where --------------------------------------------------------------------------------------------


def _columns(model: Model, task: Task, positions: str) -> list[Column]:
    lengths = [len(ids) for ids in task.clean]
    if positions == "all":
        return [Column("all", [tuple(range(n)) for n in lengths])]
    if positions == "last":
        return [Column("last", [(n - 1,) for n in lengths])]
    if positions == "each":
        return _each(model, task, lengths)
    names = list(task.marks) if positions == "marks" else [name.strip() for name in positions.split(",")]
    known = ["each", "all", "last", "marks", *task.marks]
    for name in names:
        if name not in (*task.marks, "last"):
            raise PatchbayError(
                f"positions={positions!r}: no group {name!r}; possible are {', '.join(known)}" + suggest(name, known)
            )
    if not names:
        raise PatchbayError(
            f"positions='marks': task {task.name} names no groups of positions; possible are each, all, last"
        )
    spans = {name: [tuple(sorted(set(span))) for span in task.marks[name]] for name in task.marks}
    return [Column(name, spans[name] if name in spans else [(n - 1,) for n in lengths]) for name in names]


def _each(model: Model, task: Task, lengths: Sequence[int]) -> list[Column]:
    """One column a position, counted from the start where all prompts have one length, else from the end."""
    widest = max(lengths)
    if min(lengths) < widest:
        return [Column(back, [(n + back,) if n + back >= 0 else () for n in lengths]) for back in range(-widest, 0)]
    labels = [_label(model, task, at) for at in range(widest)]
    if all(label == str(at) for at, label in enumerate(labels)):
        return [Column(at, [(at,)] * len(task)) for at in range(widest)]
    return [Column(label, [(at,)] * len(task)) for at, label in enumerate(labels)]


def _label(model: Model, task: Task, at: int) -> str:
    """The place, and its token where all prompts have the same there, else the group that it is in in all of them."""
    tokens = {ids[at] for ids in task.clean}
    if len(tokens) == 1 and model.tokenizer is not None:
        token = model.decode([*tokens])
        return f"{at}{token}" if token.startswith(" ") else f"{at} {token}"
    groups = [name for name, spans in task.marks.items() if all(at in span for span in spans)]
    return f"{at} <{groups[0]}>" if groups else f"{at}"


# --- measuring ----------------------------------------------------------------------------------------


def _measure(
    model: Model, task: Task, ports: list[Port], columns: list[Column], way: str, batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Effects [prompt, port, column], NaN where a prompt lacks the place; scores of the clean and the corrupted run
    [prompt].
    """
    effects = torch.full((len(task), len(ports), len(columns)), torch.nan, dtype=torch.float64)
    scores = {side: torch.zeros(len(task), dtype=torch.float64) for side in ("here", "there")}
    for prompts in batches(task, batch_size):
        some = task[prompts]
        here, there = two_runs(some, way)
        taps = sorted(
            {Port(p.signal, p.layer, p.index if p.signal in ("mlp.act", "experts.out") else None) for p in ports}
        )
        donor = run(model, there, taps=taps, logits="last")
        own = run(model, here, logits="last").last_logits
        clean = donor.last_logits if way == "denoising" else own
        scores["here"][prompts] = some.score(own, clean).double().cpu()
        scores["there"][prompts] = some.score(donor.last_logits, clean).double().cpu()
        cells, edits = [], []
        for i, port in enumerate(ports):
            value = _by_position(donor[port], port)  # [prompt, position, ...]
            for j, column in enumerate(columns):
                spans = [column.spans[prompt] for prompt in prompts]
                if any(spans):
                    cells.append((i, j))
                    edits.append(_edit(port, value, spans))
        if not cells:
            continue
        metric = None if task.metric != "kl" else lambda logits, at, clean=clean: maths.kl(clean[at], logits)
        swept = sweep(model, some, edits, metric, on="corrupted" if way == "denoising" else "clean")
        change = sign_of(task) * (swept["value"].double() - swept["base"].double())  # [edit, prompt]
        change = change if way == "denoising" else -change
        has = torch.tensor([[bool(columns[j].spans[prompt]) for prompt in prompts] for _, j in cells])
        at = torch.tensor(cells)
        effects[torch.tensor(prompts)[None, :], at[:, :1], at[:, 1:]] = torch.where(has, change, torch.nan)
    clean, corrupted = ("there", "here") if way == "denoising" else ("here", "there")
    return effects, scores[clean], scores[corrupted]


def _by_position(signal: Tensor, port: Port) -> Tensor:
    """[prompt, position, ...feature], the axes in which edits take values."""
    return signal.movedim(next(i for i, axis in enumerate(port.axes) if axis in ("position", "query", "key")), 1)


def _edit(port: Port, value: Tensor, spans: list[tuple[int, ...]]) -> Edit:
    """Put each prompt's own values in at its own positions."""
    if len(set(spans)) == 1:
        return edit.replace(port, value[:, list(spans[0])], positions=spans[0])
    mask = torch.zeros(value.shape[:2], dtype=torch.bool)
    widest = max(map(len, spans))
    picked = value.new_zeros(len(spans), widest, *value.shape[2:])  # [prompt, chosen position, ...]
    for row, span in enumerate(spans):
        mask[row, list(span)] = True
        picked[row, : len(span)] = value[row, list(span)]
    return edit.replace(port, picked, positions=mask)


# --- the result ---------------------------------------------------------------------------------------


class Layout:
    """Where values [port, column] stand in the result: a map of layers, a grid of all heads, or a list of parts."""

    def __init__(
        self, model: Model, site: str, ports: list[Port], chosen: list[Part] | None, columns: list[Column]
    ) -> None:
        self.ports, self.columns = ports, columns
        self.n_layers = model.n_layers
        self.parts: list[Part] | None = None
        self.rows: tuple[str, ...] = ("layer",)
        if site in INDEXED:
            listed_one_by_one = chosen is not None or len(columns) > 1
            self.parts = [port.part for port in ports] if listed_one_by_one else None
            self.rows = ("part",) if listed_one_by_one else ("layer", site)

    @property
    def axes(self) -> tuple[str, ...]:
        return (*self.rows, "position") if len(self.columns) > 1 else self.rows

    @property
    def coords(self) -> dict[str, list[str | int]]:
        return {"position": [column.label for column in self.columns]} if len(self.columns) > 1 else {}

    def __call__(self, values: Tensor) -> Tensor:
        if self.rows != ("part",):
            widest = 1 + max(port.index or 0 for port in self.ports)
            grid = values.new_full((self.n_layers, widest, values.shape[1]), torch.nan)
            for port, row in zip(self.ports, values, strict=True):
                grid[port.layer or 0, port.index or 0] = row
            values = grid[:, 0] if self.rows == ("layer",) else grid
        return values if len(self.columns) > 1 else values[..., 0]


def _notes(task: Task, way: str, layout: Layout, share: Tensor, adjusted: Tensor, gap: Tensor) -> list[str]:
    """The largest cell in words, how many cells are clear of 0, and whether there was a gap to share."""
    flat = share.nan_to_num(-torch.inf).flatten()
    row, column = divmod(int(flat.argmax()), share.shape[1])
    port, where = layout.ports[row], layout.columns[column].label
    place = f"{port}" + (f" at {where}" if len(layout.columns) > 1 else "")
    clear, tested = int((adjusted <= 0.05).sum()), int((~adjusted.isnan()).sum())
    does = "brings back" if way == "denoising" else "takes away"
    notes = [
        f"{place} {does} most: {float(flat.max()):.3g} of the gap; {clear} of {tested} cells at adjusted p <= 0.05"
    ]
    _, low, high = (float(end) for end in intervals(gap[:, None]))
    if not low > 0.0:
        notes.append(
            f"the clean runs do not score clearly better than the corrupted ones (gap {float(gap.mean()):.3g} "
            f"{task.unit}, 95 % {low:.3g} to {high:.3g}): shares mean little, read effect"
        )
    return notes
