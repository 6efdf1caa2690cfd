"""Sites: where a signal can be put from one run into another, at which positions, and where its effect stands in a Result.

Shared by the methods that patch every site between twins, run by run or by gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.edits.edit import Edit
from patchbay.errors import one_of
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.prove._cells import swept_batches
from patchbay.prove._first_order import two_runs
from patchbay.signal.port import FEATURES, Part, PatchbayError, Port, suggest
from patchbay.sweeps.sweep import sweep
from patchbay.tasks.task import Task

Site = Literal[
    "resid_in",
    "resid_mid",
    "resid_out",
    "attn_out",
    "mlp_out",
    "head",
    "neuron",
    "expert",
    "feature",
    "mlp_feature",
    "attn_feature",
]
Way = Literal["denoising", "noising"]
SIGNAL = {"resid_in": "resid_in", "resid_mid": "resid_mid", "resid_out": "resid_out", "attn_out": "attn.out"}
SIGNAL |= {"mlp_out": "mlp.out", "head": "attn.z", "neuron": "mlp.act", "expert": "experts.out"}
SIGNAL |= {kind: f"{kind}s.act" for kind in FEATURES}
INDEXED = ("head", "neuron", "expert", *FEATURES)
MANY = ("neuron", *FEATURES)  # too many to be patched one by one unasked


class Column(NamedTuple):
    """One step of the position axis: its label, and the positions that it means in each prompt (maybe none)."""

    label: str | int
    spans: list[tuple[int, ...]]


# --- where --------------------------------------------------------------------------------------------


def layers_of(model: Model, site: str, way: str) -> list[int]:
    """The layers that have the site's signal. Raises PatchbayError where none has, or no such site or way is known."""
    one_of("site", site, SIGNAL)
    one_of("way", way, ("denoising", "noising"))
    layers = [layer for layer in range(model.n_layers) if SIGNAL[site] in model.signals(layer)]
    if not layers:
        model.require(Port(SIGNAL[site], 0))  # raises: no layer has it
    return layers


def columns_of(model: Model, task: Task, site: str, positions: str | None) -> list[Column]:
    """The steps of the position axis that `positions` asks for, as `activation_patching` describes it."""
    lengths = [len(ids) for ids in task.clean]
    if positions is None and site not in INDEXED and min(lengths) < max(lengths):
        return _of_all(model, task, lengths)
    positions = ("all" if site in INDEXED else "each") if positions is None else positions
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
        return _from_end(model, task, widest)
    labels = [_label(model, task, at) for at in range(widest)]
    if all(label == str(at) for at, label in enumerate(labels)):
        return [Column(at, [(at,)] * len(task)) for at in range(widest)]
    return [Column(label, [(at,)] * len(task)) for at, label in enumerate(labels)]


def _from_end(model: Model, task: Task, n: int) -> list[Column]:
    """The last `n` positions, counted from the end, with their tokens where all prompts that reach there have the same."""
    columns = []
    for back in range(-n, 0):
        spans: list[tuple[int, ...]] = [(len(ids) + back,) if len(ids) + back >= 0 else () for ids in task.clean]
        tokens = {ids[back] for ids in task.clean if len(ids) + back >= 0}
        text = model.decode([*tokens]) if len(tokens) == 1 and model.tokenizer is not None else ""
        columns.append(Column(f"{back}{text}" if text.startswith(" ") else f"{back} {text}".rstrip(), spans))
    plain = all(str(column.label).lstrip("-").isdigit() for column in columns)
    return [Column(int(column.label), column.spans) for column in columns] if plain else columns


def _of_all(model: Model, task: Task, lengths: list[int]) -> list[Column]:
    """Steps that every prompt has, where prompts differ in length: the task's groups of positions, and the rest together; without
    groups, the positions that the shortest has, counted from the end, and all earlier ones together."""
    if not task.marks:
        shortest = min(lengths)
        earlier = Column("earlier", [tuple(range(n - shortest)) for n in lengths])
        return [earlier, *(Column(str(column.label), column.spans) for column in _from_end(model, task, shortest))]
    columns = [Column(name, [tuple(sorted(set(span))) for span in spans]) for name, spans in task.marks.items()]
    last = Column("last", [(n - 1,) for n in lengths])
    columns += [last] if all(column.spans != last.spans for column in columns) else []
    taken = [{at for column in columns for at in column.spans[i]} for i in range(len(task))]
    rest = Column("rest", [tuple(sorted(set(range(n)) - held)) for n, held in zip(lengths, taken, strict=True)])
    return [*columns, rest] if any(rest.spans) else columns


