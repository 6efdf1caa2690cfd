"""find.channels: planted channels, the identity, plain products, the rotation null by draws, rotary offsets, shared keys, refusals."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.find import _composition, _haar
from patchbay.model import rotary, weights
from patchbay.signal.channel import Channel, parse_channel
from patchbay.tiny import planted, twins
from patchbay.wiring import components, wiring
from patchbay.wiring.components import check_channel
from tests.given import lent
from tests.shares import by_turns
from tests.tolerance import close

HEADS: dict[str, Any] = {"writers": ["head"], "kinds": ["query", "key", "value"]}


def row(result: pb.Result, channel: str) -> dict[str, Any]:
    return next(row for row in result.table() if str(row["part"]) == channel)


# --- truth ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("composition", "form"), by_turns(["query", "key", "value"], ["gpt2", "llama"], of=2))
def test_planted(form: str, composition: str) -> None:
    """A rank-1 channel on a middle component: strength 0.2 beyond z 5, 0.5 beyond z 40, at their own scores, first of all."""
    for strength, least in ((0.2, 5.0), (0.5, 40.0)):
        made = planted.channel(form=form, composition=composition, strength=strength, component=5)  # type: ignore[arg-type]
        result = pb.find.channels(pb.load(made.model), **HEADS)
        name = f"{made.truth['writer']}.C5>{made.truth['reader']}.{composition[0]}"
        found = row(result, name)
        assert close(found["value"], strength, of=1.0)
        assert found["z"] > least
        assert (found["value"] - found["null_mean"]) / found["null_sd"] > 5
        group = [f"{made.truth['writer']}.C5>{reader}.{composition[0]}" for reader in made.truth["readers"]]
        assert {str(channel) for channel in result.top(len(group))} == set(group)
        assert len(result.table()) <= len(group) + 2, "almost nothing else passes"


def test_a_channel_of_a_small_component_hides_in_the_whole_score() -> None:
    made = planted.channel(form="gpt2", strength=0.3, component=40)
    model = pb.load(made.model)
    whole = pb.find.channels(model, components=False, **HEADS)
    by_component = pb.find.channels(model, **HEADS)
    pair = f"{made.truth['writer']}>{made.truth['reader']}.q"
    assert pair not in [str(channel) for channel in whole.top(1)] or row(whole, pair)["value"] < 0.1
    assert str(by_component.top(1)[0]) == f"{made.truth['writer']}.C40>{made.truth['reader']}.q"


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi", "gemma2", "qwen3", "falcon"])
def test_identity(name: str) -> None:
    """CS^2 = sum s_i^2 CS_i^2 / sum s_i^2, the left side by inner products of whole writers, for query, key and value."""
    model = pb.load(twins.twin(name).double())
    whole = pb.find.channels(model, components=False, **HEADS)
    by_component = pb.find.channels(model, **HEADS)
    later = ~whole["whole"].isnan()
    kinds = {label[-1] for label, any_later in zip(whole.labels_of("reader"), later.any(0), strict=True) if any_later}
    assert kinds == {"q", "k", "v"}
    for i, source in enumerate(whole.labels_of("writer")):
        s2 = components.components(model, source).s.square()
        parts = by_component["by_component"][i].double()[: len(s2)]  # [component, reader]
        mean = (s2[:, None] * parts.square()).sum(0) / s2.sum()
        assert close(mean[later[i]].sqrt(), whole["whole"][i][later[i]])


def test_blocks_of_any_size_give_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Symmetric matrices summed block by block, the last block smaller: as when one block is all."""
    whole = pb.find.channels(lent("llama"), components=False, nulls=0)
    monkeypatch.setattr(_composition, "BLOCK", 7)
    blocks = pb.find.channels(lent("llama"), components=False, nulls=0)
    assert close(whole["whole"], blocks["whole"], equal_nan=True)


def _products(model: pb.Model, writer: int, reader: int) -> dict[str, torch.Tensor]:
    """W_OV of L0's head against W_QK, W_QK^T and W_OV of L1's, as d_model x d_model matrices of the model's own weights."""
    at = [layer.attn.weights(fold_norm=True) for layer in model.layers]

    def wide(w: torch.Tensor, head: int, n_heads: int) -> torch.Tensor:
        return w[head * len(w) // n_heads].detach().double()

    n = model.n_heads(0)
    ov = [wide(at[i].W_V, h, n) @ wide(at[i].W_O, h, n) for i, h in ((0, writer), (1, reader))]
    qk = wide(at[1].W_Q, reader, n) @ wide(at[1].W_K, reader, n).T
    return {"in": ov[0], "q": qk, "k": qk.T, "v": ov[1]}


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neo", "bloom"])
def test_reference(name: str) -> None:
    """Scores of whole heads and of components as plain products of d_model x d_model matrices, pair by pair."""
    model = lent(name)
    result = pb.find.channels(model, components=True, **HEADS)
    for writer, reader in itertools.product(range(4), range(4)):
        m = _products(model, writer, reader)
        vh = torch.linalg.svd(m["in"]).Vh
        i = result.labels_of("writer").index(f"L0.H{writer}")
        for letter in "qkv":
            j = result.labels_of("reader").index(f"L1.H{reader}.{letter}")
            expected = (m["in"] @ m[letter]).norm() / (m["in"].norm() * m[letter].norm())
            assert close(result["whole"][i, j], expected)
            for c in range(8):
                one = (vh[c] @ m[letter]).norm() / m[letter].norm()
                assert close(result["by_component"][i, c, j], one)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "gemma2"])
