"""supernet: next-token prediction in a sub-network that is drawn anew at each step.

    loss of a step = CE(sub-network);   of each layer its attention stays or not, and a share of its neurons does: all alike likely, the whole model among them

A sub-network is what `blocks.subnetworks` makes by edits, its neurons the first of their layer, so that a smaller share lies within a larger one. `shares`: of the
neurons, with + between, the first of which is 1. `attention=0`: the attention of every layer stays. With `nested=0`, its null, as many neurons stay, but which ones is drawn anew
at each step: no two steps train one sub-network. Held-out documents are scored in the whole model: what tuning for its parts costs it. What the parts are worth then,
`blocks.subnetworks` asks.

Sarah et al. 2024, "LLaMA-NAS: Efficient Neural Architecture Search for Large Language Models", after whose tuning the search for sub-networks begins.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from patchbay.blocks.subnetworks import SHARES, are_shares, check, cuts, in_order
from patchbay.edits.edit import Edit
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError
from patchbay.train._objectives._objective import IGNORED, Document, Objective
from patchbay.train._objectives._parts import written

DRAWS = 2**30  # numbers that a sub-network is drawn by


@dataclass(frozen=True)
class Supernet(Objective):
    shares: str = "+".join(f"{share:g}" for share in SHARES)
    attention: int = 1
    nested: int = 1

    @property
    def kept(self) -> list[float]:
        try:
            return [float(one) for one in self.shares.split("+")]
        except ValueError:
            raise PatchbayError(f"supernet: shares={self.shares!r} are numbers with + between, as 1+0.5+0.25") from None

    def check(self) -> None:
        if not are_shares(self.kept) or {self.attention, self.nested} - {0, 1}:
            raise PatchbayError(
                f"supernet: shares={self.shares}, attention={self.attention}, nested={self.nested}: shares from 0 to 1, the first of them 1, and 0 or 1"
            )

    @property
    def null(self) -> str | None:
        return written("supernet", replace(self, nested=0)) if self.nested else None

    def adapt(self, model: Model) -> None:
        check(model, self.kept)

    def of_batch(self, draw: random.Random) -> Objective:
        return _Step(self.shares, self.attention, self.nested, draw.randrange(DRAWS))

    def drawn(self, model: Model, by: int) -> list[Edit]:
        """The edits of the sub-network that a number draws."""
        draw = random.Random(f"supernet {by}")
        genes = [draw.randrange(n) for _ in range(model.n_layers) for n in (1 + self.attention, len(self.kept))]
        order = in_order(model)
        if not self.nested:
            mixed = torch.Generator().manual_seed(by)
            order = [torch.randperm(len(one), generator=mixed) for one in order]
        return cuts(model, self.kept, tuple(genes), order)

    def loss(self, model: Model, hf: nn.Module, batch: dict[str, Tensor], n: Tensor | int) -> Tensor:
        # the first token is never learned: its label says what is drawn, and where it has none the whole model is asked
        by = int(batch["labels"][0, 0])
        edits = [] if by == IGNORED else self.drawn(model, by)
        with model.edited(*edits):
            return super().loss(model, hf, batch, n)


@dataclass(frozen=True)
class _Step(Supernet):
    """The objective of one step, whose rows carry what their sub-network is drawn by as the label of their first token."""

    by: int = 0

    def row(self, document: Document, draw: random.Random) -> tuple[list[int], list[int]]:
        ids, labels = super().row(document, draw)
        return ids, [self.by, *labels[1:]]


OBJECTIVE = Supernet
