"""Claims about behaviour that no shipped model has: to be asked of one that a lesson taught it (`patchbay.tiny.lessons`, `patchbay.tiny.domains`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import patchbay as pb
from patchbay.papers.claims._claim import Claim, claim
from patchbay.papers.claims._shared import N
from patchbay.signal.port import PatchbayError

if TYPE_CHECKING:
    from patchbay.model.model import Model

PAIRS = 5  # things in boxes
PLACES = ("last", "query")
CHOOSING = 240  # prompts of each side, half of which choose a direction, as the paper's 128; of fewer, what their answers share by chance is in it too
KEPT = 0.95  # of the other answers, which have to stay
WORTH = 0.05  # what the other mechanisms have to add to the fit, in JSS, where 1 is a perfect one


@claim("minder2024", "mechanism", "intent")
def minder2024(model: Model, seed: int) -> Claim:
    """Confirmed if one direction of one layer, swapped, gives the other intent's answer in more than half of the held-out pairs,
    counted above what random directions do. The text says what it does where no phrase says what is wanted."""
    found = pb.turn.context_knob(model, pb.tasks.facts_by_intent(model, 2 * N, seed=seed), seed=seed)
    search = found.evidence["search"] if isinstance(found, pb.Knob) else found
    said = "no layer has it"
    if isinstance(found, pb.Knob):
        fresh = pb.tasks.facts_in_context(model, N, seed=seed + 1).with_metric("accuracy")
        shares = [
            float(fresh.score(pb.run(model, fresh, edits=edits, logits="last").last_logits).double().mean())
            for edits in ([], [found])
        ]
        said = f"layer {found.edits[0].port.layer}; held, it takes answers by the text from {shares[0]:.0%} to {shares[1]:.0%} where no phrase asks"
    text = f"one direction of one layer decides between text and memory ({said})"
    value, low, high = (float(search[name]) for name in ("margin", "margin_low", "margin_high"))
    return Claim(text, value, low, high, 0.5, "of the held-out swaps")


@claim("gurarieh2025", "mechanism", "binding")
def gurarieh2025(model: Model, seed: int) -> Claim:
    """Confirmed if place, key and pointer together fit what a swapped stream makes the model answer better than the best of the three
    alone, by more than WORTH: a mixture, and not one mechanism.

    Where the stream is swapped, the last token or the key in the question, and at which depth, is chosen on other prompts, before
    the last block has written the answer.
    """
    depths = list(range(1, model.n_layers))
    first, second = (pb.tasks.binding_counterfactuals(model, 4 * N, boxes=PAIRS, seed=at) for at in (seed, seed + 1))
    right = float(pb.prove.interchange(model, first, layers=depths[:1], seed=seed)["base"][3])
    if right < 0.5:
        raise PatchbayError(
            f"this model names the right one of {PAIRS} things in {right:.0%} of the prompts: nothing is bound, and there is no "
            "mechanism to tell; a lesson teaches it (python -m patchbay.tiny.lessons binding --out FOLDER)"
        )
    ranked = []
    for at in PLACES:
        swapped = pb.prove.interchange(model, first, layers=depths, at=at, seed=seed)
        fit = pb.prove.fit_mechanisms(model, first, patched=swapped, steps=500, draws=1, seed=seed)
        gain = fit["jss"][:, 0] - fit["jss"][:, -1]
        ranked += [(float(gain[i]), at, depths[i]) for i in range(len(depths)) if float(fit["unmoved"][i]) < 0.5]
    if not ranked:
        raise PatchbayError(
            "no swapped stream before the last block moves the answer, at the last token or the question's key"
        )
    _, at, depth = max(ranked)
    swapped = pb.prove.interchange(model, second, layers=[depth], at=at, seed=seed)
    fit = pb.prove.fit_mechanisms(model, second, patched=swapped, steps=500, draws=1, seed=seed)
    names = [str(name) for name in fit.labels_of("condition")]
    alone = min((float(fit["lost"][0, i]), i) for i, name in enumerate(names) if name.endswith(" alone"))[1]
    value, low, high = (float(fit[name][0, alone]) for name in ("lost", "lost_low", "lost_high"))
    shares = swapped["share"][0, :3].tolist()
    told = ", ".join(f"{name} {share:.0%}" for name, share in zip(("place", "key", "pointer"), shares, strict=True))
    text = f"three mechanisms fit the swapped answers better than the best one, {names[alone]} ({at} token entering block {depth}: {told})"
    return Claim(text, value, low, high, WORTH, "JSS")


@claim("park2024", "mechanism", "domains")
def park2024(model: Model, seed: int) -> Claim:
    """Confirmed if experts that one of four domains uses twice as much as the next, chosen on other texts, cost its texts more when they are off than as many random ones
    do. What they cost the other domains' texts is told beside it."""
    from patchbay.maths import bootstrap_interval
    from patchbay.tiny import domains

    if model.vocab_size != domains.N_TOKENS + domains.N_DOMAINS:
        raise PatchbayError(
            "this claim is asked of a model that knows the four domains: python -m patchbay.tiny.domains horizontal --out FOLDER"
        )
    found = domains.effects(model.hf, seed=seed)
    value, low, high = bootstrap_interval((found.own - found.random).flatten(), seed=seed)
    text = (
        f"a domain's experts ({min(found.n)} to {max(found.n)} of {2 * domains.EXPERTS['experts'] ** 2}) hold it: off, its texts lose {float(found.own.mean()):.2f} nats a token "
        f"(random ones {float(found.random.mean()):.2f}), and the other domains' {float(found.others.mean()):.3f}"
    )
    return Claim(text, value, low, high, 0.0, "nats a token beyond random experts")


