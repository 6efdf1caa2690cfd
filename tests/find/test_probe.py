"""The probe's area under the curve, by counting pairs."""

from __future__ import annotations

import torch

from patchbay.find._probe import auc
from tests.tolerance import close


def test_ties_count_half() -> None:
    generator = torch.Generator().manual_seed(0)
    for levels in (1, 2, 5, 1000):
        scores = torch.randint(levels, (40,), generator=generator).double()
        positive = torch.randint(2, (40,), generator=generator).bool()
        pairs = [(float(a), float(b)) for a in scores[positive] for b in scores[~positive]]
        by_hand = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
        assert close(float(auc(scores, positive)), by_hand, dtype=torch.float64, of=1.0)
