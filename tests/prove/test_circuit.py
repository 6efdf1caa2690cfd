"""Circuits: planted ones are found whole and no larger; equal to a forward pass written by hand; a null; the areas."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.prove._graph import Graph, Mixed, outputs
from patchbay.prove.edge_attribution import estimate
from patchbay.tiny import planted
from patchbay.tiny.twins import twin
from tests import given
from tests.shares import by_turns
from tests.tolerance import close

KINDS = [
    "gpt2",
    "gptj",
    "gpt_neo",
    "gpt_neox",
    "bloom",
    "falcon",
    "falcon grouped",
    "gemma2",
    "olmo2",
    "phi",
    "granite",
]
KINDS += ["mixtral", "opt", "gpt_oss", "deepseek_v3", "qwen3_next", "bamba", "mamba2"]


pairs = functools.partial(given.pairs, length=7, n_wrong=1)


def units(result: pb.Result, n: int) -> set[str]:
    return {row["unit"] for row in result.tables["circuit"][:n]}


@pytest.mark.parametrize("form", by_turns(["gpt2", "llama"], of=2, start=1))
def test_planted(form: Any) -> None:
    """Embedding, first head's values, second head's keys, logits: these three edges and no fewer."""
    model, truth, task = given.chain(form, 8, length=7)
    first, second = truth["previous_token"], truth["induction"]
    edges = {f"embed -> {model.port(first + '.v')}", f"{first} -> {model.port(second + '.k')}", f"{second} -> logits"}
    result = pb.prove.circuit(model, task, draws=3)
    assert result["smallest"] == 3
    assert units(result, 3) == edges
    assert any("scored on 4 prompts" in note for note in result.notes)
    curve = dict(zip(result.coords["n_parts"], result.values.tolist(), strict=True))
    assert max(abs(f) for k, f in curve.items() if k < 3) < 0.01
    assert all(f == pytest.approx(1.0, abs=0.03) for k, f in curve.items() if k > 3)
    assert result["completeness"].tolist() == pytest.approx([1.0] * len(curve), abs=0.03)
    assert result["minimality"][2] > 0.4  # 4 or 6 edges, 3 of which are needed
    assert result["minimality"][-1] < 0.01
    assert result["null_mean"][:4].abs().max() < 0.01
    assert result["p"] == 0.25
    assert result["cpr"] > 0.95 > 0.4 > result["cpr_random"].max()
    assert result["cmd"] < 0.05


def test_planted_heads_and_greedy_growth() -> None:
    model, truth, task = given.chain("gpt2", 4, 1, length=7)
    scores = pb.prove.attribution_patching(model, task, steps=20)
    result = pb.prove.circuit(model, task, scores=scores, draws=2)
    assert result["smallest"] == 2
    assert units(result, 2) == {truth["previous_token"], truth["induction"]}
    listed = pb.prove.circuit(model, task, scores=scores.top(8, by="abs"), draws=2)  # type: ignore[arg-type]
    assert torch.equal(listed.values, result.values)
    edges = pb.prove.edge_attribution(model, task, steps=20)
    grown = pb.prove.circuit(model, task, scores=edges, select="greedy", draws=1)
    assert grown["smallest"] == 3
    within = {"logits"}  # the writers whose own reading counts
    for row in grown.tables["circuit"][:40]:
        writer, reader = row["unit"].split(" -> ")
        part = (
            reader.removesuffix(".in").rpartition(".")[0] if reader != "logits" and not reader.endswith(".in") else ""
        )
        parts = {part, part.replace("KV", "H")} if part else {reader.removesuffix(".in")}
        assert parts & within, row["unit"]
        within.add(writer)


# --- by hand ------------------------------------------------------------------------------------------


def by_hand(
    hf: Any, ids: list[int], other: dict[str, Tensor] | None, keep: Callable[[str, str], bool]
) -> dict[str, Tensor]:
    """A Llama forward pass, head by head, in which every reader sums its own choice of writers; `logits` are the last ones."""
    model, n, d = hf.model, len(ids), 8
    out = {"embed": model.embed_tokens(torch.tensor(ids))}

    def stream(reader: str, names: list[str]) -> Tensor:
        chosen = [out[w] if other is None or keep(w, reader) else other[w] for w in names]
        return torch.stack(chosen).sum(0)

    cos, sin = (x[0] for x in model.rotary_emb(out["embed"][None], torch.arange(n)[None]))

    def turned(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[:, d // 2 :], x[:, : d // 2]], 1) * sin

    hidden = torch.ones(n, n).triu(1).bool()
    for i, layer in enumerate(model.layers):
        attn, before = layer.self_attn, list(out)

        def read(name: str, kind: str, index: int, i: int = i, layer: Any = layer, before: Any = before) -> Tensor:
            weight = getattr(layer.self_attn, f"{name}_proj").weight[d * index : d * index + d]
            return layer.input_layernorm(stream(f"L{i}.{kind}{index}.{name}", before)) @ weight.T

        for h in range(4):
            q, k, v = turned(read("q", "H", h)), turned(read("k", "KV", h // 2)), read("v", "KV", h // 2)
            pattern = (q @ k.T / d**0.5).masked_fill(hidden, -torch.inf).softmax(-1)
            out[f"L{i}.H{h}"] = pattern @ v @ attn.o_proj.weight[:, d * h : d * h + d].T
        x = stream(f"L{i}.mlp.in", list(out))
        out[f"L{i}.mlp"] = layer.mlp(layer.post_attention_layernorm(x))
    out["logits"] = hf.lm_head(model.norm(stream("logits", list(out))))[-1]
    return out


@torch.no_grad()
def test_reference() -> None:
    """Faithfulness, completeness, minimality and random circuits of every size, from the forward pass by hand."""
    hf = twin("llama")
    model, task = pb.load(hf), pairs()
    edges = pb.prove.edge_attribution(model, task)
    result = pb.prove.circuit(model, task, scores=edges, draws=2)
    order = [row["unit"] for row in result.tables["circuit"]]
    assert order == [
        label for _, label in sorted(zip((-edges.values.abs()).tolist(), edges.coords["edit"], strict=True))
    ]
    twins = [by_hand(hf, list(ids), None, lambda w, r: True) for ids in task.corrupted or ()]

    def score(kept: list[str]) -> float:
        names, total = set(kept), 0.0
        for i, ids in enumerate(task.clean):
            logits = by_hand(hf, list(ids), twins[i], lambda w, r: f"{w} -> {r}" in names)["logits"]
            total += float(logits[task.right[i]] - logits[task.wrong[i][0]]) / len(task)
        return total

    empty, whole = score([]), score(order)
    assert close(float(result["empty"]), empty, of=1.0)
    assert close(float(result["whole"]), whole, of=1.0)

    def faithfulness(kept: list[str]) -> float:
        return (score(kept) - empty) / (whole - empty)

    sizes = result.coords["n_parts"]
    assert sizes == [1, 2, 4, 8, 16, 41, 82]  # shares of 82 edges
    found = [faithfulness(order[:k]) for k in sizes]
    assert result.values.tolist() == pytest.approx(found, abs=1e-3)
    rest = [1.0 - faithfulness(order[k:]) for k in sizes]
    assert result["completeness"].tolist() == pytest.approx(rest, abs=1e-3)
    lost = [abs(found[3] - faithfulness([*order[:i], *order[i + 1 : 8]])) for i in (1, 3, 5, 7)]
    assert float(result["minimality"][3]) == pytest.approx(np.mean(lost), abs=1e-3)
    share = np.array([0.0, *(k / 82 for k in sizes)])
    assert float(result["cpr"]) == pytest.approx(np.trapezoid([0.0, *found], share), abs=1e-3)
    assert float(result["cmd"]) == pytest.approx(np.trapezoid(np.abs(1 - np.array([0.0, *found])), share), abs=1e-3)
    smallest = int(result["smallest"])
    assert faithfulness(order[:smallest]) >= 0.9 > faithfulness(order[: smallest - 1])


@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_all_edges_are_the_model_none_its_twin_and_those_of_a_part_its_patch(family: str) -> None:
    model, task = pb.load(twin(family)), pairs(2)
    graph = Graph(model)
    twins = [list(ids) for ids in task.corrupted or ()]
    writers = [i for i, part in enumerate(graph.writers) if part.layer == 0]
    keep = graph.valid.repeat(2 + len(writers), 1, 1)
    keep[1] = False
    for row, writer in enumerate(writers, 2):
        keep[row, writer] = False
    found = Mixed(graph, task.clean, outputs(graph, twins), rows=16).logits(keep)
    clean = pb.run(model, task).last_logits
    expected = [clean, pb.run(model, twins).last_logits]
    for writer in writers:
        port = graph.writers[writer].port()
        donor = pb.run(model, twins, taps=[port])[port]
        expected.append(pb.run(model, task, edits=[pb.replace(port, donor)]).last_logits)
    assert close(found, torch.stack(expected))
    assert min(float((one - clean).abs().max()) for one in expected[1:]) > 1e-2


@torch.no_grad()
def test_the_mean_outside() -> None:
    """With no edge, every prompt gives what the mean stream unembeds to; with all of them, the model."""
    model = pb.load(twin("llama"))
    task = pb.Task(
        "own",
        *(
            [*getattr(pairs(2, length=8), n), *getattr(pairs(1, length=6), n)]
            for n in ("clean", "right", "wrong", "corrupted")
        ),
    )
    result = pb.prove.circuit(model, task, scores=["L0.H1", "L1.mlp", "embed", "L1.attn"], outside="mean", draws=1)  # type: ignore[list-item]
    port = model.layers[1].resid_out
    assert close(float(result["whole"]), float(task.score(pb.run(model, task).last_logits).mean()), of=1.0)
    every = pb.prove.edge_attribution(model, task)
    none = pb.prove.circuit(model, task, scores=every, outside="mean", draws=1)
    stream = pb.run(model, task, taps=[port])[port].flatten(0, 1).nanmean(0)
    logits = model.unembed_logits(model.final_norm_module(stream[None, None]))[0].expand(len(task), -1)
    assert close(float(none["empty"]), float(task.score(logits).mean()), of=1.0)


def test_null() -> None:
    """Edges in a random order are as good as edges in a random order."""
    model, task = pb.load(planted.null(seed=2).model), pairs(1, length=5)
    labels = [Graph(model).label(edge) for edge in Graph(model).edges]
    ps = []
    for seed in range(6):
        effect = torch.rand(len(labels), generator=torch.Generator().manual_seed(100 + seed))
        scores = pb.Result(effect, ("edit",), coords={"edit": labels}, name="effect")
        ps.append(float(pb.prove.circuit(model, task, scores=scores, seed=seed, draws=4)["p"]))
    assert 0.3 < sum(ps) / len(ps) < 0.9
    assert min(ps) >= 0.2


def test_metrics_batches_and_errors() -> None:
    model, task = pb.load(twin("gemma2")), pairs(3)
    heads: Any = ["L0.H1", "L1.H0", "L1.mlp"]
    whole = pb.prove.circuit(model, task, scores=heads, draws=2)
    assert pb.prove.circuit(model, task, scores=heads, draws=2, batch_size=2).agrees(whole, 1e-4)
    for metric in ("kl", "accuracy", "rank"):
        assert pb.prove.circuit(model, task.with_metric(metric), scores=heads, draws=1).unit == "share of the model"
    other = pb.prove.edge_attribution(pb.load(twin("phi")), task)
    neurons = pb.prove.attribution_patching(model, task, site="neuron")
    cases: list[tuple[str, dict[str, Any]]] = [
        ("draws=0", {"draws": 0}),
        ("possible are abs, value, greedy", {"select": "best"}),
        ("possible are corrupted, mean", {"outside": "zero"}),
        ("of another graph", {"scores": other}),
        ("no writer of this model's graph", {"scores": neurons}),
        ("follows edges from the logits back", {"scores": heads, "select": "greedy"}),
    ]
    for message, options in cases:
        with pytest.raises(pb.PatchbayError, match=message):
            pb.prove.circuit(model, task, **options)
    with pytest.raises(pb.PatchbayError, match="both halves need one"):
        pb.prove.circuit(model, task[:1])


def test_flat_scores_are_said_and_exact_effects_are_used() -> None:
    model, _, task = given.chain("gpt2", 8, length=7)
    graph = Graph(model)
    labels = {"edit": [graph.label(edge) for edge in graph.edges]}
    n = len(graph.edges)
    flat = pb.Result({"effect": (torch.zeros(n), ("edit",), "logits")}, coords=labels)
    poor = pb.prove.circuit(model, task, scores=flat, draws=1)
    assert any(f"{n} of {n} scores are equal to another's, {n} of them 0" in note for note in poor.notes)
    assert any(f"exact={n}" in note for note in poor.notes)
    exact = pb.prove.edge_attribution(model, task, exact=n)
    values = {"effect": flat["effect"], "exact": exact["exact"]}
    both = pb.Result({name: (value, ("edit",), "logits") for name, value in values.items()}, coords=labels)
    best = pb.prove.circuit(model, task, scores=both, draws=1)
    assert best["smallest"] == 3
    assert best["smallest"] < poor["smallest"]
    assert any(f"{n} of {n} edges are ordered by their exact effects" in note for note in best.notes)


def test_the_table_holds_the_smallest_circuit_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, task = given.chain("gpt2", 8, length=7)
    monkeypatch.setattr(importlib.import_module("patchbay.prove.circuit"), "LISTED", 1)
    found = pb.prove.circuit(model, task, draws=1)
    assert len(found.tables["circuit"]) == int(found["smallest"]) == 3


def test_means_outside_are_scored_by_means() -> None:
    """The first-order effect of a mean in the writer's place: exact for edges into the logits of a stream that is read linearly."""
    model, _, task = given.chain("gpt2", 8, length=7)
    result = pb.prove.circuit(model, task, outside="mean", draws=1)
    assert any("by EAP from means" in note for note in result.notes)
    twins_ = pb.prove.circuit(model, task, draws=1)
    first, second = ({row["unit"]: row["score"] for row in one.tables["circuit"]} for one in (result, twins_))
    assert any(abs(first[unit] - second[unit]) > 1e-3 for unit in first)
    graph = Graph(model)
    by_itself = estimate(graph, task, 1, len(task), outputs(graph, [list(ids) for ids in task.clean]))[0]
    assert close(by_itself, 0.0, of=1.0)  # what writers put out anyway in their own place
    assert estimate(graph, task, 1, len(task))[0].abs().max() > 1e-3


def test_default_draws_can_reach_a_twentieth() -> None:
    default = inspect.signature(pb.prove.circuit).parameters["draws"].default
    assert 1 / (1 + default) <= 0.05
