"""Directions: singular directions of what LoRA-SB learned as dials; planted ranks are found, dials are terms added by hand, what cannot be turned is refused."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.knobs.directions import linear_maps
from patchbay.train._copies import copied
from patchbay.train._low_rank import maps
from patchbay.train._plan import Arm, Rows, plan_of
from patchbay.train._trainer import trained
from tests.given import lent
from tests.tolerance import close

DOWN, KEYS = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj"
PROMPTS = [[5, 9, 13, 40, 7], [11, 3, 8, 2, 50]]


@functools.cache
def tuned(family: str = "llama") -> pb.Model:
    """By LoRA-SB of rank 3 in four steps."""
    model, arm = copied(lent(family)), Arm(optimizer="lora-sb:rank=3,first=0.05")
    plan = plan_of({"steps": 4, "batch_size": 2, "rate": 0.05})
    rows = Rows([[[5, 6, 7, 8, 9, i]] for i in range(10, 18)], arm, plan, 0)
    trained(model, rows, arm, plan, Path("nowhere"), keep=False)
    model._fingerprint = None
    return model


def change(family: str, name: str) -> torch.Tensor:
    after, before = (one.hf.get_submodule(name).weight.detach().double() for one in (tuned(family), lent(family)))
    return after - before


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # matrices [out, in], and [in, out]
def test_planted(family: str) -> None:
    """As many directions as the rank in every map, the largest first; each switched off is the tuned matrix without its term, all of them are the base."""
    found = pb.Directions(lent(family), tuned(family))
    assert set(found.sizes) == set(maps(lent(family))) == set(linear_maps(lent(family)))
    assert {len(sizes) for sizes in found.sizes.values()} == {3}
    name = list(found.sizes)[1]
    U, S, V = torch.linalg.svd(change(family, name), full_matrices=False)
    assert close(torch.tensor(found.sizes[name]), S[:3], of=1.0, dtype=torch.float32)
    without = found.turned({f"{name}:1": 0.0, f"{name}:2": 3.0}).hf.get_submodule(name).weight.detach()
    by_hand = tuned(family).hf.get_submodule(name).weight.detach().double()
    by_hand = by_hand - S[1] * torch.outer(U[:, 1], V[1]) + 2.0 * S[2] * torch.outer(U[:, 2], V[2])
    assert close(without, by_hand.float())
    assert found.turned(dict.fromkeys(found.sizes, 0.0)).fingerprint == lent(family).fingerprint
    assert "3 more maps" not in repr(found)


def test_null() -> None:
    """Dials at 1 are the tuned model to the bit, which stays as it is whatever was turned."""
    model, before = tuned(), tuned().fingerprint
    found = pb.Directions(lent("llama"), model)
    assert found.turned({}).fingerprint == before == found.turned({DOWN: 1.0, f"{KEYS}:0": 1}).fingerprint
    other = found.turned({f"{KEYS}:0": 0.5})
    moved = [
        name for name, p in other.hf.named_parameters() if not torch.equal(p, dict(model.hf.named_parameters())[name])
    ]
    assert moved == [f"{KEYS}.weight"]
    model._fingerprint = None
    assert model.fingerprint == before


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0, -2.0])
def test_reference(strength: float, tmp_path: Path) -> None:
    """A knob of a down projection says what the turned copy says, at 1 what the tuned model says to the bit, and lies in a file."""
    found = pb.Directions(lent("llama"), tuned())
    knob = found.knob(DOWN, 1)
    assert knob.neutral == 1.0 == knob.strength
    with tuned().edited(knob.at(strength)):
        edited = pb.run(tuned(), PROMPTS).logits
    plain = pb.run(tuned(), PROMPTS).logits
    turned = pb.run(found.turned({f"{DOWN}:1": strength}), PROMPTS).logits
    assert close(edited, turned)
    assert torch.equal(edited, plain) == (strength == 1.0)
    other = pb.run(found.turned({f"{DOWN}:0": strength}), PROMPTS).logits
    assert bool(close(other, turned)) == (strength == 1.0)
    knob.save(tmp_path / "direction.knob")
    kept = pb.load_knob(tmp_path / "direction.knob", tuned())
    assert torch.equal(pb.run(tuned(), PROMPTS, edits=[kept.at(strength)]).logits, edited)
    with pytest.raises(pb.PatchbayError, match="was made on"):
        pb.run(lent("llama"), PROMPTS, edits=[knob.at(0.0)])


@pytest.mark.parametrize(
    ("dials", "says"),
    [
        ({"model.layers.1.mlp.down_pro:0": 0.0}, "no dial 'model.layers.1.mlp.down_pro:0': tuning changed .* and others.*down_proj"),
        ({f"{DOWN}:3": 0.0}, "has the directions 0..2"),
        ({f"{DOWN}:x": 0.0}, "has the directions 0..2"),
        ({f"{DOWN}:0": float("nan")}, "a number, got nan"),
        ({DOWN: True}, "a number, got True"),
    ],
)  # fmt: skip
def test_dials_that_cannot_be(dials: dict[str, Any], says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        pb.Directions(lent("llama"), tuned()).turned(dials)


def test_what_has_no_directions_is_refused() -> None:
    found = pb.Directions(lent("llama"), tuned())
    with pytest.raises(pb.PatchbayError, match="the same weights"):
        pb.Directions(lent("llama"), lent("llama"))
    with pytest.raises(pb.PatchbayError, match="other tensors"):
        pb.Directions(lent("gpt2"), tuned())
    hf = copy.deepcopy(tuned().hf)
    with torch.no_grad():
        hf.model.norm.weight += 0.1
    with pytest.raises(pb.PatchbayError, match="tuning changed model.norm.weight, which is no matrix of a linear map"):
        pb.Directions(lent("llama"), pb.load(hf))
    with pytest.raises(
        pb.PatchbayError,
        match=r"k_proj is no down projection .*; use turned\(\{'model.layers.0.self_attn.k_proj:0': 0\}\)",
    ):
        pb.Directions(lent("llama"), tuned()).knob(KEYS, 0, 0.0)
    flat = copy.deepcopy(tuned().hf)
    base = copy.deepcopy(flat)
    with torch.no_grad():
        flat.model.layers[1].mlp.down_proj.weight[3] = 0.0
    with pytest.raises(pb.PatchbayError, match="does not reach every direction of the stream"):
        pb.Directions(pb.load(base), pb.load(flat)).knob(DOWN, 0)
    for call in (lambda: pb.Directions("tiny", tuned()), lambda: found.turned([DOWN]), lambda: found.knob(DOWN, "0")):
        with pytest.raises(pb.PatchbayError, match=r"takes a"):
            call()
