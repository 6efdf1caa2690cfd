"""Graph ablation: planted features cost the answer and random graphs do not, edits are the plain model's, and chance is told as that."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.prove.graph_ablation import graph_ablation
from patchbay.signal.port import parse_part
from patchbay.tiny import planted, twins
from tests import given
from tests.features.given import dictionary, layers
from tests.tolerance import close

IDS = [5, 6, 7, 8, 9]


def graph_of(model: pb.Model, places: list[tuple[str, int]], ids: list[int], logits: dict[int, float]) -> pb.Result:
    """A graph of chosen features, as `find.attribution_graph` tells of one."""
    rows: list[dict[str, Any]] = [
        {
            "prompt": 0,
            "node": f"{part}@{at}",
            "kind": "feature",
            "part": part,
            "position": at,
            "influence": 0.1,
            "index": 0,
        }
        for part, at in places
    ]
    rows += [
        {"prompt": 0, "node": f"logit {i}", "kind": "logit", "index": i, "influence": p} for i, p in logits.items()
    ]
    tokens = [{"prompt": 0, "position": at, "id": token, "token": ""} for at, token in enumerate(ids)]
    parts = sorted({part for part, _ in places})
    made = {"model": {"fingerprint": model.fingerprint}}
    return pb.Result(
        {"influence": (torch.ones(len(parts)), ("part",), "")},
        parts=parts,
        tables={"nodes": rows, "edges": [], "tokens": tokens},
        provenance=made,
    )


def test_planted() -> None:
    """Without the neuron that decides the relation the answer is lost; random graphs of other neurons, which fire and write noise, cost little."""
    built = planted.relation_neuron(seed=0, d_mlp=32)
    deciding = {part.index for part in map(parse_part, built.truth["neurons"].values())}
    others = [i for i in range(32) if i not in deciding]
    mlp, draw = built.model.transformer.h[-1].mlp, torch.Generator().manual_seed(0)
    with torch.no_grad():
        mlp.c_fc.weight[:, others] += 0.3 * torch.randn(256, len(others), generator=draw)
        mlp.c_proj.weight[others] += 0.01 * torch.randn(len(others), 256, generator=draw)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    answers = [model.token_id(answer) for answer in truth["answers"][:4]]
    proofs = []
    for prompt, answer in zip(truth["prompts"], answers, strict=False):
        graph = pb.find.attribution_graph(model, [prompt], tokens=[answer], keep_nodes=0.7)
        assert len(graph.parts or ()) < 6
        proofs.append(graph_ablation(model, graph, draws=9))
    for proof in proofs:
        assert float(proof["joint"]) > 10 * float(proof["random"].max()) > 0
        assert float(proof["p"]) == pytest.approx(0.1)
        assert float(proof["lost"]) > 5 * float(proof["random_lost"].abs().max())


def test_reference() -> None:
    """A neuron at one position, by a hook on Hugging Face's own module; a transcoder's feature, by taking what it writes from the MLP's output."""
    hf = copy.deepcopy(twins.twin("gpt2"))
    model = pb.load(hf)
    logits = {11: 0.6, 12: 0.2}
    proof = graph_ablation(model, graph_of(model, [("L0.N3", 2), ("L1.N5", 4)], IDS, logits), draws=2)

    def run(change: Any = None, block: int = 0, what: str = "act") -> torch.Tensor:
        hooks = []
        if change is not None:
            mlp = hf.transformer.h[block].mlp
            hooks = [
                (mlp.act if what == "act" else mlp).register_forward_hook(lambda _, args, out: change(args[0], out))
            ]
        with torch.no_grad():
            out = hf(torch.tensor([IDS])).logits[0, -1].double()
        for hook in hooks:
            hook.remove()
        return out

    def off(neuron: int, at: int) -> Any:
        def change(_: Any, out: torch.Tensor) -> torch.Tensor:
            out = out.clone()
            out[0, at, neuron] = 0.0
            return out

        return change

    base = run()
    hook = hf.transformer.h[1].mlp.act.register_forward_hook(lambda _, args, out: off(5, 4)(args, out))
    gone = run(off(3, 2), 0)
    hook.remove()
    kl = sum(float(p) * (float(p.log()) - float(q)) for p, q in zip(base.softmax(0), gone.log_softmax(0), strict=True))
    assert close(proof["effect"][0], kl, of=1.0)
    asked = [0.75 * float(x[11] - x.mean()) + 0.25 * float(x[12] - x.mean()) for x in (base, gone)]
    assert close(proof["lost"][0], asked[0] - asked[1], of=1.0)
    it = dictionary(model, "L0.mlp.in to L0.mlp.out", n=12)
    view = model.with_dictionaries(it)
    acts = pb.run(view, [IDS], taps=["L0.mlp_features.act"])["L0.mlp_features.act"][0]
    at, feature = acts.nonzero()[0].tolist()
    proof = graph_ablation(view, graph_of(view, [(f"L0.mlp.F{feature}", at)], IDS, logits), draws=2)

    def without(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[0, at] -= acts[at, feature] * it.W_dec[feature]
        return out

    gone = run(without, 0, "mlp")
    kl = sum(float(p) * (float(p.log()) - float(q)) for p, q in zip(base.softmax(0), gone.log_softmax(0), strict=True))
    assert close(proof["effect"][0], kl, of=1.0)
    assert close(proof["written"][0], float(acts[at, feature] * it.W_dec[feature].norm()))


def test_a_cross_layer_feature_is_taken_from_every_layer_that_it_writes_in() -> None:
    hf = copy.deepcopy(twins.twin("gpt2"))
    model = pb.load(hf)
    it = layers(model.d_model, (0, 1), n=12)
    view = model.with_dictionaries(it)
    acts = pb.run(view, [IDS], taps=["L0.mlp_features.act"])["L0.mlp_features.act"][0]
    at, feature = acts.nonzero()[0].tolist()
    proof = graph_ablation(view, graph_of(view, [(f"L0.mlp.F{feature}", at)], IDS, {11: 1.0}), draws=2)
    assert it.onward is not None
    rows = torch.stack([it.W_dec[feature], it.onward[0, feature]])

    def without(block: int) -> Any:
        def change(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
            out = out.clone()
            out[0, at] -= acts[at, feature] * rows[block]
            return out

        return hf.transformer.h[block].mlp.register_forward_hook(change)

    with torch.no_grad():
        base = hf(torch.tensor([IDS])).logits[0, -1].double()
        hooks = [without(block) for block in (0, 1)]
        gone = hf(torch.tensor([IDS])).logits[0, -1].double()
    for hook in hooks:
        hook.remove()
    kl = sum(float(p) * (float(p.log()) - float(q)) for p, q in zip(base.softmax(0), gone.log_softmax(0), strict=True))
    assert close(proof["effect"][0], kl, of=1.0)
    assert close(proof["written"][0], float(acts[at, feature] * rows.norm()))


def test_random_graphs_are_of_other_active_features_of_the_same_layers() -> None:
    """By hand: of a layer with five active features one is in the graph, and draws are of the four others; their mean is told."""
    model = given.lent("gpt2")
    it = dictionary(model, "L0.mlp.in to L0.mlp.out", n=12, form="topk", k=1, seed=3)
    view = model.with_dictionaries(it)
    acts = pb.run(view, [IDS], taps=["L0.mlp_features.act"])["L0.mlp_features.act"][0]
    active = acts.nonzero().tolist()
    (at, feature), others = active[0], active[1:]
    assert len(others) == 4
    alone = [
        float(graph_ablation(view, graph_of(view, [(f"L0.mlp.F{i}", p)], IDS, {11: 1.0}), draws=1)["effect"][0])
        for p, i in others
    ]
    proof = graph_ablation(view, graph_of(view, [(f"L0.mlp.F{feature}", at)], IDS, {11: 1.0}), draws=40)
    drawn = {round(value, 9) for value in proof["random"].tolist()}
    assert drawn == {round(value, 9) for value in alone}
    own = float(proof["effect"][0])
    assert len(drawn) == 4
    assert round(own, 9) not in drawn
    slack = 1e-6 * max(own, *alone)
    assert close(proof["p"], (1 + sum(value >= own - slack for value in proof["random"].tolist())) / 41)
    assert close(proof["difference"], own - float(proof["random"].mean()), of=1.0)


def test_random_features_that_write_as_much() -> None:
    """With lengths matched, what random graphs write is what the graph writes, within the spread of the eight nearest; by layer alone it is not."""
    model = given.lent("gpt2")
    acts = pb.run(model, [IDS], taps=["L0.mlp.act"])["L0.mlp.act"][0]
    writes = acts.abs() * model.layers[0].mlp.weights().W_out.detach().norm(dim=1)
    strong = [divmod(int(i), writes.shape[1]) for i in writes.flatten().topk(40).indices[10:18]]
    graph = graph_of(model, [(f"L0.N{i}", at) for at, i in strong], IDS, {11: 1.0})
    own = sum(float(writes[at, i]) for at, i in strong)
    by_layer, by_length = (
        graph_ablation(model, graph, draws=5, matched=which)["random_written"] for which in ("layer", "length")
    )
    assert close(graph_ablation(model, graph, draws=1)["written"][0], own)
    assert float(by_layer.max()) < 0.7 * own
    assert float((by_length / own - 1).abs().max()) < 0.2


def test_null() -> None:
    """Features drawn at random are no better than features drawn at random: p is spread over what it can be."""
    model = given.lent("gpt2")
    draw = torch.Generator().manual_seed(0)
    found = []
    for _ in range(12):
        places = [
            (f"L{layer}.N{int(torch.randint(100, (), generator=draw))}", at) for layer in (0, 1) for at in range(5)
        ]
        found.append(float(graph_ablation(model, graph_of(model, places, IDS, {11: 1.0}), draws=4)["p"]))
    assert len(set(found)) >= 3
    assert 0.3 < sum(found) / len(found) < 0.9  # 0.6 is the mean of 1/5 .. 5/5


def test_bad_input() -> None:
    model = given.lent("gpt2")
    with pytest.raises(pb.PatchbayError, match="a Result of find.attribution_graph"):
        graph_ablation(model, pb.Result(torch.ones(2, 4)))
    graph = graph_of(model, [("L0.N3", 2)], IDS, {11: 1.0})
    with pytest.raises(pb.PatchbayError, match="made on a model whose fingerprint is"):
        graph_ablation(given.lent("llama"), graph)
    with pytest.raises(pb.PatchbayError, match="draws=0"):
        graph_ablation(model, graph, draws=0)
    with pytest.raises(pb.PatchbayError, match=r"prompt 0 has no feature.*keep_nodes="):
        graph_ablation(model, graph_of(model, [], IDS, {11: 1.0}))
    whole = [(f"L0.N{i}", at) for i in range(model.n_neurons(0)) for at in range(5)]
    with pytest.raises(pb.PatchbayError, match="every feature that is active"):
        graph_ablation(model, graph_of(model, whole, IDS, {11: 1.0}))


def test_what_neurons_write_is_what_reaches_the_stream() -> None:
    """Also where the family scales what its layers add (Granite)."""
    model = given.lent("granite")
    assert model.residual_scale not in (0.0, 1.0)
    act = float(pb.run(model, [IDS], taps=["L1.mlp.act"])["L1.mlp.act"][0, 3, 4])
    proof = graph_ablation(model, graph_of(model, [("L1.N4", 3)], IDS, {7: 1.0}), draws=1)
    quiet = pb.run(model, [IDS], edits=[pb.zero("L1.N4.act", positions=3)], taps=["L1.mlp.out"])["L1.mlp.out"]
    loud = pb.run(model, [IDS], taps=["L1.mlp.out"])["L1.mlp.out"]
    assert act != 0.0
    assert close(proof["written"][0], float((loud - quiet)[0, 3].norm()))
