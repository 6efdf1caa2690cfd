"""Attribution graphs: weights as plain loops on the frozen model, sums to the last digit, what was planted, nothing where nothing is."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama

import patchbay as pb
from patchbay.features.across import cross_layer, pieces_of
from patchbay.find._frozen import frozen
from patchbay.find._paths import Node, Paths, fewest, influences, pruned
from patchbay.find.attribution_graph import attribution_graph
from patchbay.tiny import planted, twins
from tests import given
from tests.features.given import crosscoder, dictionary, layers
from tests.tolerance import close

IDS = [5, 6, 7, 8, 9]
gelu = functools.partial(torch.nn.functional.gelu, approximate="tanh")
EXACT = {"keep_nodes": 1.0, "keep_edges": 1.0}


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root mean square norms count in float32 whatever they are given; here in float64."""

    def llama(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    def gemma(self: Any, x: Tensor) -> Tensor:
        return (1.0 + self.weight) * x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", llama)
    monkeypatch.setattr(modeling_gemma2.Gemma2RMSNorm, "forward", gemma)


def double(name: str) -> pb.Model:
    return pb.load(copy.deepcopy(twins.twin(name)).double())


def transcoded(model: pb.Model, **more: Any) -> pb.Model:
    """The model with random transcoders, a skip in the last one."""
    found = [dictionary(model, f"L{i}.mlp.in to L{i}.mlp.out", n=16, seed=i, **more) for i in range(model.n_layers)]
    skip = torch.randn(found[-1].d_in, found[-1].d_out, generator=torch.Generator().manual_seed(9)) / 8
    found[-1] = pb.Dictionary(
        found[-1].W_enc,
        found[-1].W_dec,
        found[-1].b_enc,
        found[-1].b_dec,
        layer=found[-1].layer,
        reads="mlp.in",
        writes="mlp.out",
        W_skip=skip,
    )
    return model.with_dictionaries(*(it.double() for it in found))


def rows_of(result: pb.Result, kind: str) -> dict[str, dict[str, Any]]:
    return {row["node"]: row for row in result.tables["nodes"] if row["kind"] == kind}


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "phi"])
def test_weights_into_a_node_sum_to_its_pre_activation(name: str, exact_norms: None) -> None:
    """To 1e-10, of neurons and of transcoders with errors and a skip; also where only few features are followed. The pre-activations are the
    model's: the dictionary's own, and the centred logits of a plain run."""
    model = double(name)
    view = transcoded(model)
    across = model.with_dictionaries(layers(model.d_model, tuple(range(model.n_layers)), n=16).double())
    for lent, more in (
        (model, {"features": 40}),
        (across, {}),
        (across, {"features": 5}),
        (view, {}),
        (view, {"features": 5}),
    ):
        result = attribution_graph(lent, [IDS], **EXACT, **more)  # type: ignore[arg-type]
        assert float(result["sum_error"]) < 1e-10
        if lent is model:  # a gated neuron sums to its activation, a plain one to what its activation function is given
            gated = name in ("llama", "gemma2")
            neurons = list(rows_of(result, "feature").values())
            assert neurons
            for row in neurons:
                made = row["pre"] if gated else float(gelu(torch.tensor(row["pre"], dtype=torch.float64)))
                assert abs(made - row["activation"]) < 1e-10
    nodes = rows_of(result, "feature")
    assert len(nodes) == 5 == int(result["n_followed"])
    trace = pb.run(view, [IDS], taps=[f"L{i}.mlp.in" for i in range(view.n_layers)])
    for row in nodes.values():
        it: Any = view.dictionaries[row["layer"], "mlp_features"]
        pre = it.pre(trace[f"L{row['layer']}.mlp.in"][0, row["position"]])[row["index"]]
        assert abs(row["pre"] - float(pre)) < 1e-10
        assert abs(row["sum"] - row["pre"]) < 1e-10
    logits = trace.last_logits[0].double()
    for row in rows_of(result, "logit").values():
        assert abs(row["sum"] - float(logits[row["index"]] - logits.mean())) < 1e-10


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "phi"])
def test_features_and_error_are_the_whole_mlp(name: str, exact_norms: None) -> None:
    model = double(name)
    across = model.with_dictionaries(layers(model.d_model, tuple(range(model.n_layers))).double())
    for lent in (model, transcoded(model), across):
        run = frozen(lent, IDS, {layer: it for (layer, _), it in lent.dictionaries.items()})
        for i, block in enumerate(run.blocks):
            out = pb.run(lent, [IDS], taps=[f"L{i}.mlp.out"])[f"L{i}.mlp.out"][0]
            every, half = (
                [rule(one.acts) for one in run.blocks] for rule in (lambda a: a != 0, lambda a: a > a.median())
            )
            for kept in (every, half):
                said: Any = 0.0
                for j in range(i + 1) if lent is across else [i]:
                    it: Any = lent.dictionaries.get((j, "mlp_features"))
                    rows = block.rows if it is None or j == i else it.onward[i - j - 1]
                    said = said + torch.where(kept[j], run.blocks[j].acts, 0.0) @ rows.double()
                assert close(block.post(said) + block.through(block.stream) + run.error(i, kept), out)
            if lent is model:
                assert float(run.error(i, every).abs().max()) < 1e-12  # neurons leave nothing


