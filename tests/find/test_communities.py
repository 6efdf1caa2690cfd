"""find.communities: two planted circuits, the modularity written out, random models, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch

import patchbay as pb
from patchbay.find.communities import _join, expectation, grouped, modularity
from patchbay.tiny import twins
from tests.tolerance import close


def two_circuits(seed: int = 0) -> pb.Model:
    """Heads 0 to 3 of every layer write and read one half of the stream, heads 4 to 7 the other half."""
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 3}
    hf = twins.twin("llama", seed, **sizes)
    halves = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)))[0].T.split(32)
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.input_layernorm.weight.fill_(1.0)
            for half, rows in enumerate(halves):
                inside, at = rows.T @ rows, slice(32 * half, 32 * half + 32)
                for name in ("q_proj", "k_proj", "v_proj"):
                    weight = getattr(layer.self_attn, name).weight  # [out, in]
                    weight[at] = weight[at] @ inside
                layer.self_attn.o_proj.weight[:, at] = inside @ layer.self_attn.o_proj.weight[:, at]
    return pb.load(hf)


def test_planted() -> None:
    result = pb.find.communities(two_circuits(), writers=["head"], kinds=["query", "key", "value"])
    assert float(result["p"]) <= 0.02
    assert float(result["modularity"]) > float(result["null_high"])
    assert result.parts is not None
    group = {str(part): int(c) for part, c in zip(result.parts, result["community"].tolist(), strict=True) if c >= 0}
    halves = [{name for name in group if name[-1] in pair} for pair in ("0123", "4567")]
    for half in halves:
        assert len({group[name] for name in half}) == 1, group
    assert len({group[min(half)] for half in halves}) == 2
    assert sum(row["n_parts"] for row in result.tables["communities"]) == len(group)
    assert float(result["belonging"][result["community"] >= 0].min()) > 0.9, "nothing leads from one half to the other"


def test_reference() -> None:
    """Modularity as plain sums over pairs; on six nodes no grouping beats the one that is found by more than a little."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.rand(6, 6, generator=generator, dtype=torch.float64).triu(1)
    weights[:3, 3:] *= 0.1
    weights = weights + weights.T
    possible = ~torch.eye(6, dtype=torch.bool)
    expected = expectation(weights, possible)
    assert close(expected.sum(1), weights.sum(1))
    found = grouped(weights - expected)
    slow = 0.0
    for i, j in itertools.product(range(6), range(6)):
        if found[i] == found[j]:
            slow += float(weights[i, j] - expected[i, j]) / float(weights.sum())
    assert close(modularity(weights, expected, found), slow, of=1.0)
    every = (torch.tensor(groups) for groups in itertools.product(range(4), repeat=6))
    best = max(modularity(weights, expected, groups) for groups in every)
    assert modularity(weights, expected, found) == pytest.approx(best, abs=0.01)
    assert [len({int(g) for g in found[half]}) for half in (slice(0, 3), slice(3, 6))] == [1, 1]


def test_groups_that_gain_by_it_are_joined() -> None:
    """Four nodes in two groups that are better as one, and a fifth that is better alone."""
    gain = torch.full((5, 5), 0.2, dtype=torch.float64)
    gain[4], gain[:, 4] = -1.0, -1.0
    groups = torch.tensor([0, 0, 2, 2, 4])
    _join(gain, groups)
    assert len(set(groups[:4].tolist())) == 1
    assert groups[4] not in groups[:4]


def test_null() -> None:
    """Weights without groups, on layers as a model has them: p is below 0.1 about one time in ten."""
    low = 0
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        layer = torch.arange(12) // 4
        possible = layer[:, None] != layer
        hubs = torch.rand(12, generator=generator, dtype=torch.float64) + 0.3
        noise = torch.rand(12, 12, generator=generator, dtype=torch.float64).triu(1)
        weights = torch.outer(hubs, hubs) * (noise + noise.T) * possible
        low += _p(weights, possible, generator) <= 0.1
    assert low <= 4, low


def _p(weights: torch.Tensor, possible: torch.Tensor, generator: torch.Generator) -> float:
    from patchbay.find.communities import _dealt

    expected = expectation(weights, possible)
    real = modularity(weights, expected, grouped(weights - expected))
    null = [_dealt(weights, expected, possible, generator) for _ in range(19)]
    return (1 + sum(one >= real for one in null)) / 20


def test_a_random_model_has_no_wiring_to_group() -> None:
    with pytest.raises(pb.PatchbayError, match="no wiring to group"):
        pb.find.communities(pb.load(twins.twin("llama", 3)), writers=["head"], kinds=["query", "key", "value"])


def test_a_null_needs_draws() -> None:
    with pytest.raises(pb.PatchbayError, match="draws=0"):
        pb.find.communities(two_circuits(), draws=0)
