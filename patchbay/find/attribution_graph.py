"""Attribution graph: which features of a prompt make which others, from its tokens to the logits, through the model as it was on this prompt.

MLPs are features and an error: those of transcoders that are attached (`model.with_dictionaries`; `L3.mlp.F12`), elsewhere the MLP's own neurons
(`L3.N12`), which leave no error. A cross-layer transcoder's features send what they write in all layers from their own on. Attention patterns and the scales of norms are held as they were, so that all else is affine, and

    weight(s -> t) = a_s d_s . grad(w_t . read_t)       of feature s at its position to feature t at its own

with tokens, what the transcoders miss (`error`) and biases as leaves, and as targets the centred unembedding columns of the fewest tokens that hold
95 % (at most 10). The weights into a feature sum to its pre-activation, those into a logit to the logit less the mean logit: `sum_error` is the
largest that they are off. A gated neuron act(g) u is read half through its gate and half through its value with act(g) / g held, and sums to
its activation.

Influence is w N + w N^2 + ..., N the |weights| of each target as shares and w the logits' probabilities; nodes are kept to 80 % of it, edges to 98 % of
what these carry. `through_error`, `through_tokens` and `through_bias` are the leaves' shares of it, which sum to 1. Cost: one run, and one pass
backwards through the frozen layers for each feature that is followed.

Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language Models"; transcoders: Dunefsky et al. 2024. Pruning as in
circuit-tracer, whose form `result.save_graph` writes. What moves a query or a key is not in the graph: patterns are held, and so is which token is
looked at. A graph is of one prompt and proves nothing: `prove.graph_ablation` takes its nodes away, beside random graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchbay.find._frozen import WHAT, frozen
from patchbay.find._paths import Node, Paths, Pruned, Targets, pieces, pruned
from patchbay.model.model import Model
from patchbay.results.letters import visible
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError
from patchbay.tasks.task import Task

SHARE, MOST = 0.95, 10  # of the probability, by at most so many tokens
LEAVES = {"through_tokens": "embed", "through_error": "error", "through_bias": "bias"}


@method(paper="ameisen2025", unit="share of the logits")
def attribution_graph(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    *,
    features: int = 1024,
    tokens: list[int] | None = None,
    keep_nodes: float = 0.8,
    keep_edges: float = 0.98,
) -> Result:
    """The graph of each prompt; main variable `influence` [part], the features that are left in them, summed over positions, mean over prompts.

    Tables: "nodes" (each with its `influence`, `activation`, `pre`-activation and the `sum` of what arrives) and "edges" (source, target, weight),
    by prompt, and "tokens". Of a Task the prompts are its clean ones.

    `features`: how many features of a prompt are followed, by their influence, in equal shares of the layers; what the others write is in the
    error. `tokens`: ids of the tokens whose logits are asked; without, the fewest that hold 95 % of the probability. `keep_nodes`, `keep_edges`:
    shares of the influence that nodes, and then edges, are kept to.
    """
    if features < 1:
        raise PatchbayError(f"features={features}: at least one feature is followed")
    for name, share in (("keep_nodes", keep_nodes), ("keep_edges", keep_edges)):
        if not 0 < share <= 1:
            raise PatchbayError(f"{name}={share}: a share of the influence, above 0 and at most 1")
    encoded = model.encode(prompts)
    dictionaries = _transcoders(model)
    graphs = [_graph(model, list(ids), dictionaries, features, tokens, (keep_nodes, keep_edges)) for ids in encoded]
    return _result(model, graphs)


def _transcoders(model: Model) -> dict[int, Any]:
    """The attached transcoders by layer."""
    found: dict[int, Any] = {}
    for (layer, _), attached in model.dictionaries.items():
        it: Any = attached
        if it.reads not in ("mlp.in", "resid_mid") or it.writes != "mlp.out" or it.normalise != "none":
            why = f"it reads {it.reads} and writes {it.writes}"
            why = "it normalises each token" if it.normalise != "none" else why
            raise PatchbayError(
                f"{WHAT}: the dictionary at L{layer}.{it.writes} is no transcoder of an MLP ({why}): attach those that read mlp.in, or "
                "resid_mid, and write mlp.out alone, or none, and neurons are the features"
            )
        found[layer] = it
    return found


@dataclass
class Graph:
    """One prompt's graph before and after pruning."""

    ids: list[int]
    nodes: list[Node]  # sources, then logits
    kinds: list[str]  # of the features, by layer
    weights: Tensor  # [target, source]
    pre: Tensor  # [target]
    pruned: Pruned
    chances: Tensor  # of the logits' tokens
    acts: Tensor  # [feature]
    n_active: int

    @property
    def n_features(self) -> int:
        return sum(node.kind == "feature" for node in self.nodes)

    def text(self, i: int) -> str:
        node = self.nodes[i]
        return node.text(self.kinds[node.layer] if node.kind == "feature" else "")

    def through(self, kind: str) -> float:
        """The share of the influence that comes from leaves of a kind."""
        mine = torch.tensor([node.kind == kind for node in self.nodes[: len(self.pruned.influence)]])
        return float(self.pruned.influence[mine].sum())


