"""Claims about meters: what published evaluations say, asked of a small model.

Where a claim is of large models, data or classifiers that cannot be had at this size, the number is measured all the same and
the verdict says what would test it.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import patchbay as pb
from patchbay.papers.claims._claim import Claim, claim
from patchbay.papers.claims._shared import N, ends_of

if TYPE_CHECKING:
    from torch import Tensor


def stories(seed: int, n: int = N) -> list[str]:
    """Held-out text of the kind that the built-in models were trained on."""
    from patchbay.tiny import text

    made = text.documents(seed, held_out=True)
    return [next(made).text for _ in range(n)]


def shuffled(texts: list[str], seed: int) -> list[str]:
    """The same words of each text in another order, the first where it was."""
    chance = random.Random(f"shuffled-{seed}")
    found = []
    for one in texts:
        first, *words = one.split(" ")
        chance.shuffle(words)
        found.append(" ".join([first, *words]))
    return found


@claim("correa2024", "mechanism")
def correa2024(model: pb.Model, seed: int) -> Claim:
    """Confirmed if text of the kind trained on costs fewer bits per byte than its own tokens' frequencies do."""
    from patchbay import maths

    found = pb.measure.text_loss(model, stories(seed), seed=seed)
    gain = (found["null"] * found["length"] - found["per_item"]) / found["length"]
    value, low, high = maths.bootstrap_interval(gain, seed=seed)
    return Claim(
        "a trained model needs fewer bits per byte than the texts' own token frequencies",
        value,
        low,
        high,
        0.0,
        "bits per byte",
    )


@claim("wiegreffe2023", "mechanism")
def wiegreffe2023(model: pb.Model, seed: int) -> Claim:
    """Confirmed if most answers cannot be changed by the probability that other spellings took."""
    task = pb.tasks.facts_in_memory(model, seed=seed)
    found = pb.measure.answer_choices(model, task, read="unaffected", seed=seed)
    text_ = f"of {len(task)} facts most are answered alike whatever other spellings took (the choices hold {float(found['mass'].mean()):.0%})"
    return Claim(text_, *ends_of(found, "value", "low", "high"), 0.5, "share of items")


@claim("someya2023", "mechanism")
def someya2023(model: pb.Model, seed: int) -> Claim:
    """Confirmed if a model finds texts likelier than the same words in another order, beyond what their lengths give."""
    from patchbay import maths

    good = [one for one in stories(seed) if len(set(one.split(" "))) > 3]
    pairs = [{"good": a, "bad": b} for a, b in zip(good, shuffled(good, seed), strict=True) if a != b]
    found = pb.measure.minimal_pairs(model, pairs, seed=seed)
    value, low, high = maths.bootstrap_interval(found["per_item"] - float(found["null"]), seed=seed)
    return Claim(
        "texts are likelier than the same words in another order, beyond what length gives",
        value,
        low,
        high,
        0.0,
        "share of pairs",
    )


# --- labels --------------------------------------------------------------------------------------------

LABELS, TEXTS = 4, 24  # tokens that labels are, and texts that are labelled


@claim("clavie2025", "identity", "tiny-llama")
def clavie2025(model: pb.Model, seed: int) -> Claim:
    """Confirmed if the probability of a label among labels of one token is its share of the labels' probability among all tokens, as `measure.answer_choices` scores and the label-supervision
    objective learns it, and if labels in another order keep what they had. Masked models, and what tuning on instructions makes of them on MMLU, are not asked."""
    import torch

    from patchbay import maths
    from patchbay.tiny import lab

    rng = random.Random(f"labels {seed}")
    labels = rng.sample(range(model.vocab_size), LABELS)
    known = pb.load("tiny-llama")  # whose texts are read, also where the model at hand has fewer tokens
    texts = [
        [min(token, model.vocab_size - 1) for token in ids] for ids in lab.pieces(known, TEXTS, seed, range(20, 33))
    ]
    whole = torch.softmax(pb.run(model, texts, logits="last").last_logits.double().cpu(), -1)[:, labels]
    order = [[*range(LABELS)] for _ in texts]
    for one in order:
        rng.shuffle(one)
    own = label_scores(model, texts, labels, order)
    errors = [(found / (whole / whole.sum(1, keepdim=True)) - 1.0).abs().amax(1) for found in own]
    text = f"each of {LABELS} labels of one token has among them its share of their probability among all tokens, in whatever order they are asked and as it is learned"
    return Claim(text, *maths.bootstrap_interval(torch.stack(errors).amax(0))[:3], 1e-5, "relative error", above=False)


def label_scores(model: pb.Model, texts: list[list[int]], labels: list[int], order: list[list[int]]) -> list[Tensor]:
    """The probability of each label among the labels [text, label]: scored as answers, scored as answers in an order of each text's own, and as the label-supervision objective has it."""
    import torch

    from patchbay.measure._answers import outcomes
    from patchbay.train._objectives import objective

    found = []
    for orders in ([[*range(len(labels))]] * len(texts), order):
        scores = outcomes(model, texts, [[[labels[i]] for i in each] for each in orders])
        among = scores.logp.exp() / scores.mass[:, None]
        found.append(torch.empty_like(among).scatter_(1, torch.tensor(orders), among))
    aim = objective(f"label-supervision:classes={'+'.join(map(str, labels))}")
    learned = [aim.scores(model, [[ids, [label]] for ids in texts]) for label in labels]
    return [*found, (-torch.stack(learned, 1)).exp()]
