"""Trees: boundary distributions and parents as loops, distances to a tree and back, and a planted tree read off a pattern."""

from __future__ import annotations

import math

import pytest
import torch

import patchbay as pb
from patchbay.blocks import trees
from patchbay.signal.port import PatchbayError
from tests.blocks.given import IDS, built
from tests.tolerance import close

GENERATOR = torch.Generator().manual_seed(0)
HEIGHTS, DISTANCES = (
    torch.randn(7, generator=GENERATOR, dtype=torch.float64),
    torch.randn(6, generator=GENERATOR, dtype=torch.float64),
)


def test_reference_boundaries_and_parents() -> None:
    """Every gate, every boundary, every constituent by itself."""
    n, gate = 7, [[1 / (1 + math.exp(-(float(t) - float(d)) * 1.5)) for d in DISTANCES] for t in HEIGHTS]
    left, right = trees.boundaries(HEIGHTS, DISTANCES, 1.5)
    for i in range(n):
        reach = [min([gate[i][j] for j in range(low, i)], default=1.0) for low in range(i + 1)]
        onward = [min([gate[i][j] for j in range(i, high)], default=1.0) for high in range(i, n)]
        p_l = [reach[low] - (reach[low - 1] if low else 0.0) for low in range(i + 1)]
        p_r = [onward[k] - (onward[k + 1] if k + 1 < len(onward) else 0.0) for k in range(n - i)]
        assert close(left[i, : i + 1], torch.tensor(p_l, dtype=torch.float64), of=1.0, dtype=torch.float64)
        assert close(right[i, i:], torch.tensor(p_r, dtype=torch.float64), of=1.0, dtype=torch.float64)
        expected = torch.zeros(n, dtype=torch.float64)
        for low in range(i + 1):
            for k in range(n - i):
                span = slice(low, i + k + 1)
                expected[span] += p_l[low] * p_r[k] * (2.0 * HEIGHTS[span]).softmax(0)
        expected[i] = 0.0
        assert close(trees.parents(HEIGHTS, DISTANCES, 1.5, 2.0)[i], expected, of=1.0, dtype=torch.float64)
    for found in (left, right):
        assert close(found.sum(1), torch.ones(n), dtype=torch.float64)
        assert float(found.min()) >= 0.0


def test_distances_to_a_tree_and_back_keep_their_order() -> None:
    for seed in range(20):
        spans = trees.random_tree(9, seed)
        assert len(spans) == 8
        assert spans[0] == (0, 8)
        again = trees.splits(trees.heights_of(spans, 9))
        assert set(again) == set(spans)
        assert trees.f1(again, spans, 9) == 1.0
    assert trees.splits(torch.arange(5, 0, -1).double()) == trees.right_branching(6)


def test_planted_a_tree_in_a_pattern_and_chance() -> None:
    """Tokens of one constituent look at the same places: the tree is read off, random trees score far lower."""
    gold = [(0, 7), (0, 3), (4, 7), (0, 1), (2, 3), (4, 5), (6, 7)]
    pattern = torch.zeros(8, 8)
    for first, last in gold:
        pattern[first : last + 1, first : last + 1] += 1.0 / (last - first + 1)
    found = trees.splits(trees.of_pattern(pattern))
    assert trees.f1(found, gold, 8) == 1.0
    assert close(trees.of_pattern(-pattern), trees.of_pattern(pattern))
    chance = [trees.f1(trees.random_tree(8, seed), gold, 8) for seed in range(200)]
    assert sum(score == 1.0 for score in chance) < 10
    assert trees.f1(trees.right_branching(8), gold, 8) < 0.5


def test_trees_of_any_models_patterns() -> None:
    """Of every head of a model whose weights may be negative: a tree of the text, each gap cut once."""
    model = pb.load(built(mixer="gla"))
    port = model.layers[1].attn.pattern
    distances = trees.of_pattern(pb.run(model, IDS, taps=[port])[port])
    assert distances.shape == (2, 4, 11)
    for head in distances.flatten(0, 1):
        spans = trees.splits(head)
        assert len(set(spans)) == 11
        assert spans[0] == (0, 11)
        assert {first + int(head[first:last].argmax()) for first, last in spans} == set(range(11))


def test_what_is_refused() -> None:
    with pytest.raises(PatchbayError, match="7 heights need 6 distances, one for each gap; got 7"):
        trees.boundaries(HEIGHTS, HEIGHTS)
    with pytest.raises(PatchbayError, match="65 tokens: parents take"):
        trees.parents(torch.zeros(65), torch.zeros(64))
