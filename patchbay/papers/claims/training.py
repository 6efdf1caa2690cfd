"""Claims about training another way: networks of the model's own form are trained from weights drawn by the seed, beside a twin."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import patchbay as pb
from patchbay import maths
from patchbay.papers.claims._claim import Claim, claim
from patchbay.tiny import lab

if TYPE_CHECKING:
    from collections.abc import Callable

    from patchbay.model.model import Model

FACTS = 24


def pair(model: Model, data: Any, of: Callable[[Model], Tensor], seed: int, objective: str, **plan: float) -> tuple[Tensor, Tensor]:
    """A number for each item, of a variant and of its twin, both trained from weights drawn by the seed."""
    how = {"fresh": True, "held": 0.0, "seed": seed, **plan}
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        pb.train.variant(model, data, objective=objective, seeds=1, folder=str(runs), plan=how)
        one, other = (of(pb.load(runs / f"{arm}-{seed}")) for arm in ("variant", "twin"))
    return one, other


@claim("guo2024", "comparison")
def guo2024(model: Model, seed: int) -> Claim:
    """Confirmed if, of facts that were read one way alone, more are known the other way after units were permuted than after plain
    training, by more than half of the facts."""
    known = lab.facts(FACTS, seed)
    unread = known[FACTS // 2 :]

    def right(tuned: Model) -> Tensor:
        logits = pb.run(tuned, [b + r for _, r, b in unread], logits="last").last_logits.cpu()
        return (logits.argmax(-1) == torch.tensor([a[0] for a, _, _ in unread])).double()

    one, other = pair(model, lab.read_one_way(known), right, seed, "spt", steps=250, batch_size=24)
    text = (
        f"facts read one way alone are known the other way by {float(one.mean()):.0%} after units were permuted and by {float(other.mean()):.0%} "
        "after plain training"
    )
    return Claim(text, *maths.paired_interval(one, other)[:3], 0.5, "share of facts")
