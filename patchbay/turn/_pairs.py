"""Two groups of prompts that a direction is to tell apart: a task's prompts and their twins, or two lists of texts.

A task's prompts and twins are pairs. Two lists are groups, of any two sizes: nothing says which of one belongs to which of the
other, but for the way "pca", which takes differences within pairs and takes the lists in their order.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

LEAST = 2  # of a group in a half


@dataclass(frozen=True)
class Groups:
    """Positive and negative prompts as ids; whether they are pairs; and the task, where the prompts have answers."""

    name: str
    positive: list[list[int]]
    negative: list[list[int]]
    paired: bool
    task: Task | None = None

    def split(self, seed: int) -> tuple[Groups, Groups]:
        """Two halves without a prompt in common: to choose on and to test on."""
        if self.task is not None:
            return of_task(self.task.split(0.5, seed)[0]), of_task(self.task.split(0.5, seed)[1])
        halves: tuple[dict[str, Any], ...] = ({}, {})
        for side, which in self._sides().items():
            order = list(dict.fromkeys(which))  # copies of one prompt are in one half
            random.Random(f"split-{seed}{'' if self.paired else f'-{side}'}").shuffle(order)
            first = set(order[: len(order) // 2])
            for half, inside in zip(halves, (True, False), strict=True):
                listed = getattr(self, side)
                half[side] = [ids for ids, key in zip(listed, which, strict=True) if (key in first) == inside]
        return replace(self, **halves[0]), replace(self, **halves[1])

    def _sides(self) -> dict[str, list[Any]]:
        """What may not be torn apart, one for each prompt of a side: its tokens, or those of its pair."""
        sides = {side: [tuple(ids) for ids in getattr(self, side)] for side in ("positive", "negative")}
        if not self.paired:
            return sides
        pairs = list(zip(sides["positive"], sides["negative"], strict=True))
        return dict.fromkeys(sides, pairs)

    def fewest(self) -> int:
        """Different prompts of the smaller group."""
        return min(len(set(which)) for which in self._sides().values())


def of_task(task: Task) -> Groups:
    """A task's prompts against their twins."""
    if task.corrupted is None:
        raise PatchbayError(
            f"task {task.name} has no corrupted twins: contrast pairs are prompts (positive) and twins (negative), or two lists "
            "of texts, positive=[...] and negative=[...]"
        )
    twins = [list(ids) for ids in task.corrupted]
    return Groups(task.name, [list(ids) for ids in task.clean], twins, True, task if task.answered else None)


def groups_of(model: Model, task: Task | None, positive: Any, negative: Any, way: str) -> Groups:
    """What a call was given, checked: a task, or two lists."""
    if (task is None) == (positive is None and negative is None) or (positive is None) != (negative is None):
        raise PatchbayError("give a task with twins, or both positive=[...] and negative=[...], two lists of texts")
    if task is not None:
        task.check(model.vocab_size)
        found = of_task(task)
    else:
        plus, minus = (model.encode(_several(*side)) for side in ((positive, "positive"), (negative, "negative")))
        found = Groups("contrast", plus, minus, paired=way == "pca")
    sizes = len(found.positive), len(found.negative)
    if found.paired and sizes[0] != sizes[1]:
        raise PatchbayError(
            f"way='pca' takes differences within pairs, and there are {sizes[0]} positive and {sizes[1]} negative prompts; "
            "give as many of both, in the same order, or take way='mean' or 'probe'"
        )
    both = {tuple(ids) for ids in found.positive} & {tuple(ids) for ids in found.negative}
    if both and task is None:
        raise PatchbayError(f"{model.decode(min(both))!r} stands in both groups, which are to be told apart")
    if found.fewest() < 2 * LEAST:
        of = (
            f"task {found.name} has {sizes[0]} pairs"
            if task is not None
            else f"{sizes[0]} positive and {sizes[1]} negative"
        )
        raise PatchbayError(f"{of}: {LEAST} different ones to fit on and {LEAST} to hold out are needed")
    return found


def _several(texts: Any, side: str) -> Any:
    if isinstance(texts, str) or (not isinstance(texts, Sequence) and not hasattr(texts, "tolist")):
        raise PatchbayError(f"{side}: a list of texts is needed, got {type(texts).__name__} {texts!r:.40}")
    return texts
