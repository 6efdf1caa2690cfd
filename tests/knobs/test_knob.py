"""Knob: turning by the stated rules, exactly nothing at neutral, and a file that is whole or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import patchbay as pb
from patchbay.edits.apply import apply
from patchbay.edits.edit import Edit
from patchbay.knobs.knob import Knob, load_knob
from patchbay.tiny import planted
from tests.tolerance import close


@pytest.fixture(scope="module")
def model() -> pb.Model:
    built = planted.induction(seed=0)
    return pb.load(built.model, built.tokenizer)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(0))


def templates(model: pb.Model) -> dict[str, Edit]:
    """One template of every operation, at a head's z, [prompt, position, d_head], or at its pattern."""
    head = model.layers[1].heads[2]
    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(64, generator=generator)
    return {
        "scale": pb.scale(head.z, 1.0),
        "add": pb.add(head.z, vector),
        "zero": pb.zero(head.z),
        "replace": pb.replace(head.z, vector),
        "mean": pb.mean(head.z, vector),
        "project": pb.project(head.z, torch.randn(3, 64, generator=generator)),
        "block": pb.block(head.pattern, query=-1, key=[1, 2]),
    }


def turned(edits: list[Edit], signal: torch.Tensor) -> torch.Tensor:
    for edit in edits:
        signal = apply(edit, signal, None, None)
    return signal


@pytest.mark.parametrize("op", ["scale", "add", "zero", "replace", "mean", "project", "block"])
def test_at_neutral_nothing_is_edited_bit_for_bit(model: pb.Model, ids: torch.Tensor, op: str) -> None:
    knob = Knob(op, [templates(model)[op]], 0.7)
    assert knob.edits_at(knob.neutral) == []
    plain = model.hf(ids).logits
    with model.edited(knob, strength=knob.neutral):
        assert torch.equal(model.hf(ids).logits, plain)
    with model.edited(knob):
        assert not torch.equal(model.hf(ids).logits, plain)


@pytest.mark.parametrize("op", ["add", "zero", "replace", "mean", "project"])
@pytest.mark.parametrize("strength", [-1.0, 0.25, 1.0, 3.0])
def test_the_linear_ones_go_straight_from_as_it_was_to_the_template(model: pb.Model, op: str, strength: float) -> None:
    signal = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2))
    template = templates(model)[op]
    there = apply(template, signal, None, None)
    found = turned(Knob(op, [template], strength).edits_at(), signal)
    assert close(found, signal + strength * (there - signal))


def test_at_one_the_template_itself_is_used(model: pb.Model) -> None:
    for op, template in templates(model).items():
        if op != "scale":
            assert Knob(op, [template], 1.0).edits_at() == [template]


def test_kept_counts_what_is_left(model: pb.Model, tmp_path: Path) -> None:
    """1 is neutral, 0 the template; the strength that is left goes through records and files."""
    template = templates(model)["project"]
    knob = Knob("less", [template], 0.25, kept=True)
    assert knob.neutral == 1.0
    assert knob.at(1.0).edits_at() == []
    assert knob.edits_at(0.0) == [template]
    assert knob.edits_at() == Knob("less", [template], 0.75).edits_at()
    assert knob.edits_at(3.0) == Knob("less", [template], -2.0).edits_at()
    assert knob != Knob("less", [template], 0.25)
    assert load_knob(knob.save(tmp_path / "a.knob")) == knob == Knob.from_json(knob.to_json())
    with pytest.raises(pb.PatchbayError, match="scale edits keep at 1 by themselves"):
        Knob("both", [templates(model)["scale"]], 1.0, kept=True)


@pytest.mark.parametrize("strength", [-2.0, 0.0, 0.3, 4.0])
def test_scale_multiplies_by_the_strength_or_by_a_share_of_it(model: pb.Model, strength: float) -> None:
    port = model.layers[0].heads[0].z
    assert Knob("plain", [pb.scale(port, 1.0)], strength).edits_at()[0].value == strength
    against = Knob("against", [pb.scale(port, -1.0)], strength).edits_at()[0].value
    assert close(against, 2.0 - strength, dtype=torch.float64)
    several = Knob("several", [pb.scale(port, torch.tensor([0.0, 1.0] * 32))], strength).edits_at()[0].value
    assert close(several, torch.tensor([1.0, strength] * 32))


