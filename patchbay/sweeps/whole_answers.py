"""Sweeps over answers of several tokens: every token of every answer is a row of an ordinary sweep, and rows make whole answers.

Rows that have equally many tokens of an answer behind their prompt are one sweep. Positions of edits count in the prompt, as they do
in generation: an edit at all positions, or from one on, acts on the answer's tokens too, one at -1 or "last" on the prompt's last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patchbay.edits.apply import acts_on, for_prompts
from patchbay.edits.edit import Edit
from patchbay.errors import PatchbayError
from patchbay.model.given import flat_edits
from patchbay.model.model import Model
from patchbay.results.record import task_record
from patchbay.results.result import Result
from patchbay.signal.positions import Batch, Positions, Role, Token, chosen
from patchbay.tasks.answers import Step, steps_of
from patchbay.tasks.task import Task


def sweep_answers(
    model: Model, task: Task, edits: Sequence[Any], on: str, one: Callable[[Task, Sequence[Any]], Result]
) -> Result:
    """What `pb.sweep` returns, for a task whose answers are of several tokens; `one` is a sweep of answers of one token."""
    prompts = task.prompts(on)
    entries = [flat_edits([entry], model=model) for entry in edits]
    _check(model, prompts, entries)
    read, each = _steps(task, prompts)
    values = torch.full((len(entries), len(read)), float("nan"))
    base, notes, record = torch.full((len(read),), float("nan")), set(), {}
    for n_behind in sorted({step.place for step in read}):
        at = [i for i, step in enumerate(read) if step.place == n_behind]
        rows = [read[i] for i in at]
        part = Task(task.name, tuple(r.ids for r in rows), tuple(r.target for r in rows), metric=each)
        moved = [[m for edit in entry if (m := _moved(model, edit, rows, len(prompts), n_behind))] for entry in entries]
        acting = [i for i, entry in enumerate(moved) if entry]
        some = one(part, [moved[i] for i in acting] or [[_none(model)]])
        base[at] = some["base"]
        values[:, at] = some["base"]  # of entries that touch no token that these rows see
        if acting:
            values[torch.tensor(acting)[:, None], torch.tensor(at)] = some["value"]
        notes |= set(some.notes)
        record = some.provenance
    result = Result(
        {
            "value": (_whole(task, read, values), ("edit", "prompt"), task.unit),
            "base": (_whole(task, read, base), ("prompt",), task.unit),
        },
        coords={"edit": [" + ".join(map(str, entry)) for entry in entries]},
        notes=sorted(notes),
    )
    result.provenance |= record | {"task": task_record(task, "the prompts")}
    result.provenance["options"] = {**record["options"], "metric": task.metric_name, "on": on}
    return result


def _steps(task: Task, prompts: Sequence[tuple[int, ...]]) -> tuple[list[Step], str]:
    """The steps that the metric reads, and what is read of each."""
    every = steps_of(prompts, task.answers)
    if task.metric == "kl":
        return [step for step in every if step.answer == step.place == 0], "kl"
    if task.metric == "accuracy":
        return [step for step in every if step.answer == 0], "accuracy"
    return every, "log_probability"


def _whole(task: Task, read: Sequence[Step], values: Tensor) -> Tensor:
    """The metric [..., prompt] from what was read of each step [..., step]."""
    if task.metric == "kl":
        return values
    if task.metric == "accuracy":
        of = [[i for i, step in enumerate(read) if step.prompt == prompt] for prompt in range(len(task))]
        return torch.stack([values[..., some].amin(-1) for some in of], -1)
    return task.of_steps(values.double()).to(values.dtype)


def _check(model: Model, prompts: Sequence[tuple[int, ...]], entries: Sequence[Sequence[Edit]]) -> None:
    """Refuse empty entries, ports that the model lacks, and positions outside the prompts."""
    if not entries or not all(entries):
        raise PatchbayError("a sweep needs at least one edit in every entry")
    lengths = torch.tensor([len(ids) for ids in prompts])
    ids = torch.tensor([[*row, *[0] * (int(lengths.max()) - len(row))] for row in prompts])
    for edit in (edit for entry in entries for edit in entry):
        model.require(edit.port)
        touched = acts_on(edit, Batch(ids, lengths, lengths, model))
        if not bool(touched.any()) and edit.positions != "generated" and not isinstance(edit.positions, Token):
            raise PatchbayError(f"{edit} touches nothing: no prompt has such a position")


def _moved(model: Model, edit: Edit, rows: Sequence[Step], n_prompts: int, n_behind: int) -> Edit | None:
    """The edit on rows of prompts with `n_behind` tokens behind them, its positions counted in the prompts; None where it
    touches none of them."""
    lengths = torch.tensor([len(row.ids) for row in rows])
    width = int(lengths.max())
    ids = torch.tensor([[*row.ids, *[0] * (width - len(row.ids))] for row in rows])
    batch = Batch(ids, lengths, lengths - n_behind, model)
    own = for_prompts(edit, [row.prompt for row in rows], n_prompts, width)
    if own is None:
        return None
    own = replace(own, positions=_counted(own.positions, batch, n_behind), keys=_counted(own.keys, batch, n_behind))
    return own if bool(acts_on(own, Batch(ids, lengths, lengths, model)).any()) else None


def _counted(positions: Positions, batch: Batch, n_behind: int) -> Positions:
    """The same positions of prompts that have `n_behind` tokens behind them."""
    if isinstance(positions, str) and positions == "last":
        return -1 - n_behind
    if isinstance(positions, int):
        return positions - n_behind if positions < 0 else positions
    if isinstance(positions, tuple):
        return tuple(index - n_behind if index < 0 else index for index in positions)
    if isinstance(positions, slice | str | Role):  # "generated"
        return chosen(positions, batch) >= 0
    return positions


def _none(model: Model) -> Edit:
    """An edit that changes nothing, where no entry acts on the rows of a sweep."""
    return Edit("scale", model.port("embed"), 1.0)
