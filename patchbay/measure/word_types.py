"""Word types: whether words that two languages share, or share with another meaning, are understood as well as others.

    value = mean over words of the accuracy on items of the type `of`

Types are the user's: cognate (one spelling, one meaning), homograph (one spelling, two meanings), other. Items of one word belong together: intervals draw whole
words. Table `types`: the accuracy of every type, and of every context in which it is asked (in isolation, in a congruent or an incongruent
sentence). `difference`: words of this type against those of `against`, with its interval. `null`: one in as many as there are choices; p by sign flips over
words. A model that goes by the spelling alone is right on half of the items of a homograph that is asked in both languages. One forward pass.

Tan et al. 2025, "Multilingual LLMs Struggle to Link Orthography and Semantics in Bilingual Word Processing". Higher is better. Types also differ in how
frequent their words are: match them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from patchbay.measure import _estimates as estimates
from patchbay.measure._answers import outcomes
from patchbay.measure._asked import hit, place_of
from patchbay.measure._items import resolved, rows_of, texts_only
from patchbay.measure._meter import reading
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, suggest
from patchbay.tasks.table import Row

SHARE = "share of items"


@method(paper="tan2025")
def word_types(
    model: Model,
    items: str | list[dict[str, Any]],
    *,
    of: str = "homograph",
    against: str = "other",
    boundary: Literal["refuse", "back_up"] = "refuse",
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """Accuracy on words of one type, over words, beside those of the other types and contexts.

    `difference` to the type `against` with its ends; `mass`, the mean probability of all choices; table `types`.

    `items`: rows with the fields word, type, prompt, choices, answer and, where wanted, context. `of`: the type whose accuracy is the value. `against`: the
    type that it is compared with. `boundary`: refuse a choice that the tokenizer joins with its prompt, or back_up to before it for all.
    """
    needs = ("word", "type", "prompt", "choices", "answer")
    rows, said = rows_of(resolved(model, items), needs, ("context",), lists=("choices",))
    texts_only(rows, ("prompt",))
    types = list(dict.fromkeys(str(row.values["type"]) for row in rows))
    if of not in types:
        raise PatchbayError(f"of={of!r}: no item has that type; there are {', '.join(types)}{suggest(of, types)}")
    places = torch.tensor([place_of(row.values["answer"], row.values["choices"], row.where) for row in rows])
    found = outcomes(
        model,
        [row.values["prompt"] for row in rows],
        [row.values["choices"] for row in rows],
        where=[row.where for row in rows],
        boundary=boundary,
        batch_size=batch_size,
    )
    right = hit(found.logp, places)
    chance = torch.tensor([1.0 / len(row.values["choices"]) for row in rows], dtype=torch.float64)
    own = [str(row.values["type"]) == of for row in rows]
    value, null = (_by_word(rows, x, own) for x in (right, chance))
    more: dict[str, Any] = {"mass": (found.mass.mean(), (), "probability")}
    if against in types and against != of:
        more |= _difference(value, _by_word(rows, right, [str(row.values["type"]) == against for row in rows]), seed)
    return reading(
        {"per_item": value},
        SHARE,
        better="higher",
        null_items=null,
        more=more,
        tables={"types": _table(rows, right, chance, types, seed)},
        notes=[*said, f"{len(value)} words of type {of}"],
        seed=seed,
    )


def _by_word(rows: Sequence[Row], values: Tensor, kept: Sequence[bool]) -> Tensor:
    """Means by word of the items that are kept, in the order in which words first come, [word]."""
    of: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if kept[i]:
            of.setdefault(str(row.values["word"]), []).append(i)
    return torch.stack([values[at].mean() for at in of.values()])


def _difference(one: Tensor, other: Tensor, seed: int) -> dict[str, Any]:
    """Mean of one less mean of the other, words of both drawn anew."""
    items = torch.stack(
        [torch.cat([one, other]), torch.cat([torch.ones(len(one)), torch.zeros(len(other))]).double()], 1
    )

    def gap(x: Tensor) -> float:
        return float(x[x[:, 1] == 1, 0].mean() - x[x[:, 1] == 0, 0].mean())  # NaN where a draw has none of one type

    ends = estimates.resampled(gap, items, n=1000, seed=seed)
    return {"difference" + end: (x, (), SHARE) for end, x in zip(("", "_low", "_high"), ends, strict=True) if x == x}


def _table(rows: Sequence[Row], right: Tensor, chance: Tensor, types: Sequence[str], seed: int) -> list[dict[str, Any]]:
    found = []
    for name in types:
        contexts = dict.fromkeys(str(row.values.get("context", "")) for row in rows if str(row.values["type"]) == name)
        for context in [""] if len(contexts) < 2 else ["", *contexts]:
            kept = [str(row.values["type"]) == name and context in ("", str(row.values.get("context", ""))) for row in rows]  # fmt: skip
            words = _by_word(rows, right, kept)
            ends = estimates.resampled(lambda x: float(x.mean()), words[:, None], n=500, seed=seed)
            found.append({"type": name, "context": context or "all", "words": len(words), "items": sum(kept), "accuracy": ends.mean, "low": ends.low, "high": ends.high, "chance": float(chance[torch.tensor(kept)].mean())})  # fmt: skip
    return found
