"""Planted directions, labels and concepts: numbers by hand, what is planted is found, and nothing where nothing is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.measure._features import absorbed, fraction, logistic, matching, probed, recovered, sparse
from tests.tolerance import close


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_directions_are_matched_one_to_one() -> None:
    cosines = torch.tensor([[0.9, 0.8, 0.0], [0.85, 0.1, 0.0]], dtype=torch.float64)
    rows, columns = matching(cosines)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 1), (1, 0)], (
        "the largest sum, not each one's nearest"
    )
    truth = torch.eye(4)[:2]
    found = recovered(torch.tensor([[0.0, 3.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]), truth)
    half = 0.5**0.5
    assert close(found["best"], (half + 1) / 2)
    assert close(found["matched"], (half + 1) / 2)
    assert found["found"] == 0.5
    assert recovered(torch.eye(4)[:1], truth)["matched"] == 0.5, "fewer features than directions"


def test_support_is_f1_over_tokens() -> None:
    rows = torch.eye(3)[[1, 0, 2]]
    on = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]).bool()
    present = torch.tensor([[1, 1], [1, 0], [0, 0], [0, 0]]).bool()
    # direction 0 is feature 1: on at 0, 1; present at 0, 1: F1 1. direction 1 is feature 0: on at 0, 3, present at 0: 2 / 3
    assert close(recovered(rows, torch.eye(3)[:2], on, present)["support"], (1 + 2 / 3) / 2)


def test_logistic_is_at_the_top_of_the_likelihood() -> None:
    x = normal(200, 2).double()
    y = (x @ torch.tensor([2.0, -1.0]).double() + normal(200, seed=1).double() > 0).double()
    w = logistic(x, y)
    wide = torch.cat([x, torch.ones(200, 1).double()], 1)
    gradient = wide.T @ ((wide @ w).sigmoid() - y) + torch.tensor([2.0, 2.0, 1e-6]).double() * w
    assert float(gradient.abs().max()) < 1e-6
    assert float(w[0]) > 0 > float(w[1])


def test_probes_find_the_feature_of_a_class_and_nothing_of_shuffled_labels() -> None:
    x = normal(80, 30)
    labels = [i % 2 for i in range(80)]
    x[1::2, 7] += 4.0
    assert sparse(x, torch.tensor(labels).bool(), 1).tolist() == [7]
    scores = probed(x, labels, 0)
    assert float(scores[0]) > 0.9
    order = torch.randperm(80, generator=torch.Generator().manual_seed(3)).tolist()
    assert float(probed(x, [labels[i] for i in order], 0).max()) < 0.75
    three = [i % 3 for i in range(80)]
    y = normal(80, 30)
    for i in range(80):
        y[i, three[i]] += 4.0
    assert float(probed(y, three, 0)[0]) > 0.9
    with pytest.raises(pb.PatchbayError, match="no class has two texts"):
        probed(x[:2], [0, 1], 0)


def test_probes_are_scored_on_items_that_chose_nothing() -> None:
    """With many columns and few items, the half that chose is told and the other half is not."""
    scores = torch.stack([probed(normal(24, 2000, seed=s), [i % 2 for i in range(24)], s) for s in range(8)])
    assert 0.35 < float(scores.mean()) < 0.65


def test_the_absorbed_fraction_by_hand() -> None:
    own, other, whole = (torch.tensor(row, dtype=torch.float64) for row in
                         ([0.0, -1.0, 1.0, 0.5, 0.2, 0.5], [0.8, 1.0, 1.0, 0.5, 0.3, 2.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]))  # fmt: skip
    # nothing of its own: 1; less than nothing: 1; all its own: 0; half: .5; others say less than .4: 0; others no more than the rest: .5
    assert close(fraction(own, other, whole), torch.tensor([1.0, 1.0, 0.0, 0.5, 0.0, 0.5], dtype=torch.float64))


def hierarchy(absorbing: bool, n: int = 1200) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A parent that every third token has and eight rare children that imply it; the parent's feature is silent beside a child, or is not."""
    draw = torch.Generator().manual_seed(0)
    eye = torch.eye(16)
    parent = torch.arange(n) % 3 == 0
    which = torch.where(torch.rand(n, generator=draw) < 0.32, torch.randint(1, 9, (n,), generator=draw), 0)
    child = torch.nn.functional.one_hot(torch.where(parent, which, 0), 16).float()
    child[:, 0] = 0
    x = parent[:, None] * eye[0] + child @ eye + 0.05 * torch.randn(n, 16, generator=draw)
    x[:, 9:] += (torch.rand(n, 7, generator=draw) < 0.3).float()
    rows = eye.clone()
    rows[1:9] += eye[0] * float(absorbing)
    z = torch.cat([(parent & ~((child.sum(1) > 0) & absorbing))[:, None].float(), child[:, 1:9], x[:, 9:].relu()], 1)
    return x - x.mean(0), z, rows, parent


def test_absorption_is_found_where_it_was_planted_and_nowhere_else() -> None:
    x, z, rows, parent = hierarchy(True)
    found = absorbed(x, z, rows, parent, 0)
    share = float((z[:, 1:9] > 0).any(1)[parent].double().mean())
    assert 0.25 < share < 0.4
    assert abs(found - share) < 0.08, "all of the tokens with a child, and none of the others"
    x, z, rows, parent = hierarchy(False)
    assert absorbed(x, z, rows, parent, 0) < 0.02
    assert absorbed(x, z, rows, torch.zeros(len(x), dtype=torch.bool), 0) != absorbed(x, z, rows, parent, 0), (
        "NaN: no such token"
    )
