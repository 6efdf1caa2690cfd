"""Sub-networks: the whole choice is the model, others are the model without these weights, fronts and areas by hand, and a search that finds a known front."""

from __future__ import annotations

import copy
import random

import pytest
import torch

import patchbay as pb
from patchbay.blocks import subnetworks
from patchbay.errors import PatchbayError
from tests.blocks.given import IDS
from tests.given import lent
from tests.tolerance import close


def test_a_choice_is_the_model_without_its_weights() -> None:
    model = lent("llama")
    space = subnetworks.Space(model, IDS.tolist(), shares=(1.0, 0.5, 0.0))
    whole = (0,) * len(space.options)
    assert space.options == [2, 3] * model.n_layers
    assert space.edits(whole) == []
    modules = [part for layer in model.hf.model.layers for part in (layer.self_attn, layer.mlp)]
    assert space.size(whole) == sum(p.numel() for part in modules for p in part.parameters())
    choice = (1, 0, 0, 1, *whole[4:])
    hf = copy.deepcopy(model.hf)
    acts = pb.run(model, IDS, taps=[model.layers[1].mlp.act])[model.layers[1].mlp.act]
    down = hf.model.layers[1].mlp.down_proj.weight.detach()
    writes = [float(acts[..., n].abs().mean() * down[:, n].norm()) for n in range(down.shape[1])]
    least = sorted(range(len(writes)), key=lambda n: writes[n])[: len(writes) // 2]
    with torch.no_grad():
        hf.model.layers[0].self_attn.o_proj.weight.zero_()
        down[:, least] = 0.0
        expected = hf(IDS).logits
    assert close(pb.run(model, IDS, edits=space.edits(choice)).logits, expected)
    attention, mlp = (sum(p.numel() for p in part.parameters()) for part in modules[:2])
    assert space.size(whole) - space.size(choice) == attention + mlp // 2
    assert len(subnetworks.every(space.options)) == 6**model.n_layers
    with pytest.raises(PatchbayError, match="first 1, the whole layer"):
        subnetworks.Space(model, IDS.tolist(), shares=(0.5, 1.0))


def test_fronts_areas_and_crowding_by_hand() -> None:
    points = [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0), (2.0, 3.0), (3.0, 3.0)]
    assert subnetworks.front(points) == [0, 1, 2]
    assert subnetworks.hypervolume(points, (4.0, 4.0)) == 1 * 1 + 1 * 2 + 1 * 3
    assert subnetworks.hypervolume([(5.0, 0.0)], (4.0, 4.0)) == 0.0
    assert subnetworks.crowding([(0.0, 4.0), (1.0, 2.0), (4.0, 0.0)]) == [float("inf"), 2.0, float("inf")]
    found = {(i,): point for i, point in enumerate(points)}
    ranked = subnetworks.best(list(found), found)
    assert set(ranked[:3]) == {(0,), (1,), (2,)}
    assert ranked[3:] == [(3,), (4,)]
    draw = random.Random(0)
    cloud = [(draw.random(), draw.random()) for _ in range(12)]
    counted = sum(any(x <= i / 200 and y <= j / 200 for x, y in cloud) for i in range(200) for j in range(200)) / 200**2
    assert abs(subnetworks.hypervolume(cloud, (1.0, 1.0)) - counted) < 0.02


def asked(choice: subnetworks.Choice) -> subnetworks.Point:
    """Each gene costs size by its option and loss by its square, some more than others: few choices are on the front."""
    kept = [3 - gene for gene in choice]
    return sum((i + 1) * (3 - one) ** 2 for i, one in enumerate(kept)), float(sum(kept) + 0.1 * kept[0])


def test_planted_a_known_front_is_reached_and_null_random_choices_do_not() -> None:
    options = [4] * 6
    points = [asked(one) for one in subnetworks.every(options)]
    corner = (max(x for x, _ in points), max(y for _, y in points))
    most = subnetworks.hypervolume(points, corner)
    for seed in range(3):
        found = subnetworks.search(asked, options, evaluations=1000, population=40, seed=seed)
        assert len(found) == 1000
        assert (0,) * 6 in found
        reached = subnetworks.hypervolume(list(found.values()), corner)
        assert reached > 0.99 * most
        draw = random.Random(seed)
        drawn = [asked(tuple(draw.randrange(4) for _ in options)) for _ in range(1000)]
        assert subnetworks.hypervolume(drawn, corner) < reached
    assert len(subnetworks.search(asked, [2, 2], evaluations=99)) == 4
    with pytest.raises(PatchbayError, match="evaluations=0"):
        subnetworks.search(asked, options, evaluations=0)
