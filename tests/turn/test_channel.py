"""turn.channel: one component is turned and no other; equal to the weights changed by hand; at 1 it is not there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.knobs.knob import Knob
from patchbay.signal.channel import parse_channel
from patchbay.tiny import planted
from patchbay.tiny.twins import twin
from patchbay.turn.channel import edited_weight
from patchbay.wiring.components import components
from tests.tolerance import NOISE, close


def built(form: Any = "gpt2", **options: Any) -> tuple[pb.Model, Any]:
    made = planted.channel(form=form, seed=3, composition="query", component=2, **options)
    return pb.load(made.model, made.tokenizer), made.truth


def random_ids(model: pb.Model, n: int = 3, width: int = 9) -> list[list[int]]:
    return torch.randint(3, model.vocab_size, (n, width), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("form", ["gpt2", "llama"])
@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0, -1.0])
def test_planted(form: Any, strength: float) -> None:
    """What the head writes changes along the planted direction alone, by the factor asked; the coordinate form sets it."""
    model, truth = built(form)
    out = model.part(truth["writer"]).port("out")
    direction = truth["directions"][0]  # [d_model], unit
    name, ids = f"{truth['writer']}.C2>{truth['reader']}.q", random_ids(model)
    knob = pb.turn.channel(model, name, strength=strength)
    before, after = (pb.run(model, ids, taps=[out], edits=e)[out] for e in ([], [knob]))
    along, along_after = before @ direction, after @ direction  # [prompt, position]
    # what is read of z and written back went through a decomposition of the weights
    assert close(along_after, strength * along, of=before, noise=4 * NOISE)
    rest = before - along[..., None] * direction
    assert close(after - along_after[..., None] * direction, rest)
    assert along.abs().max() > 0.01
    sign = torch.sign(components(model, truth["writer"]).v[2] @ direction)
    fixed = pb.turn.channel(model, name, coordinate=strength, positions="last")
    placed = pb.run(model, ids, taps=[out], edits=[fixed])[out] @ direction
    assert close(placed[:, -1], sign * torch.full((3,), strength), of=before, noise=4 * NOISE)
    assert close(placed[:, :-1], along[:, :-1])


FAMILIES = ["gpt2", "llama", "gemma2", "phi", "qwen3", "gpt_neo", "bloom", "deepseek_v3"]


@pytest.mark.parametrize("name", FAMILIES)
def test_reference(name: str) -> None:
    """W_O of the head changed by hand in a copy of the model gives the same logits; where keys and values are its own, so does W_V."""
    model, ids = pb.load(twin(name)), torch.tensor([[5, 9, 20, 7, 11, 3, 8]])
    for text, strength in (("L0.H1.C0", 0.0), ("L1.H3.C4", -1.5)):
        layer, head = int(text[1]), int(text[4])
        knob = pb.turn.channel(model, text, strength=strength)
        with torch.no_grad(), model.edited(knob):
            found = model.hf(ids).logits
        plain = pb.run(model, ids).logits
        forms: list[Any] = ["W_O"] + (["W_V"] if model.n_groups(layer) == model.n_heads(layer) else [])
        assert (found - plain).abs().max() > 1e-4 * plain.abs().max()
        for form in forms:
            other = pb.load(copy.deepcopy(model.hf))
            weight, bias = edited_weight(model, parse_channel(text), strength, matrix=form)
            views = other.layers[layer].attn.weights()
            with torch.no_grad():
                if form == "W_O":
                    assert bias is None
                    views.W_O[head].copy_(weight)
                else:
                    _write_v(other, layer, head, weight, bias)
                expected = other.hf(ids).logits
            assert close(found, expected), (form, text)


def _write_v(model: pb.Model, layer: int, head: int, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Write W_V of a head where the family packs q, k and v, or keeps v apart."""
    attn: Any = model.modules[layer].attn
    d = model.d_head(layer)
    if model.config.model_type == "gpt2":
        at = slice(2 * model.d_model + head * d, 2 * model.d_model + head * d + d)
        attn.c_attn.weight[:, at], attn.c_attn.bias[at] = weight, bias
    elif model.config.model_type == "bloom":  # by head: q, k, v
        at = slice((3 * head + 2) * d, (3 * head + 3) * d)
        attn.query_key_value.weight[at], attn.query_key_value.bias[at] = weight.T, bias
    elif model.config.model_type == "deepseek_v3":  # by head: the key's part that is not turned (8), then the value (6)
        attn.kv_b_proj.weight[14 * head + 8 : 14 * head + 14] = weight.T
    else:
        at = slice(head * d, head * d + d)
        attn.v_proj.weight[at] = weight.T
        if bias is not None:
            attn.v_proj.bias[at] = bias


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi"])
def test_it_is_the_formula(name: str) -> None:
    """W_V W_O after the edit = W_V W_O - (1 - t) s_i u_i v_i^T, norms folded in, for W_O and for W_V."""
    model = pb.load(twin(name))
    found = components(model, "L1.H1")
    w = model.layers[1].attn.weights(fold_norm=True)
    own = 1 * len(w.W_V) // len(w.W_Q)
    W_O, _ = edited_weight(model, parse_channel("L1.H1.C3"), 0.25)
    expected = w.W_OV(1) - 0.75 * found.s[3] * torch.outer(found.u[3], found.v[3])
    assert close(w.W_V[own] @ W_O, expected)


