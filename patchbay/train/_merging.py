"""Merging: what several tunings of one model changed, made one change, tau.

    sum                 the sum of the changes (task arithmetic)
    ties:keep=0.2       of each change the largest entries, by size, in all tensors together; each number's sign that of the sum of these; the mean of those of that sign
    dare:drop=0.9       each entry of each change 0 by that chance, the others over 1 - drop, so that the mean stays; then the sum

Ilharco et al. 2023, "Editing Models with Task Arithmetic"; Yadav et al. 2023, "TIES-Merging"; Yu et al. 2024, "Language Models are Super Mario" (DARE).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchbay.signal.port import PatchbayError, suggest
from patchbay.train._written import made

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Sum:
    """Task arithmetic."""

    def check(self) -> None:
        """There is nothing to be wrong."""

    def merged(self, changes: Sequence[Tensors], seed: int) -> Tensors:
        """The sum, tensor by tensor."""
        return {name: torch.stack([one[name] for one in changes]).sum(0) for name in changes[0]}


@dataclass(frozen=True)
class Ties:
    """Trim, elect a sign, and mean what has it."""

    keep: float = 0.2

    def check(self) -> None:
        if not 0 < self.keep <= 1:
            raise PatchbayError(f"ties: keep={self.keep}, the share of entries that stay, above 0 to 1")

    def merged(self, changes: Sequence[Tensors], seed: int) -> Tensors:
        """Zero where nothing is kept, and where what is kept cancels."""
        trimmed = [self._trimmed(one) for one in changes]
        found = {}
        for name in changes[0]:
            kept = torch.stack([one[name] for one in trimmed])
            agree = (kept.sign() == kept.sum(0).sign()) & (kept != 0)
            found[name] = (kept * agree).sum(0) / agree.sum(0).clamp(min=1)
        return found

    def _trimmed(self, change: Tensors) -> Tensors:
        """A change without all but its largest entries."""
        sizes = torch.cat([one.abs().flatten().cpu() for one in change.values()])
        count = max(1, round(self.keep * len(sizes)))
        least = float(sizes.kthvalue(len(sizes) - count + 1).values)
        return {name: one * (one.abs() >= least) for name, one in change.items()}


@dataclass(frozen=True)
class Dare:
    """Drop and rescale."""

    drop: float = 0.9

    def check(self) -> None:
        if not 0 <= self.drop < 1:
            raise PatchbayError(f"dare: drop={self.drop}, the chance of an entry to go, from 0 to below 1")

    def merged(self, changes: Sequence[Tensors], seed: int) -> Tensors:
        """The sum of what stays of each."""
        draw = torch.Generator().manual_seed(seed)
        kept = [
            {
                name: value * (torch.rand(value.shape, generator=draw) >= self.drop).to(value) / (1 - self.drop)
                for name, value in one.items()
            }
            for one in changes
        ]
        return Sum().merged(kept, seed)


FORMS: dict[str, type[Sum] | type[Ties] | type[Dare]] = {"sum": Sum, "ties": Ties, "dare": Dare}


def way_of(text: str) -> Sum | Ties | Dare:
    """How changes are merged, as text. PatchbayError where there is no such way."""
    name = text.partition(":")[0].strip()
    if name not in FORMS:
        raise PatchbayError(f"no way to merge {name!r}; ways are {', '.join(FORMS)}{suggest(name, list(FORMS))}")
    return made("merge", text, FORMS[name])


def merged(changes: Sequence[Tensors], way: str, seed: int) -> Tensors:
    """One change of several, of the tensors that any of them changed and whose merge is not all 0."""
    how = way_of(way)
    names = sorted({name for one in changes for name in one})
    like = {name: next(one[name] for one in changes if name in one) for name in names}
    whole = [{name: one.get(name, torch.zeros_like(like[name])) for name in names} for one in changes]
    found = {name: value for name, value in how.merged(whole, seed).items() if bool((value != 0).any())}
    if not found:
        raise PatchbayError(f"merged by {way!r}, the changes of {len(changes)} models are all 0")
    return found
