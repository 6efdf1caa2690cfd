"""The prompts that a knob is measured on: such as it was not made of, and on which there is something to change.

A steering direction leads from a task's twins to its prompts. On the prompts it has nothing to do, and on the pairs that it was
fitted on it does more than it would elsewhere: measured on its own task, a steering knob is measured on the twins of the other half.
"""

from __future__ import annotations

from dataclasses import replace

from patchbay.knobs.knob import Knob
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task


def prompts_for(task: Task, *knobs: Knob) -> tuple[Task, list[str]]:
    """The task on the prompts to measure these knobs on, and what is to be said of those left out. Raises where none is left."""
    fitted = {tuple(ids) for knob in knobs for ids in knob.provenance.get("fitted") or ()}
    whose = f"knob {knobs[0].name!r} was" if len(knobs) == 1 else "these knobs were"
    twins = task.corrupted or task.clean
    kept = [i for i, pair in enumerate(zip(task.clean, twins, strict=True)) if not fitted & set(pair)]
    if not kept:
        raise PatchbayError(
            f"{whose} fitted on all {len(task)} prompts of task {task.name}, so they cannot test it; give others, "
            "such as the same task with another seed"
        )
    said = []
    if len(kept) < len(task):
        which = "the knob was" if len(knobs) == 1 else "a knob was"
        said.append(f"{len(task) - len(kept)} of {len(task)} prompts, on which {which} fitted, are left out")
    task = task if len(kept) == len(task) else task[kept]
    if task.corrupted is not None and any(_made_of(knob, task) for knob in knobs):
        what = "the knob leads from a prompt's twin to the prompt, so it is" if len(knobs) == 1 else "a knob leads from a prompt's twin to the prompt, so all are"  # fmt: skip
        said.append(f"{what} measured on the twins, for the prompts' answers")
        task = replace(task, clean=task.corrupted, corrupted=task.clean, texts=(), marks={})
    return task, said


def _made_of(knob: Knob, task: Task) -> bool:
    """Whether a knob is a direction between prompts and twins of this task, of these prompts or of others."""
    made = knob.provenance.get("task") or {}
    return bool(knob.provenance.get("fitted")) and made.get("name") == task.name and made.get("corrupted") is not None
