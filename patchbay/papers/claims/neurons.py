"""Claims about neurons and experts."""

from __future__ import annotations

import math
import random

import patchbay as pb
from patchbay.papers.claims._claim import Claim, claim
from patchbay.papers.claims._shared import SETS, N, at_part, ends_of, over_sets, student, untrained
from patchbay.tasks import words


@claim("alkhamissi2024")
def alkhamissi2024(model: pb.Model, seed: int) -> Claim:
    """Confirmed if untrained networks of this form have neurons that respond more to sentences than to lists of invented words,
    chosen on one half of the prompts and measured on the other."""

    def held_out(asked: pb.Model, at: int) -> float:
        found = pb.find.concept_neurons(asked, _sentences(model, at), control="none", seed=at)
        return float(found["held_out_mean"])

    own = student([held_out(model, at) for at in range(SETS)])
    text = f"an untrained network has neurons for sentences against lists of invented words (the trained one's are at {own[0]:.3g})"
    bound = 1.96  # the mean of scores of variance 1 passes it by chance in 2.5 %, however they go together
    return Claim(text, *over_sets(lambda at: held_out(untrained(model, at), at), seed), bound, "Welch's t")


def _sentences(model: pb.Model, seed: int) -> pb.Task:
    """Single sentences, and lists of as many tokens of invented words as their twins."""
    rng = random.Random(f"alkhamissi2024-{seed}")
    invented = words.LANDS + words.CAPITALS
    clean = tuple(map(tuple, model.encode([words.sentences(rng, 1)[1:] for _ in range(N)])))
    lists = model.encode([" ".join(rng.sample(invented, 20)) for _ in range(N)])
    twins = tuple(tuple(ids[: len(own)]) for ids, own in zip(lists, clean, strict=True))
    right = (0,) * N  # nothing is asked
    return pb.Task("sentences", clean, right, corrupted=twins, metric="log_probability", seed=seed)


@claim("liu2025b")
def liu2025b(model: pb.Model, seed: int) -> Claim:
    """Confirmed if switching off 3 % of the neurons, those of one series (days, letters, ...), costs its held-out answers more than
    the worst of ten random sets does, mean over the series."""
    task = pb.tasks.successor(model, 4 * N, seed=seed)
    found = pb.find.relation_neurons(model, task, labels=("kind", "start"), shares=(0.03,), seed=seed)
    n = len(found.labels_of("condition"))
    value, low, high, bound = (
        [float(found[name][i, i, 0]) for i in range(n)]
        for name in ("change", "change_low", "change_high", "random_low")
    )
    half = sum(((b - a) / 2.0) ** 2 for a, b in zip(low, high, strict=True)) ** 0.5 / n
    mean = sum(value) / n
    text = "neurons that tell one series from the others, switched off, cost its answers more than random neurons"
    return Claim(text, mean, mean - half, mean + half, sum(bound) / n, "nats", above=False)


@claim("luo2024")
def luo2024(model: pb.Model, seed: int) -> Claim:
    found = pb.find.activation_sparsity(model, pb.tasks.indirect_object(model, N, seed=seed), seed=seed)
    interval = ends_of(found, "ratio_held_out", "ratio_low", "ratio_high")
    text = f"leaving out {float(found['sparsity_held_out']):.0%} of the neurons costs at most 2 % perplexity on held-out text"
    return Claim(text, *interval, 1.02, "of the perplexity", above=False)


@claim("davies2025")
def davies2025(model: pb.Model, seed: int) -> Claim:
    p = pb.find.neuron_vocabulary(model, seed=seed)["p"].flatten()
    p = p[~p.isnan()]
    share, bound = float((p <= 0.01).double().mean()), 0.01
    error = 1.96 * math.sqrt(share * (1 - share) / len(p))
    text = "more neurons read one token's direction apart from all others than randomly turned ones do"
    return Claim(text, share, share - error, share + error, bound, "share of neurons")


@claim("dahlke2025")
def dahlke2025(model: pb.Model, seed: int) -> Claim:
    kinds = (pb.tasks.successor, pb.tasks.arithmetic, pb.tasks.indirect_object)
    half, other = (
        pb.Task.joined([make(model, N // 2, seed=at) for make in kinds]).with_metric("log_probability")
        for at in (seed, seed + 1)
    )
    best = pb.find.expert_specialisation(model, half, label="task", value="0", seed=seed).top(1)[0]
    found = pb.find.expert_specialisation(model, other, label="task", value="0", seed=seed)
    value, low, high = (at_part(found, name, best) for name in ("relevance", "low", "high"))
    text = f"{best} is chosen more often where the next of a series is asked than elsewhere, also on new prompts"
    return Claim(text, value, low, high, 0.0, "share of prompts")
