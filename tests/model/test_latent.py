"""Latent attention (DeepSeek): maps out of factors, the number in place of the inner norm, and channels found, proved and turned."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.find import _composition, _haar
from patchbay.model import rotary, weights
from patchbay.model.check import verify
from patchbay.signal.channel import parse_channel
from patchbay.signal.port import Part, Port
from patchbay.tiny import twins
from patchbay.turn.channel import edited_weight
from patchbay.wiring import components
from tests.shares import by_turns
from tests.tolerance import NOISE, close

NAMES = ("deepseek_v3", "deepseek_v2", "glm4_moe_lite")
HEADS: dict[str, Any] = {"writers": ["head"], "kinds": ["query", "key", "value"]}
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1)).tolist()
YARN = twins._YARN  # lengthens what it turns by 0.1 log 2 + 1
FORMS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "plain queries": {"q_lora_rank": None},
    "biased": {"attention_bias": True},
    "turned by halves": {"rope_interleave": False},
    "yarn": {"rope_parameters": YARN},
}


@functools.cache
def lent(name: str, form: str = "as it is", seed: int = 0) -> pb.Model:
    return pb.load(twins.twin(name, seed, **FORMS[form]))


def row(result: pb.Result, channel: str) -> dict[str, Any]:
    return next(row for row in result.table() if str(row["part"]) == channel)


# --- the maps -----------------------------------------------------------------------------------------


def by_modules(model: pb.Model, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the inner norms of queries and of keys and values multiply each token's latent by, [prompt, position], from hooks."""
    attn: Any = model.modules[layer].attn
    seen: dict[str, Tensor] = {}
    found = []
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        norm = getattr(attn, name)
        if norm is None:
            found.append(torch.ones(x.shape[:2]))
            continue
        hook = norm.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (args[0], out)}))
        try:
            pb.run(model, IDS)
        finally:
            hook.remove()
        c, out = seen[name]
        found.append(((out / norm.weight) / c).median(-1).values)  # the same number in every dimension
    return found[0], found[1]


def assumed(model: pb.Model, layer: int) -> tuple[float, float]:
    """The convention, from the parameters: 1 / sqrt((|G W_a|_F^2 + |b_a|^2) / d_latent + eps); 1 where there is no latent."""
    at: Any = model.modules[layer]
    gain, out = at.norm_attn.weight.detach().double(), []
    for down, norm in (
        (at.attn.q_a_proj, at.attn.q_a_layernorm),
        (at.attn.kv_a_proj_with_mqa, at.attn.kv_a_layernorm),
    ):
        if norm is None:
            out.append(1.0)
            continue
        n = len(norm.weight)
        w = down.weight.detach().double()[:n] * gain  # [d_latent, d_model]
        power = w.pow(2).sum() + (0.0 if down.bias is None else down.bias.detach().double()[:n].pow(2).sum())
        out.append(float((power / n + norm.variance_epsilon) ** -0.5))
    return out[0], out[1]


@pytest.mark.parametrize(("name", "form"), by_turns(NAMES, FORMS, of=2))
def test_the_inner_scale_frozen_they_give_q_k_v_and_out(name: str, form: str) -> None:
    """q = x W_Q, k = x W_K, v = x W_V and out = z W_O at every position, each token's norm as the modules have it."""
    model = lent(name, form)
    for layer in range(2):
        at, attn = model.modules[layer], model.layers[layer].attn
        ports = [attn.q, attn.k, attn.v, attn.z, attn.head_out, model.layers[layer].resid_in]
        seen = pb.run(model, IDS, taps=ports)
        x = at.norm_attn(seen[ports[5]])
        w = attn.weights()
        q, k, v = (
            torch.einsum("pkm,hmd->phkd", x, m) + (0 if b is None else b[:, None])
            for m, b in ((w.W_Q, w.b_Q), (w.W_K, w.b_K), (w.W_V, w.b_V))
        )
        by_query, by_key = by_modules(model, layer, x)
        assumed_query, assumed_key = assumed(model, layer)
        by_query, by_key = (by_query / assumed_query)[:, None, :, None], (by_key / assumed_key)[:, None, :, None]
        still, size = 8, 0.1 * torch.tensor(2.0).log() + 1 if form == "yarn" else 1.0
        assert close(q[..., :still] * by_query, seen[attn.q][..., :still])
        assert close(k[..., :still] * by_key, seen[attn.k][..., :still])
        assert close((q[..., still:] * by_query * size)[:, :, 0], seen[attn.q][:, :, 0, still:])
        assert close(k[:, :, 0, still:] * size, seen[attn.k][:, :, 0, still:])
        assert close(v * by_key, seen[attn.v])
        assert close(torch.einsum("pqhd,hdm->pqhm", seen[attn.z], w.W_O), seen[attn.head_out])
        rates = attn.inner_rates(x)
        assert close(rates[0][..., 0], by_query[:, 0, :, 0].double())
        assert close(rates[2][..., 0], by_key[:, 0, :, 0].double())
        assert torch.equal(rates[1][..., still:], torch.ones_like(rates[1][..., still:]))


