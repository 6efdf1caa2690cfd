"""What the lab's optimisers have alike: a closure is asked before the step, with gradients, and its loss is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from patchbay.train._cosmos import Cosmos
from patchbay.train._low_rank import Lora, LowRank
from patchbay.train._muon import MuonAdamW
from patchbay.train._states import Resumed

MADE: dict[str, Callable[[Tensor], Resumed]] = {
    "cosmos": lambda W: Cosmos([W], lr=0.1, rank=2),
    "muon": lambda W: MuonAdamW([W], lr=0.1, among=frozenset({id(W)})),
    "lora": lambda W: LowRank([W], 0.1, Lora(rank=2), frozenset({id(W)})),
}


@pytest.mark.parametrize("name", sorted(MADE))
def test_a_closure_is_asked_before_the_step(name: str) -> None:
    x = torch.linspace(-1, 1, 12).view(4, 3)
    ends = []
    for asked in (True, False):
        W = torch.nn.Parameter(torch.linspace(-1, 1, 15).view(3, 5).clone())
        optimizer = MADE[name](W)

        def loss(W: Tensor = W) -> Tensor:
            W.grad = None
            found = (x @ W).square().mean()
            found.backward()
            return found

        with torch.no_grad():
            if asked:
                told = optimizer.step(loss)  # type: ignore[arg-type]
                assert float(told) == float((x @ torch.linspace(-1, 1, 15).view(3, 5)).square().mean())  # type: ignore[arg-type]
            else:
                with torch.enable_grad():
                    loss()
                assert optimizer.step() is None
        ends.append(W.detach().clone())
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], torch.linspace(-1, 1, 15).view(3, 5))
