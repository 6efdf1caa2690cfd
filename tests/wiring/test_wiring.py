"""Channels as text, components of every writer, readers and the rotary turn, against the model's own signals and plain algebra."""

from __future__ import annotations

import pytest
import torch

import patchbay as pb
from patchbay.model import rotary, weights
from patchbay.signal.channel import Channel, parse_channel
from patchbay.signal.port import Part, parse_part
from patchbay.tiny import twins
from patchbay.wiring import components
from patchbay.wiring.components import check_channel
from patchbay.wiring.timing import read_time, write_time
from tests.given import lent
from tests.tolerance import close

WITH_HEADS = (
    "gpt2",
    "llama",
    "gemma2",
    "phi",
    "mixtral",
    "gpt_neo",
    "bloom",
    "qwen3",
    "olmo2",
    "cohere normed",
    "granite",
)


# --- text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "L0.H1.C3>L2.H0.q",
        "L0.H1>L2.H0.k",
        "L0.N7>L1.H2.v",
        "embed>L1.mlp",
        "embed.positions>L0.H1.q",
        "L0.mlp.C5>unembed",
        "L0.attn.bias>L1.router",
        "L0.mlp.bias>unembed",
        "L0.E2>L1.E0",
        "L0.H1.C3",
    ],
)
def test_a_channel_reads_as_it_prints(text: str) -> None:
    assert str(parse_channel(text)) == text
    assert parse_channel(parse_channel(text)) == parse_channel(text)
    assert {parse_channel(text): 1}[parse_channel(text)] == 1


