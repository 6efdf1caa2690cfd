"""Score convergence: whether what a tuned model does on tasks without examples follows what its base does with them.

    value = Spearman's correlation over tasks of (base: accuracy after k examples, tuned: accuracy without any)

Tasks are the groups of the items; each prompt's examples are of its own task. Intervals draw whole tasks; p is that of tasks dealt at random, exact up to 7 tasks. `pearson`
stands beside it, and `base_zero`, the correlation with the base without examples: what examples add. The correlation does not change when either model's scores are
stretched or moved. Three forward passes.

Bigoulaeva et al. 2025, "The Inherent Limits of Pretrained LLMs: The Unexpected Convergence of Instruction Tuning and In-Context Learning Capabilities". Neither way is better. Tasks that
are easy for everybody give a correlation between any two models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from patchbay import maths
from patchbay.measure._answers import score, spell
from patchbay.measure._asked import Asked, asked_of, hit
from patchbay.measure._deals import dealt_p
from patchbay.measure._items import resolved, rows_of
from patchbay.measure._meter import reading
from patchbay.measure._runs import comparing
from patchbay.measure._shots import drawn, pool_of, with_shots
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError

LEAST = 3


@method(paper="bigoulaeva2025")
def score_convergence(
    model: Model,
    items: str | list[dict[str, Any]],
    other: Model,
    *,
    k: int = 2,
    join: str = "\n",
    boundary: Literal["refuse", "back_up"] = "refuse",
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """Correlation over tasks of a base model's accuracy after examples with a tuned one's without.

    `base` and `tuned` [prompt], one number a task; `pearson`, `base_zero`, `mass` (the mean probability of all choices, of the base model); table `tasks`.

    `items`: rows with the fields prompt, choices, answer and group (the task). `other`: the tuned model. `k`: examples in front of the base model's prompts.
    `join`: what stands between examples. `boundary`: refuse a choice that the tokenizer joins with its prompt, or back_up to before it.
    """
    given = resolved(model, items)
    rows, said = rows_of(given, ("prompt", "choices", "answer", "group"), lists=("choices",))
    asked = asked_of([dict(row.values) for row in rows])._replace(where=[row.where for row in rows], said=said)
    groups = [str(row.values["group"]) for row in rows]
    names = list(dict.fromkeys(groups))
    small = min(groups.count(name) for name in names)
    if len(names) < LEAST or k < 1 or small <= k:
        raise PatchbayError(
            f"{len(names)} tasks, the least of {small} items, k={k}: {LEAST} tasks or more, each with more items than examples"
        )
    pool = {name: [shot for shot, group in zip(pool_of(asked), groups, strict=True) if group == name] for name in names}
    shots = [with_shots(model, drawn(prompt, pool[group], k, f"shots-{seed}-{i}"), prompt, join) for i, (prompt, group) in enumerate(zip(asked.prompts, groups, strict=True))]  # fmt: skip
    calls = {"base": (model, shots), "tuned": (other, asked.prompts), "zero": (model, asked.prompts)}
    read = {name: _right(*call, asked, boundary, batch_size) for name, call in calls.items()}
    right = {name: each for name, (each, _) in read.items()}
    of = {name: torch.stack([each[torch.tensor([g == group for g in groups])].mean() for group in names]) for name, each in right.items()}  # fmt: skip
    base, tuned, zero = of["base"], of["tuned"], of["zero"]
    value = maths.spearman(base, tuned)
    more: dict[str, Any] = {"pearson": (_pearson(base, tuned), (), "correlation"), "base_zero": (maths.spearman(zero, tuned), (), "correlation"), "mass": (read["base"][1], (), "probability")}  # fmt: skip
    table = [{"task": name, "n": groups.count(name), **{key: float(of[key][i]) for key in of}} for i, name in enumerate(names)]  # fmt: skip
    return reading(
        {"base": base, "tuned": tuned},
        "correlation",
        better="neither",
        made="spearman",
        null=0.0,
        p=dealt_p(base, tuned, seed) if value == value and not comparing() else None,
        more={name: one for name, one in more.items() if one[0] == one[0]},
        units={"base": "accuracy", "tuned": "accuracy"},
        tables={"tasks": table},
        notes=[*said, f"{len(names)} tasks", *([] if value == value else ["one model scores all tasks alike: no correlation"])],
        seed=seed,
    )  # fmt: skip


def _right(model: Model, prompts: Sequence[Any], asked: Asked, boundary: str, batch_size: int) -> tuple[Tensor, float]:
    """1 where the right choice is the likeliest, [item], and the mean probability of all choices."""
    spelled = spell(model, prompts, asked.choices, where=asked.where, boundary=boundary)
    found = score(model, spelled, batch_size=batch_size)
    return hit(found.logp, torch.tensor(asked.right)), float(found.mass.mean())


def _pearson(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 1e-12 else math.nan