def test_block_is_on_or_off(model: pb.Model) -> None:
    template = templates(model)["block"]
    assert Knob("cut", [template], 0.2).edits_at() == Knob("cut", [template], -5.0).edits_at() == [template]


def test_positions_and_rows_stay(model: pb.Model) -> None:
    port = model.layers[0].resid_out
    template = pb.replace(port, torch.ones(256), positions=[1, -1], rows=[0])
    for edit in Knob("placed", [template], 0.5).edits_at():
        assert (edit.positions, edit.rows, edit.port) == ((1, -1), (0,), port)


def test_a_knob_is_a_value(model: pb.Model) -> None:
    knob = Knob("steer", [templates(model)["add"]], 2.0)
    same = Knob("steer", [templates(model)["add"]], 2.0)
    assert knob == same
    assert hash(knob) == hash(same)
    assert knob != knob.at(1.0)
    assert knob.at(1.0).edits == knob.edits
    with pytest.raises(AttributeError):
        knob.strength = 3.0  # type: ignore[misc]
    assert repr(knob).splitlines() == ["Knob 'steer' at strength 2 (neutral 0)", "  add(L1.H2.z, tensor[64])"]


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -float("inf"), "3", None, True])
def test_strengths_that_are_no_numbers_are_refused(model: pb.Model, strength: Any) -> None:
    template = templates(model)["add"]
    with pytest.raises(pb.PatchbayError, match="finite number"):
        Knob("bad", [template], strength)
    if strength is not None:  # None is the knob's own
        with pytest.raises(pb.PatchbayError, match="finite number"):
            Knob("good", [template], 1.0).edits_at(strength)


def test_knobs_without_one_neutral_are_refused(model: pb.Model) -> None:
    made = templates(model)
    with pytest.raises(pb.PatchbayError, match=r"add and scale in one knob.*two knobs"):
        Knob("mixed", [made["scale"], made["add"]], 1.0)
    with pytest.raises(pb.PatchbayError, match="are needed, got none"):
        Knob("empty", [], 1.0)
    with pytest.raises(pb.PatchbayError, match="needs a name"):
        Knob(" ", [made["add"]], 1.0)
    assert Knob("both", [made["zero"], made["add"]], 1.0).neutral == 0.0


def whole(model: pb.Model) -> Knob:
    """A knob with every kind of value and evidence."""
    made = templates(model)
    vector = made["add"].value
    port = model.layers[0].resid_out
    edits = [edit for op, edit in made.items() if op != "scale"]
    edits += [
        pb.add(port, vector.repeat(4), positions=slice(1, None)),
        pb.add(port, vector.repeat(4), positions="last"),
    ]
    edits += [pb.zero(model.layers[0].mlp.neurons[3].act, positions=torch.tensor([[True, False]]))]
    edits += [pb.zero(model.layers[0].mlp.neurons[4].act, positions=pb.Token(" the"))]
    task = pb.tasks.repeated_tokens(model, 3)
    proof = pb.prove.ablation(model, task, ["L1.H2"], draws=2)
    knob = Knob(
        "whole ✓", edits, -0.5, {"model": {"fingerprint": model.fingerprint, "source": "here"}, "x": float("inf")}
    )
    return knob.with_evidence(proof=proof, other=pb.find.previous_token_heads(model, task))


def test_a_file_holds_the_whole_knob(model: pb.Model, tmp_path: Path) -> None:
    knob = whole(model)
    path = knob.save(tmp_path / "a.knob")
    assert [found.name for found in tmp_path.iterdir()] == ["a.knob"]
    again = load_knob(path)
    assert again == knob
    assert again.edits_at() == knob.edits_at()
    assert again.provenance == knob.provenance
    assert list(again.evidence) == ["proof", "other"]
    for name, result in knob.evidence.items():
        assert again.evidence[name].equal(result)
        assert again.evidence[name].provenance == result.provenance
    assert again.fits(model)
    assert "evidence proof: prove.ablation" in repr(again)
    assert pb.load_knob(str(path)) == knob


