"""A model with dictionaries is a view: parts by text, records, what is refused."""

from __future__ import annotations

import pytest
import torch

import patchbay as pb
from patchbay.model.attached import attached
from patchbay.model.cards import part_card
from tests import given
from tests.features.given import dictionary, random


@pytest.fixture(scope="module")
def model() -> pb.Model:
    return pb.load(given.gpt2(0, vocab_size=60))


def test_parts_and_ports_by_text(model: pb.Model) -> None:
    view = model.with_dictionaries(
        dictionary(model, "L0.mlp.in to L0.mlp.out"), dictionary(model, "L1.resid_out"), dictionary(model, "L1.attn.z")
    )
    for text, port in (
        ("L0.F3", "L0.mlp.F3.act"),
        ("L0.mlp.F3", "L0.mlp.F3.act"),
        ("L1.F3", "L1.F3.act"),
        ("L1.attn.F3", "L1.attn.F3.act"),
    ):
        assert str(view.part(text).port()) == port
        assert view.port(f"{text}.act") == view.port(port)
        assert str(pb.Edit("zero", port).port) == port, "text that prints is text that is read"
    assert view.part("l1.f3") == view.part("L1.F3")
    assert str(view.port("L1.features.error")) == "L1.features.error"
    assert [str(p) for p in view.layers[1].ports if "features" in str(p)] == [
        "L1.features.act", "L1.features.error", "L1.attn_features.act", "L1.attn_features.error",
    ]  # fmt: skip
    assert sorted([view.part("L1.F10"), view.part("L1.F9")]) == [view.part("L1.F9"), view.part("L1.F10")]


def test_the_model_stays_as_it_was(model: pb.Model) -> None:
    before = [str(port) for port in model.ports]
    view = model.with_dictionaries(dictionary(model, "L1.resid_out"))
    again = view.with_dictionaries(dictionary(model, "L1.mlp.out"))
    assert [str(port) for port in model.ports] == before
    assert len(view.ports) == len(before) + 2
    assert len(again.ports) == len(before) + 4
    assert view.hf is model.hf
    assert view.fingerprint == model.fingerprint
    assert attached(model) == {}
    assert list(attached(again)["dictionaries"]) == ["L1.features", "L1.mlp_features"]


def test_what_cannot_be_attached_is_refused(model: pb.Model) -> None:
    it = dictionary(model, "L1.resid_out")
    for given_, said in (
        ([it, dictionary(model, "L1.resid_in")], "layer 1 has a dictionary at resid_out already, and one at resid_in"),
        ([random()], "made for 6 numbers, L0.resid_out of GPT2LMHeadModel has 32"),
        ([pb.Dictionary(it.W_enc, it.W_dec, it.b_enc, it.b_dec, layer=9)], "L9.resid_out: the model has layers 0..1"),
        (
            [pb.Dictionary(it.W_enc, it.W_dec, it.b_enc, it.b_dec, reads="mlp.out", writes="mlp.in")],
            "written where it reads or later",
        ),
        ([pb.Dictionary(it.W_enc, it.W_dec, it.b_enc, it.b_dec, reads="logits")], "a dictionary that reads logits"),
        (["folder"], "expected dictionaries, such as pb.load_dictionary"),
    ):
        with pytest.raises(pb.PatchbayError, match=said):
            model.with_dictionaries(*given_)


def test_features_that_are_not_there_are_refused(model: pb.Model) -> None:
    view = model.with_dictionaries(dictionary(model, "L1.resid_out"))
    with pytest.raises(
        pb.PatchbayError, match=r"layer 0 has no dictionary; a dictionary is attached with model.with_dictionaries"
    ):
        view.part("L0.F3")
    with pytest.raises(pb.PatchbayError, match=r"L1.F24.act: layer 1 has 24 \(0..23\)"):
        view.port("L1.F24.act")
    with pytest.raises(pb.PatchbayError, match="layer 1 has the features L1.features alone"):
        view.port("L1.mlp.F0.act")
    with pytest.raises(pb.PatchbayError, match="layer 1 has no dictionary"), view.edited(pb.zero("L1.F0.act")):
        pb.run(model, [[3, 4, 5]])


def test_a_record_says_whose_features_they_are(model: pb.Model) -> None:
    view = model.with_dictionaries(dictionary(model, "L1.resid_out"))
    found = pb.prove.ablation(view, given.pairs(), [view.part("L1.F3")], draws=2)
    record = found.provenance["model"]["dictionaries"]["L1.features"]
    assert record["digest"] == view.dictionaries[1, "features"].digest
    with pytest.raises(pb.PatchbayError, match="layer 1 has no dictionary"):
        pb.replay(found, model=model)
    assert pb.replay(found, model=view).agrees


def test_a_card_says_what_a_feature_reads_and_writes(model: pb.Model) -> None:
    it = dictionary(model, "L1.resid_out")
    row = int((it.W_dec @ model.unembed.weight.detach().T).argmax() // model.vocab_size)
    view = model.with_dictionaries(it)
    reads, writes = part_card(view, f"L1.F{row}")["words"]
    gain = model.final_norm_module.weight.detach()
    effect = model.unembed.weight.detach() @ ((it.W_dec[row] - it.W_dec[row].mean()) * gain)
    assert writes["most"] == [str(int(i)) for i in effect.topk(6).indices]
    assert reads["most"] == [str(int(i)) for i in (model.embed.weight.detach() @ it.W_enc[:, row]).topk(6).indices]
    assert torch.equal(view.dictionaries[1, "features"].W_dec, it.W_dec)