def test_reference() -> None:
    """GPT-2, by hand: every weight into a neuron of the second layer and into a logit, from plain loops over heads, positions and neurons."""
    hf = copy.deepcopy(twins.twin("gpt2")).double()
    ids = [5, 6, 7]
    model = pb.load(hf)
    result = attribution_graph(model, [ids], features=10**6, tokens=[11], **EXACT)
    weights = {(row["source"], row["target"]): row["weight"] for row in result.tables["edges"]}
    hf.set_attn_implementation("eager")
    blocks, last = hf.transformer.h, hf.transformer.ln_f
    attended: list[Tensor] = []
    hooks = [block.attn.register_forward_hook(lambda *seen: attended.append(seen[-1][0][0])) for block in blocks]
    with torch.no_grad():
        out = hf(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    x0 = out.hidden_states[0][0]

    def scaled(norm: Any, x: Tensor, w: Tensor) -> Tensor:
        """w after a layer norm, before it: gain and centring, over the length that x had."""
        y = norm.weight * w
        return (y - y.mean()) / (x.var(correction=0) + norm.eps).sqrt()

    def through(layer: int, x: Tensor, w: Tensor, query: int, key: int) -> Tensor:
        """What a write at `key` needs along to be read as w at `query` behind the attention of a layer."""
        block, n = blocks[layer], hf.config.n_head
        d = hf.config.n_embd // n
        total = torch.zeros_like(w)
        w_v = block.attn.c_attn.weight[:, 2 * hf.config.n_embd :]
        for head in range(n):
            cut = slice(head * d, (head + 1) * d)
            value = block.attn.c_proj.weight[cut] @ w
            total += out.attentions[layer][0, head, query, key] * (w_v[:, cut] @ value)
        return scaled(block.ln_1, x[key], total)

    with torch.no_grad():
        mids, acts, streams = [], [], [x0]
        for block, added in zip(blocks, attended, strict=True):
            mid = streams[-1] + added
            act = block.mlp.act(block.mlp.c_fc(block.ln_2(mid)))
            mids.append(mid)
            acts.append(act)
            streams.append(mid + block.mlp.c_proj(act))
        assert len(blocks) == 2
        neuron, at = 3, 2
        w = scaled(
            blocks[1].ln_2, mids[1][at], blocks[1].mlp.c_fc.weight[:, neuron]
        )  # read in the stream after the second attention
        for key in range(3):
            read = through(1, streams[1], w, at, key) + (w if key == at else 0)
            for source in (0, 7):
                expected = acts[0][key, source] * (blocks[0].mlp.c_proj.weight[source] @ read)
                assert close(weights[f"L0.N{source}@{key}", f"L1.N{neuron}@{at}"], expected, of=1.0)
        unembed = hf.lm_head.weight
        u = scaled(last, streams[2][2], unembed[11] - unembed.mean(0))
        for source in (0, 9):
            assert close(
                weights[f"L1.N{source}@2", "logit 11"],
                acts[1][2, source] * (blocks[1].mlp.c_proj.weight[source] @ u),
                of=1.0,
            )
        token = 0.0
        for mid_key in range(3):  # the token at 1 to the logit: straight, by either attention, by both
            reach = through(1, streams[1], u, 2, mid_key) + (u if mid_key == 2 else 0)
            token += float(x0[1] @ (through(0, x0, reach, mid_key, 1) + (reach if mid_key == 1 else 0)))
        assert close(weights["embed@1", "logit 11"], token, of=1.0)


def test_what_a_cross_layer_feature_sends_is_carried_forward_from_all_layers_it_writes_in() -> None:
    """Weights, each by one contribution carried forwards through the frozen layers; beside per-layer transcoders, whose rows do not go on."""
    model = pb.load(given.gpt2(0, n_layer=3).double())
    it = layers(model.d_model, (0, 1, 2), n=6).double()
    view = model.with_dictionaries(it)
    result = attribution_graph(view, [IDS], **EXACT)  # type: ignore[arg-type]
    weights = {(row["source"], row["target"]): row["weight"] for row in result.tables["edges"]}
    run = frozen(view, IDS, {layer: one for (layer, _), one in view.dictionaries.items()})
    zero, logit = torch.zeros_like(run.embed), rows_of(result, "logit")
    for row in [row for row in rows_of(result, "feature").values() if row["layer"] < 2][:12]:
        moved, piece = zero, view.dictionaries[row["layer"], "mlp_features"]
        for layer, block in enumerate(run.blocks):
            middle = moved + block.attn(moved) - block.attn(zero)
            read = block.read(middle) - block.read(zero)
            for other in rows_of(result, "feature").values():
                if other["layer"] == layer > row["layer"]:
                    column = view.dictionaries[layer, "mlp_features"].W_enc[:, other["index"]]
                    expected = float(read[other["position"]] @ column)
                    assert close(weights.get((row["node"], other["node"]), 0.0), expected, of=1.0)
            moved = middle
            if layer >= row["layer"]:
                rows: Any = piece.W_dec if layer == row["layer"] else piece.onward[layer - row["layer"] - 1]
                moved = moved.clone()
                moved[row["position"]] += row["activation"] * rows[row["index"]]
        end = (run.final(moved) - run.final(zero))[-1]
        for name, target in logit.items():
            columns, _, _ = run.centred([target["index"]])
            assert close(weights.get((row["node"], name), 0.0), float(end @ columns[0]), of=1.0)
    alone = [dataclasses.replace(one, later=(), onward=None, family="", rest=()) for one in pieces_of(it)]
    apart = attribution_graph(model.with_dictionaries(*alone), [IDS], **EXACT)  # type: ignore[arg-type]
    pieces = [one if one.onward is None else dataclasses.replace(one, onward=0 * one.onward) for one in pieces_of(it)]
    none = attribution_graph(model.with_dictionaries(cross_layer(pieces)), [IDS], **EXACT)  # type: ignore[arg-type]
    assert none.tables["edges"] == apart.tables["edges"]
    assert apart.tables["edges"] != result.tables["edges"]


def test_transcoders_that_read_before_the_norm(exact_norms: None) -> None:
    model = double("llama")
    found = [dictionary(model, f"L{i}.resid_mid to L{i}.mlp.out", n=16, seed=i).double() for i in range(model.n_layers)]
    view = model.with_dictionaries(*found)
    result = attribution_graph(view, [IDS], **EXACT)  # type: ignore[arg-type]
    assert float(result["sum_error"]) < 1e-10
    trace = pb.run(view, [IDS], taps=[f"L{i}.resid_mid" for i in range(model.n_layers)])
    for row in rows_of(result, "feature").values():
        pre = found[row["layer"]].pre(trace[f"L{row['layer']}.resid_mid"][0, row["position"]])[row["index"]]
        assert abs(row["pre"] - float(pre)) < 1e-10


def test_planted() -> None:
    """The neuron that decides a relation leads each prompt's graph, on an edge up to the answer; its token leads the edges into it."""
    built = planted.relation_neuron(seed=0, d_mlp=16)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    for relation, neuron in truth["neurons"].items():
        which = next(i for i, prompt in enumerate(truth["prompts"]) if prompt.endswith(relation))
        prompt, answer = truth["prompts"][which], model.token_id(truth["answers"][which])
        result = attribution_graph(model, [prompt], tokens=[answer])
        last = len(model.encode(prompt)[0]) - 1
        into = [
            row
            for row in result.tables["edges"]
            if row["target"] == f"logit {answer}" and row["source"].startswith("L")
        ]
        assert max(into, key=lambda row: row["weight"])["source"] == f"{neuron}@{last}"
        assert neuron == str(result.top(1)[0])
        made = {row["source"]: row["weight"] for row in result.tables["edges"] if row["target"] == f"{neuron}@{last}"}
        assert max(made, key=made.__getitem__) == f"embed@{last}"


def test_null() -> None:
    """Neurons that write nothing are in no graph, and transcoders of rows that are 0 leave all to the error."""
    hf = copy.deepcopy(twins.twin("gpt2"))
    with torch.no_grad():
        for block in hf.transformer.h:
            block.mlp.c_proj.weight.zero_()
    result = attribution_graph(pb.load(hf), [IDS])
    assert result.values.numel() == 0
    assert not rows_of(result, "feature")
    assert float(result["through_error"]) == 0.0
    assert "no feature is left" in result.notes[-1]
    model = given.lent("gpt2")
    silent = [dictionary(model, f"L{i}.mlp.in to L{i}.mlp.out", W_dec=torch.zeros(24, model.d_model)) for i in range(2)]
    result = attribution_graph(model.with_dictionaries(*silent), [IDS])
    assert result.values.numel() == 0
    assert float(result["through_error"]) > 0.2
    whole = sum(float(result[name]) for name in ("through_error", "through_tokens", "through_bias"))
    assert close(whole, 1.0)


def test_influence_is_the_sum_of_powers() -> None:
    """Against a dense inverse, and a chain by hand: logits take 3/4 of a feature that is made half by each of two leaves."""
    weights = torch.tensor([[0.0, 2.0, -2.0], [3.0, 0.0, 1.0]], dtype=torch.float64)
    found = influences(weights, 1, torch.tensor([1.0], dtype=torch.float64))
    assert found.tolist() == [0.75, 0.375, 0.625]
    draw = torch.Generator().manual_seed(0)
    n, leaves = 6, 4
    weights = torch.randn(n + 2, n + leaves, generator=draw, dtype=torch.float64)
    weights[:n, :n] = weights[:n, :n].tril(-1)
    start = torch.tensor([0.7, 0.3], dtype=torch.float64)
    share = weights.abs() / weights.abs().sum(1, keepdim=True)
    square = torch.zeros(
        n + leaves + 2, n + leaves + 2, dtype=torch.float64
    )  # [target, source], leaves are reached by none
    square[:n, : n + leaves], square[n + leaves :, : n + leaves] = share[:n], share[n:]
    whole = torch.cat([torch.zeros(n + leaves, dtype=torch.float64), start]) @ torch.linalg.inv(
        torch.eye(len(square), dtype=torch.float64) - square
    )
    assert close(influences(weights, n, start), whole[: n + leaves])
    assert close(influences(weights, n, start)[n:].sum(), 1.0)


def test_pruning_keeps_the_fewest_nodes_and_no_loose_ends() -> None:
    assert fewest(torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]), 0.8).tolist() == [True, True, False, False, False]
    assert fewest(torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]), 1.0).tolist() == [True, True, True, True, False]
    nodes = [
        Node("feature", 0, 0, 0),
        Node("feature", 0, 0, 1),
        Node("error", 0, 0),
        Node("embed", -1, 0, 4),
        Node("embed", -1, 1, 5),
    ]
    weights = torch.tensor([[0, 0, 0, 9.0, 0], [0, 0, 0, 1.0, 0], [8.0, 0.2, 2.0, 0, 0]], dtype=torch.float64)
    start = torch.ones(1, dtype=torch.float64)
    left = pruned(weights, nodes, start, 0.8, 0.98)
    assert left.sources.tolist() == [True, False, False, True, True]  # tokens stay, whatever they send
    assert left.edges.nonzero().tolist() == [[0, 3], [2, 0]]
    whole = pruned(weights, nodes, start, 1.0, 1.0)
    assert whole.sources.tolist() == [True, True, True, True, True]
    assert int(whole.edges.sum()) == 5
    thin = pruned(
        weights, nodes, start, 1.0, 0.95
    )  # the second feature loses its edge upwards, and with it the one into it
    assert thin.sources.tolist() == [True, False, True, True, True]