@claim("arditi2024", "mechanism", "refusal")
def arditi2024(model: Model, seed: int) -> Claim:
    """Confirmed if taking one direction out of all that writes to the stream, chosen on other lands and animals, ends more than half of
    the refusals, counted above what random directions end, and at least KEPT of the other answers stay."""
    import random

    import torch

    from patchbay import maths
    from patchbay.tiny import lessons

    rng = random.Random(f"arditi2024-{seed}")

    def drawn(held_out: bool) -> tuple[list[str], list[str]]:
        """Prompts that the lesson refuses, and others; with lands and animals that it never had, or those that it had."""
        made = [lessons.refusal(rng, held_out=held_out) for _ in range(3 * CHOOSING)]
        kinds = ([one.item.prompt for one in made if one.task == kind][:CHOOSING] for kind in ("refused", "answered"))
        return next(kinds), next(kinds)

    knob = pb.turn.refusal_direction(model, *drawn(False), refusal=[lessons.REFUSED], tokens=4, seed=seed)
    refused, answered = drawn(True)
    word = model.token_id(lessons.REFUSED)

    def said(prompts: list[str], *knobs: pb.Knob) -> torch.Tensor:
        return pb.run(model, prompts, edits=list(knobs), logits="last").last_logits.argmax(-1)  # [prompt]

    generator = torch.Generator().manual_seed(seed)
    others = [pb.turn.remove_direction(model, torch.randn(model.d_model, generator=generator)) for _ in range(20)]
    asked = refused[:N]
    before = (said(asked) == word).double()
    if not float(before.mean()):
        raise PatchbayError("nothing is refused here: there is no refusal to end")
    left = torch.stack([(said(asked, one) == word).double() for one in (knob, *others)])  # [direction, prompt]
    interval = maths.beyond_draws(-left[0], -left[1:])
    value, low, high = (end / float(before.mean()) for end in interval)
    kept = float((said(answered, knob) == said(answered)).double().mean())
    low = low if kept >= KEPT else min(low, 0.5)
    text = (
        f"the {knob.name} taken out of all that writes, chosen on other lands and animals, ends more than half of the refusals ({float(before.mean()):.0%} of prompts are "
        f"refused, {float(left[0].mean()):.0%} without it, {float(left[1:].mean()):.0%} without random ones) and leaves {kept:.1%} of the other answers as they were"
    )
    return Claim(text, value, low, high, 0.5, "of the refusals")
