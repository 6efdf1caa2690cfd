"""Claims about neurons and experts."""

from __future__ import annotations

import math
import random

import patchbay as pb
from patchbay.papers.claims._claim import Claim, claim
from patchbay.papers.claims._shared import (
    FEW,
    SETS,
    STUDENT,
    N,
    at_part,
    first_of,
    over_sets,
    student,
    untrained,
)
from patchbay.tasks import words

RANDOM_SETS = 10  # of find.relation_neurons


@claim("alkhamissi2024", "comparison")
def alkhamissi2024(model: pb.Model, seed: int) -> Claim:
    """Confirmed if untrained networks of this form have neurons that respond more to sentences than to lists of the same words in
    no order, chosen on one half of the prompts and measured on the other.

    Of the same words: invented ones alone, as in the localiser, any random embedding tells from others.
    """

    def held_out(asked: pb.Model, at: int) -> float:
        found = pb.find.concept_neurons(asked, _sentences(model, at), control="none", seed=at)
        return float(found["held_out_mean"])

    own = over_sets(lambda at: held_out(model, at), seed)
    text = f"an untrained network has neurons for sentences against the same words in no order (the trained one's are at {own[0]:.3g})"
    bound = 1.96  # the mean of scores of variance 1 passes it by chance in 2.5 %, however they go together
    return Claim(text, *over_sets(lambda at: held_out(untrained(model, at), at), seed), bound, "Welch's t")


def _sentences(model: pb.Model, seed: int) -> pb.Task:
    """Single sentences, and as many lists as long of all their words, dealt out anew."""
    rng = random.Random(f"alkhamissi2024-{seed}")
    clean = tuple(map(tuple, model.encode([words.sentences(rng, 1)[1:] for _ in range(N)])))
    dealt = [token for ids in clean for token in ids]
    rng.shuffle(dealt)
    left = iter(dealt)
    twins = tuple(tuple(next(left) for _ in ids) for ids in clean)
    right = (0,) * N  # nothing is asked
    return pb.Task("sentences", clean, right, corrupted=twins, metric="log_probability", seed=seed)


@claim("liu2025b", "mechanism")
def liu2025b(model: pb.Model, seed: int) -> Claim:
    """Confirmed if switching off 3 % of the neurons, those of one series (days, letters, ...), costs its held-out answers more than
    switching off random sets does, mean over the series; prompts and random sets both vary."""
    task = pb.tasks.successor(model, 4 * N, seed=seed)
    found = pb.find.relation_neurons(model, task, labels=("kind", "start"), shares=(0.03,), seed=seed)
    n = len(found.labels_of("condition"))
    gaps, squares = [], []
    for i in range(n):
        change, low, high, mean, z = (
            float(found[name][i, i, 0]) for name in ("change", "change_low", "change_high", "random", "z")
        )
        spread = abs(change - mean) / max(abs(z), 1e-9)  # of the random sets
        gaps.append(change - mean)
        squares.append(((high - low) / 2.0) ** 2 + (STUDENT[RANDOM_SETS] * spread) ** 2 * (1.0 + 1.0 / RANDOM_SETS))
    value, half = sum(gaps) / n, sum(squares) ** 0.5 / n
    text = "neurons that tell one series from the others, switched off, cost its answers more than random neurons"
    return Claim(text, value, value - half, value + half, 0.0, "nats beyond random neurons", above=False)


@claim("luo2024", "mechanism")
def luo2024(model: pb.Model, seed: int) -> Claim:
    """Confirmed if the share of neurons that can be left out, those that write least at each token, at a rise of perplexity by at most
    1 %, is by more than a half above the share of random neurons that can be left out at that rise."""

    def above(at: int) -> float:
        task = pb.tasks.indirect_object(model, FEW, seed=at)
        found = pb.find.activation_sparsity(model, task, baselines=False, seed=at)
        return float(found["overall"]) - _random_share(model, task, at)

    text = "more than half of the neurons, above as many as random ones, can be left out while perplexity rises by at most 1 %"
    return Claim(text, *over_sets(above, seed), 0.5, "share of neurons above random ones")


def _random_share(model: pb.Model, task: pb.Task, seed: int) -> float:
    """The largest share of random neurons, halved up to eight times, without which perplexity rises by at most 1 %."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    layers = [i for i in range(model.n_layers) if "mlp.act" in model.signals(i)]
    order = {
        i: torch.rand(model.n_neurons(i), generator=generator) for i in layers
    }  # a neuron goes when the share passes its own

    def nats(share: float) -> float:
        edits = [pb.scale(pb.Port("mlp.act", i), (order[i] >= share).float()) for i in layers]
        logits, ids = (trace := pb.run(model, task, edits=edits)).logits, trace.ids
        lost = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2).float(), ids[:, 1:], reduction="none")
        real = torch.arange(1, ids.shape[1])[None] < trace.lengths[:, None]
        return float(lost[real].mean())

    base, low, high = nats(0.0), 0.0, 1.0
    if nats(1.0) - base <= math.log(1.01):
        return 1.0
    for _ in range(8):
        middle = (low + high) / 2.0
        low, high = (middle, high) if nats(middle) - base <= math.log(1.01) else (low, middle)
    return low


@claim("davies2025", "mechanism")
def davies2025(model: pb.Model, seed: int) -> Claim:
    """Confirmed if more than 1 % of the neurons have a margin that 1 % of turned directions reach; neurons and directions both vary."""

    def share(at: int) -> tuple[float, int]:
        p = pb.find.neuron_vocabulary(model, seed=at)["p"].flatten()
        p = p[~p.isnan()]
        return float((p <= 0.01).double().mean()), len(p)

    rows = [share(100 * (seed + 1) + at) for at in range(SETS)]
    mean, low, _ = student([value for value, _ in rows])
    error = math.hypot(mean - low, 1.96 * math.sqrt(mean * (1 - mean) / rows[0][1]))
    text = "more neurons read one token's direction apart from all others than randomly turned ones do"
    return Claim(text, mean, mean - error, mean + error, 0.01, "share of neurons")


@claim("dahlke2025", "mechanism", "tiny-moe")
def dahlke2025(model: pb.Model, seed: int) -> Claim:
    kinds = (pb.tasks.successor, pb.tasks.arithmetic, pb.tasks.indirect_object)
    half, other = (
        pb.Task.joined([make(model, N // 2, seed=at) for make in kinds]).with_metric("log_probability")
        for at in (seed, seed + 1)
    )
    best = first_of(pb.find.expert_specialisation(model, half, label="task", value="0", seed=seed))
    found = pb.find.expert_specialisation(model, other, label="task", value="0", seed=seed)
    value, low, high = (at_part(found, name, best) for name in ("relevance", "low", "high"))
    text = f"{best} is chosen more often where the next of a series is asked than elsewhere, also on new prompts"
    return Claim(text, value, low, high, 0.0, "share of prompts")