@pytest.mark.parametrize("name", NAMES)
def test_the_number_is_that_of_a_root_mean_square_latent(name: str) -> None:
    """The mean of mean(c^2) over many isotropic unit-variance streams behind the layer's gain."""
    at: Any = lent(name).modules[1]
    x = torch.randn(20_000, 32, generator=torch.Generator().manual_seed(0)) * at.norm_attn.weight.detach()
    latent = x @ at.attn.kv_a_proj_with_mqa.weight.detach()[:16].T
    found = (latent.pow(2).mean() + at.attn.kv_a_layernorm.variance_epsilon).rsqrt()
    assert float(found) == pytest.approx(assumed(lent(name), 1)[1], rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_what_holds_over_the_whole_head_is_checked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-check has rows for it, and they fail where the convention's number is not what the maps hold."""
    model = pb.load(twins.twin(name))
    rows = verify(model)
    said = {row.claim for row in rows if "inner scale" in row.claim}
    assert {claim.split(": ")[-1] for claim in said} >= {"what is not turned", "the rotary part at position 0"}
    assert all(row.passed for row in rows)
    rates = weights.Latent.rates
    monkeypatch.setattr(weights.Latent, "rates", lambda self, x: 1.01 * rates(self, x))
    failed = {row.signal for row in verify(model) if not row.passed}
    assert failed == {"attn.q", "attn.k", "attn.v"}
    with pytest.raises(pb.PatchbayError, match=r"weights of L0.attn cannot be read: the stream times W_V is not v"):
        pb.load(twins.twin(name)).layers[0].attn.weights()


@pytest.mark.parametrize(("name", "form"), by_turns(NAMES, FORMS, of=2))
def test_only_the_rotary_part_turns(name: str, form: str) -> None:
    """R is 1 on what is not turned, pairs of the family's layout turned by t theta^(-2i/n) on the rest; and with it and the
    tokens' inner scales W_Q R W_K^T gives every logit of the model."""
    model = lent(name, form)
    folded = {1: components.folded_heads(model, 1)}
    turn = rotary.turns(model, list(range(9)), folded)[1]
    assert turn.rotation is not None
    pairs = [(0, 1), (2, 3)] if name == "deepseek_v2" else [(0, 2), (1, 3)]
    for t, found in enumerate(turn.rotation):
        expected = torch.eye(12, dtype=torch.float64)
        for i, (a, b) in enumerate(pairs):
            angle = torch.tensor(t * 10000.0 ** (-i / 2), dtype=torch.float64)
            a, b = a + 8, b + 8
            expected[a, a] = expected[b, b] = angle.cos()
            expected[a, b], expected[b, a] = angle.sin(), -angle.sin()
        if form != "yarn":  # which has other frequencies
            assert close(found.double(), expected)
        assert torch.equal(found[:8], torch.eye(12)[:8])
    if form == "biased":
        return
    attn, ports = model.layers[1].attn, [model.layers[1].resid_in, model.layers[1].attn.q, model.layers[1].attn.k]
    seen = pb.run(model, IDS, taps=ports)
    stream = seen[ports[0]]
    unit = stream / (stream.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    rates = attn.inner_rates(model.modules[1].norm_attn(stream))
    q, k = (
        torch.einsum("pkm,hmd->phkd", unit, w) * r[:, None] for w, r in zip((turn.W_Q, turn.W_K), rates, strict=False)
    )
    logits = torch.einsum("phqd,phkd->phqk", seen[attn.q], seen[attn.k])
    for query, key in ((8, 0), (5, 4), (7, 2), (3, 3)):
        made = torch.einsum("phd,de,phe->ph", q[:, :, query], turn.rotation[query - key].double(), k[:, :, key])
        assert close(made, logits[:, :, query, key].double(), noise=4 * NOISE)  # each factor was rounded on its way


def test_what_stands_in_the_latent_besides_a_plain_norm_is_refused() -> None:
    model = pb.load(twins.twin("deepseek_v3"))
    model.layers[0].attn.weights()
    attn: Any = model.modules[0].attn
    attn.kv_a_layernorm = torch.nn.LayerNorm(16)
    with pytest.raises(pb.PatchbayError, match="no plain RMS norm before a map"):
        model.layers[0].attn.weights()
    attn.kv_b_proj = None
    with pytest.raises(pb.PatchbayError, match="has no kv_a_proj_with_mqa, kv_a_layernorm, kv_b_proj"):
        model.layers[0].attn.weights()


def test_a_bias_before_the_inner_norm_is_no_part_of_what_attention_always_adds() -> None:
    """v holds b_a times a number that differs by token: what is added whatever the prompt is the output bias alone."""
    model = lent("deepseek_v3", "biased")
    assert model.layers[0].attn.weights().b_V is not None
    written = components.components(model, Part(0, "attn"), "bias")
    bias = model.modules[0].attn_proj.bias.detach()
    assert close(written.s[0] * written.u[0, 0] * written.v[0], bias)


# --- scores -------------------------------------------------------------------------------------------


def wide(model: pb.Model, layer: int, head: int, offset: int | None = None) -> dict[str, Tensor]:
    """W_OV and W_Q R W_K^T of a head as d_model x d_model matrices of the module's parameters, without `weights` or `wiring`."""
    at: Any = model.modules[layer]
    gain = at.norm_attn.weight.detach().double()[:, None]
    n_query, n_key = assumed(model, layer)
    down, up = at.attn.kv_a_proj_with_mqa.weight.detach().double(), at.attn.kv_b_proj.weight.detach().double()
    inner = at.attn.kv_a_layernorm.weight.detach().double()[:, None]
    n = len(inner)
    up = up.view(4, -1, n)[head]  # key's part, then value
    value = n_key * (gain * down[:n].T) @ (inner * up[8:].T)
    out = at.attn_proj.weight.detach().double().view(32, 4, 6)[:, head].T
    found = {"v": value @ out}
    key_still = n_key * (gain * down[:n].T) @ (inner * up[:8].T)
    query = at.attn.q_b_proj.weight.detach().double().view(4, 12, 16)[head].T
    query = (
        n_query
        * (gain * at.attn.q_a_proj.weight.detach().double().T)
        @ (at.attn.q_a_layernorm.weight.detach().double()[:, None] * query)
    )
    key_turned = gain * down[n:].T
    if offset is not None:  # neighbouring dimensions turn together in both layouts, as the projections write them
        turn = torch.zeros(4, 4, dtype=torch.float64)
        for i in (0, 1):
            angle = torch.tensor(offset * 10000.0 ** (-i / 2), dtype=torch.float64)
            a, b = 2 * i, 2 * i + 1
            turn[a, a] = turn[b, b] = angle.cos()
            turn[a, b], turn[b, a] = angle.sin(), -angle.sin()
        found["q"] = query[:, :8] @ key_still.T + query[:, 8:] @ turn @ key_turned.T
        found["k"] = found["q"].T
    return found


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    """Scores of whole heads and of components as products of d_model x d_model matrices, pair by pair, offset by offset."""
    model, offsets = lent(name), [0, 1, 5]
    result = pb.find.channels(model, offsets=offsets, **HEADS)
    for writer, reader in itertools.product(range(4), range(4)):
        into = wide(model, 0, writer)["v"]
        vh = torch.linalg.svd(into).Vh
        i = result.labels_of("writer").index(f"L0.H{writer}")
        at = [wide(model, 1, reader, offset) for offset in offsets]
        for letter in "qkv":
            j = result.labels_of("reader").index(f"L1.H{reader}.{letter}")
            total = sum(one[letter].norm().square() for one in at)
            expected = (sum((into @ one[letter]).norm().square() for one in at) / total).sqrt() / into.norm()
            assert close(result["whole"][i, j], expected)
            for c in range(6):
                one_row = (sum((vh[c] @ one[letter]).norm().square() for one in at) / total).sqrt()
                assert close(result["by_component"][i, c, j], one_row, of=1.0)


@pytest.mark.parametrize(("name", "form"), [*itertools.product(NAMES, ["as it is"]), ("deepseek_v3", "plain queries")])
def test_identity(name: str, form: str) -> None:
    """CS^2 = sum s_i^2 CS_i^2 / sum s_i^2, the left side by inner products of whole writers, for query, key and value."""
    hf = twins.twin(name, **FORMS[form]).double()
    hf.set_experts_implementation("eager")  # the fused one has no float64
    model = pb.load(hf)
    whole = pb.find.channels(model, components=False, **HEADS)
    by_component = pb.find.channels(model, **HEADS)
    later = ~whole["whole"].isnan()
    assert {label[-1] for label, any_ in zip(whole.labels_of("reader"), later.any(0), strict=True) if any_} == set(
        "qkv"
    )
    for i, source in enumerate(whole.labels_of("writer")):
        s2 = components.components(model, source).s.square()
        parts = by_component["by_component"][i].double()[: len(s2)]
        mean = (s2[:, None] * parts.square()).sum(0) / s2.sum()
        assert close(mean[later[i]].sqrt(), whole["whole"][i][later[i]])


def test_which_scores_depend_on_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the queries' number changes no score; ten times that of keys and values changes query and key scores, as the
    notes say, and no value score."""
    model = lent("deepseek_v3")
    plain = pb.find.channels(model, nulls=0, **HEADS)
    assert any("at the weight of a root mean square latent" in note for note in plain.notes)
    value_only = pb.find.channels(model, nulls=0, writers=["head"], kinds=["value"])
    assert not any("root mean square" in note for note in value_only.notes)
    maps = weights.Latent.maps
    kinds = [label[-1] for label in plain.labels_of("reader")]
    for d_up, letters in ((12, ""), (14, "qk")):  # width of W_up: query's 12, key's 8 and value's 6

        def larger(self: weights.Latent, d_up: int = d_up) -> Any:
            made = maps(self)
            return (10 * made[0], made[1]) if self.W_up.shape[2] == d_up else made

        monkeypatch.setattr(weights.Latent, "maps", larger)
        monkeypatch.setattr(rotary, "_check_direction", lambda *args: torch.ones(12, dtype=torch.float64))
        found = pb.find.channels(model, nulls=0, **HEADS)
        monkeypatch.undo()
        for j, kind in enumerate(kinds):
            both = (found["whole"][:, j].nan_to_num(), plain["whole"][:, j].nan_to_num())
            if plain["whole"][:, j].isfinite().any():
                assert bool(close(*both)) == (kind not in letters), (d_up, kind)


# --- truth and null -----------------------------------------------------------------------------------

BIG: dict[str, Any] = dict(hidden_size=256, q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16)
BIG |= dict(v_head_dim=32, head_dim=16)
OFFSETS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


@torch.no_grad()
def planted(name: str, kind: str, strength: float) -> pb.Model:
    """Component 5 of L0.H1 has the composition score `strength` with L1.H2, through the map into the latent of L1.

    v is taken out of that map and put back along one direction of the latent, at the amount of which the score is `strength`."""
    hf = twins.twin(name, seed=2, **BIG)
    attn: Any = hf.model.layers[1].self_attn
    model = pb.load(hf)
    v = components.components(model, "L0.H1").v[5]
    down = attn.q_a_proj if kind == "query" else attn.kv_a_proj_with_mqa
    n = 64
    gain = hf.model.layers[1].input_layernorm.weight
    rest = down.weight.clone()
    read = v / gain  # so that the folded map, weight * gain, reads v
    rest[:n] -= torch.outer((rest[:n] * gain) @ v, read)
    inward = torch.nn.functional.normalize(torch.randn(n, generator=torch.Generator().manual_seed(4)), dim=0)

    rotation = rotary.turns(model, OFFSETS, {1: components.folded_heads(model, 1)})[1].rotation
    assert rotation is not None

    def put(amount: float) -> float:
        down.weight.copy_(rest)
        down.weight[:n] += amount * torch.outer(inward, v / gain)
        down.weight[:n] *= rest[:n].norm() / down.weight[:n].norm()
        w = components.folded_heads(model, 1)
        made = [w.W_OV(2)] if kind == "value" else [w.W_Q[2] @ turn @ w.W_K[2].T for turn in rotation]
        made = [one.T for one in made] if kind == "key" else made
        return float((sum((v @ one).square().sum() for one in made) / sum(one.square().sum() for one in made)) ** 0.5)

    low, high = 0.0, 200.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if put(middle) < strength else (low, middle)
    return pb.load(hf)


@pytest.mark.parametrize(
    ("name", "kind"), [*itertools.product(["deepseek_v3"], ["query", "key", "value"]), ("deepseek_v2", "key")]
)
def test_planted(name: str, kind: str) -> None:
    """A rank-1 channel on a middle component: strength 0.2 beyond z 5, 0.5 beyond z 40, at its own score, first of all."""
    for strength, least in ((0.2, 5.0), (0.5, 40.0)):
        model = planted(name, kind, strength)
        result = pb.find.channels(model, **HEADS)
        found = row(result, f"L0.H1.C5>L1.H2.{kind[0]}")
        assert found["value"] == pytest.approx(strength, abs=1e-3)
        assert found["z"] > least
        top = {str(channel) for channel in result.top(4)}
        assert all(channel.startswith("L0.H1.C5>L1.H") for channel in top), top  # all heads of L1 read that latent


def test_null() -> None:
    """Random latent models: p uniform, false finds at the stated rate, whole heads and components alike."""
    p, passing, tested = [], 0, 0
    for name, seed in itertools.product(NAMES, range(4)):
        model = lent(name, seed=seed)
        net = _composition.gather(model, writing=["head"], kinds=["query", "key", "value"], components=True)
        found = _composition.score(net)
        flat = _haar.upper_tail(found.squares, *_haar.moments(found.written, found.read, 32))
        unit = torch.ones(1, 3, dtype=torch.float64)
        rows = torch.cat(list(found.rows.values())).double()
        each = _haar.upper_tail(rows, *(m[0] for m in _haar.moments(unit, found.read, 32)))
        p += [flat[~flat.isnan()], each[~each.isnan()]]
        passing += int(pb.find.channels(model, nulls=0, **HEADS)["p_adjusted"].le(0.05).any())
        tested += 1
    flat = torch.cat(p)
    for level in (0.5, 0.2, 0.05):
        share = float((flat <= level).double().mean())
        assert abs(share - level) < 0.35 * level + 0.002, (level, share)
    assert passing <= 3, f"{passing} of {tested} random models had a find at a rate of 0.05"
    result = pb.find.channels(lent("deepseek_v3"), nulls=400, **HEADS)
    assert abs(float(result["null_check_mean"])) < 4
    assert float(result["null_check_spread"]) == pytest.approx(1.0, abs=0.2)


# --- turned and proved --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "strength"), [*itertools.product(NAMES, [0.0, -1.5]), ("deepseek_v2", 0.5)])
def test_the_knob_is_the_weights_changed(name: str, strength: float) -> None:
    """As W_O of the head, and as its value columns of the map out of the latent: the same logits; at 1 nothing, bit for bit."""
    model = lent(name)
    for text in ("L0.H1.C0", "L1.H3.C4"):
        layer, head = int(text[1]), int(text[4])
        knob = pb.turn.channel(model, text, strength=strength)
        plain, found = (pb.run(model, IDS, edits=e).logits for e in ([], [knob]))
        assert (found - plain).abs().max() > 1e-4 * plain.abs().max()
        assert torch.equal(pb.run(model, IDS, edits=[knob.at(1.0)]).logits, plain)
        for form in ("W_O", "W_V"):
            weight, bias = edited_weight(model, parse_channel(text), strength, matrix=form)  # type: ignore[arg-type]
            assert bias is None
            hf = copy.deepcopy(model.hf)
            attn: Any = hf.model.layers[layer].self_attn
            with torch.no_grad():
                if form == "W_O":
                    attn.o_proj.weight[:, 6 * head : 6 * head + 6] = weight.T
                else:
                    attn.kv_b_proj.weight.view(4, 14, 16)[head, 8:] = weight.T
                expected = hf(torch.tensor(IDS)).logits
            assert close(found, expected), (form, text)


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_changed_are_the_formula(name: str) -> None:
    """W_V W_O after the edit = W_V W_O - (1 - t) s_i u_i v_i^T, the convention's number and the norms folded in."""
    model = lent(name)
    found, w = components.components(model, "L1.H1"), model.layers[1].attn.weights(fold_norm=True)
    assert "one positive number per token" in found.note
    W_O, _ = edited_weight(model, parse_channel("L1.H1.C3"), 0.25)
    expected = wide(model, 1, 1)["v"].float() - 0.75 * found.s[3] * torch.outer(found.u[3], found.v[3])
    assert close(w.W_V[1] @ W_O, expected)


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_on_channels_works(name: str) -> None:
    """Content, communities, changes between models and the proof of a channel: they run and say what the scores depend on."""
    model, other = lent(name), lent(name, seed=1)
    content = pb.find.channel_content(model, IDS * 3, "L0.H1.C1", draws=5)
    z = pb.run(model, IDS * 3, taps=[model.layers[0].heads[1].out])[model.layers[0].heads[1].out]
    v = components.components(model, "L0.H1").v[1]
    assert close(content["coordinate"].float(), z @ v)
    assert any("one positive number per token" in note for note in content.notes)
    groups = pb.find.communities(model, rate=1.0, draws=3)
    assert any("root mean square latent" in note for note in groups.notes)
    changes = pb.diff(model, other)
    assert any("root mean square latent" in note for note in changes.notes)
    task = pb.Task("any", [row[:6] for row in IDS * 2], [7] * 4, [[9]] * 4)
    for kind in "qkv":
        proof = pb.prove.channel(model, task, f"L0.H1.C1>L1.H2.{kind}", sizes=[1, 3], draws=2)  # type: ignore[arg-type]
        assert proof["composition"].shape == (6,)
        assert any("root mean square latent" in note for note in proof.notes) == (kind != "v")


def test_an_edge_is_heard_through_the_reader_alone() -> None:
    """The edge to a key by hand: L1.H2's key recomputed from a stream without the component, all else as it was."""
    model = lent("deepseek_v3")
    task = pb.Task("any", [row[:6] for row in IDS], [7, 8], [[9], [9]])
    proof = pb.prove.channel(model, task, "L0.H1.C1>L1.H2.k", sizes=[1], draws=1)  # type: ignore[arg-type]
    found, z = components.components(model, "L0.H1"), model.layers[0].heads[1].z
    ids = [list(row) for row in task.clean]
    keep = [model.layers[0].mlp.out]
    base = pb.run(model, ids, taps=[z, *keep])
    gone = base[z] - (base[z] @ found.read_z[1])[..., None] * found.write_z[1]
    held = [pb.replace(port, base[port]) for port in keep]
    key = model.layers[1].groups[2].k
    heard = pb.run(model, ids, taps=[key], edits=[pb.replace(z, gone), *held])[key]
    last = [pb.run(model, ids, edits=e).last_logits for e in ([], [pb.replace(key, heard)])]
    lost = (task.score(last[0]) - task.score(last[1])).mean()
    assert close(float(proof["edge"]), float(lost), of=1.0)
    assert abs(float(lost)) > 1e-5


def test_the_half_precision_twin_is_proved_too() -> None:
    model = pb.load(twins.twin("deepseek_v3").to(torch.bfloat16))
    assert model.layers[0].attn.weights().W_K.dtype == torch.bfloat16
    assert not [str(row) for row in verify(model) if not row.passed and "inner scale" in row.claim]
    assert pb.find.channels(model, nulls=0, **HEADS)["whole"].isfinite().any()
    assert Port("attn.k", 0) in model.ports()
