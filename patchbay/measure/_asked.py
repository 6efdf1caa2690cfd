"""Questions with choices: prompts, choices and right answers from a Task or from rows, and whether the best choice is the right one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchbay.measure._items import rows_of, texts_only
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task


class Asked(NamedTuple):
    """Items: their prompts, choices, right answers by place, premises where they have them, names, and what is to be said."""

    prompts: list[Any]
    choices: list[list[Any]]
    right: list[int]
    premises: list[Any]
    where: list[str]
    said: list[str]


def asked_of(items: Any) -> Asked:
    """The items of a Task, whose right answers stand first, or of rows."""
    if isinstance(items, Task):
        if not items.answered or any(len(each) < 2 for each in items.whole_answers):
            raise PatchbayError(
                f"task {items.name} has prompts without wrong answers: choices are a right answer and wrong ones"
            )
        texts = items.answer_texts or items.whole_answers
        choices = [list(each) for each in (items.whole_answers if not items.texts or not items.answer_texts else texts)]
        prompts = list(items.texts) if items.texts and items.answer_texts else list(items.clean)
        return Asked(prompts, choices, [0] * len(items), [], [f"prompt {i}" for i in range(len(items))], [])
    rows, said = rows_of(items, ("prompt", "choices", "answer"), ("premise",), lists=("choices",))
    texts_only(rows, ("prompt", "premise"))
    premises = [row.values["premise"] for row in rows if "premise" in row.values]
    if premises and len(premises) < len(rows):
        raise PatchbayError(f"{len(premises)} of {len(rows)} items have a premise: all or none")
    right = [place_of(row.values["answer"], row.values["choices"], row.where) for row in rows]
    return Asked([row.values["prompt"] for row in rows], [row.values["choices"] for row in rows], right, premises, [row.where for row in rows], said)  # fmt: skip


def place_of(answer: Any, choices: Sequence[Any], where: str) -> int:
    """The place of an answer among its choices, given as the choice or as a number from 0."""
    if answer in choices:
        return list(choices).index(answer)
    number = int(answer) if isinstance(answer, str) and answer.strip().isdigit() else answer
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(choices):
        return number
    raise PatchbayError(
        f"{where}: the answer {answer!r} is none of the choices {', '.join(map(repr, list(choices)[:6]))} and no place from 0 to {len(choices) - 1}"
    )


def hit(values: Tensor, right: Tensor) -> Tensor:
    """1 where the right choice has the highest value, 0 where another has; equal ones share. values [item, choice] -> [item]."""
    best = _best(values)
    return best[torch.arange(len(right)), right].double() / best.sum(1)


def picked(values: Tensor, seed: int) -> Tensor:
    """The place of the choice of the highest value, [item]; of equal ones any, drawn by `seed`, and not the first, which is right too often."""
    points = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed))
    return points.masked_fill(~_best(values), -1.0).argmax(1)


def _best(values: Tensor) -> Tensor:
    """Which choices have the highest value, [item, choice]; NaN, in place of choices that an item has not, never has."""
    filled = values.nan_to_num(nan=-torch.inf)
    return (filled == filled.amax(1, keepdim=True)) & ~values.isnan()
