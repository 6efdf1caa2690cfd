"""Context compression: how well questions are answered when only some sentences of their context are kept.

    value = accuracy with the share `keep` of the sentences that a critic scores highest, in their own order

Critics: leave_one_out, the fall of ln p(answer) without the sentence (it sees the answer, so it is an upper bound of what any critic gives); surprisal, the nats per
token of the sentence read alone; random. `null`: as many sentences at random, mean of `DRAWS` picks, p by sign flips over items. `full`: the accuracy with the whole
context; `kept`, the share of its characters that stay. keep=1 is the context itself. One forward pass for each sentence of leave_one_out.

Shen et al. 2025, "QwenLong-CPRS: Towards infinite-LLMs with Dynamic Context Optimization", whose trained critic is not here. Higher is better. A rise above `full` says that
the rest distracted this model, and not that it was needless.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from patchbay.measure._answers import outcomes
from patchbay.measure._asked import hit, place_of
from patchbay.measure._items import resolved, rows_of, texts_only
from patchbay.measure._meter import reading
from patchbay.measure._runs import comparing
from patchbay.measure._texts import losses, whole_texts
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.table import Row

DRAWS = 3  # random picks
SHARE = "share of items"
Critic = Literal["leave_one_out", "surprisal", "random"]


@method(paper="shen2025")
def context_compression(
    model: Model,
    items: str | list[dict[str, Any]],
    *,
    keep: float = 0.5,
    critic: Critic = "leave_one_out",
    boundary: Literal["refuse", "back_up"] = "refuse",
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """Accuracy on questions after a context of which a share of the sentences is kept.

    `full`, the accuracy with the whole context, `logp` and `logp_full` [prompt] of the right answer, `kept` [prompt]; table `contexts`.

    `items`: rows with the fields context, question (what follows the context), choices and answer. `keep`: the share of sentences that stay, one at least.
    `critic`: leave_one_out, surprisal or random. `boundary`: refuse a choice that the tokenizer joins with its prompt, or back_up to
    before it for all choices.
    """
    rows, said = rows_of(resolved(model, items), ("context", "question", "choices", "answer"), lists=("choices",))
    texts_only(rows, ("context", "question"))
    if not 0 < keep <= 1 or critic not in ("leave_one_out", "surprisal", "random"):
        raise PatchbayError(f"keep={keep} lies in (0, 1]; critic={critic!r}: leave_one_out, surprisal or random")
    right = torch.tensor([place_of(row.values["answer"], row.values["choices"], row.where) for row in rows])
    parts = [sentences(row.values["context"], row.where) for row in rows]

    def read(contexts: Sequence[str], of: Sequence[int]) -> Tensor:
        """ln p of the choices after each context and its item's question, [context, choice]."""
        prompts = [context + rows[i].values["question"] for context, i in zip(contexts, of, strict=True)]
        return outcomes(model, prompts, [rows[i].values["choices"] for i in of], where=[rows[i].where for i in of], boundary=boundary, batch_size=batch_size).logp  # fmt: skip

    every = list(range(len(rows)))
    whole = read(["".join(each) for each in parts], every)
    worth = _worth(model, parts, rows, critic, read, whole, right, seed, batch_size)
    texts = [_kept(each, own, keep) for each, own in zip(parts, worth, strict=True)]
    found = read(texts, every)
    null = None
    if not comparing() and critic != "random":
        picks = [hit(read([_kept(each, _random(each, f"{seed}-{i}-{draw}"), keep) for i, each in enumerate(parts)], every), right) for draw in range(DRAWS)]  # fmt: skip
        null = torch.stack(picks).mean(0)
    size = torch.tensor([len(text) / len("".join(each)) for text, each in zip(texts, parts, strict=True)])
    at = torch.arange(len(rows))
    return reading(
        {"per_item": hit(found, right)},
        SHARE,
        better="higher",
        null_items=null,
        more={
            "full": (hit(whole, right).mean(), (), SHARE),
            "logp": (found[at, right], ("prompt",), "nats"),
            "logp_full": (whole[at, right], ("prompt",), "nats"),
            "kept": (size.double(), ("prompt",), "share of characters"),
        },
        tables={"contexts": [{"item": row.where, "sentences": len(each), "context": text} for row, each, text in zip(rows, parts, texts, strict=True)]},
        notes=[*said, *(["the critic sees the answer"] if critic == "leave_one_out" else [])],
        seed=seed,
    )  # fmt: skip


def sentences(text: str, where: str = "the context") -> list[str]:
    """A text's sentences, each with the space after it, which together are the text."""
    found = re.findall(r".+?(?:[.!?]+(?:\s+|$)|$)", text, re.DOTALL)
    if not found or "".join(found) != text:
        raise PatchbayError(f"{where}: the context {text!r:.40} has no sentence")
    return found


def _kept(parts: Sequence[str], worth: Sequence[float], keep: float) -> str:
    """The sentences that are worth most, in their own order; of equals the earlier."""
    n = max(1, round(keep * len(parts)))
    best = sorted(range(len(parts)), key=lambda i: (-worth[i], i))[:n]
    return "".join(parts[i] for i in sorted(best))


def _random(parts: Sequence[str], name: str) -> list[float]:
    chance = random.Random(f"kept-{name}")
    return [chance.random() for _ in parts]


def _worth(
    model: Model,
    parts: Sequence[Sequence[str]],
    rows: Sequence[Row],
    critic: str,
    read: Any,
    whole: Tensor,
    right: Tensor,
    seed: int,
    batch_size: int,
) -> list[list[float]]:
    """What a critic says each sentence of each context is worth."""
    if critic == "random":
        return [_random(each, f"{seed}-{i}-own") for i, each in enumerate(parts)]
    flat = [(i, k) for i, each in enumerate(parts) for k in range(len(each))]
    if critic == "surprisal":
        texts = whole_texts(model, [parts[i][k] for i, k in flat], [f"{rows[i].where}, sentence {k}" for i, k in flat])
        values = torch.stack([loss.mean() for loss in losses(model, texts, batch_size=batch_size)])
    else:
        of = torch.tensor([i for i, _ in flat])
        without = read(["".join(parts[i][:k]) + "".join(parts[i][k + 1 :]) for i, k in flat], of.tolist())
        values = whole[of, right[of]] - without[torch.arange(len(flat)), right[of]]
    found: list[list[float]] = [[] for _ in parts]
    for (i, _), value in zip(flat, values.tolist(), strict=True):
        found[i].append(value)
    return found