def test_features_that_are_followed_are_those_of_most_influence() -> None:
    """Of a budget, those of the last layer are the ones whose weights to the logits are the largest shares."""
    model = given.lent("gpt2")
    run = frozen(model, IDS, {})
    paths = Paths(run)
    logits = paths.logits([11, 12])
    start = torch.tensor([0.75, 0.25], dtype=torch.float64)
    kept = paths.chosen(logits, start, 10)
    assert [int(mask.sum()) for mask in kept] == [5, 5]
    everything, total = paths.whole(logits)
    direct = (start[:, None, None] * everything[1].abs() / total[:, None, None]).sum(0)
    assert direct[kept[1]].min() >= direct[~kept[1]].max()
    assert all(torch.equal(a, b.acts != 0) for a, b in zip(paths.chosen(logits, start, 10**6), run.blocks, strict=True))


def test_logits_are_the_fewest_that_hold_95_percent() -> None:
    result = attribution_graph(given.lent("gpt2"), [IDS])
    chance = pb.run(given.lent("gpt2"), [IDS]).last_logits[0].softmax(0)
    logits = list(rows_of(result, "logit").values())
    assert len(logits) == 10  # a random model spreads
    assert [row["index"] for row in logits] == chance.topk(10).indices.tolist()
    built = planted.relation_neuron(seed=0)
    sure = attribution_graph(pb.load(built.model, built.tokenizer), [built.truth["prompts"][0]])
    held = [row["influence"] for row in rows_of(sure, "logit").values()]
    assert sum(held) >= 0.95 or len(held) == 10
    assert sum(held[:-1]) < 0.95