def test_the_other_writers_and_readers_as_plain_products(name: str) -> None:
    model = lent(name)
    result = pb.find.channels(model, components=False)
    writers, readers = result.labels_of("writer"), result.labels_of("reader")
    w = {text: _out_map(model, text) for text in writers}
    r = {text: _in_map(model, text) for text in readers if text[-2:] not in (".q", ".k")}
    for i, j in ((~result["whole"].isnan()).nonzero()).tolist():
        if readers[j] in r:
            made = (w[writers[i]] @ r[readers[j]]).norm() / (w[writers[i]].norm() * r[readers[j]].norm())
            assert close(result["whole"][i, j], made), (writers[i], readers[j])


def _out_map(model: pb.Model, text: str) -> torch.Tensor:
    source = parse_channel(text)
    found = components.components(model, source.writer, source.component if isinstance(source.component, str) else None)
    return (found.s[:, None] * found.v).double()


def _in_map(model: pb.Model, text: str) -> torch.Tensor:
    """The reading side with its norm folded, from the modules."""
    if text == "unembed":
        rows = model.unembed.weight.detach().double()
        return _folded(model.final_norm_module, (rows - rows.mean(0)).T)
    layer = model.modules[int(text[1])]
    if text.endswith(".v"):
        w = model.layers[int(text[1])].attn.weights(fold_norm=True)
        head = int(text.split("H")[1][0])
        out = w.W_O[head].detach().double()
        if layer.attn_added is not layer.attn and layer.attn_added is not layer.attn_proj:
            out = out * weights.norm_parts(layer.attn_added)[0].detach().double()
        return w.W_V[head * len(w.W_V) // len(w.W_Q)].detach().double() @ out
    if text.endswith("router"):
        return _folded(layer.norm_mlp, layer.router.weight.detach().double().T)
    if ".E" in text:
        return _folded(layer.norm_mlp, layer.experts.gate_up_proj[int(text.split("E")[1])].detach().double().T)
    w = model.layers[int(text[1])].mlp.weights()
    sides = [side.detach().double() for side in (w.W_in, w.W_gate) if side is not None]
    return _folded(layer.norm_mlp, torch.cat(sides, 1))


def _folded(norm: Any, weight: torch.Tensor) -> torch.Tensor:
    gain, _, centred = weights.norm_parts(norm)
    out = gain.detach().double()[:, None] * weight
    return out - out.mean(0) if centred else out


def test_orientation() -> None:
    """Writers write rows: a head that writes along e_0 is read by the query whose W_Q reads e_0, and by no other input."""
    hf = twins.twin("llama", num_key_value_heads=4)
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.input_layernorm.weight.fill_(1.0)
        at = [layer.self_attn for layer in hf.model.layers]
        at[0].o_proj.weight.zero_()
        at[0].o_proj.weight[0, 0:8] = 1.0  # head 0 of layer 0 writes along e_0 (Linear stores [out, in])
        at[0].o_proj.weight[1, 8:32] = 1.0  # the others along e_1
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(at[1], name).weight[:, :2] = 0
        at[1].q_proj.weight[0:8, 0] = 3.0  # only head 0's query reads e_0
    result = pb.find.channels(pb.load(hf), **HEADS)
    whole, readers = result["whole"][0], result.labels_of("reader")
    assert [readers[j] for j in (whole > 1e-3).nonzero()[:, 0].tolist()] == ["L1.H0.q"]
    assert result["whole"][1, readers.index("L1.H0.q")] < 1e-3


def test_grouped_queries_are_the_expanded_model() -> None:
    """Keys and values copied for every query head: the same scores."""
    shared = twins.twin("llama")
    wide = twins.twin("llama", num_key_value_heads=4)
    with torch.no_grad():
        state = dict(shared.state_dict())
        for name, weight in state.items():
            if "k_proj" in name or "v_proj" in name:
                state[name] = weight.view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32)
        wide.load_state_dict(state)
    ours, theirs = (pb.find.channels(pb.load(hf), nulls=0) for hf in (shared, wide))
    assert ours.labels_of("reader") == theirs.labels_of("reader")
    for variable in ("whole", "whole_z", "by_component"):
        assert close(ours[variable], theirs[variable], equal_nan=True), variable


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gptj", "qwen3", "deepseek_v3"])
def test_offsets_are_the_turn_written_out(name: str) -> None:
    """The score at each offset with W_Q R_D W_K^T as a matrix; the score over offsets has both norms averaged."""
    model = lent(name)
    offsets = [0, 1, 5]
    result = pb.find.channels(
        model, writers=["L0.H1"], readers=["L1.H2"], kinds=["query", "key"], components=False, offsets=offsets
    )
    w = components.folded_heads(model, 0)
    writer = components.per_head(w.W_V, 4)[1].double() @ w.W_O[1].double()
    turn = rotary.turns(model, offsets, {1: components.folded_heads(model, 1)})[1]
    assert turn.rotation is not None
    W_Q, W_K = turn.W_Q[2].double(), components.per_head(turn.W_K, 4)[2].double()
    wide = [W_Q @ R.double() @ W_K.T for R in turn.rotation]
    for kind, matrices in (("q", wide), ("k", [m.T for m in wide])):
        at = [str(part) for part in result.parts or []].index(f"L0.H1>L1.H2.{kind}")
        above, below = [(writer @ m).norm().square() for m in matrices], [m.norm().square() for m in matrices]
        expected = torch.stack([(a / b).sqrt() for a, b in zip(above, below, strict=True)]) / writer.norm()
        assert close(result["by_offset"][at], expected), kind
        overall = (sum(above) / sum(below)) ** 0.5 / writer.norm()
        assert close(result.values[at], overall)


