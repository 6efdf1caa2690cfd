"""Claims about matrices in factors: what is left after tuning the low ranks of a cut alone, and what feed-forward layers in factors learn beside narrower ones.

The model at hand has no part in them, so that what an untrained network of its form shows is the same number again.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import patchbay as pb
from patchbay.papers.claims._claim import TRAINED, Claim, claim
from patchbay.papers.claims.training import difference, trained

if TYPE_CHECKING:
    from torch import Tensor

RATES = (1e-3, 4e-3, 1.6e-2)


def _loss(held: list[Any]) -> Any:
    """Mean nats per token of each held-out text, of a model."""
    from patchbay.train._objectives import objective

    aim = objective("ntp")
    return functools.partial(aim.scores, held=[[one] for one in held])


# --- a cut, tuned -------------------------------------------------------------------------------------

KEEP = 0.5  # of the full ranks


@claim("jaiswal2024", "comparison", seeds=TRAINED)
def jaiswal2024(model: pb.Model, seed: int) -> Claim:
    """Confirmed if a model cut by one threshold, whose matrices of less than half of their rank were then tuned alone, is left with less loss than one cut to the same ranks dealt anew
    among matrices of one shape and tuned alike. Told beside it: the same cut with all of its weights tuned, which the paper finds worse at 7 billion; each at the best of three rates,
    chosen on other texts."""
    found = _cut(seed)
    told = {name: float(one.mean()) for name, one in found.items()}
    share = float(found["share"][0])
    text = (
        f"on texts of facts the model tiny-llama, at {told['whole']:.2f} nats a token, is at {told['cut']:.2f} when cut to half of its ranks by one threshold and at {told['low']:.2f} after 30 steps on the low ranks alone "
        f"({share:.0%} of its weights); {told['full']:.2f} after 30 on all weights; with the same ranks dealt anew at {told['cut dealt']:.2f} and {told['dealt']:.2f}"
    )
    return Claim(text, *difference(found["dealt"], found["low"]), 0.0, "nats per token")


@functools.cache
def _cut(seed: int) -> dict[str, Tensor]:
    import torch

    from patchbay.blocks import welore
    from patchbay.train._optimizers import learns
    from patchbay.train._plan import Arm

    model = pb.load("tiny-llama")
    texts = [list(ids) for ids in pb.tasks.facts_in_context(model, 320, seed=seed).clean]
    loss = _loss(texts[:80])
    ranks = welore.ranks(model.hf, KEEP)
    cuts = {
        name: pb.load(pb.blocks.build(model.hf, ranks=some), model.tokenizer)
        for name, some in (("cut", ranks), ("cut dealt", welore.shuffled(model.hf, ranks, seed)))
    }
    ways = {"low": ("cut", "low-ranks"), "full": ("cut", "adamw"), "dealt": ("cut dealt", "low-ranks")}
    found = {"whole": loss(model)[1::2]} | {name: loss(one)[1::2] for name, one in cuts.items()}
    for name, (start, optimizer) in ways.items():  # chosen on the even texts, told of the odd ones
        arm = {"one": Arm(optimizer=optimizer)}
        tried = [
            trained(cuts[start], texts[80:], loss, seed, arm, steps=30, batch_size=8, rate=rate)["one"]
            for rate in RATES
        ]
        found[name] = min(tried, key=lambda one: float(one[::2].mean()))[1::2]
    moved, every = (
        sum(p.numel() for p in some) for some in (learns("low-ranks", cuts["cut"]), cuts["cut"].hf.parameters())
    )
    return found | {"share": torch.tensor([moved / every])}
