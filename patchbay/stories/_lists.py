"""Lists of many lengths for one model, which of its answers are right, and where heads look while it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import patchbay as pb
from patchbay import maths
from patchbay.edits.apply import apply
from patchbay.model.given import by_length
from patchbay.model.model import Model
from patchbay.signal.port import Part, PatchbayError, Port
from patchbay.tasks.task import Task

SIZES = range(3, 21)
DEV = 1 / 3  # of the prompts of each length, to choose on
KNOWN = 0.5  # a length is one that the model can do when it names this share on the development part


@dataclass(frozen=True)
class Lists:
    """Prompts to choose on and to judge on, of every length that the model can read, and why others are missing."""

    dev: Task
    test: Task
    sizes: tuple[int, ...]
    missing: str


def ask(model: Model, *, n: int, seed: int) -> Lists:
    """`n` lists of each length from 3 to 20, as far as the model's positions and vocabulary allow."""
    halves: list[tuple[Task, Task]] = []
    sizes: list[int] = []
    why = ""
    for size in SIZES:
        try:
            task = pb.tasks.laundry_list(model, n, objects=size, seed=seed)
        except PatchbayError as error:
            why = why or f"lists of {size} and more are not asked: {error}"
            if not sizes:
                raise
            break
        halves.append(task.split(DEV, seed))
        sizes.append(size)
    dev, test = (join(list(side)) for side in zip(*halves, strict=True))
    return Lists(dev, test, tuple(sizes), why if len(why) <= 200 else why[:197] + "...")


def join(tasks: Sequence[Task]) -> Task:
    """The prompts of several tasks as one."""
    first = tasks[0]
    rows = {
        name: tuple(row for task in tasks for row in getattr(task, name))
        for name in ("clean", "right", "wrong", "texts")
    }
    twins = tuple(row for task in tasks for row in task.corrupted or ())
    marks = {name: tuple(row for task in tasks for row in task.marks[name]) for name in first.marks}
    labels = {name: tuple(row for task in tasks for row in task.labels[name]) for name in first.labels}
    options = {key: value for key, value in first.options.items() if key != "objects"}
    return replace(first, **rows, corrupted=twins or None, marks=marks, labels=labels, options=options)  # type: ignore[arg-type]


def known(task: Task, right: Tensor, most: int) -> Task:
    """Up to `most` prompts, spread evenly, of the lengths that the model can do; of all where it can do none."""
    sizes = torch.tensor(task.labels["n_objects"])
    can = [size for size in sorted(set(sizes.tolist())) if float(right[sizes == size].mean()) >= KNOWN]
    places = [i for i, size in enumerate(sizes.tolist()) if not can or size in can]
    step = max(1.0, len(places) / most)
    return task[[places[int(i * step)] for i in range(min(most, len(places)))]]


def rightness(model: Model, task: Task, edits: Sequence[object] = ()) -> Tensor:
    """1 where the model names the missing object, over the whole vocabulary, [prompt]."""
    asked = task.with_metric("accuracy")
    pieces = [
        some.score(pb.run(model, some, edits=list(edits), logits="last").last_logits).cpu()
        for some in (asked[i : i + 64] for i in range(0, len(asked), 64))
    ]
    return torch.cat(pieces).double()


def screened(model: Model, task: Task, head: Part, knobs: Sequence[pb.Knob]) -> Tensor:
    """1 where the missing object is named with each knob turned at the last position, [knob, prompt]."""
    port, out = head.port("z"), torch.zeros(len(knobs), len(task), dtype=torch.float64)
    for places in by_length(task.clean):
        some = task[places].with_metric("accuracy")
        z = pb.run(model, some, taps=[port], logits="last").last(port)  # [prompt, d_head]
        edits = []
        for knob in knobs:
            value = z[:, None]  # what the knob's edits make of it: one replacement is cheaper in a sweep than they are
            for edit in knob.edits_at():
                value = apply(replace(edit, positions=None), value, None, None)
            edits.append(pb.replace(port, value, positions="last"))
        out[:, places] = pb.sweep(model, some, edits)["value"].double()
    return out


def looks(model: Model, task: Task, heads: Sequence[Part], edits: Sequence[object] = ()) -> dict[str, Tensor]:
    """Attention of heads from the last position: to the missing object, to each other listed one, to each that is done (both
    means over such places), [head, prompt]."""
    ports = [Port("attn.pattern", head.layer, head.index).rows(-1) for head in heads]
    out = {name: torch.zeros(len(heads), len(task)) for name in ("missing", "listed", "done")}
    for start in range(0, len(task), 64):
        some = task[start : start + 64]
        trace = pb.run(model, some, taps=ports, edits=list(edits), logits="last")
        for h, port in enumerate(ports):
            rows = trace[port][:, 0].cpu()  # [prompt, key]
            for i, row in enumerate(rows):
                missing = some.marks["missing"][i]
                others = [at for at in some.marks["objects"][i] if at not in missing]
                out["missing"][h, start + i] = row[list(missing)].sum()
                out["listed"][h, start + i] = row[others].mean()
                out["done"][h, start + i] = row[list(some.marks["done"][i])].mean()
    return {name: value.double() for name, value in out.items()}


def by_label(task: Task, label: str, *rows: Tensor) -> list[tuple[int, int, list[maths.Interval]]]:
    """For each value of a label: how many prompts have it, and the mean of each row [prompt] on them with its interval."""
    values = torch.tensor(task.labels[label])
    found = []
    for value in sorted(set(values.tolist())):
        at = values == value
        found.append((int(value), int(at.sum()), [maths.bootstrap_interval(row[at]) for row in rows]))
    return found
