"""Cross-task shots: what examples of one task in front of a prompt do for answers to another.

    value = mean over prompts of [ln P(right | k examples, prompt) - ln P(right | prompt)],    P among the prompt's choices

`null`: the same with the examples' answers dealt among them, so that what is left of the gain is their form; p by sign flips of the differences. With the
prompts' own task as the source it is the gain of ordinary few-shot prompting (a prompt is never its own example). `zero` and `shots` [prompt], both accuracies,
and `similarity`, the cosine of the two tasks' mean states at the last token. Three forward passes and one for the states.

Chatterjee et al. 2024, "Language Models can Exploit Cross-Task In-context Learning for Data-Scarce Novel Tasks". Higher is better. A gain by form (labels seen, a
layout) is none of the other task's content: read the null.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from patchbay import maths
from patchbay.measure._answers import score, spell
from patchbay.measure._asked import Asked, asked_of, hit
from patchbay.measure._items import Items, resolved
from patchbay.measure._meter import reading
from patchbay.measure._runs import comparing, refuse_by_row
from patchbay.measure._shots import Shot, drawn, pool_of, with_shots
from patchbay.model.model import Model
from patchbay.model.states import depth, last_states
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError


@method(paper="chatterjee2024")
def cross_task(
    model: Model,
    items: Items,
    source: Items,
    *,
    k: int = 2,
    join: str = "\n",
    boundary: Literal["refuse", "back_up"] = "refuse",
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """What k examples of another task add to the log-probability of the right answer among its choices.

    `accuracy_zero` and `accuracy_shots`; `zero` and `shots` [prompt]; `similarity`.

    `items`: a Task, or rows with the fields prompt, choices and answer. `source`: the task that examples are of, likewise. `k`: examples in front of each
    prompt. `join`: what stands between examples; of prompts that are token ids nothing does. `boundary`: refuse a choice that the
    tokenizer joins with its prompt, or back_up to before it for all choices.
    """
    asked, theirs = asked_of(resolved(model, items)), asked_of(resolved(model, source))
    pool = pool_of(theirs)
    kinds = {isinstance(prompt, str) for prompt in (*asked.prompts, *theirs.prompts)}
    if k < 1 or k >= len(pool) or len(kinds) > 1:
        raise PatchbayError(
            f"k={k} of {len(pool)} examples: 1 or more and fewer than there are; prompts of both tasks are texts, or ids"
        )
    refuse_by_row(model)
    chosen = [drawn(prompt, pool, k, f"shots-{seed}-{i}") for i, prompt in enumerate(asked.prompts)]
    dealt = [[(one[0], answer) for one, answer in zip(each, _turned([a for _, a in each]), strict=True)] for each in chosen]  # fmt: skip
    right = torch.tensor(asked.right)
    runs: list[list[list[Shot]]] = [[[] for _ in chosen], chosen]
    runs += [] if comparing() or k < 2 else [dealt]
    found = [_logp(model, asked, each, join, boundary, batch_size) for each in runs]  # each [prompt, choice]
    own = [
        logp.log_softmax(1)[torch.arange(len(right)), right] for logp in (x.nan_to_num(nan=-torch.inf) for x in found)
    ]
    more: dict[str, Any] = {"zero": (own[0], ("prompt",), "nats"), "shots": (own[1], ("prompt",), "nats")}
    for name, logp in zip(("accuracy_zero", "accuracy_shots"), found, strict=False):
        more[name] = (hit(logp, right).mean(), (), "share of items")
    more["similarity"] = (_similarity(model, asked.prompts, theirs.prompts, batch_size), (), "cosine")
    return reading(
        {"per_item": own[1] - own[0]},
        "nats",
        better="higher",
        null_items=own[2] - own[0] if len(own) > 2 else None,
        more=more,
        notes=[*asked.said, *([] if k > 1 else ["one example has no other's answer to be dealt: no null"])],
        seed=seed,
    )


def _turned(answers: list[Any]) -> list[Any]:
    """Each example's answer moved on to the next."""
    return answers[1:] + answers[:1]


def _logp(
    model: Model, asked: Asked, shots: Sequence[Sequence[Shot]], join: str, boundary: str, batch_size: int
) -> Tensor:
    prompts = [with_shots(model, each, prompt, join) for each, prompt in zip(shots, asked.prompts, strict=True)]
    return score(model, spell(model, prompts, asked.choices, where=asked.where, boundary=boundary), batch_size=batch_size).logp  # fmt: skip


def _similarity(model: Model, a: Sequence[Any], b: Sequence[Any], batch_size: int) -> float:
    port = depth(model, "resid_out")[1][-1]
    means = [last_states(model, model.encode(list(each)), [port], batch_size)[0].mean(0) for each in (a, b)]
    return float(maths.cosine(*means))
