"""Text loss: how many bits per byte a model needs for texts, the one unit in which models of different tokenizers compare.

    value = sum over texts of -log2 p(text) / sum over texts of their UTF-8 bytes

p(text) is the product of its tokens' probabilities after the start token, which is no text and is not counted. Texts longer than
a window are cut: every token is scored once, with `context` tokens before it. With unit="token" the sum is over tokens in
nats per token, which compares one model with itself. `null`: the same by the frequencies of the texts' own tokens (a unigram model
that has seen them), `uniform`: all tokens equally likely; p against the unigram, text by text. Texts with a `group` make a
card: each group's loss side by side, as in adapting a model to a domain and watching what it forgets. One forward pass.

Corrêa et al. 2024, "Tucano: Advancing Neural Text Generation for Portuguese". Lower is better. A loss on these texts says
nothing of others: a story model differs by a third between the first and the last stories of one file, so draw texts at random.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from patchbay import maths
from patchbay.measure._items import Items, resolved
from patchbay.measure._meter import reading
from patchbay.measure._texts import Text, given_texts, losses, whole_texts
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError


@method(paper="correa2024")
def text_loss(
    model: Model,
    items: Items,
    *,
    unit: Literal["byte", "token"] = "byte",
    window: int | None = None,
    context: int = 0,
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """Bits per byte (or nats per token) of texts, with its interval over texts; of each group of them in table `groups`.

    `items`: texts, lists of token ids, a Task (its prompts), or a file with the fields text and, where wanted, group. `unit`: byte, for
    bits per byte, or token, for nats per token. `window`: tokens of a window, the start token among them; without, as many as the
    model reads. `context`: tokens of a window that stand before those it scores, 0 for none.
    """
    texts, names, groups, said = given_texts(resolved(model, items))
    read = whole_texts(model, texts, names)
    if unit == "byte" and any(text.n_bytes is None for text in read):
        raise PatchbayError(
            "bits per byte need the texts' bytes, and this model came without a tokenizer: unit='token', or pb.load(model, tokenizer)"
        )
    found = losses(model, read, window=window, context=context, batch_size=batch_size)
    scale = math.log(2.0) if unit == "byte" else 1.0
    above = torch.stack([loss.sum() for loss in found]) / scale  # [text]
    below = torch.tensor(
        [float(text.n_bytes or 0) if unit == "byte" else float(len(text.ids)) for text in read]
    ).double()
    unigram, uniform = (
        _unigram(read) / scale,
        torch.tensor([len(t.ids) * math.log(model.vocab_size) for t in read]) / scale,
    )
    words = "bits per byte" if unit == "byte" else "nats per token"
    total = "bits" if unit == "byte" else "nats"
    more = {"uniform": (uniform.double().sum() / below.sum(), (), words), "tokens": (torch.tensor([float(len(t.ids)) for t in read]), ("prompt",), "tokens")}  # fmt: skip
    p = float(maths.sign_flip_p((above - unigram)[:, None], seed=seed)[0])
    return reading(
        {"per_item": above, "length": below},
        words,
        better="lower",
        made="ratio",
        null=float(unigram.sum() / below.sum()),
        p=p,
        interval=_interval(above, below, seed),
        more=more,
        units={"per_item": total, "length": f"{unit}s"},
        tables={"groups": _groups(above, below, groups, seed)} if groups else {},
        notes=[*said, *_start(read)],
        seed=seed,
    )


def _interval(above: Tensor, below: Tensor, seed: int) -> maths.Interval:
    """The ratio of sums, texts drawn with replacement."""
    return maths.Interval(*(float(end) for end in maths.intervals(above[:, None], below, seed=seed)))


def _unigram(texts: Sequence[Text]) -> Tensor:
    """Nats of each text by the frequencies of all texts' tokens, [text]."""
    counts = Counter(token for text in texts for token in text.ids)
    total = sum(counts.values())
    return torch.tensor(
        [sum(-math.log(counts[token] / total) for token in text.ids) for text in texts], dtype=torch.float64
    )


def _groups(above: Tensor, below: Tensor, groups: Sequence[Any], seed: int) -> list[dict[str, Any]]:
    rows = []
    for name in dict.fromkeys(groups):
        at = torch.tensor([i for i, group in enumerate(groups) if group == name])
        value, low, high = _interval(above[at], below[at], seed)
        rows.append(
            {"group": "" if name is None else str(name), "n": len(at), "value": value, "low": low, "high": high}
        )
    return rows


def _start(texts: Sequence[Text]) -> list[str]:
    if not all(text.before == texts[0].before for text in texts):
        return [
            "the tokenizer has no start token: nothing stands before a text's first token, which is left out with its bytes"
        ]
    return []
