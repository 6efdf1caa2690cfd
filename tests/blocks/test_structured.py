"""Structured feed-forward maps: each is its dense product, starts with a dense layer's variance, has its rank, and its guide starts as itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import patchbay as pb
from patchbay.blocks import structured
from patchbay.signal.port import PatchbayError
from tests.blocks.given import IDS, built
from tests.tolerance import close

SIZES = {"low_rank": {"rank": 6}, "block_dense": {"rank": 12, "blocks": 4}, "block_shuffle": {"blocks": 4}}
FORMS = {
    "low_rank": structured.LowRank(32, 48, 6, bias=True),
    "block_dense": structured.BlockDense(32, 48, 12, 4, bias=True),
    "block_shuffle": structured.BlockShuffle(32, 48, 4, bias=True),
}


def test_reference_factors_as_matrices() -> None:
    """The product of the factors written out whole; the shuffle deals neighbours to neighbouring blocks, so that each block gives to all."""
    low, dense, shuffle = FORMS.values()
    assert close(low.weight, low.V @ low.U, of=1.0)
    assert close(dense.weight, dense.V @ torch.block_diag(*dense.B), of=1.0)
    deal = torch.zeros(32, 32)
    for place in range(8):
        for block in range(4):
            deal[block * 8 + place, place * 4 + block] = 1.0
    assert close(shuffle.weight, torch.block_diag(*shuffle.second) @ deal @ torch.block_diag(*shuffle.first), of=1.0)


@pytest.mark.parametrize("form", SIZES)
def test_it_has_the_face_of_a_linear_layer(form: str) -> None:
    module, x = FORMS[form], torch.randn(2, 5, 32)
    with torch.no_grad():
        assert module.bias is not None
        module.bias.normal_()
    assert (module.in_features, module.out_features) == (32, 48)
    assert close(module(x), x @ module.weight.T + module.bias)
    drawn = torch.stack([structured.of(nn.Linear(32, 48), form, **SIZES[form]).weight for _ in range(40)])
    assert abs(float(drawn.detach().std()) / 0.02 - 1) < 0.06  # as a dense layer of spread 0.02 starts


def test_ranks_at_the_same_count() -> None:
    """Block shuffle of 4 blocks holds the numbers of low rank 8 at width 32, and is of full rank."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # a square block that is drawn may be singular but for rounding
        square, low = structured.BlockShuffle(32, 32, 4), structured.LowRank(32, 32, 8)
    assert sum(p.numel() for p in square.parameters()) == sum(p.numel() for p in low.parameters()) == 512
    assert int(torch.linalg.matrix_rank(square.weight, rtol=1e-5)) == 32
    assert int(torch.linalg.matrix_rank(low.weight, rtol=1e-5)) == 8


@pytest.mark.parametrize("form", SIZES)
def test_a_guide_starts_as_the_map_itself(form: str) -> None:
    """At step 0 nothing changes whatever the share; later it does; at share 0 the factors are alone. The share is saved."""
    module, x = structured.of(nn.Linear(32, 48), form, guided=True, **SIZES[form]), torch.randn(3, 32)
    alone = module.product(x)
    for share in (1.0, 0.3, 0.0):
        structured.set_share(module, share)
        assert close(module(x), alone)
    with torch.no_grad():
        assert module.guide is not None
        module.guide.mul_(2.0)
    structured.set_share(module, 0.25)
    assert close(module(x), 0.5 * alone + 0.75 * alone)
    assert close(module(x), x @ module.weight.T)
    assert float(module.state_dict()["share"]) == 0.25
    shares = [structured.guide_share(step, 100) for step in (0, 25, 50, 99)]
    assert (shares[0], shares[2:]) == (1.0, [0.0, 0.0])
    assert abs(shares[1] - 0.5) < 0.01


@pytest.mark.parametrize("form", SIZES)
def test_a_model_of_each_has_neurons_and_weights(form: str, tmp_path: object) -> None:
    hf = built(
        feedforward={"kind": form, **SIZES[form]} if form != "block_dense" else {"kind": form, "rank": 8, "blocks": 4}
    )
    model = pb.load(hf)
    mlp = model.layers[1].mlp
    weights = mlp.weights()
    assert close(
        weights["W_out"] if isinstance(weights, dict) else weights.W_out, hf.model.layers[1].mlp.down_proj.weight.T
    )
    edit = pb.zero(mlp.neurons[3].act)
    edited = pb.run(model, IDS, edits=[edit], taps=[mlp.out])[mlp.out]
    plain = pb.run(model, IDS, taps=[mlp.out, mlp.act])
    lost = plain[mlp.act][..., 3, None] * hf.model.layers[1].mlp.down_proj.weight[:, 3]
    assert close(plain[mlp.out] - edited, lost, of=plain[mlp.out])
    assert len(pb.find.neuron_vocabulary(model).table(3)) == 3
    with pytest.raises(PatchbayError, match=r"down_proj computes its weight \(\w+: a product of factors\)"):
        pb.turn.scale("L0.N3", 0.0).export(model, f"{tmp_path}/out")
    hf.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(pb.load(str(tmp_path)).hf(IDS).logits, hf(IDS).logits)


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(PatchbayError, match="in_features 32 does not divide into 5 blocks"):
        structured.BlockDense(32, 48, 10, 5)
    with pytest.raises(PatchbayError, match="feed-forward form 'low_rank' needs rank="):
        built(feedforward="low_rank")
    with pytest.raises(PatchbayError, match="no feed-forward form 'lowrank'; forms are"):
        built(feedforward={"kind": "lowrank", "rank": 3})
    with pytest.raises(PatchbayError, match="feedforward cannot be put into gpt2, which has no linear layers"):
        built("gpt2", feedforward={"kind": "low_rank", "rank": 4})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"kind": "low_rank", "rank": 0}, "rank=0; a whole number from 1 to 32"),
        ({"kind": "low_rank", "rank": 33}, "rank=33; a whole number from 1 to 32"),
        ({"kind": "low_rank", "rank": 2.5}, "rank=2.5"),
        ({"kind": "block_dense", "rank": 16, "blocks": "2"}, "blocks='2'"),
        ({"kind": "low_rank", "rank": 16, "blocks": 2}, "has no blocks; it has rank and guided"),
        ({"kind": "block_shuffle", "rank": 16, "blocks": 2}, "has no rank; it has blocks and guided"),
    ],
)
def test_sizes_are_whole_numbers_of_the_form(given: dict[str, Any], says: str) -> None:
    with pytest.raises(PatchbayError, match=says):
        structured.of(nn.Linear(32, 48), given["kind"], **{key: size for key, size in given.items() if key != "kind"})