def test_what_is_already_there_stays(model: pb.Model, tmp_path: Path) -> None:
    knob = Knob("steer", [templates(model)["add"]], 2.0)
    path = knob.save(tmp_path / "a.knob")
    before = path.read_bytes()
    with pytest.raises(pb.PatchbayError, match="overwrite=True"):
        knob.at(1.0).save(path)
    assert path.read_bytes() == before
    knob.at(1.0).save(path, overwrite=True)
    assert load_knob(path).strength == 1.0
    other = tmp_path / "notes.txt"
    other.write_text("keep me")
    with pytest.raises(pb.PatchbayError, match="not a knob: not replaced"):
        knob.save(other, overwrite=True)
    assert other.read_text() == "keep me"
    with pytest.raises(pb.PatchbayError, match="is a folder"):
        knob.save(tmp_path)


def test_a_save_that_fails_leaves_nothing(model: pb.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    knob = Knob("steer", [templates(model)["add"]], 2.0)
    path = knob.save(tmp_path / "a.knob")
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(pb.PatchbayError, match="No space left on device; nothing was written"):
        knob.at(9.0).save(path, overwrite=True)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["a.knob"]
    with pytest.raises(pb.PatchbayError, match="could not save"):
        knob.save(tmp_path / "no" / "such" / "folder.knob")
    monkeypatch.undo()
    monkeypatch.setattr("os.replace", lambda *_: full(0))  # whole on disk, not yet in its place
    with pytest.raises(pb.PatchbayError, match="nothing was written"):
        knob.at(9.0).save(path, overwrite=True)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["a.knob"]


def test_damaged_foreign_and_newer_files_are_refused(model: pb.Model, tmp_path: Path) -> None:
    good = whole(model).save(tmp_path / "good.knob").read_bytes()
    bad = tmp_path / "bad.knob"
    for at in (len(good) - 3, len(good) // 2, 200, 20, 0):
        flipped = bytearray(good)
        flipped[at] ^= 1
        bad.write_bytes(bytes(flipped))
        with pytest.raises(pb.PatchbayError, match=r"bad\.knob"):
            load_knob(bad)
    for content in (good[:-5], good[: len(good) // 2], good[:4], b"", b"hello", good + b"x"):
        bad.write_bytes(content)
        with pytest.raises(pb.PatchbayError, match=r"bad\.knob"):
            load_knob(bad)
    save_file({"w": torch.ones(2)}, bad)
    with pytest.raises(pb.PatchbayError, match="does not say where it is added"):
        load_knob(bad)
    save_file({}, bad, metadata={"format": "patchbay-knob", "version": "3", "knob": "{}"})
    with pytest.raises(pb.PatchbayError, match=r"version 3.*reads versions 1 and 2: update"):
        load_knob(bad)
    save_file({}, bad, metadata={"format": "patchbay-knob", "version": "1", "knob": "{}"})
    with pytest.raises(pb.PatchbayError, match="damaged knob"):
        load_knob(bad)
    with pytest.raises(pb.PatchbayError, match="not there"):
        load_knob(tmp_path / "none.knob")
    with pytest.raises(pb.PatchbayError, match="a folder"):
        load_knob(tmp_path)


def test_records_are_plain_data(model: pb.Model) -> None:
    knob = whole(model)
    again = Knob.from_json(json.loads(json.dumps(knob.to_json())))
    assert again == knob
    large = Knob("large", [pb.add(model.layers[0].resid_out, torch.ones(2, 200, 256))], 1.0)
    record = json.loads(json.dumps(large.to_json()))
    assert len(record["sha256"]) == 64
    with pytest.raises(pb.PatchbayError, match="by digest alone"):
        Knob.from_json(record)


def test_it_knows_which_model_it_was_made_on(model: pb.Model) -> None:
    knob = pb.turn.scale(["L1.H2"], 0.0, model=model)
    other = planted.induction(seed=1, n_layers=1 + 1)
    assert not knob.fits(pb.load(other.model, other.tokenizer))
    small = planted.null(seed=0, n_heads=2, n_kv_heads=2)
    with pytest.raises(pb.PatchbayError, match=r"L1\.H2.*has 2"):
        knob.fits(pb.load(small.model, small.tokenizer))


def test_generation_under_a_knob_stops_when_it_ends(model: pb.Model) -> None:
    prompts = pb.tasks.repeated_tokens(model, 2).clean[0]
    plain = model.generate(list(prompts), 4)
    with model.edited(pb.turn.scale(["L1.attn"], -3.0)):
        changed = model.generate(list(prompts), 4)
    assert changed != plain
    assert model.generate(list(prompts), 4) == plain
