"""Claims about matrices in factors: what is left after tuning the low ranks of a cut alone, and what feed-forward layers in factors learn beside narrower ones.

The model at hand has no part in them.
"""

from __future__ import annotations

import functools
import json
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


@claim("jaiswal2024", "made", seeds=TRAINED)
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


# --- feed-forward layers in factors -------------------------------------------------------------------

WIDE, NARROW, RANK, BLOCKS = (
    256,
    80,
    16,
    4,
)  # three maps between 64 and 256 in factors have the numbers of three between 64 and 80


@claim("wei2024", "made", seeds=TRAINED)
def wei2024(model: pb.Model, seed: int) -> Claim:
    """Confirmed if wide feed-forward layers in factors, of the form that other texts choose, are left with less loss after as many steps than a dense one that is narrower and so has as many weights. Told
    beside it: each form, the low-rank one with its guide, and the wide dense layer. The paper's steeper scaling is of up to 1.3 billion weights."""
    found = _structured(seed)
    forms = ("low_rank", "block_dense", "block_shuffle", "guided")
    best = min(forms, key=lambda name: float(found[name][::2].mean()))
    told = {name: float(one[1::2].mean()) for name, one in found.items()}
    each = ", ".join(f"{name.replace('_', ' ')} {told[name]:.3f}" for name in forms)
    text = (
        f"in networks of width 64, feed-forward layers in factors are left with {each} nats a token (chosen: {best.replace('_', ' ')}), a narrower dense layer of as many weights with {told['narrow']:.3f}, and the dense "
        f"layer of their own width, of {WIDE / NARROW:.1f} times the weights, with {told['dense']:.3f}"
    )
    return Claim(text, *difference(found["narrow"][1::2], found[best][1::2]), 0.0, "nats per token")


@functools.cache
def _structured(seed: int) -> dict[str, Tensor]:
    from patchbay.tiny import lab
    from patchbay.train._plan import Arm

    tiny = pb.load("tiny")
    texts = lab.pieces(tiny, 2064, seed, range(12, 36))
    forms: dict[str, dict[str, Any]] = {
        "low_rank": {"kind": "low_rank", "rank": RANK},
        # the largest rank that has no more numbers
        "block_dense": {"kind": "block_dense", "rank": RANK + BLOCKS, "blocks": BLOCKS},
        "block_shuffle": {"kind": "block_shuffle", "blocks": BLOCKS},
        "guided": {"kind": "low_rank", "rank": RANK, "guided": True},
    }
    arms = {name: Arm(blocks=json.dumps({"feedforward": form})) for name, form in forms.items()}
    arms |= {"dense": Arm(), "narrow": Arm(mlp=NARROW)}
    network = lab.small(tiny.vocab_size, mlp=WIDE)
    return trained(network, texts[64:], _loss(texts[:64]), seed, arms, fresh=True, steps=90, batch_size=16, rate=4e-3)