def test_a_mean_over_prompts_is_that_of_their_graphs() -> None:
    model = given.lent("llama")
    both, first, second = (attribution_graph(model, some) for some in ([IDS, [7, 3, 2]], [IDS], [[7, 3, 2]]))
    for part, value in zip(both.parts, both.values.tolist(), strict=True):
        apart = [float(one.values[one.parts.index(part)]) if part in one.parts else 0.0 for one in (first, second)]
        assert close(value, sum(apart) / 2, of=1.0)


@pytest.mark.parametrize("kind", ["transcoders", "cross-layer"])
def test_a_graph_is_written_as_circuit_tracer_does_and_read_back(kind: str, tmp_path: Any) -> None:
    model = double("gpt2")
    view = transcoded(model) if kind == "transcoders" else model.with_dictionaries(layers(model.d_model, (0, 1), n=16))
    result = attribution_graph(view, [IDS], **EXACT)
    path = result.save_graph(tmp_path / "graph.json")
    held = json.loads(path.read_text())
    assert set(held) >= {"metadata", "qParams", "nodes", "links"}
    kinds = {node["feature_type"] for node in held["nodes"]}
    assert kinds == {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}
    names = [node["node_id"] for node in held["nodes"]]
    assert len(set(names)) == len(names)
    assert {end for link in held["links"] for end in (link["source"], link["target"])} <= set(names)
    feature = next(row for row in result.tables["nodes"] if row["kind"] == "feature")
    node = next(
        n for n in held["nodes"] if n["node_id"] == f"{feature['layer']}_{feature['index']}_{feature['position']}"
    )
    layer, index = feature["layer"], feature["index"]
    assert node["feature"] == (layer + index) * (layer + index + 1) // 2 + index
    shown = sorted(n["influence"] for n in held["nodes"] if n["influence"] is not None)
    assert shown[0] > 0  # cumulative
    assert shown[-1] <= 1.0 + 1e-9
    back = pb.load_result(path)
    for name, rows in result.tables.items():
        assert sorted(back.tables[name], key=str) == sorted(rows, key=str), name
    assert [str(part) for part in back.parts] == [str(part) for part in result.parts]
    assert close(back.values, result.values)
    with pytest.raises(pb.PatchbayError, match="already there"):
        result.save_graph(path)
    with pytest.raises(pb.PatchbayError, match=r"prompt=3: the graphs here are of prompts 0"):
        result.save_graph(tmp_path / "other.json", prompt=3)
    del held["patchbay"]  # as another program writes it
    path.write_text(json.dumps(held))
    foreign = pb.load_result(path)
    assert {row["node"] for row in foreign.tables["nodes"]} == {
        row["node"] for row in result.tables["nodes"] if row["kind"] != "bias"
    }
    assert [row["id"] for row in foreign.tables["tokens"]] == IDS
    path.write_text("{}")
    with pytest.raises(pb.PatchbayError, match="no attribution graph"):
        pb.load_result(path)


