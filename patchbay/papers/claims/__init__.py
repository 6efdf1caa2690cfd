"""Claims of papers, at the size of a small model: each checked by one function, with an interval and one rule for the verdict.

A claim says that a number stands above (or below) a bound. It is confirmed when the whole 95 % interval does, not confirmed
when none of it does, and inconclusive otherwise. The bound is what chance or the control gives, or what the claim itself
names; it stands in the function, before anything is run. What a claim shows holds for this model and these prompts. Where a
paper's own case cannot be had at this size (languages, refusals), the claim is of its small analogue, and says so.

heads     which heads there are, what they write, what they are needed for
neurons   neurons and experts
layers    where something can be read, and in which words
proving   what patching, paths, edges and circuits show
trained   what a model shows that had a lesson (tiny.lessons), for behaviour that no shipped model has
turning   what knobs do
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from patchbay.papers.claims import heads, layers, neurons, proving, trained, turning
from patchbay.papers.claims._claim import CLAIMS, Claim, claim, known

__all__ = ["CLAIMS", "Claim", "check", "claim", "heads", "known", "layers", "neurons", "proving", "trained", "turning"]

if TYPE_CHECKING:
    from patchbay.model.model import Model


def check(key: str, model: Model, *, seed: int = 0) -> Claim:
    """Check the claim of one paper on a model."""
    return known(key)(model, seed)
