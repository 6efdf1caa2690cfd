"""Prefix bag of words: the formula as loops, no order at lam = 0, order through the state, and no word of its own."""

from __future__ import annotations

import pytest
import torch

from patchbay.blocks.prefix_bag import PrefixBag
from patchbay.signal.port import PatchbayError
from tests.blocks.given import IDS
from tests.tolerance import close


def test_reference_and_order() -> None:
    torch.manual_seed(0)
    bag, states = PrefixBag(96, 5, state=3, lam=0.5), torch.randn(2, 12, 3)
    with torch.no_grad():
        bag.start.normal_()
        found = bag(IDS, states)
        assert bag.context is not None
        for i in (0, 1, 7):
            h = bag.start + sum(bag.words.weight[IDS[0, q]] for q in range(i)) + 0.5 * bag.context.weight @ states[0, i]
            assert close(found[0, i], bag.read.bias + bag.read.weight @ torch.tanh(h))
        permuted = IDS.clone()
        permuted[:, :6] = IDS[:, torch.tensor([3, 1, 5, 0, 4, 2])]
        with pytest.raises(PatchbayError, match="lam=0.5: the term then reads a model's states"):
            bag(IDS)
        with pytest.raises(PatchbayError, match="lam=0.5: the term then reads a model's states"):
            PrefixBag(96, 5, lam=0.5)(IDS, states)
        bag.lam = 0.0
        assert close(bag(permuted, states)[:, 6:], bag(IDS, states)[:, 6:])
        assert not close(bag(permuted, states)[:, 3], bag(IDS, states)[:, 3])
        other = IDS.clone()
        other[:, 6:] = 4
        assert torch.equal(bag(other)[:, :7], bag(IDS)[:, :7])  # the word itself and what follows are not in it