def _label(model: Model, task: Task, at: int) -> str:
    """The place, and its token where all prompts have the same there, with that of their twins where it is another (`3
    Lily/Tim`), else the group that it is in in all of them."""
    tokens = {ids[at] for ids in task.clean}
    if len(tokens) == 1 and model.tokenizer is not None:
        token = model.decode([*tokens])
        twins = {ids[at] for ids in task.corrupted or () if at < len(ids)}
        if len(twins) == 1 and twins != tokens:
            token = f"{token}/{model.decode([*twins]).strip()}"
        return f"{at}{token}" if token.startswith(" ") else f"{at} {token}"
    groups = [name for name, spans in task.marks.items() if all(at in span for span in spans)]
    return f"{at} <{groups[0]}>" if groups else f"{at}"


# --- measuring ----------------------------------------------------------------------------------------


def patched(
    model: Model, task: Task, ports: list[Port], columns: list[Column], way: str, batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Effects [prompt, port, column], NaN where a prompt lacks the place; scores of the clean and the corrupted run
    [prompt].
    """
    effects = torch.full((len(task), len(ports), len(columns)), torch.nan, dtype=torch.float64)
    scores = {side: torch.zeros(len(task), dtype=torch.float64) for side in ("here", "there")}
    for prompts in swept_batches(task, batch_size):
        some = task[prompts]
        here, there = two_runs(some, way)
        taps = sorted(
            {
                Port(p.signal, p.layer, p.index if p.index_axis in ("neuron", "expert", "feature") else None)
                for p in ports
            }
        )
        donor = run(model, there, taps=taps, logits=task.reads)
        own, put = run(model, here, logits=task.reads).read(task.reads), donor.read(task.reads)
        clean = put if way == "denoising" else own
        scores["here"][prompts] = some.score(own, clean).double().cpu()
        scores["there"][prompts] = some.score(put, clean).double().cpu()
        cells, edits = [], []
        for i, port in enumerate(ports):
            value = donor[port].movedim(port.tapped_axis, 1)  # [prompt, position, ...]
            for j, column in enumerate(columns):
                spans = [column.spans[prompt] for prompt in prompts]
                if any(spans):
                    cells.append((i, j))
                    edits.append(placed(port, value, spans))
        if not cells:
            continue
        metric = None if task.metric != "kl" else lambda logits, at, clean=clean: maths.kl(clean[at], logits)
        swept = sweep(model, some, edits, metric, on="corrupted" if way == "denoising" else "clean")
        change = task.sign * (swept["value"].double() - swept["base"].double())  # [edit, prompt]
        change = change if way == "denoising" else -change
        has = torch.tensor([[bool(columns[j].spans[prompt]) for prompt in prompts] for _, j in cells])
        at = torch.tensor(cells)
        effects[torch.tensor(prompts)[None, :], at[:, :1], at[:, 1:]] = torch.where(has, change, torch.nan)
    clean, corrupted = ("there", "here") if way == "denoising" else ("here", "there")
    return effects, scores[clean], scores[corrupted]


def placed(port: Port, value: Tensor, spans: list[tuple[int, ...]], make: Callable[..., Edit] = edit.replace) -> Edit:
    """Put (or add) each prompt's own values [prompt, position, ...] in at its own positions."""
    if len(set(spans)) == 1:
        return make(port, value[:, list(spans[0])], positions=spans[0])
    mask = torch.zeros(value.shape[:2], dtype=torch.bool)
    widest = max(map(len, spans))
    picked = value.new_zeros(len(spans), widest, *value.shape[2:])  # [prompt, chosen position, ...]
    for row, span in enumerate(spans):
        mask[row, list(span)] = True
        picked[row, : len(span)] = value[row, list(span)]
    return make(port, picked, positions=mask)


# --- in a result --------------------------------------------------------------------------------------


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
            listed_one_by_one = chosen is not None or len(columns) > 1 or site in FEATURES
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