def test_grouped_values_are_left_alone() -> None:
    model = pb.load(twin("llama"))
    with pytest.raises(pb.PatchbayError, match=r"W_V belongs to 2 query heads"):
        edited_weight(model, parse_channel("L0.H1.C0"), 0.0, matrix="W_V")


def test_null() -> None:
    """At 1 nothing is edited, bit for bit; one of 64 components of a random head at 0 changes next to nothing."""
    made = planted.null(seed=0)
    model = pb.load(made.model, made.tokenizer)
    task = pb.tasks.repeated_tokens(model, 6)
    plain = pb.run(model, task).last_logits
    knob = pb.turn.channel(model, "L0.H1.C5", strength=1.0)
    assert knob.edits_at() == []
    assert torch.equal(pb.run(model, task, edits=[knob]).last_logits, plain)
    unset = pb.turn.channel(model, "L0.H1.C5", coordinate=3.0).at(0.0)
    assert torch.equal(pb.run(model, task, edits=[unset]).last_logits, plain)
    gone = pb.run(model, task, edits=[knob.at(0.0)]).last_logits
    assert 0 < (gone - plain).abs().max() < 0.1 * plain.std()


def test_components_together_are_the_head() -> None:
    """All components taken away one after the other: what is left of z writes nothing."""
    model, truth = built()
    head = model.part(truth["writer"])
    knobs = [pb.turn.channel(model, f"{head}.C{i}", strength=0.0) for i in range(model.d_head(0))]
    out = head.port("out")
    silent = pb.run(model, random_ids(model), taps=[out], edits=knobs)[out]
    assert close(silent, 0.0, of=pb.run(model, random_ids(model), taps=[out])[out])


def test_a_whole_head_is_scaled() -> None:
    model, truth = built()
    knob = pb.turn.channel(model, truth["writer"], strength=0.5)
    assert knob.edits == pb.turn.scale(truth["writer"], 0.5).edits
    assert knob.neutral == 1.0


def test_the_knob_is_data(tmp_path: Any) -> None:
    model, _ = built()
    knob = pb.turn.channel(model, "L0.H1.C2>L1.H0.q", strength=0.5)
    assert knob.name == "channel L0.H1.C2>L1.H0.q"
    assert knob.provenance["options"]["channel"] == "L0.H1.C2>L1.H0.q"
    again = pb.load_knob(knob.save(tmp_path / "a.knob"))
    assert again == knob
    assert again.neutral == 1.0
    assert again.edits_at() == knob.edits_at()
    assert Knob.from_json(knob.to_json()).edits_at(0.0) == knob.edits_at(0.0)


def test_errors() -> None:
    model, _ = built()
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("L0.H1.C2", {}, r"strength .* or coordinate .*, got neither"),
        ("L0.H1.C2", {"strength": 0.0, "coordinate": 1.0}, "got both"),
        ("L0.H1", {"coordinate": 1.0}, "no one coordinate"),
        ("L0.H1.C64", {"strength": 0.0}, r"has components 0\.\.63"),
        ("L0.H9.C0", {"strength": 0.0}, "no channel of this model"),
        ("L0.mlp.C0", {"strength": 0.0}, "is no head"),
        ("L0.H1.C2", {"strength": float("nan")}, "not a finite number"),
        ("L0.H1.C2", {"coordinate": float("inf")}, "not a finite number"),
        ("L1.H1.C2>L0.H0.q", {"strength": 0.0}, "reads the stream before"),
        ("sideways", {"strength": 0.0}, "is not a part"),
    ]
    for text, options, message in refused:
        with pytest.raises(pb.PatchbayError, match=message):
            pb.turn.channel(model, text, **options)
    with pytest.raises(pb.PatchbayError, match="no layer of this mamba model"):
        pb.turn.channel(pb.load(twin("mamba2")), "L0.H1.C0", strength=0.0)
    broken = pb.load(twin("gpt2"))
    with torch.no_grad():
        broken.hf.transformer.h[0].attn.c_proj.weight[0, 0] = float("nan")
    with pytest.raises(pb.PatchbayError, match="NaN or infinite"):
        pb.turn.channel(broken, "L0.H0.C0", strength=0.0)
