"""turn.scale: the knob multiplies what parts write, as multiplying weights by hand does; at 1 it is not there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.tiny import planted
from tests.tolerance import close


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_planted(form: Any) -> None:
    """The planted head's share of the answer's logit follows the strength; silent at 0, the other way below."""
    built = planted.induction(form=form, seed=1)
    model = pb.load(built.model, built.tokenizer)
    task = pb.tasks.repeated_tokens(model, 8)
    head, right = built.truth["induction"], torch.tensor(task.right)
    logits = []
    for strength in (-1.0, 0.0, 1.0, 2.0):
        knob = pb.turn.scale([head], strength, model=model)
        said = pb.run(model, task, edits=[knob]).last_logits
        logits.append(said.gather(1, right[:, None]).mean())
    assert logits[2] == pytest.approx(built.truth["logit"], rel=0.05)
    assert abs(logits[1]) < 0.3
    assert logits[0] < -0.8 * logits[2]
    assert logits[3] > 1.5 * logits[2]


def test_reference() -> None:
    """Rows of W_O (head), of W_out (neuron) and whole projections multiplied by hand give the same logits."""
    torch.manual_seed(0)
    built = planted.null(form="llama", seed=1)
    model = pb.load(built.model, built.tokenizer)
    ids = torch.randint(3, 60, (3, 9))
    cases: list[tuple[str, Any]] = [
        ("L1.H2", lambda layer: layer.self_attn.o_proj.weight[:, 2 * 64 : 3 * 64]),
        ("L1.N5", lambda layer: layer.mlp.down_proj.weight[:, 5]),
        ("L1.mlp", lambda layer: layer.mlp.down_proj.weight),
        ("L1.attn", lambda layer: layer.self_attn.o_proj.weight),
        ("L1.KV1", lambda layer: layer.self_attn.v_proj.weight[64:128]),
    ]
    for part, weight in cases:
        other = copy.deepcopy(model.hf)
        with torch.no_grad():
            weight(other.model.layers[1]).mul_(-1.7)
            expected = other(ids).logits
            with model.edited(pb.turn.scale([part], -1.7)):
                found = model.hf(ids).logits
        assert close(found, expected), part
        assert (expected - pb.run(model, ids).logits).abs().max() > 1e-4


def test_planted_expert() -> None:
    built = planted.routed_expert(seed=2)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    said = [
        pb.run(model, truth["prompts"], edits=[pb.turn.scale(truth["expert"], strength)] if strength != 1 else [])
        .last_logits[:, truth["token_id"]]
        .mean()
        for strength in (0.0, 1.0)
    ]
    assert abs(said[0]) < 0.3
    assert said[1] > 3


def test_null() -> None:
    """At 1 nothing is edited, bit for bit; in a random model one head at 0 changes next to nothing."""
    built = planted.null(seed=0)
    model = pb.load(built.model, built.tokenizer)
    task = pb.tasks.repeated_tokens(model, 8)
    plain = pb.run(model, task).last_logits
    knob = pb.turn.scale(["L0.H1", "L1.N7"], 1.0, model=model)
    assert knob.edits_at() == []
    assert torch.equal(pb.run(model, task, edits=[knob]).last_logits, plain)
    silent = pb.run(model, task, edits=[knob.at(0.0)]).last_logits
    assert 0 < (silent - plain).abs().max() < 0.5


def test_the_knob_says_where_it_came_from() -> None:
    built = planted.null(seed=0)
    model = pb.load(built.model, built.tokenizer)
    knob = pb.turn.scale("L0.H1,L1.H2", 0.5, model=model)  # type: ignore[arg-type]
    assert knob.name == "scale L0.H1+L1.H2"
    assert knob.provenance["method"] == "turn.scale"
    assert knob.provenance["options"]["parts"] == ["L0.H1", "L1.H2"]
    assert knob.made_on["fingerprint"] == model.fingerprint
    assert knob.fits(model)
    assert not pb.turn.scale("L0.H1", 0.5).made_on  # type: ignore[arg-type]


def test_errors() -> None:
    built = planted.null(seed=0)
    model = pb.load(built.model, built.tokenizer)
    with pytest.raises(pb.PatchbayError, match=r"L0\.H7.*has 4"):
        pb.turn.scale("L0.H7", 0.5, model=model)  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="not a finite number"):
        pb.turn.scale("L0.H1", float("nan"))  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match=r"choose some, like result\.top"):
        pb.turn.scale(pb.find.previous_token_heads(model, [[5, 6, 7, 8]]), 0.0)  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="'2:2': no position from 2 to before 2"):
        pb.turn.scale("L0.H1", 0.5, positions="2:2")  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="no parts"):
        pb.turn.scale([], 0.0)
    with pytest.raises(pb.PatchbayError, match="needs a Model"):
        pb.turn.scale("L0.H1", 0.0, model="gpt2")  # type: ignore[arg-type]


def test_every_part_is_scaled_where_it_was_asked() -> None:
    knob = pb.turn.scale(["L0.H1", "L1.H2"], 0.0, positions=[2, 3])
    assert [(str(edit.port), edit.positions) for edit in knob.edits] == [("L0.H1.z", (2, 3)), ("L1.H2.z", (2, 3))]


def test_values_are_scaled_where_they_are_read() -> None:
    """A group's values by 2 are its heads' z by 2; at some positions they are the value rows of W_V there, by hand."""
    built = planted.null(form="llama", seed=1)
    model = pb.load(built.model, built.tokenizer)
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))

    def logits(*edits: Any) -> torch.Tensor:
        return pb.run(model, ids, edits=list(edits)).logits

    group = pb.turn.scale("L1.KV1", 2.0, of="values", model=model)  # type: ignore[arg-type]
    heads = pb.turn.scale("L1.H2,L1.H3", 2.0, model=model)  # type: ignore[arg-type]
    assert close(logits(group), logits(heads))
    assert group.name == "scale values of L1.KV1"
    some = pb.turn.scale("L1.KV1", 2.0, of="values", positions="2:5")  # type: ignore[arg-type]
    port = model.layers[1].groups[1].v
    value = pb.run(model, ids, taps=[port])[port].clone()  # [prompt, key, d_head]
    value[:, 2:5] *= 2
    assert close(logits(some), logits(pb.replace(port, value)))
    assert not torch.allclose(logits(some), logits(group), atol=1e-3)
    whole = pb.turn.scale("L1.attn", 0.0, of="values")  # type: ignore[arg-type]
    assert close(logits(whole), logits(pb.turn.scale("L1.attn", 0.0)))  # type: ignore[arg-type]
    plain = pb.load(planted.null(seed=1).model)  # GPT-2: every head has its own
    assert str(pb.turn.scale("L1.H2", 0.5, of="values", model=plain).edits[0].port) == "L1.KV2.v"  # type: ignore[arg-type]


def test_values_that_are_shared_are_refused() -> None:
    model = pb.load(planted.null(form="llama", seed=1).model)
    for part, options, message in (
        ("L1.H2", {"model": model}, r"L1\.H2, L1\.H3 share those of L1\.KV1"),
        ("L1.H2", {}, "give model="),
        ("L1.N2", {"model": model}, "reads no value vectors"),
    ):
        with pytest.raises(pb.PatchbayError, match=message):
            pb.turn.scale(part, 2.0, of="values", **options)  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="of=.*possible are outputs, values"):
        pb.turn.scale("L1.H2", 2.0, of="keys")  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="positions 'first'"):
        pb.turn.scale("L1.H2", 2.0, positions="first")  # type: ignore[arg-type]
