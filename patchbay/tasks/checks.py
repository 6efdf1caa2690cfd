"""What is no task: counts that differ, marks outside their prompts, answers that a metric cannot compare, ids that a model lacks."""

from __future__ import annotations

import operator
from typing import Any

from patchbay.errors import PatchbayError, said, suggest
from patchbay.tasks.answers import NORMALISATIONS
from patchbay.tasks.scoring import COMPARING, METRICS


def check(task: Any) -> None:
    """Raise PatchbayError, by name, where the fields of a task do not belong together."""
    _counts(task)
    _twins(task)
    _marks(task)
    _metric(task)
    if task.answered:
        _answers(task)


def are_tasks(tasks: Any, kind: type) -> None:
    """Raise PatchbayError for anything but one Task or several in a list."""
    if not isinstance(tasks, (list, tuple)) or not all(isinstance(task, kind) for task in tasks):
        raise PatchbayError(f"joined takes a list of Tasks, got {said(tasks)}")
    if not tasks:
        raise PatchbayError("no tasks to join were given")


def indices(which: Any) -> list[int]:
    """Indices of prompts, of one or of several."""
    try:
        return [operator.index(which)] if hasattr(which, "__index__") else [operator.index(i) for i in which]
    except TypeError:
        raise PatchbayError(f"prompts are picked by an index, a slice or several indices, got {said(which)}") from None


def marked(task: Any, name: str, option: str = "subject") -> list[tuple[int, ...]]:
    """The positions of each prompt that a mark names, in order, each once. Raises PatchbayError where a prompt has none."""
    if name not in task.marks:
        raise PatchbayError(
            f"{option}={name!r}: task {task.name} marks {', '.join(task.marks) or 'no positions'}; give a task that marks them "
            "(pb.tasks.facts_in_memory does), or the name of another mark" + suggest(name, list(task.marks))
        )
    spans = [tuple(sorted(set(span))) for span in task.marks[name]]
    empty = [i for i, span in enumerate(spans) if not span]
    if empty:
        raise PatchbayError(f"{option}={name!r}: prompts {empty[:5]} of task {task.name} have no such position")
    return spans


def _counts(task: Any) -> None:
    if not task.clean or not all(task.clean):
        at = next((i for i, prompt in enumerate(task.clean) if not prompt), None)
        raise PatchbayError(f"task {task.name}: {'no prompts' if at is None else f'prompt {at} has no tokens'}")
    rows = {**task.marks, **task.labels}
    rows |= {"answers": task.answers} if task.answers else {"wrong": task.wrong}
    rows |= {"right": task.right} if task.right else {}
    rows |= {"answer_texts": task.answer_texts} if task.answer_texts else {}
    rows |= {"corrupted": task.corrupted} if task.corrupted is not None else {}
    rows |= {"texts": task.texts} if task.texts else {}
    uneven = {name: len(values) for name, values in rows.items() if len(values) != len(task.clean)}
    if uneven:
        found = ", ".join(f"{name} has {count}" for name, count in uneven.items())
        raise PatchbayError(f"task {task.name}: {len(task.clean)} prompts, but {found}; each needs one per prompt")


def _twins(task: Any) -> None:
    if task.corrupted is not None and task.options.get("aligned", True):
        pairs = enumerate(zip(task.clean, task.corrupted, strict=True))
        other = [f"{i} ({len(a)} and {len(b)} tokens)" for i, (a, b) in pairs if len(a) != len(b)]
        if other:
            raise PatchbayError(
                f"task {task.name}: {len(other)} corrupted twins differ from their prompts in length: "
                f"{', '.join(other[:5])}; give twins of equal length, or say aligned=False to Task.from_prompts (options={{'aligned': False}} to Task itself)"
            )


def _marks(task: Any) -> None:
    for name, groups in task.marks.items():
        for i, (positions, prompt) in enumerate(zip(groups, task.clean, strict=True)):
            if any(not 0 <= position < len(prompt) for position in positions):
                raise PatchbayError(
                    f"task {task.name}: mark {name!r} is at {positions} in prompt {i}, which has {len(prompt)} tokens"
                )


def _metric(task: Any) -> None:
    if not callable(task.metric) and task.metric not in list(METRICS):
        known = f"metrics are {', '.join(METRICS)}, or a function"
        raise PatchbayError(
            f"task {task.name}: no metric {task.metric!r}; {known}{suggest(str(task.metric), list(METRICS))}"
        )
    if task.normalise not in NORMALISATIONS:
        raise PatchbayError(f"task {task.name}: no normalise={task.normalise!r}; possible: {', '.join(NORMALISATIONS)}")
    if not task.answered and not callable(task.metric) and task.metric != "kl":
        raise PatchbayError(
            f"task {task.name} has no answers, which the metric {task.metric} needs: give right=, or use kl or a function"
        )


def _answers(task: Any) -> None:
    whole = task.whole_answers
    if not all(all(each) and each for each in whole):
        raise PatchbayError(f"task {task.name}: an answer has no tokens")
    if task.normalise in ("byte", "character") and [*map(len, task.answer_texts)] != [*map(len, whole)]:
        raise PatchbayError(f"task {task.name}: normalise={task.normalise!r} needs answer_texts, one for each answer")
    every = [*task.clean, *(task.corrupted or ()), *(ids for each in whole for ids in each)]
    lowest = min(token for ids in every for token in ids)
    if lowest < 0:
        raise PatchbayError(f"task {task.name}: token ids are never negative, found {lowest}")
    both = [i for i, (right, *wrong) in enumerate(whole) if right in wrong]
    if both:
        raise PatchbayError(f"task {task.name}: the right answer is also among the wrong ones in prompts {both[:5]}")
    none = [i for i, each in enumerate(whole) if len(each) < 2]
    if task.metric in COMPARING and none:
        raise PatchbayError(
            f"task {task.name}: {task.metric} needs a wrong answer for every prompt, {len(none)} have none "
            f"(first: prompt {none[0]}); possible without: {', '.join(m for m in METRICS if m not in COMPARING)}"
        )
    if task.answers and task.metric == "rank":
        raise PatchbayError(f"task {task.name}: answers of several tokens have no rank; possible: log_probability")


def check_vocabulary(task: Any, size: int) -> None:
    """Raise PatchbayError where a prompt or an answer holds an id that a vocabulary of this size lacks."""
    named = {"clean": task.clean, "corrupted": task.corrupted or ()}
    named |= {"right": (task.right,), "wrong": task.wrong} if task.right else {}
    named |= {"answers": tuple(ids for each in task.answers for ids in each)}
    for name, rows in named.items():
        high = max((token for ids in rows for token in ids), default=-1)
        if high >= size:
            raise PatchbayError(
                f"task {task.name}: token id {high} in {name}, but the model has ids 0 to {size - 1}; "
                "was the task made with another model's tokenizer?"
            )
