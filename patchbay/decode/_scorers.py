"""What continuations are ranked by: functions of a call, the place of a prompt and its continuations -> a number of each.

logp                log p(continuation | prompt), in nats
pmi                 log p(continuation | prompt) - log p(continuation | start token): what the prompt adds
self_certainty      mean over tokens of KL(uniform || p): how far the law that wrote it is from saying nothing
unigram_overlap     the share of its tokens that occur in the prompt
another Model       log p(continuation | prompt) there

Those of the model are under the edits in force, but for the second term of `pmi` where edits name positions: those of a prompt are none
of a lone start token's, and it is then the model's as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patchbay.decode._loop import Call
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError

Scorer = Callable[[Call, int, Sequence[Sequence[int]]], list[float]]


def logits_of(call: Call, place: int, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """The logits that each token of each text was chosen from [token, vocab], after the prompt of that place; one pass a batch."""
    found = []
    for at in range(0, len(texts), call.batch_size):
        some = [list(text) for text in texts[at : at + call.batch_size]]
        width = max(map(len, some))
        tokens = torch.tensor([text + [0] * (width - len(text)) for text in some], device=call.model.device)
        with call.rows([place] * len(some)) as rows:
            logits = rows.run(tokens, keep=width + 1).logits[:, :-1]
        found += [one[: len(text)] for one, text in zip(logits, some, strict=True)]
    return found


def logp(call: Call, place: int, texts: Sequence[Sequence[int]]) -> list[float]:
    found = []
    for logits, text in zip(logits_of(call, place, texts), texts, strict=True):
        said = torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(list(text), device=logits.device)[:, None])
        found.append(float(said.sum()))
    return found


def pmi(call: Call, place: int, texts: Sequence[Sequence[int]]) -> list[float]:
    start = start_token(call.model)
    everywhere = [edit for edit in call.edits if edit.positions is None and edit.keys is None]
    edits = call.edits if len(everywhere) == len(call.edits) else []
    own = logp(call, place, texts)
    prompts = [[start] if at == place else ids for at, ids in enumerate(call.prompts)]
    alone = replace(call, prompts=prompts, edits=edits)
    free = logp(alone, place, texts)
    call.calls, call.fed = alone.calls, alone.fed  # it went on counting
    return [a - b for a, b in zip(own, free, strict=True)]


def start_token(model: Model) -> int:
    """The token that stands before a text; raises PatchbayError for a model without one."""
    own = getattr(model.tokenizer, "bos_token_id", None) if model.tokenizer is not None else None
    found = own if own is not None else getattr(model.config, "bos_token_id", None)
    if found is None:
        raise PatchbayError(
            "pmi compares with a text after the start token alone, and this model names none: choose another scorer"
        )
    return int(found)


def self_certainty(call: Call, place: int, texts: Sequence[Sequence[int]]) -> list[float]:
    return [certainty(logits) for logits in logits_of(call, place, texts)]


def certainty(logits: Tensor) -> float:
    """The mean over tokens of KL(uniform || p), from logits [token, vocab]."""
    law = torch.log_softmax(logits.double(), -1)
    return float(-(law + math.log(law.shape[-1])).mean())


def unigram_overlap(call: Call, place: int, texts: Sequence[Sequence[int]]) -> list[float]:
    there = set(call.prompts[place])
    return [sum(token in there for token in text) / len(text) for text in texts]


NAMED: dict[str, Scorer] = {
    "logp": logp,
    "pmi": pmi,
    "self_certainty": self_certainty,
    "unigram_overlap": unigram_overlap,
}
UNITS = {"logp": "nats", "pmi": "nats", "self_certainty": "nats", "unigram_overlap": "share of tokens"}


def scorer_of(call: Call, asked: Any) -> Scorer:
    """The scorer of a name, of another model, or a function of (prompt ids, list of ids) itself."""
    if isinstance(asked, str):
        if asked not in NAMED:
            raise PatchbayError(f"scorer={asked!r}: one of {', '.join(NAMED)}, another Model, or a function of ids")
        return NAMED[asked]
    if hasattr(asked, "hf"):
        other = call.beside(asked)
        return lambda _, place, texts: logp(other, place, texts)
    if callable(asked):
        return lambda of, place, texts: checked(
            asked(list(of.prompts[place]), [list(text) for text in texts]), len(texts)
        )
    raise PatchbayError(
        f"scorer: one of {', '.join(NAMED)}, another Model, or a function of ids, got {type(asked).__name__}"
    )


def checked(scores: Any, n: int) -> list[float]:
    found = [float(one) for one in scores]
    if len(found) != n or not all(math.isfinite(one) for one in found):
        raise PatchbayError(f"scorer: a finite number for each of {n} texts is needed, got {found[:4]}")
    return found
