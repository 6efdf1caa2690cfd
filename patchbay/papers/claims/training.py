"""Claims about training another way: small networks of the lab's own are trained from weights drawn by the seed, beside a twin.

The model at hand has no part in them, so that what an untrained network of its form shows is the same number again.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import patchbay as pb
from patchbay.papers.claims._claim import Claim, claim

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from patchbay.model.model import Model
    from patchbay.train._plan import Arm

FACTS = 24


def pair(
    network: Model, data: Any, of: Callable[[Model], Tensor], seed: int, arms: tuple[Arm, Arm], **plan: float
) -> tuple[Tensor, Tensor]:
    """A number for each item, of a variant and of its twin, both trained from weights drawn by the seed on all of the data."""
    from patchbay.train._documents import read
    from patchbay.train._plan import plan_of
    from patchbay.train._runs import Lab, ended

    how = plan_of({"fresh": True, "held": 0.0, **plan})
    documents = read(network, data, how.length)
    share = Lab(network, documents, documents, how)
    one, other = (of(ended(share, arm, seed)) for arm in arms)
    return one, other


@claim("guo2024", "comparison")
def guo2024(model: Model, seed: int) -> Claim:
    """Confirmed if, of facts that were read one way alone, more are known the other way after units were permuted than after plain
    training, by more than half of the facts."""
    from patchbay import maths

    one, other = _reversal(seed)
    text = (
        f"in networks of 50,000 weights, facts read one way alone are known the other way by {float(one.mean()):.0%} after units were permuted "
        f"and by {float(other.mean()):.0%} after plain training"
    )
    return Claim(text, *maths.paired_interval(one, other)[:3], 0.5, "share of facts")


@functools.cache
def _reversal(seed: int) -> tuple[Tensor, Tensor]:
    import torch

    from patchbay.tiny import lab
    from patchbay.train._plan import Arm

    known = lab.facts(FACTS, seed)
    unread = known[FACTS // 2 :]

    def right(tuned: Model) -> Tensor:
        logits = pb.run(tuned, [b + r for _, r, b in unread], logits="last").last_logits.cpu()
        return (logits.argmax(-1) == torch.tensor([a[0] for a, _, _ in unread])).double()

    network = lab.small(lab.FACT_VOCAB, width=48, mlp=96)
    return pair(network, lab.read_one_way(known), right, seed, (Arm("spt"), Arm()), steps=400, batch_size=24)


@claim("yusuf2023", "comparison")
def yusuf2023(model: Model, seed: int) -> Claim:
    """Confirmed if one attention layer whose queries, keys and values are convolved repeats what it has read more often than a plain one, by
    more than 0.3 of the tokens. The paper's own claim is of accuracy on other tasks, and its sentence on memory contradicts itself."""
    from patchbay import maths

    one, other = _one_layer(seed)
    text = (
        f"in networks of one layer, convolved queries, keys and values repeat a random string with {float(one.mean()):.0%} of tokens right, and plain ones "
        f"with {float(other.mean()):.0%}"
    )
    return Claim(text, *maths.paired_interval(one, other)[:3], 0.3, "share of tokens")


@functools.cache
def _one_layer(seed: int) -> tuple[Tensor, Tensor]:
    import torch

    from patchbay.tiny import lab
    from patchbay.train._plan import Arm

    strings = {"vocab": 24, "length": 24, "most": 8}
    held = lab.repeats(40, seed + 1000, **strings)

    def right(tuned: Model) -> Tensor:
        said = pb.run(tuned, held).logits.cpu()[:, 15:-1].argmax(-1)
        return (said == torch.tensor(held)[:, 16:]).double().mean(1)

    network, arms = lab.small(24, layers=1, mlp=1), (Arm(blocks='{"convolution": 3}'), Arm())
    return pair(network, lab.repeats(2048, seed, **strings), right, seed, arms, steps=350, batch_size=24, rate=4e-3)
