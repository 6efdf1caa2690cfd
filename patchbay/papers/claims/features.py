"""Claims about sparse features."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import patchbay as pb
from patchbay.papers.claims._claim import Claim, claim
from patchbay.papers.claims._shared import DRAWS, FEW, N, beyond_random, ends_of, over_sets, stories

if TYPE_CHECKING:
    from patchbay.model.model import Model

WIDTH, K = 512, 2
BOXES = 8  # planted ones, for each set of texts


@claim("ayonrinde2024", "comparison")
def ayonrinde2024(model: Model, seed: int) -> Claim:
    """Confirmed if, of a dictionary at its start, more features are kept at no token of a batch by k a token than by a number for each
    feature. What training makes of them is measured by `train.dictionary`; here is what the rule itself leaves without a gradient."""
    from patchbay.train._allocation import kept  # with torch, which looking up a claim does without
    from patchbay.train._fitting import Fitting, Plan
    from patchbay.train._places import places_of
    from patchbay.train._stream import Source

    places = places_of(model, f"L{model.n_layers // 2}.resid_out")

    def unused(at: int) -> float:
        task = pb.tasks.repeated_tokens(model, FEW, seed=at)
        ids = model.encode(task)
        read, written = Source([model], ids, places).of(range(len(ids)))
        plan = Plan("topk", WIDTH, K, 0.0, 1, 1e-3, len(read), at)
        begun = Fitting(plan, read, written, places)
        value = begun._pre(read / begun.scale_in).relu().detach()
        shares = [
            1 - float(kept(form, value, K, begun.density).any(0).double().mean()) for form in ("topk", "feature_choice")
        ]
        return shares[0] - shares[1]

    value, low, high = over_sets(unused, seed)
    return Claim(
        "more features are used at no token of a batch with k a token than with a number for each feature",
        value,
        low,
        high,
        0.0,
        "of the features",
    )


@claim("ameisen2025", "mechanism")
def ameisen2025(model: Model, seed: int) -> Claim:
    """Confirmed if the next token changes more without the neurons of attribution graphs than without as many others of their layers, each
    writing about as much at its token; prompts and random graphs both vary."""
    graph = pb.find.attribution_graph(model, pb.tasks.indirect_object(model, FEW, seed=seed), features=256)
    found = pb.prove.graph_ablation(model, graph, draws=DRAWS, matched="length", seed=seed)
    text = "the neurons of attribution graphs matter more than as many others of their layers that write as much"
    interval = ends_of(found, "difference", "difference_low", "difference_high")
    return beyond_random(text, interval, float(found["p"]), DRAWS, "nats")


@claim("schwettmann2023", "made")
def schwettmann2023(model: Model, seed: int) -> Claim:
    """Confirmed if an interpreter that says what black boxes do, `find.feature_names` with its search over predicates, is right less often at a planted exception, a tenth to a
    fifth of where the box should fire, than elsewhere. In place of agents that are language models; of the published score for functions of numbers it is told what a table passes, a constant, and answers blind
    to a corrupted interval."""
    del model
    return _interpreted(seed)


@functools.cache
def _interpreted(seed: int) -> Claim:
    """Of black boxes and of no model, so that it is the same for each."""
    share = _passed(seed)
    seen: list[tuple[float, float]] = []

    def missed(at: int) -> float:
        boxes = [_described(100 * at + i) for i in range(BOXES)]
        seen.extend(boxes)
        return sum(most - least for most, least in boxes) / BOXES

    value, low, high = over_sets(missed, seed)
    most, least = (sum(row) / len(seen) for row in zip(*seen, strict=True))
    text = (
        f"predicates that were found say rightly when {most:.0%} of planted boxes' tokens fire, and {least:.0%} of those at a planted exception (of functions of numbers the published score passes a table of 17 values "
        f"on {share['table']:.0%}, a constant on {share['constant']:.0%}, answers blind to a corrupted interval on {share['blind']:.0%})"
    )
    return Claim(text, value, low, high, 0.0, "of the tokens more often right elsewhere")


def _described(seed: int) -> tuple[float, float]:
    """A box that fires on some words but after others: how often what is found, on half of some texts, is right on the other half where those words are, and where they stand after the others."""
    import random

    import torch

    from patchbay.find._predicates import Tokens, best

    rng = random.Random(f"boxes-{seed}")
    spelled = [text.split() for text in stories(2 * N, seed)]
    vocabulary = sorted({word for text in spelled for word in text})
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokens = Tokens([[ids[word] for word in text] for text in spelled], lambda i: f" {vocabulary[i]}")
    rule = torch.isin(tokens.ids, torch.tensor(rng.sample(range(len(vocabulary)), len(vocabulary) // 8)))
    before = sorted(set(tokens.previous[rule].tolist()))
    rng.shuffle(before)
    taken = torch.zeros_like(rule)
    for word in before:
        more = taken | rule & (tokens.previous == word)
        if int(taken.sum()) < 0.1 * int(rule.sum()) and int(more.sum()) < 0.2 * int(rule.sum()):
            taken = more
    chooses = tokens.text < N
    found = best(tokens, rule & ~taken, chooses).mask
    right = found == (rule & ~taken)
    return tuple(float(right[~chooses & where].double().mean()) for where in (rule & ~taken, taken))  # type: ignore[return-value]


def _passed(seed: int, n: int = 120) -> dict[str, float]:
    """The share of composed functions on which the published score passes a table of 17 values, a constant, and, of functions of which one interval is corrupted, the function without."""
    import numpy as np

    from patchbay.measure._black_boxes import HIGH, LOW, baselines, make, score

    asked, passed = np.linspace(LOW, HIGH, 17), dict.fromkeys(("table", "constant", "blind"), 0.0)
    for i in range(n):
        box, corrupted = (make("composed", 1000 * seed + i, 0.0, chance) for chance in (0.15, 1.0))
        rivals = baselines(asked, box(asked))
        for name in ("table", "constant"):
            passed[name] += score(box, rivals[name], asked, None).passes / n
        passed["blind"] += score(corrupted, lambda x, box=corrupted: np.nan_to_num(box.rule(x)), asked, None).passes / n  # type: ignore[misc]
    return passed
