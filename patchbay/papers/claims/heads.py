"""Claims about heads: which there are, what they write, and that the model needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import patchbay as pb
from patchbay.papers.claims._claim import Claim, claim
from patchbay.papers.claims._shared import N, at_best, ends_of, joint


def _carry(model: pb.Model, seed: int, find: Callable[..., Any], task: Callable[..., Any], text: str) -> Claim:
    """That the first two heads of a finder are needed, on prompts that did not choose them."""
    heads = find(model, task(model, N, seed=seed)).top(2)
    return joint(model, heads, task(model, N, seed=seed + 1), seed, text.format(*heads) + ", more than random heads")


@claim("elhage2021")
def elhage2021(model: pb.Model, seed: int) -> Claim:
    error = float(pb.find.direct_logit_attribution(model, pb.tasks.indirect_object(model, N, seed=seed))["sum_error"])
    text = "what the parts write sums to the logit difference"
    return Claim(text, error, error, error, 1e-4, "logits off", above=False)


@claim("olsson2022")
def olsson2022(model: pb.Model, seed: int) -> Claim:
    found = pb.find.induction_heads(model, pb.tasks.repeated_tokens(model, N, seed=seed))
    score, error = at_best(found, "score"), 1.96 * at_best(found, "standard_error")
    text = f"{found.top(1)[0]} looks at what followed the token before, more than at the places around it"
    return Claim(text, score, score - error, score + error, at_best(found, "null_high"), "attention")


@claim("wang2022")
def wang2022(model: pb.Model, seed: int) -> Claim:
    text = "the name movers {} and {} carry the indirect object"
    return _carry(model, seed, pb.find.name_mover_heads, pb.tasks.indirect_object, text)


@claim("wu2024")
def wu2024(model: pb.Model, seed: int) -> Claim:
    text = "the retrieval heads {} and {} carry the needle"
    return _carry(model, seed, pb.find.retrieval_heads, pb.tasks.needle_retrieval, text)


@claim("gould2023")
def gould2023(model: pb.Model, seed: int) -> Claim:
    heads = pb.find.successor_heads(model).top(1)
    text = f"the head {heads[0]}, found by its weights, carries successions, more than random heads"
    return joint(model, heads, pb.tasks.successor(model, N, seed=seed), seed, text)


@claim("zhang2024")
def zhang2024(model: pb.Model, seed: int) -> Claim:
    return _carry(model, seed, pb.find.arithmetic_heads, pb.tasks.arithmetic, "{} and {} carry sums")


@claim("gu2024")
def gu2024(model: pb.Model, seed: int) -> Claim:
    found = pb.find.attention_sinks(model, pb.tasks.repeated_tokens(model, N, seed=seed))
    value, low, high = (at_best(found, name) for name in ("rate", "low", "high"))
    text = f"{found.top(1)[0]} rests on the first token in more than half of the prompts"
    return Claim(text, value, low, high, 0.5, "share of prompts")


@claim("akyurek2024")
def akyurek2024(model: pb.Model, seed: int) -> Claim:
    found = pb.find.ngram_heads(model, pb.tasks.repeated_tokens(model, N, seed=seed), order=2)
    value, low, high = (at_best(found, name) for name in ("excess", "low", "high"))
    return Claim(
        f"{found.top(1)[0]} looks at what followed the last two tokens before", value, low, high, 0.0, "attention"
    )


@claim("dunefsky2023")
def dunefsky2023(model: pb.Model, seed: int) -> Claim:
    found = pb.find.observable_propagation(model, pb.tasks.indirect_object(model, N, seed=seed), seed=seed)
    interval = ends_of(found, "spearman", "spearman_low", "spearman_high")
    return Claim("propagated scores of heads rank as their exact effects do", *interval, 0.0, "Spearman's correlation")


@claim("mugnaini2025")
def mugnaini2025(model: pb.Model, seed: int) -> Claim:
    found = pb.find.head_importance(model, pb.tasks.indirect_object(model, N, seed=seed), seed=seed)
    interval = ends_of(found, "spearman", "spearman_low", "spearman_high")
    return Claim("heads that write much cost much when they are removed", *interval, 0.0, "Spearman's correlation")


@claim("mcdougall2023")
def mcdougall2023(model: pb.Model, seed: int) -> Claim:
    found = pb.find.copy_suppression_heads(model, pb.tasks.indirect_object(model, N, seed=seed), seed=seed)
    score, error = at_best(found, "suppression"), 1.96 * at_best(found, "standard_error")
    text = f"{found.top(1)[0]} pushes down what is about to be said where it stands in the prompt, more than elsewhere"
    return Claim(text, score, score - error, score + error, at_best(found, "null_mean"), "logits")