def _graph(
    model: Model,
    ids: list[int],
    dictionaries: dict[int, Any],
    features: int,
    tokens: list[int] | None,
    keep: tuple[float, float],
) -> Graph:
    run = frozen(model, ids, dictionaries)
    chance = run.logits.softmax(0)
    asked = _asked(model, chance) if tokens is None else _given(model, tokens)
    paths, start = Paths(run), chance[asked] / chance[asked].sum()
    logits = paths.logits(asked)
    kept = paths.chosen(logits, start, features)
    sources = paths.sources(kept)
    nodes = [node for node in sources if node.kind == "feature"]
    targets = [
        paths.features(i, of) for i in range(paths.n_layers) if (of := [node for node in nodes if node.layer == i])
    ]
    targets.append(logits)
    weights = torch.cat([_sent(paths, target, kept) for target in targets])
    pre = torch.cat([target.pre for target in targets])
    off = (weights.sum(1) - pre).abs()
    allowed = 1e-3 if torch.finfo(model.dtype).eps < 1e-5 else 5e-2
    if not bool((off <= allowed * weights.abs().sum(1).clamp_min(1e-6)).all()):
        raise PatchbayError(
            f"{WHAT}: what arrives at a node of this {model.family.name} model does not sum to its pre-activation (off by {float(off.max()):.2g}): "
            "its layers are not affine between features; find.direct_logit_attribution works"
        )
    acts = torch.cat([block.acts[mask] for block, mask in zip(run.blocks, kept, strict=True)])
    left = pruned(weights, sources, start, *keep)
    active = sum(int((block.acts != 0).sum()) for block in run.blocks)
    return Graph(
        ids,
        [*sources, *logits.nodes],
        [block.kind for block in run.blocks],
        weights,
        pre,
        left,
        chance[asked],
        acts,
        active,
    )


def _sent(paths: Paths, targets: Targets, kept: list[Tensor]) -> Tensor:
    width = int(max(mask.sum() for mask in kept)) * paths.zero.shape[1] + paths.zero.numel()
    return torch.cat([paths.sent(targets.some(some), kept) for some in pieces(len(targets.nodes), width)])


def _asked(model: Model, chance: Tensor) -> list[int]:
    """The fewest tokens that hold 95 % of the probability, at most ten."""
    top = chance.topk(min(MOST, len(chance)))
    n = int((top.values.cumsum(0) < SHARE).sum()) + 1
    return [int(i) for i in top.indices[:n]]


def _given(model: Model, tokens: list[int]) -> list[int]:
    if not tokens or any(not 0 <= int(one) < model.vocab_size for one in tokens) or len(set(tokens)) < len(tokens):
        raise PatchbayError(f"tokens={tokens}: different token ids in 0..{model.vocab_size - 1}")
    return [int(one) for one in tokens]


# --- what is told -----------------------------------------------------------------------------------


