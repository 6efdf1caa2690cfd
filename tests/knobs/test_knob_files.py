"""Knob files and whose they are: other weights only when asked, with both fingerprints named; damaged and foreign files refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import patchbay as pb
from patchbay.knobs.knob import Knob, _digest, load_knob
from patchbay.knobs.rows import by_row
from patchbay.tiny import twins

IDS = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> pb.Model:
    return pb.load(twins.twin("llama"))


@pytest.fixture(scope="module")
def other() -> pb.Model:
    return pb.load(twins.twin("llama", seed=1))


@pytest.fixture
def path(model: pb.Model, tmp_path: Path) -> Path:
    return pb.turn.scale(["L1.H2", "L0.H1"], 3.0, model=model).save(tmp_path / "x.knob")


def test_a_file_says_whose_it_is(model: pb.Model, path: Path) -> None:
    knob = load_knob(path)
    assert knob.made_on["fingerprint"] == model.fingerprint
    assert knob.fits(model)
    knob.check(model)
    again = pb.load(twins.twin("llama"))  # the same weights, loaded anew
    assert torch.equal(pb.run(again, IDS, edits=[knob]).logits, pb.run(model, IDS, edits=[knob]).logits)


def test_other_weights_are_refused_wherever_a_knob_is_used(model: pb.Model, other: pb.Model, path: Path) -> None:
    knob = load_knob(path)
    task = pb.tasks.repeated_tokens(other, 4)
    before = pb.run(other, IDS).logits
    uses: dict[str, Any] = {
        "run": lambda: pb.run(other, IDS, edits=[knob]),
        "edited": lambda: other.edited(knob).__enter__(),
        "generate": lambda: other.generate(IDS, 2, edits=[knob]),
        "sweep": lambda: pb.sweep(other, task, [knob]),
        "rows": lambda: by_row(other, [None, knob]),
        "dose": lambda: pb.measure.dose_response(other, task, knob),
        "export": lambda: knob.export(other, path.parent / "out"),
        "nested": lambda: pb.run(other, IDS, edits=[[knob]]),
    }
    for name, use in uses.items():
        with pytest.raises(pb.PatchbayError, match="use knob.for_model") as caught:
            use()
        assert model.fingerprint in str(caught.value), name
        assert other.fingerprint in str(caught.value), name
    assert torch.equal(pb.run(other, IDS).logits, before)


def test_when_asked_it_is_moved_with_a_warning_that_names_both(model: pb.Model, other: pb.Model, path: Path) -> None:
    knob = load_knob(path).with_evidence(proof=pb.Result(torch.ones(2, 4)))
    with pytest.warns(UserWarning, match=f"{model.fingerprint}.*{other.fingerprint}"):
        moved = knob.for_model(other)
    assert moved.fits(other)
    assert moved.edits == knob.edits
    assert moved.evidence == {}
    assert moved.provenance["first_model"]["fingerprint"] == model.fingerprint
    with other.edited(moved):
        found = other.hf(IDS).logits
    assert torch.equal(found, pb.run(other, IDS, edits=knob.edits_at()).logits)
    assert load_knob(moved.save(path.parent / "y.knob")).provenance["first_model"] == moved.provenance["first_model"]
    assert knob.for_model(model) is knob  # nothing to say where it fits


def test_weights_that_changed_are_other_weights(path: Path) -> None:
    """One number of one weight."""
    changed = pb.load(twins.twin("llama"))
    with torch.no_grad():
        changed.hf.lm_head.weight[3, 5] += 1e-3
    with pytest.raises(pb.PatchbayError, match="was made on"):
        pb.run(changed, IDS, edits=[load_knob(path)])


def test_a_model_without_the_parts_or_of_other_widths_is_no_model_for_it(path: Path, model: pb.Model) -> None:
    small = pb.load(twins.twin("llama", num_attention_heads=2, num_key_value_heads=1))
    with pytest.raises(pb.PatchbayError, match=r"L1\.H2.*has 2"):
        load_knob(path).for_model(small)
    wide = pb.load(twins.twin("llama", hidden_size=48))
    for port in (model.layers[1].resid_out, model.layers[0].heads[1].z, model.layers[0].mlp.act):
        n = {"d_model": 32, "d_head": 8, "neuron": 48}[port.axes[-1]]
        knob = Knob("steer", [pb.add(port, torch.ones(n))], 1.0)
        narrow = pb.load(twins.twin("llama", hidden_size=48, intermediate_size=40))
        with pytest.raises(pb.PatchbayError, match=f"made for {n} numbers"):
            knob.for_model(narrow)
    assert wide.d_model == 48


def test_a_knob_that_does_not_say_where_it_was_made_is_held_to_nothing(model: pb.Model, other: pb.Model) -> None:
    knob = pb.turn.scale(["L1.H2"], 2.0)
    for one in (model, other):
        knob.check(one)
        pb.run(one, IDS, edits=[knob])


# --- files --------------------------------------------------------------------------------------------


def rewritten(path: Path, change: Any, *, sign: bool = True) -> Path:
    """The file with its header changed, and its checksum made to fit."""
    with safe_open(path, framework="pt") as file:
        marks = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = json.loads(marks["knob"])
    change(header, marks)
    marks["knob"] = json.dumps(header)
    if sign:
        marks["sha256"] = _digest(tensors, marks["knob"])
    target = path.with_name("changed.knob")
    save_file(tensors, target, metadata=marks)
    return target


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h, m: h.update(strength={"$float": "nan"}), "finite number"),
        (lambda h, m: h.update(strength="2"), "finite number"),
        (lambda h, m: h["edits"][0].update(op="explode"), "no edit 'explode'"),
        (lambda h, m: h["edits"][0].update(port="L1.H2.zz"), "damaged knob"),
        (lambda h, m: h["edits"][0].update(tensor="gone"), "damaged knob"),
        (lambda h, m: h.update(edits=[]), "are needed, got none"),
        (lambda h, m: h.pop("name"), "damaged knob"),
        (lambda h, m: m.update(version="99"), "version 99; this Patchbay reads versions 1 and 2: update it"),
        (lambda h, m: m.update(format="other-tool"), "'other-tool', not 'patchbay-knob'"),
        (lambda h, m: m.pop("format"), "without a format"),
    ],
)
def test_files_that_are_whole_and_wrong(path: Path, change: Any, said: str) -> None:
    with pytest.raises(pb.PatchbayError, match=said):
        load_knob(rewritten(path, change))


def test_a_strength_changed_in_the_file_is_noticed(path: Path) -> None:
    with pytest.raises(pb.PatchbayError, match="contents were altered"):
        load_knob(rewritten(path, lambda h, m: h.update(strength=9.0), sign=False))
    assert load_knob(rewritten(path, lambda h, m: h.update(strength=9.0))).strength == 9.0


def test_every_truncation_is_refused(path: Path) -> None:
    content = path.read_bytes()
    for length in range(0, len(content), 37):
        (path.parent / "cut.knob").write_bytes(content[:length])
        with pytest.raises(pb.PatchbayError, match=r"cut\.knob"):
            load_knob(path.parent / "cut.knob")
