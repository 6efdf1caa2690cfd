"""Claims about training another way: small networks of the lab's own are trained from weights drawn by the seed, beside a twin.

The model at hand has no part in them, so that what an untrained network of its form shows is the same number again.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import patchbay as pb
from patchbay import maths
from patchbay.papers.claims._claim import Claim, claim
from patchbay.tiny import lab
from patchbay.train._documents import read
from patchbay.train._plan import Arm, plan_of
from patchbay.train._runs import Lab, ended

if TYPE_CHECKING:
    from collections.abc import Callable

    from patchbay.model.model import Model

FACTS = 24


def pair(
    data: Any, vocab: int, of: Callable[[Model], Tensor], seed: int, objective: str, **plan: float
) -> tuple[Tensor, Tensor]:
    """A number for each item, of a variant and of its twin, both trained from weights drawn by the seed on all of the data."""
    how = plan_of({"fresh": True, "held": 0.0, **plan})
    network = lab.small(vocab, width=48, mlp=96)
    documents = read(network, data, how.length)
    share = Lab(network, documents, documents, how)
    one, other = (of(ended(share, Arm(text), seed)) for text in (objective, "ntp"))
    return one, other


@claim("guo2024", "comparison")
def guo2024(model: Model, seed: int) -> Claim:
    """Confirmed if, of facts that were read one way alone, more are known the other way after units were permuted than after plain
    training, by more than half of the facts."""
    one, other = _reversal(seed)
    text = (
        f"in networks of 50,000 weights, facts read one way alone are known the other way by {float(one.mean()):.0%} after units were permuted "
        f"and by {float(other.mean()):.0%} after plain training"
    )
    return Claim(text, *maths.paired_interval(one, other)[:3], 0.5, "share of facts")


@functools.cache
def _reversal(seed: int) -> tuple[Tensor, Tensor]:
    known = lab.facts(FACTS, seed)
    unread = known[FACTS // 2 :]

    def right(tuned: Model) -> Tensor:
        logits = pb.run(tuned, [b + r for _, r, b in unread], logits="last").last_logits.cpu()
        return (logits.argmax(-1) == torch.tensor([a[0] for a, _, _ in unread])).double()

    return pair(lab.read_one_way(known), lab.FACT_VOCAB, right, seed, "spt", steps=400, batch_size=24)
