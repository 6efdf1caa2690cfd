"""Answer choices: how often the likeliest choice is the right one, and how much probability the choices have at all.

    PMV(x) = sum over choices l of p(l | x),    attentiveness = mean PMV,    surface-form competition <= 1 - PMV(x)

p(l | x) of the whole choice. An item is `unaffected` where 1 - PMV < p1 - p2: even if all the mass that other spellings took went to
the runner-up, the answer would stay. Accuracy is given under each norm: the sum of log-probabilities, by token, character or
byte, and with premises pmi = log p(l | x) - log p(l | premise). `null`: the accuracy with every item's choices after the prompt
of another item (p: item by item); `chance`: one in as many as there are choices. Equal scores share the answer.
One forward pass over the prompts, one more for the null.

Wiegreffe et al. 2023, "Attentiveness to Answer Choices Doesn't Always Entail High QA Accuracy"; labels of one token as choices make a classifier of the model's own unembedding
(Clavié et al. 2025, "It's All in The [MASK]"). Higher is better. Choices with a low PMV are
still ranked: what the model would rather have said is not seen here.
"""

from __future__ import annotations

import random
from typing import Literal

import torch
from torch import Tensor

from patchbay import maths
from patchbay.measure._answers import NORMS, Scores, Spelled, refuse_unclear, score, spell
from patchbay.measure._asked import Asked, asked_of, hit
from patchbay.measure._items import Items, resolved
from patchbay.measure._meter import reading
from patchbay.measure._runs import comparing
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError

SHARE = "share of items"


@method(paper="wiegreffe2023")
def answer_choices(
    model: Model,
    items: Items,
    *,
    read: Literal["accuracy", "attentiveness", "unaffected"] = "accuracy",
    norm: Literal["sum", "token", "char", "byte", "pmi"] = "sum",
    boundary: Literal["refuse", "back_up"] = "refuse",
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """Accuracy over choices (or their share of the probability), with the share of items that other spellings cannot change.

    `per_item`: right or wrong, or what `read` names; `mass` [prompt], the probability of all choices; `attentiveness` and `unaffected`
    with their intervals; table `norms`, the accuracy under each norm.

    `items`: a Task, or rows with the fields prompt, choices, answer (the choice, or its place from 0) and, for pmi, premise. `read`: which
    quantity is the value: accuracy, attentiveness or unaffected. `norm`: what ranks the choices: sum, token, char, byte or
    pmi. `boundary`: refuse a choice that the tokenizer joins with its prompt, or back_up to before it for all choices.
    """
    asked = asked_of(resolved(model, items))
    spelled = spell(model, asked.prompts, asked.choices, where=asked.where, boundary=boundary)
    refuse_unclear(spelled)
    found = score(model, spelled, batch_size=batch_size)
    ranks = _norms(model, found, asked, boundary, batch_size)
    if norm not in ranks:
        raise PatchbayError(
            f"norm={norm!r} cannot be had of these items; possible: {', '.join(ranks)} (pmi needs premises, char and byte need texts)"
        )
    right = torch.tensor(asked.right)
    mass = found.mass
    items_of = {"accuracy": hit(ranks[norm], right), "attentiveness": mass, "unaffected": _unaffected(found.logp, mass)}
    chance = (1.0 / (~found.logp.isnan()).double().sum(1)).mean()
    wanted = read == "accuracy" and norm == "sum" and not comparing()
    null = _shuffled(model, spelled, right, seed, batch_size) if wanted else None
    more = {"chance": (chance, (), SHARE), "mass": (mass, ("prompt",), "probability")}
    for name in items_of:
        if name != read:
            unit = "probability" if name == "attentiveness" else SHARE
            ends = maths.bootstrap_interval(items_of[name], seed=seed)
            more |= {name + end: (x, (), unit) for end, x in zip(("", "_low", "_high"), ends, strict=True) if x == x}
    rows = [{"norm": name, "accuracy": float(hit(values, right).mean())} for name, values in ranks.items()]
    return reading(
        {"per_item": items_of[read]},
        "probability" if read == "attentiveness" else SHARE,
        better="higher",
        null_items=null,
        null=None if null is not None or read != "accuracy" else float(chance),
        more=more,
        tables={"norms": rows},
        notes=asked.said,
        seed=seed,
    )


def _unaffected(logp: Tensor, mass: Tensor) -> Tensor:
    top = logp.exp().nan_to_num(0.0).topk(2, 1).values
    return (1.0 - mass < top[:, 0] - top[:, 1]).double()


def _norms(model: Model, found: Scores, asked: Asked, boundary: str, batch_size: int) -> dict[str, Tensor]:
    """What ranks the choices, [item, choice], by norm; those that the items allow."""
    texts = all(text is not None for each in found.spelled.texts for text in each)
    ranks = {name: found.normed(name) for name in NORMS if texts or name in ("sum", "token")}
    if asked.premises:
        alone = spell(
            model, asked.premises, asked.choices, where=[f"{w}, premise" for w in asked.where], boundary=boundary
        )
        ranks["pmi"] = found.logp - score(model, alone, batch_size=batch_size).logp
    return ranks


def _shuffled(model: Model, spelled: Spelled, right: Tensor, seed: int, batch_size: int) -> Tensor | None:
    """Right or wrong with each item's choices after another item's prompt, [item]; None where there is no other or no room."""
    n = len(spelled.prompts)
    order = list(range(n))
    random.Random(f"shuffled-{seed}").shuffle(order)
    other = {at: order[(k + 1) % n] for k, at in enumerate(order)}
    prompts = [spelled.prompts[other[i]] for i in range(n)]
    longest = model.longest_prompt or 10**9
    room = all(len(p) + max(map(len, a)) - 1 <= longest for p, a in zip(prompts, spelled.answers, strict=True))
    if n < 2 or not room:
        return None
    moved = Spelled(prompts, spelled.answers, spelled.texts, spelled.where)
    return hit(score(model, moved, batch_size=batch_size).logp, right)
