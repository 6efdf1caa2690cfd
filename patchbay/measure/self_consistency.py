"""Self-consistency: how alike a model's answers are when one question is asked again and again.

    value = mean over prompts of the mean similarity of two of its `per_prompt` samples

similarity is equality of the texts (case and spaces aside), or the share of words that two texts have in common among all of theirs. `null`:
samples of a prompt against those of the next prompt; p by sign flips. `expected` [prompt] = sum over v of p(v)^2, the exact similarity
of two answers of one token, and `most` [prompt], the probability of the likeliest token, stand beside it. With labels (1 real, 0
invented): `auroc`, how well consistency tells them apart, its interval over prompts, and what `expected` and `most` give without any sample.

Agrawal et al. 2023, "Do Language Models Know When They're Hallucinating References?". Neither way is better. A model may be wrong in one
and the same way each time: consistency is of its answers, not of the world.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from patchbay.measure import _estimates as estimates
from patchbay.measure._items import Items, resolved
from patchbay.measure._meter import reading
from patchbay.measure._runs import distributions
from patchbay.measure._samples import samples, texts_of
from patchbay.measure._texts import given_texts
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError


@method(paper="agrawal2023")
def self_consistency(
    model: Model,
    items: Items,
    *,
    per_prompt: int = 10,
    max_new_tokens: int = 12,
    alike: Literal["equal", "words"] = "equal",
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """Mean similarity of two samples of a prompt, over prompts; with labels, how well it tells real from invented.

    `items`: prompts, as texts, ids, a Task or a file with the field text and, where wanted, label (1 real, 0 invented). `per_prompt`: samples of each
    prompt, two or more. `max_new_tokens`: tokens of a sample. `alike`: equal, or words, the share of words in common. `top_p`: the
    probability that the tokens drawn from hold, 1 for all.
    """
    if per_prompt < 2:
        raise PatchbayError(f"per_prompt={per_prompt}: two samples or more are compared")
    prompts, where, given, said = given_texts(resolved(model, items), beside="label")
    labels = None if not given else _labels(given, where)
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "top_p": top_p, "seed": seed, "batch_size": batch_size}
    texts = [texts_of(model, each) for each in samples(model, prompts, per_prompt, **how)]
    own = torch.tensor([_mean(itertools.combinations(each, 2), alike) for each in texts], dtype=torch.float64)
    other = [_mean(itertools.product(each, texts[(i + 1) % len(texts)]), alike) for i, each in enumerate(texts)]
    logp = torch.cat(distributions(model, model.encode(list(prompts)), batch_size=batch_size))  # [prompt, vocab]
    expected, most = (2.0 * logp).exp().sum(1), logp.amax(1).exp()
    more: dict[str, Any] = {
        "expected": (expected, ("prompt",), "similarity"),
        "most": (most, ("prompt",), "probability"),
    }
    if labels is not None:
        more |= _told_apart(own, expected, most, labels, seed)
    return reading(
        {"per_item": own},
        "similarity",
        better="neither",
        null_items=torch.tensor(other, dtype=torch.float64) if len(texts) > 1 else None,
        more=more,
        tables={"samples": [{"prompt": name, "first": each[0], "different": len(set(each))} for name, each in zip(where, texts, strict=True)]},
        notes=said,
        seed=seed,
    )  # fmt: skip


def _mean(pairs: Any, alike: str) -> float:
    found = [similarity(a, b, alike) for a, b in pairs]
    return sum(found) / len(found)


def similarity(a: str, b: str, alike: str = "equal") -> float:
    """Of two texts, in [0, 1]: whether they are equal but for case and spaces, or Jaccard's index of their words."""
    first, second = (re.findall(r"\S+", text.lower()) for text in (a, b))
    if alike == "equal":
        return float(first == second)
    either = set(first) | set(second)
    return len(set(first) & set(second)) / len(either) if either else 1.0


def _labels(given: Sequence[Any], where: Sequence[str]) -> Tensor:
    for label, name in zip(given, where, strict=True):
        if str(label) not in ("0", "1"):
            raise PatchbayError(
                f"{name}: label is 1 (real) or 0 (invented) for every prompt or for none, got {label!r}"
            )
    return torch.tensor([float(label) for label in given], dtype=torch.float64)


def _told_apart(own: Tensor, expected: Tensor, most: Tensor, labels: Tensor, seed: int) -> dict[str, Any]:
    """AUROC of consistency with its interval, and of what needs no samples."""
    area = "area under the curve"
    ends = estimates.resampled(
        lambda x: estimates.auroc(x[:, 0], x[:, 1]), torch.stack([own, labels], 1), n=500, seed=seed
    )
    found = {"auroc" + end: x for end, x in zip(("", "_low", "_high"), ends, strict=True)}
    found |= {"auroc_expected": estimates.auroc(expected, labels), "auroc_most": estimates.auroc(most, labels)}
    return {name: (x, (), area) for name, x in found.items() if x == x}
