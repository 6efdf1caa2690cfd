"""Claims about heads: which there are, what they write, and that the model needs them.

A head is chosen on some prompts, and what is claimed of it is measured on others.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import patchbay as pb
from patchbay.papers.claims._claim import WIDE, Claim, Interval, claim
from patchbay.papers.claims._shared import (
    DRAWS,
    FEW,
    N,
    apart,
    at_part,
    beyond_random,
    first_of,
    joint,
    over_sets,
    removals,
    stories,
    unrelated,
)
from patchbay.signal.port import PatchbayError

REPAIRED = 20  # steps of LoRA after a cut


def _carry(model: pb.Model, seed: int, find: Callable[..., Any], task: Callable[..., Any], text: str) -> Claim:
    """That the best heads of two layers, by a finder, are needed, on prompts that did not choose them."""
    heads = apart(find(model, task(model, N, seed=seed)))
    said = text.format(" and ".join(map(str, heads))) + ", more than random heads of their layers"
    return joint(model, heads, task(model, N, seed=seed + 1), seed, said)


def _looks(model: pb.Model, seed: int, find: Callable[..., Any], measure: Callable[..., float]) -> tuple[Any, Interval]:
    """The best head of a finder on repeated tokens, and what is measured of it on sets of others."""
    head = first_of(find(model, pb.tasks.repeated_tokens(model, N, seed=seed)))
    return head, over_sets(lambda at: measure(find(model, pb.tasks.repeated_tokens(model, FEW, seed=at)), head), seed)


@claim("elhage2021", "identity")
def elhage2021(model: pb.Model, seed: int) -> Claim:
    error = float(pb.find.direct_logit_attribution(model, pb.tasks.indirect_object(model, N, seed=seed))["sum_error"])
    text = "what the parts write sums to the logit difference"
    return Claim(text, error, error, error, 1e-4, "logits off", above=False)


@claim("olsson2022", "mechanism")
def olsson2022(model: pb.Model, seed: int) -> Claim:
    def above(found: Any, head: Any) -> float:
        return at_part(found, "score", head) - at_part(found, "null_mean", head)

    head, interval = _looks(model, seed, pb.find.induction_heads, above)
    text = f"{head} looks at what followed the token before, more than at the places around it"
    return Claim(text, *interval, 0.0, "attention above the places around")


@claim("wang2022", "mechanism", WIDE)
def wang2022(model: pb.Model, seed: int) -> Claim:
    text = "the name movers {} carry the indirect object"
    return _carry(model, seed, pb.find.name_mover_heads, pb.tasks.indirect_object, text)


@claim("wu2024", "mechanism", WIDE)
def wu2024(model: pb.Model, seed: int) -> Claim:
    text = "the retrieval heads {} carry the needle"
    return _carry(model, seed, pb.find.retrieval_heads, pb.tasks.needle_retrieval, text)


@claim("gould2023", "mechanism", WIDE)
def gould2023(model: pb.Model, seed: int) -> Claim:
    heads = apart(pb.find.successor_heads(model, seed=seed))
    text = f"the heads {' and '.join(map(str, heads))}, found by their weights, carry successions, more than random heads of their layers"
    return joint(model, heads, pb.tasks.successor(model, N, seed=seed), seed, text)


@claim("zhang2024", "mechanism", WIDE)
def zhang2024(model: pb.Model, seed: int) -> Claim:
    return _carry(model, seed, pb.find.arithmetic_heads, pb.tasks.arithmetic, "{} carry sums")


@claim("dunefsky2023", "comparison", WIDE)
def dunefsky2023(model: pb.Model, seed: int) -> Claim:
    """Confirmed if what heads write towards the observable, by one path, ranks them as their removal does by all paths, further than
    unrelated ranks would. (Along that path alone the two agree by construction.)"""

    def rank(at: int) -> float:
        from patchbay import maths

        task = pb.tasks.indirect_object(model, FEW, seed=at)
        found = pb.find.observable_propagation(model, task, seed=at)
        heads = found.top(10**6)
        scores = found["score"][[part.layer for part in heads], [part.index for part in heads]]
        return float(maths.spearman(scores, removals(model, task, heads)))

    text = "propagated scores of heads, along the path to the logits, rank as what the answer loses without each head, by all paths"
    return Claim(text, *over_sets(rank, seed), unrelated(_n_heads(model)), "Spearman's correlation")


@claim("mugnaini2025", "mechanism", "tiny-llama")
def mugnaini2025(model: pb.Model, seed: int) -> Claim:
    """Confirmed if a checkpoint without the fifth of the neurons that write least on other texts loses less than one without as many
    random ones. What a LoRA brings back of either, and to the whole model in as many steps, is told beside it."""
    scored = pb.find.neuron_importance(model, stories(FEW, seed), exact=0, seed=seed)["importance"]
    n = scored.shape[1] // 5
    least = scored.argsort(1)[:, :n].tolist()
    rng = random.Random(f"mugnaini2025-{seed}")
    others = [rng.sample(range(scored.shape[1]), n) for _ in least]
    parts, drawn_parts = (
        [pb.Part(i, "neuron", j) for i, row in enumerate(rows) for j in row] for rows in (least, others)
    )
    told = stories(FEW, seed + 1)
    found = pb.turn.cut(model, parts, told, draws=20, seed=seed)
    drawn, loss = sorted(found["random"].tolist()), found["loss"].tolist()
    counts, spent = found["parameters"].tolist(), found.provenance["seconds_of_a_run"]
    repaired = [_repaired(model, which, told, seed) for which in (parts, drawn_parts, [])]
    text = (
        f"a checkpoint without the fifth of the neurons that write least ({counts[0]:,.0f} to {counts[1]:,.0f} parameters, {1000 * spent['as it is']:.0f} to "
        f"{1000 * spent['cut']:.0f} ms, equal to zeroing within {float(found['difference']):.1g}) has a loss of {loss[1]:.3f} (whole {loss[0]:.3f}), one without as many random ones {sum(drawn) / len(drawn):.3f}; "
        f"after {REPAIRED} steps of LoRA {repaired[0]:.3f}, {repaired[1]:.3f} without random ones, and {repaired[2]:.3f} of the whole model after as many"
    )
    gaps = [one - loss[1] for one in drawn]
    return beyond_random(
        text, (sum(gaps) / len(gaps), gaps[0], gaps[-1]), float(found["p"]), len(drawn), "nats per token"
    )


def _repaired(model: pb.Model, parts: list[pb.Part], told: list[str], seed: int) -> float:
    """Nats per token on `told` of the model cut of these parts, after a LoRA of rank 8 of all its maps had REPAIRED steps on other texts, merged."""
    from patchbay.model.load import load
    from patchbay.results.method import seeded
    from patchbay.tiny import lab
    from patchbay.train._objectives._objective import Objective, collated

    try:
        import peft
    except ImportError:
        raise PatchbayError("repairing a cut by LoRA takes the package peft (pip install peft)") from None
    rng, aim = random.Random(f"repair-{seed}"), Objective()
    read = model.encode(stories(16 * N, seed + 2))
    with tempfile.TemporaryDirectory(prefix="patchbay-cut-") as made:
        if parts:
            pb.turn.cut(model, parts, told, draws=1, folder=f"{made}/cut", seed=seed)
        hf = copy.deepcopy(load(f"{made}/cut").hf if parts else model.hf)
    with seeded(seed):
        adapted: Any = peft.get_peft_model(hf, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))

    def loss(running: Any, step: int) -> Any:
        batch = collated([aim.row([ids], rng) for ids in rng.sample(read, 16)])
        return aim.loss(model, running, batch, (batch["labels"][:, 1:] >= 0).sum())

    lab.steps_of(adapted, loss, REPAIRED)
    whole = load(adapted.merge_and_unload(), model.tokenizer)
    losses = []
    for ids in model.encode(told):
        said = pb.run(whole, [ids]).logits[0, :-1].double().log_softmax(-1)
        losses.append(-float(said[range(len(ids) - 1), ids[1:]].mean()))
    return sum(losses) / len(losses)


@claim("mcdougall2023", "mechanism")
def mcdougall2023(model: pb.Model, seed: int) -> Claim:
    head = first_of(pb.find.copy_suppression_heads(model, pb.tasks.indirect_object(model, N, seed=seed), seed=seed))

    def above(at: int) -> float:
        task = pb.tasks.indirect_object(model, FEW, seed=at)
        found = pb.find.copy_suppression_heads(model, task, seed=at)
        return at_part(found, "suppression", head) - at_part(found, "null_mean", head)

    text = f"{head} pushes down what is about to be said where it stands in the prompt, more than other tokens there"
    return Claim(text, *over_sets(above, seed), 0.0, "logits above other tokens")


def _n_heads(model: pb.Model) -> int:
    return sum(model.n_heads(layer) for layer in range(model.n_layers))


@claim("todd2023", "mechanism")
def todd2023(model: pb.Model, seed: int) -> Claim:
    """Confirmed if the vector of the two best heads, chosen on other prompts, moves twins to the answer further than other heads do."""
    task, rng = pb.tasks.successor(model, N, length=5, seed=seed), random.Random(f"todd2023-{seed}")
    twins = [[*rng.sample(ids[:-1], len(ids) - 1), ids[-1]] for ids in task.clean]
    task = replace(task, corrupted=tuple(map(tuple, twins)), options={"aligned": False}, marks={})
    found = pb.find.function_vectors(model, task, top=2, draws=DRAWS, seed=seed)
    drawn, gain = found["random"].double(), float(found["gain"])
    value = gain - float(drawn.mean())
    low, high = value - (gain - float(found["gain_low"])), value + (float(found["gain_high"]) - gain)
    text = f"the sum of the mean outputs of {' and '.join(map(str, found.highlights))} moves prompts whose items are shuffled to the next item, more than that of other heads"
    return beyond_random(text, (value, low, high), float(found["p_gain"]), len(drawn), found.units["gain"])