# --- the null ---------------------------------------------------------------------------------------


def test_null() -> None:
    """Random models: p uniform, false finds at the stated rate, whole heads and components alike."""
    p, passing, tested = [], 0, 0
    for name, seed in itertools.product(["gpt2", "llama", "phi", "qwen3"], range(4)):
        hf = twins.twin(name, seed)
        net = _composition.gather(pb.load(hf), writing=["head"], kinds=["query", "key", "value"], components=True)
        found = _composition.score(net)
        flat = _haar.upper_tail(found.squares, *_haar.moments(found.written, found.read, 32))
        p.append(flat[~flat.isnan()])
        unit = torch.ones(1, 3, dtype=torch.float64)
        rows = torch.cat(list(found.rows.values())).double()
        each = _haar.upper_tail(rows, *(m[0] for m in _haar.moments(unit, found.read, 32)))
        p.append(each[~each.isnan()])
        passing += int(pb.find.channels(pb.load(hf), nulls=0, **HEADS)["p_adjusted"].le(0.05).any())
        tested += 1
    flat = torch.cat(p)
    for level in (0.5, 0.2, 0.05, 0.01):
        share = float((flat <= level).double().mean())
        assert abs(share - level) < 0.25 * level + 0.002, (level, share)
    assert passing <= 4, f"{passing} of {tested} random models had a find at a rate of 0.05"


@pytest.mark.parametrize(("rank_a", "rank_g", "d"), [(1, 8, 32), (8, 8, 32), (4, 30, 32), (32, 32, 32), (1, 1, 24)])
def test_the_closed_form_is_what_random_rotations_give(rank_a: int, rank_g: int, d: int) -> None:
    """Mean, variance, skewness and tail against whole random orthogonal matrices put between the two."""
    generator = torch.Generator().manual_seed(1)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    P = torch.logspace(0, -1, rank_a, dtype=torch.float64)[:, None] * normal(rank_a, d)
    F = normal(d, rank_g) * torch.logspace(0, -0.5, rank_g, dtype=torch.float64)
    turned, upper = torch.linalg.qr(normal(4000, d, d))
    turned = turned * upper.diagonal(dim1=1, dim2=2).sign()[:, None]  # so that it is uniform
    x = (P @ turned @ F).square().sum((1, 2)) / (P.square().sum() * F.square().sum())
    a, g = wiring.Factors.of(P[None]), wiring.Factors.of(F.T[None])
    mean, variance, third = (m[0, 0] for m in _haar.moments(a.traces(), g.traces(), d))
    assert close(mean, 1 / d)
    assert float(x.mean()) == pytest.approx(float(mean), rel=5 / 4000**0.5 * float(variance.sqrt() / mean) + 1e-9)
    assert float(x.var()) == pytest.approx(float(variance), rel=0.2)
    assert float(((x - mean) ** 3).mean()) == pytest.approx(float(third), rel=0.5, abs=0.3 * float(variance) ** 1.5)
    score_mean, score_sd = _haar.of_score(mean, variance)
    assert float(x.sqrt().mean()) == pytest.approx(float(score_mean), rel=0.02)
    assert float(x.sqrt().std()) == pytest.approx(float(score_sd), rel=0.1)
    p = _haar.upper_tail(x, mean, variance, third)
    for level in (0.5, 0.1, 0.01):
        share = float((p <= level).double().mean())
        assert 0.3 * level < share < 1.3 * level, (level, share)  # never too small, at most a little too large
    drawn = _haar.drawn(a.spectrum(0), g.spectrum(0), d, 2000, generator)
    assert float(drawn.mean()) == pytest.approx(float(mean), rel=5 / 2000**0.5 * float(variance.sqrt() / mean) + 1e-9)
    assert float(drawn.var()) == pytest.approx(float(variance), rel=0.25)


