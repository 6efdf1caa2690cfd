"""Groups of prompts that a finder contrasts: by a label of the task, or the prompts against their corrupted twins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError, suggest
from patchbay.tasks.task import Task


@dataclass(frozen=True)
class Groups:
    """Prompts as ids, the group of each (its place in `names`), and the names."""

    prompts: list[list[int]]
    of: Tensor  # int64 [prompt]
    names: list[str]

    def members(self, name: str) -> Tensor:
        """Bool [prompt]: is it of this group?"""
        return self.of == self.names.index(name)

    def need(self, n: int, what: str) -> None:
        """An error where a group has fewer than `n` prompts."""
        small = {name: int((self.of == i).sum()) for i, name in enumerate(self.names)}
        small = {name: count for name, count in small.items() if count < n}
        if small:
            found = ", ".join(f"{name!r} has {count}" for name, count in small.items())
            raise PatchbayError(f"{what} needs {n} prompts or more in every group; {found}")


def groups_of(model: Model, task: Task, label: str | None, what: str) -> Groups:
    """The task's prompts grouped by the values of a label; without one, `clean` against `corrupted`."""
    if not isinstance(task, Task):
        raise PatchbayError(f"{what} contrasts groups of prompts and needs a Task, got {type(task).__name__}")
    task.check(model.vocab_size)
    if label is None:
        if task.corrupted is None:
            raise PatchbayError(
                f"{what}: task {task.name} has no corrupted twins to contrast its prompts with; give label=, one of "
                f"{', '.join(task.labels) or 'none (the task has no labels)'}"
            )
        prompts = [list(ids) for ids in (*task.clean, *task.corrupted)]
        of = torch.arange(2).repeat_interleave(len(task))
        return Groups(prompts, of, ["clean", "corrupted"])
    values = label_of(task, label, what)
    names = list(dict.fromkeys(values))
    if len(names) < 2:
        raise PatchbayError(
            f"{what}: label {label!r} of task {task.name} has the one value {names[0]!r}; two are needed"
        )
    of = torch.tensor([names.index(value) for value in values])
    return Groups([list(ids) for ids in task.clean], of, names)


def label_of(task: Task, label: str, what: str) -> list[str]:
    """One text for each prompt: the values of a label."""
    if label not in task.labels:
        known = list(task.labels)
        raise PatchbayError(
            f"{what}: task {task.name} has no label {label!r}; its labels are {', '.join(known) or 'none'}"
            + suggest(label, known)
        )
    return [str(value) for value in task.labels[label]]


def value_of(groups: Groups, value: str | None, label: str | None, what: str) -> str | None:
    """The asked group, checked; without one, the first of two, or None where there are more."""
    if value is None:
        return groups.names[0] if len(groups.names) == 2 else None
    if value not in groups.names:
        raise PatchbayError(
            f"{what}: asked for the group {value!r} of {label or 'clean and corrupted'}; there are "
            f"{', '.join(groups.names[:12])}" + suggest(value, groups.names)
        )
    return value


def halves(groups: Groups, seed: int) -> Tensor:
    """Bool [prompt]: a random half of every group (the larger one, where a group is odd)."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(groups.of), dtype=torch.bool)
    for i in range(len(groups.names)):
        members = (groups.of == i).nonzero()[:, 0]
        picked = torch.randperm(len(members), generator=generator)[: (len(members) + 1) // 2]
        chosen[members[picked]] = True
    return chosen