def test_forms_that_people_write() -> None:
    assert parse_channel("l0.h1.c3 > L2.H0.query") == Channel(Part(0, "head", 1), 3, Part(2, "head", 0), "query")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("L0.H1>", "not a channel"),
        ("L0.H1>L2.H0", "read as .q, .k or .v"),
        ("L0.H1>L2.H0.q>L3.H1.k", "not a channel"),
        ("L0.router>L1.H0.q", "does not write"),
        ("L0.attn>L1.H0.q", "writes by its heads"),
        ("L0.H1.bias>L1.H0.q", "has no 'bias'"),
        ("L0.H1>L1.KV0", "does not read"),
        ("L0.H1>L1.mlp.q", "has no .q"),
        ("hello>L1.mlp", "is not a part"),
    ],
)
def test_what_is_no_channel_is_refused(text: str, says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        parse_channel(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("L0.H9>L1.H0.q", "no channel of this model"),
        ("L0.H1>L7.H0.q", "no channel of this model"),
        ("L0.H1.C8>L1.H0.q", "components 0..7"),
        ("L1.H1>L0.H0.q", "before L1.H1 writes"),
        ("L0.H1>L0.H0.q", "before L0.H1 writes"),
        ("L0.H1>L1.router", "has no router"),
    ],
)
def test_a_channel_of_another_model_is_refused(text: str, says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        check_channel(parse_channel(text), lent("gpt2"))


def test_who_reads_whom() -> None:
    """A block in sequence: the MLP reads its own layer's heads. A parallel block: it does not."""
    channel = parse_channel("L0.H1>L0.mlp")
    assert check_channel(channel, lent("gpt2")) is channel
    with pytest.raises(pb.PatchbayError, match="side by side"):
        check_channel(channel, lent("phi"))
    assert write_time(Part(None, "embed")) < read_time(lent("phi"), Part(0, "head", 0), "query")
    assert read_time(lent("phi"), Part(None, "unembed"), "unembed") > write_time(Part(1, "mlp"))


# --- components -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_HEADS)
def test_components_of_a_head_are_its_map_and_its_coordinates(name: str) -> None:
    model = lent(name)
    part = Part(1, "head", 2)
    found = components.components(model, part)
    w = components.folded_heads(model, 1)
    W_O = w.W_O[2]
    W_OV = components.per_head(w.W_V, len(w.W_O))[2] @ W_O
    assert close(torch.einsum("c,ci,cj->ij", found.s, found.u, found.v), W_OV)
    n = len(found)
    assert close(found.v @ found.v.T, torch.eye(n))
    assert close(found.u @ found.u.T, torch.eye(n))
    assert bool((found.s[:-1] >= found.s[1:]).all())
    z = torch.randn(5, W_O.shape[0])
    assert close(z @ found.read_z.T, (z @ W_O) @ found.v.T)
    assert close(found.write_z @ W_O, found.v)
    kept = torch.eye(W_O.shape[0]) - (1 - 0.3) * torch.outer(found.read_z[1], found.write_z[1])
    one = torch.outer(found.u[1], found.v[1]) * found.s[1]
    W_V = components.per_head(w.W_V, len(w.W_O))[2]
    assert close(W_V @ kept @ W_O, W_OV - 0.7 * one, of=W_OV)


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi", "granite"])
def test_a_head_writes_what_its_port_says(name: str) -> None:
    """Without a norm after attention, z W_O as folded is the head's out; so is the map from the normed stream at one key."""
    model = lent(name)
    trace = pb.run(model, [[5, 9, 11, 3]], taps=[model.layers[1].heads[2].z, model.layers[1].heads[2].out])
    z, out = trace[model.layers[1].heads[2].z][0], trace[model.layers[1].heads[2].out][0]
    found = components.components(model, "L1.H2")
    assert close((z @ found.read_z.T) @ found.v, out * model.residual_scale)


def test_what_is_written_passes_the_norm_after_the_block() -> None:
    """Gemma 2's norm behind attention, times the root mean square that it divides by."""
    norm, rows = lent("gemma2").hf.model.layers[1].post_attention_layernorm, torch.randn(5, lent("gemma2").d_model)
    rate = (rows.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
    assert close(components.through(norm, rows, 2.0), 2.0 * rate * norm(rows))


@pytest.mark.parametrize("part", ["L0.mlp", "L1.N3", "embed"])
def test_components_of_other_writers(part: str) -> None:
    model = lent("llama")
    found = components.components(model, part)
    rows = components.writing_rows(model, parse_part(part))
    assert close(found.u.T @ (found.s[:, None] * found.v), rows)
    assert close(found.write_z @ rows, found.v)
    assert close(found.read_z, (rows @ found.v.T).T)


def test_an_expert_writes_its_out_map() -> None:
    model = lent("mixtral")
    found = components.components(model, "L1.E2")
    out = model.modules[1].experts.down_proj[2].detach().T  # stored [d_model, d_ff]
    assert close(found.u.T @ (found.s[:, None] * found.v), out)


def test_an_expert_of_a_scaled_stream_writes_scaled() -> None:
    """Granite multiplies what a block adds; so is what an expert writes into the stream."""
    model = lent("granitemoe")
    plain = components.expert_weights(model, 1)[1][2]
    assert model.residual_scale == 0.5
    assert close(components.writing_rows(model, Part(1, "expert", 2)), 0.5 * plain)


def test_a_bias_is_what_attention_adds_whatever_the_prompt() -> None:
    """In every prompt attention adds b_O + sum_h b_V[h] W_O[h]: with W_V set to 0 that is all it adds."""
    model = pb.load(twins.twin("gpt2"))
    with torch.no_grad():
        model.modules[0].attn.c_attn.weight[:, 64:] = 0
    written = components.components(model, Part(0, "attn"), "bias")
    out = pb.run(model, [[5, 9, 11]], taps=[model.layers[0].attn.out])[model.layers[0].attn.out]
    assert close(out[0, 2], written.s[0] * written.v[0] * written.u[0, 0])


def test_a_norm_after_the_block_is_said() -> None:
    assert "up to that" in components.components(lent("gemma2"), "L0.H0").note
    assert components.components(lent("gpt2"), "L0.H0").note == ""


# --- the turn ---------------------------------------------------------------------------------------


def _explicit(d_head: int, width: int, theta: float, offset: int, *, neighbours: bool = False) -> torch.Tensor:
    out = torch.eye(d_head, dtype=torch.float64)
    half = width // 2
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if neighbours else (i, i + half)
        angle = torch.tensor(offset * theta ** (-2 * i / width), dtype=torch.float64)
        out[a, a] = out[b, b] = angle.cos()
        out[a, b], out[b, a] = angle.sin(), -angle.sin()
    return out


@pytest.mark.parametrize(
    ("name", "width", "neighbours"),
    [("llama", 8, False), ("gpt_neox", 2, False), ("gptj", 4, True), ("cohere", 8, True), ("phi", 4, False)],
)
def test_the_turn_is_rotary_positions_written_out(name: str, width: int, neighbours: bool) -> None:
    model = lent(name)
    folded = {0: components.folded_heads(model, 0)}
    turn = rotary.turns(model, [0, 1, 7], folded)[0].rotation
    assert turn is not None
    theta = (getattr(model.config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
    for found, offset in zip(turn, (0, 1, 7), strict=True):
        expected = _explicit(8, width, theta, offset, neighbours=neighbours)
        assert close(found.double(), expected), name


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "falcon alibi"])
def test_without_rotary_positions_nothing_turns(name: str) -> None:
    model = lent(name)
    assert rotary.turns(model, [0, 5], {0: components.folded_heads(model, 0)})[0].rotation is None


def test_layers_without_rotary_positions_do_not_turn() -> None:
    model = lent("smollm3")
    found = rotary.turns(model, [0, 3], {layer: components.folded_heads(model, layer) for layer in (0, 1)})
    assert [found[layer].rotation is None for layer in (0, 1)] == [False, True]


@pytest.mark.parametrize("name", ["qwen3", "cohere normed", "gemma3_text", "olmo2"])
def test_query_key_norms_are_part_of_the_maps(name: str) -> None:
    """At offset 0 the folded maps give the model's own scores up to one factor for each query and each key."""
    model = lent(name)
    folded = {1: components.folded_heads(model, 1)}
    turn = rotary.turns(model, [0], folded)[1]
    stream, seen = rotary._probe(model, 1, [1])
    q = seen[model.layers[1].attn.q][:, :, 0]  # [probe, head, d_head]
    made = torch.einsum("pd,hdr->phr", stream / stream.pow(2).mean(-1, keepdim=True).sqrt(), turn.W_Q)
    bias = model.layers[1].attn.weights().b_Q
    assert bias is None
    assert (torch.nn.functional.cosine_similarity(made, q, dim=-1) > 0.9999).all()


def test_something_unknown_between_weights_and_queries_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pb.load(twins.twin("qwen3"))
    monkeypatch.setattr(weights, "QUERY_KEY_NORMS", ())
    with pytest.raises(pb.PatchbayError, match="something stands between"):
        rotary.turns(model, [0, 1], {0: components.folded_heads(model, 0)})


@pytest.mark.parametrize("offsets", [[-1], [], [64]])
def test_offsets_outside_the_model_are_refused(offsets: list[int]) -> None:
    with pytest.raises(pb.PatchbayError, match=r"lie in 0\.\.63"):
        rotary.turns(lent("llama"), offsets, {0: components.folded_heads(lent("llama"), 0)})