def _result(model: Model, graphs: Sequence[Graph]) -> Result:
    influence: dict[Part, float] = {}
    for graph in graphs:
        for i in graph.pruned.sources[: graph.n_features].nonzero()[:, 0].tolist():
            node = graph.nodes[i]
            part = Part(node.layer, graph.kinds[node.layer], node.index)
            influence[part] = influence.get(part, 0.0) + float(graph.pruned.influence[i]) / len(graphs)
    parts = sorted(influence, key=lambda part: (-influence[part], part))
    unit, n = "share of the logits", len(graphs)
    variables: dict[str, Any] = {
        "influence": (torch.tensor([influence[p] for p in parts], dtype=torch.float64), ("part",), unit)
    }
    for name, kind in LEAVES.items():
        variables[name] = (
            torch.tensor([graph.through(kind) for graph in graphs], dtype=torch.float64),
            ("prompt",),
            unit,
        )
    off = [float((graph.weights.sum(1) - graph.pre).abs().max()) for graph in graphs]
    variables["sum_error"] = (torch.tensor(off, dtype=torch.float64), ("prompt",), "logits")
    counts = {
        "n_active": [graph.n_active for graph in graphs],
        "n_followed": [graph.n_features for graph in graphs],
        "n_nodes": [int(graph.pruned.sources.sum()) + len(graph.chances) for graph in graphs],
        "n_edges": [int(graph.pruned.edges.sum()) for graph in graphs],
    }
    variables |= {name: (torch.tensor(row, dtype=torch.float64), ("prompt",), "count") for name, row in counts.items()}
    tables: dict[str, list[dict[str, Any]]] = {"nodes": [], "edges": [], "tokens": []}
    for prompt, graph in enumerate(graphs):
        _rows(model, prompt, graph, tables)
    error = sum(graph.through("error") for graph in graphs) / n
    notes = [
        f"{100 * error:.1f} % of the logits go through what the features miss (error leaves), {100 * sum(g.through('embed') for g in graphs) / n:.1f} % come from tokens"
        f" and {100 * sum(g.through('bias') for g in graphs) / n:.1f} % from biases; weights into a node sum to its pre-activation within {max(off):.2g}",
        "patterns and norms are held: what moves queries and keys, and so which token is looked at, is not in the graph",
    ]
    followed = [(g.n_features, g.n_active) for g in graphs if g.n_features < g.n_active]
    if followed:
        notes.append(
            f"{followed[0][0]} of {followed[0][1]} active features are followed; what the others write is in the error (features=)"
        )
    if not parts:
        notes.append("no feature is left: what reaches the logits comes straight from tokens, errors and biases")
    return Result(variables, parts=parts, tables=tables, notes=notes)


def _rows(model: Model, prompt: int, graph: Graph, tables: dict[str, list[dict[str, Any]]]) -> None:
    """The rows of one prompt's graph."""
    n, first_logit = graph.n_features, len(graph.pruned.influence)
    arrives, cumulative = graph.weights.sum(1), _cumulative(graph.pruned.influence)
    for i in [*graph.pruned.sources.nonzero()[:, 0].tolist(), *range(first_logit, len(graph.nodes))]:
        node = graph.nodes[i]
        row: dict[str, Any] = {
            "prompt": prompt,
            "node": graph.text(i),
            "kind": node.kind,
            "layer": node.layer,
            "position": node.position,
            "index": node.index,
        }
        target = i if i < n else n + i - first_logit if i >= first_logit else None
        row["influence"] = float(graph.pruned.influence[i] if i < first_logit else graph.chances[i - first_logit])
        row["cumulative"] = float(cumulative[i]) if i < first_logit else None
        row["activation"] = float(graph.acts[i]) if i < n else None
        row |= {
            "pre": None if target is None else float(graph.pre[target]),
            "sum": None if target is None else float(arrives[target]),
        }
        row["part"] = str(Part(node.layer, graph.kinds[node.layer], node.index)) if node.kind == "feature" else ""
        row["token"] = visible(_token(model, node.index)) if node.kind in ("embed", "logit") else ""
        tables["nodes"].append(row)
    for target, source in graph.pruned.edges.nonzero().tolist():
        name = graph.text(target if target < n else first_logit + target - n)
        tables["edges"].append(
            {
                "prompt": prompt,
                "source": graph.text(source),
                "target": name,
                "weight": float(graph.weights[target, source]),
            }
        )
    tables["tokens"] += [
        {"prompt": prompt, "position": at, "id": token, "token": _token(model, token)}
        for at, token in enumerate(graph.ids)
    ]


def _cumulative(influence: Tensor) -> Tensor:
    """The share of the influence that a node and all stronger ones hold."""
    order = influence.argsort(descending=True, stable=True)
    held = torch.empty_like(influence)
    held[order] = influence[order].cumsum(0) / influence.sum().clamp_min(1e-300)
    return held


def _token(model: Model, token: int) -> str:
    return model.decode([token]) if model.tokenizer is not None else str(token)