def test_it_is_drawn_with_all_its_kinds() -> None:
    figure = attribution_graph(transcoded(double("gpt2")), [IDS]).plot()
    axis = figure.axes[0]
    assert len(axis.get_xticks()) == len(IDS)
    assert {text.get_text() for text in axis.get_legend().get_texts()} >= {
        "feature",
        "missed by the features",
        "token",
        "logit",
    }
    assert [label.get_text() for label in axis.get_yticklabels()] == ["tokens", "L0", "L1", "logits"]


def test_bad_input() -> None:
    model = given.lent("gpt2")
    with pytest.raises(pb.PatchbayError, match="no attention patterns"):
        attribution_graph(given.lent("mamba2"), [IDS])
    with pytest.raises(pb.PatchbayError, match=r"Attach a transcoder of it.*L0.mlp.in to L0.mlp.out"):
        attribution_graph(given.lent("mixtral"), [IDS])
    with pytest.raises(pb.PatchbayError, match=r"L1.resid_out is no transcoder of an MLP \(it reads resid_out"):
        attribution_graph(model.with_dictionaries(dictionary(model, "L1.resid_out")), [IDS])
    with pytest.raises(pb.PatchbayError, match="L1.mlp.out is no transcoder of an MLP"):
        attribution_graph(model.with_dictionaries(crosscoder(model.d_model, (0, 1), reads="mlp.out")), [IDS])
    with pytest.raises(pb.PatchbayError, match="features=0"):
        attribution_graph(model, [IDS], features=0)
    with pytest.raises(pb.PatchbayError, match="keep_edges=1.5"):
        attribution_graph(model, [IDS], keep_edges=1.5)
    with pytest.raises(pb.PatchbayError, match="tokens="):
        attribution_graph(model, [IDS], tokens=[10**6])


def test_experts_with_transcoders_are_drawn() -> None:
    """A transcoder stands for a whole mixture of experts."""
    model = given.lent("mixtral")
    view = model.with_dictionaries(*(dictionary(model, f"L{i}.mlp.in to L{i}.mlp.out") for i in range(model.n_layers)))
    result = attribution_graph(view, [IDS])
    assert rows_of(result, "feature")
    assert float(result["sum_error"]) < 1e-4