def test_random_rotations_of_this_model_give_its_null() -> None:
    result = pb.find.channels(lent("gpt2"), nulls=400, **HEADS)
    assert abs(float(result["null_check_mean"])) < 4
    assert float(result["null_check_spread"]) == pytest.approx(1.0, abs=0.2)


# --- what it takes ----------------------------------------------------------------------------------


def test_writers_readers_and_kinds_are_chosen() -> None:
    model = lent("gpt2")
    result = pb.find.channels(model, writers=["L0.H1", "bias"], readers=["L1.H0", "unembed"], kinds=["key", "unembed"])
    assert set(result.labels_of("reader")) == {"L1.H0.k", "unembed"}
    assert result.labels_of("writer")[0] == "L0.H1"
    neurons = pb.find.channels(model, writers=["neuron"], kinds=["query"])
    assert len(neurons.labels_of("writer")) == 2 * model.n_neurons(0)
    assert neurons.parts
    assert neurons.parts[0].writer.kind == "neuron"  # type: ignore[attr-defined]


def test_the_list_is_of_channels() -> None:
    result = pb.find.channels(lent("llama"))
    assert all(isinstance(channel, Channel) for channel in result.top(3))
    assert all(check_channel(channel, lent("llama")) for channel in result.top(3))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"writers": []}, "possible are head"),
        ({"writers": ["L0.router"]}, "does not write"),
        ({"kinds": ["keys"]}, "possible are query, key"),
        ({"kinds": []}, "possible are query"),
        ({"readers": ["L0.H0"], "writers": ["head"]}, "no writer comes before a reader"),
        ({"readers": ["L9.H0"]}, "layers 0..1"),
        ({"nulls": -1}, "0 or more"),
        ({"offsets": [99]}, r"0\.\.63"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        pb.find.channels(lent("gpt2"), **options)


@pytest.mark.parametrize(
    "name", by_turns([name for name in twins.FAMILY_CONFIGS if name not in ("mamba", "mamba2", "falcon_mamba")], of=4)
)
def test_every_family_with_heads_has_channels(name: str) -> None:
    """Whole heads and components; the mixers of hybrid layers are no writers, and one such layer leaves no pair of heads."""
    model = lent(name)
    if name.startswith("hunyuan_v1"):  # norms of queries and keys after they are turned
        with pytest.raises(pb.PatchbayError, match="positions do more to q and k than turn pairs"):
            pb.find.channels(model, nulls=0, offsets=[0, 1])
        return
    result = pb.find.channels(model, nulls=0, offsets=[0, 1])
    assert result["whole"].isfinite().any()
    assert (result["whole"].nan_to_num() <= 1.0).all()
    assert any(".H" in str(writer) for writer in result.labels_of("writer"))


def test_models_without_the_weights_are_refused() -> None:
    for name in ("mamba", "mamba2"):
        with pytest.raises(pb.PatchbayError, match="no writer comes before a reader"):
            pb.find.channels(lent(name))
    one = pb.load(twins.twin("gpt2", n_layer=1))
    with pytest.raises(pb.PatchbayError, match="one layer"):
        pb.find.channels(one)
    assert pb.find.channels(one, writers=["embed"]).parts


def test_numbers_that_are_not_finite_are_refused() -> None:
    model = pb.load(twins.twin("gpt2"))
    with torch.no_grad():
        model.modules[1].attn.c_proj.weight[3, 3] = torch.nan
    with pytest.raises(pb.PatchbayError, match="attention of L1: the weights hold NaN"):
        pb.find.channels(model)


def test_quantised_weights_are_refused() -> None:
    model = pb.load(twins.twin("llama"))
    proj = model.modules[0].attn.q_proj
    proj.weight = torch.nn.Parameter(torch.zeros(32, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(pb.PatchbayError, match="no linear map that weights could be read of"):
        pb.find.channels(model)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_embeddings(tied: bool) -> None:
    result = pb.find.channels(pb.load(twins.twin("gpt2", tie_word_embeddings=tied)), components=False)
    i, j = result.labels_of("writer").index("embed"), result.labels_of("reader").index("unembed")
    assert bool(result["whole_p"][i, j] < 1e-6) == tied
