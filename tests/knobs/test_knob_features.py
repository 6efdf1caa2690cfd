"""Knobs of features: saved, loaded, held to their dictionary, exported where they are a bias."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import patchbay as pb
from tests import given
from tests.features.given import dictionary, layers
from tests.tolerance import close

IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))


def test_a_knob_comes_back_and_generates_with_its_cache(tmp_path: Path) -> None:
    model = given.lent("llama")
    view = model.with_dictionaries(dictionary(model, "L1.resid_out"))
    knob = pb.turn.scale([view.part("L1.F3")], 40.0, model=view)
    back = pb.load_knob(knob.save(tmp_path / "knob.safetensors"), view)
    assert back == knob
    assert [str(e) for e in back.edits] == ["scale(L1.F3.act, 1)"]
    grown = view.generate(IDS, 4, edits=[back])
    whole = pb.run(view, grown, edits=[back]).logits
    assert [row[7:] for row in grown] == whole[:, 6:-1].argmax(-1).tolist()
    assert torch.equal(pb.run(view, IDS, edits=[back.at(1.0)]).logits, pb.run(model, IDS).logits), (
        "neutral: bit for bit"
    )


def test_a_knob_is_held_to_its_dictionary() -> None:
    model = given.lent("llama")
    it = dictionary(model, "L1.resid_out")
    view, other = (model.with_dictionaries(one) for one in (it, dictionary(model, "L1.resid_out", seed=1)))
    knob = pb.turn.scale([view.part("L1.F3")], 0.0, model=view)
    with pytest.raises(
        pb.PatchbayError, match=r"made on the features of a dictionary \(.*and L1.features here are those of another"
    ):
        pb.run(other, IDS, edits=[knob])
    with pytest.raises(pb.PatchbayError, match="layer 1 has no dictionary"):
        pb.run(model, IDS, edits=[knob])
    pb.run(model.with_dictionaries(replace(it, source="elsewhere")), IDS, edits=[knob])  # the same numbers
    with pytest.warns(UserWarning, match="is used on weights"):
        moved = knob.for_model(other)
    pb.run(other, IDS, edits=[moved])
    heads = pb.turn.scale([view.part("L1.H0")], 0.0, model=view)
    assert torch.equal(pb.run(other, IDS, edits=[heads]).logits, pb.run(model, IDS, edits=[heads]).logits)


@pytest.mark.parametrize("place", ["L1.resid_out", "L0.attn.z", "L1.mlp.in to L1.mlp.out"])
def test_what_is_always_added_to_a_feature_folds_into_a_bias(place: str, tmp_path: Path) -> None:
    model = pb.load(given.gpt2(0, vocab_size=60))
    view = model.with_dictionaries(dictionary(model, place))
    part = view.part(f"L{place[1]}.F3")
    knob = pb.Knob("more", [pb.add(part.port(), 2.0)], 1.0)
    knob.export(view, tmp_path / "out")
    folded = pb.load(tmp_path / "out").hf(IDS).logits
    assert close(folded, pb.run(view, IDS, edits=[knob]).logits)
    assert not torch.equal(folded, pb.run(view, IDS).logits)
    with pytest.raises(pb.PatchbayError, match="a feature's activation is no linear map of the stream"):
        pb.turn.scale([part], 0.5, model=view).export(view, tmp_path / "no")


def test_a_knob_of_a_cross_layer_feature_acts_and_does_not_fold(tmp_path: Path) -> None:
    model = pb.load(given.gpt2(0, vocab_size=60))
    view = model.with_dictionaries(layers(model.d_model, (0, 1)))
    knob = pb.turn.scale([view.part("L0.F3")], 20.0, model=view)
    back = pb.load_knob(knob.save(tmp_path / "knob.safetensors"), view)
    assert [row[7:] for row in view.generate(IDS, 3, edits=[back])] == pb.run(
        view, view.generate(IDS, 3, edits=[back]), edits=[back]
    ).logits[:, 6:-1].argmax(-1).tolist()
    with pytest.raises(pb.PatchbayError, match="a feature's activation is no linear map"):
        pb.Knob("more", [pb.add("L0.mlp.F3.act", 2.0)], 1.0).export(view, tmp_path / "out")
