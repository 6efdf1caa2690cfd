"""Graph ablation: what is lost without the nodes of an attribution graph, against random graphs of the same size and layers.

    effect[prompt]  = KL(model || model without the graph's features at their positions), of the next token, in nats
    random[draw]    = the same, mean over prompts, of as many other features that were active on that prompt, from the same layers
    lost            = by how much the graph's logits (each less the mean logit, weighted as in the graph) fall; `random_lost` of the draws

A feature of a graph stands at a position, and is set to 0 there alone; all else runs as it does, patterns and norms too, so that this is no claim
about the frozen model in which the graph was drawn. A draw takes for each layer as many (feature, position) pairs from those that are active there and
are not in the graph (`matched="layer"`), or each from the few that write about as much as the one it stands for ("length"); where a layer has too few it
takes what there is, and says so. `difference` is the effect less the mean of the draws, its
interval over prompts and draws together; `p` = (1 + draws that cost as much or more) / (1 + draws). `written` beside `random_written` is
the summed length of what the features write: what is strong at a token costs more whatever it means, which "length" takes out.

Ameisen et al. 2025, "Circuit Tracing", whose graphs `find.attribution_graph` draws. An effect shows that these features matter together here, not that
they make each other as the edges say.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.edits.edit import Edit
from patchbay.errors import one_of
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.prove._cells import check_draws
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port, parse_part

Place = tuple[int, int]  # position, feature
Matched = Literal["layer", "length"]
NEAREST = 8  # of which one is drawn, where lengths are matched


class Taken(NamedTuple):
    """Of one prompt: its tokens, the graph's logits with their weights, and by port the places of each condition: the graph, then the draws."""

    ids: list[int]
    tokens: list[int]
    weights: Tensor
    places: list[dict[Port, list[Place]]]
    written: list[float]
    short: int  # places that random graphs had to leave out


@method(paper="ameisen2025", unit="nats")
def graph_ablation(
    model: Model, graph: Result, *, draws: int = 20, matched: Matched = "layer", batch_size: int = 32, seed: int = 0
) -> Result:
    """What taking away each prompt's graph costs; main variable `effect` [prompt].

    `graph`: a Result of `find.attribution_graph` made on this model. `draws`: random graphs of other active features, of the same size in each layer.
    `matched`: random features are any active ones of the "layer", or each is one of the eight there whose writing is nearest in "length".
    """
    check_draws(draws)
    one_of("matched", matched, ("layer", "length"))
    prompts = _prompts(model, graph)
    taken = [_taken(model, ids, rows, draws, matched, f"graph-{seed}-{i}") for i, (ids, rows) in enumerate(prompts)]
    found = torch.stack([_costs(model, one, batch_size) for one in taken])  # [prompt, condition, nats and logits]
    own, drawn = found[:, 0, 0], found[:, 1:, 0].T
    difference, means = maths.beyond_draws(own, drawn), drawn.mean(1)
    joint, p = maths.bootstrap_interval(own), maths.draws_p(float(own.mean()), means)
    written = torch.tensor([one.written for one in taken], dtype=torch.float64)  # [prompt, condition]
    n = [sum(map(len, one.places[0].values())) for one in taken]
    notes = [
        f"without the {sum(n) / len(n):.3g} features of a graph: {joint.mean:.3g} nats{maths.between(joint.low, joint.high)}; without random graphs "
        f"{float(means.mean()):.3g} (draws {float(means.min()):.3g} to {float(means.max()):.3g}); difference {difference.mean:.3g}"
        f"{maths.between(difference.low, difference.high, said='')}, p = {p:.3g}",
        f"the graph's features write {float(written[:, 0].mean()):.3g} in all, those of random graphs {float(written[:, 1:].mean()):.3g}",
    ]
    if short := sum(one.short for one in taken):
        notes.append(
            f"random graphs are smaller by {short / len(taken) / draws:.3g} features: their layers have too few other active ones"
        )
    return Result(
        {
            "effect": (own, ("prompt",), "nats"),
            "lost": (found[:, 0, 1], ("prompt",), "logits"),
            "random": (means, ("draw",), "nats"),
            "random_lost": (found[:, 1:, 1].mean(0), ("draw",), "logits"),
            "joint": (joint.mean, (), "nats"),
            "joint_low": (joint.low, (), "nats"),
            "joint_high": (joint.high, (), "nats"),
            "difference": (difference.mean, (), "nats"),
            "difference_low": (difference.low, (), "nats"),
            "difference_high": (difference.high, (), "nats"),
            "p": (p, (), "probability"),
            "written": (written[:, 0], ("prompt",), "length"),
            "random_written": (written[:, 1:].mean(0), ("draw",), "length"),
            "size": (torch.tensor(n, dtype=torch.float64), ("prompt",), "features"),
        },
        notes=notes,
    )


def _prompts(model: Model, graph: Result) -> list[tuple[list[int], list[dict[str, Any]]]]:
    """The tokens of each prompt and the rows of its nodes; refuses what is no graph, or is one of another model or without features."""
    if not {"nodes", "edges", "tokens"} <= set(graph.tables) or not graph.tables["tokens"]:
        raise PatchbayError(
            "graph: a Result of find.attribution_graph, which holds nodes, edges and the prompt's tokens"
        )
    made = (graph.provenance.get("model") or {}).get("fingerprint")
    if made is not None and made != model.fingerprint:
        raise PatchbayError(
            f"the graph was made on a model whose fingerprint is {made}, this one's is {model.fingerprint}: make it anew on this one"
        )
    found: dict[int, tuple[list[int], list[dict[str, Any]]]] = {}
    for row in graph.tables["tokens"]:
        found.setdefault(int(row["prompt"]), ([], []))[0].append(int(row["id"]))
    for row in graph.tables["nodes"]:
        found[int(row["prompt"])][1].append(row)
    for prompt, (_, rows) in found.items():
        if not any(row["kind"] == "feature" for row in rows):
            raise PatchbayError(
                f"the graph of prompt {prompt} has no feature that could be taken away: make it larger (keep_nodes=), or leave that prompt out"
            )
    return [found[prompt] for prompt in sorted(found)]


def _taken(
    model: Model, ids: list[int], rows: Sequence[dict[str, Any]], draws: int, matched: Matched, seed: str
) -> Taken:
    own: dict[Port, list[Place]] = {}
    for row in rows:
        if row["kind"] == "feature":
            part = parse_part(str(row["part"]))
            model.require(part.port())
            own.setdefault(Port(part.port().signal, part.layer), []).append(
                (int(row["position"]), int(part.index or 0))
            )
    trace = run(model, [ids], taps=list(own), logits="last")
    acts = {port: trace[port][0].double().cpu() for port in own}  # [position, feature]
    lengths = {port: _lengths(model, port) for port in own}
    size = {port: acts[port].abs() * lengths[port] for port in own}  # of what is written, [position, feature]
    pools = {port: _others(acts[port], own[port]) for port in own}
    if not any(pools.values()):
        raise PatchbayError(
            "every feature that is active in the graph's layers is in the graph, so that no random one can be drawn: keep fewer (keep_nodes=)"
        )
    rng = random.Random(seed)
    places, short = [own], 0
    for _ in range(draws):
        drawn = {
            port: _drawn(rng, own[port], pool, size[port] if matched == "length" else None)
            for port, pool in pools.items()
        }
        short += sum(len(own[port]) - len(drawn[port]) for port in own)
        places.append(drawn)
    written = [sum(float(size[port][place]) for port, some in one.items() for place in some) for one in places]
    logits = [row for row in rows if row["kind"] == "logit"]
    weights = torch.tensor([float(row["influence"]) for row in logits], dtype=torch.float64)
    return Taken(ids, [int(row["index"]) for row in logits], weights / weights.sum(), places, written, short)


def _others(acts: Tensor, own: Sequence[Place]) -> list[Place]:
    """Where other features are active."""
    taken = set(own)
    return [(at, i) for at, i in acts.nonzero().tolist() if (at, i) not in taken]


def _drawn(rng: random.Random, own: Sequence[Place], pool: Sequence[Place], size: Tensor | None) -> list[Place]:
    """As many others as there are own ones, or all; with `size` each one of the nearest in it that are left."""
    if size is None or len(pool) <= len(own):
        return rng.sample(pool, min(len(own), len(pool)))
    places = torch.tensor(pool)
    sizes = size[places[:, 0], places[:, 1]].clone()
    found: list[Place] = []
    for place in rng.sample(own, len(own)):
        nearest = (sizes - size[place]).abs().topk(min(NEAREST, len(pool) - len(found)), largest=False).indices.tolist()
        one = rng.choice(nearest)
        sizes[one] = torch.inf  # each once
        found.append(pool[one])
    return found


def _lengths(model: Model, port: Port) -> Tensor:
    """Length of what each feature of a layer writes at activation 1, in all layers together."""
    layer = port.layer or 0
    if port.signal == "mlp.act":
        return model.layers[layer].mlp.weights().W_out.detach().double().cpu().norm(dim=1) * abs(model.residual_scale)
    it = model.dictionaries[layer, port.signal.split(".")[0]]
    rows = it.W_dec[None] if it.onward is None else torch.cat([it.W_dec[None], it.onward])
    return rows.detach().double().cpu().pow(2).sum((0, 2)).sqrt()


def _costs(model: Model, taken: Taken, batch_size: int) -> Tensor:
    """Of each condition: KL in nats, and how far the graph's logits fall, [condition, 2]."""
    base = run(model, [taken.ids], logits="last").last_logits.double().cpu()
    found = []
    for start in range(0, len(taken.places), batch_size):
        some = taken.places[start : start + batch_size]
        logits = (
            run(model, [taken.ids] * len(some), edits=_edits(some, len(taken.ids), model), logits="last")
            .last_logits.double()
            .cpu()
        )
        kl = (base.softmax(1) * (base.log_softmax(1) - logits.log_softmax(1))).sum(1)
        found.append(torch.stack([kl, _asked(base, taken) - _asked(logits, taken)], 1))
    return torch.cat(found)


def _asked(logits: Tensor, taken: Taken) -> Tensor:
    """The graph's logits, each less the mean logit, weighted, [row]."""
    return (logits[:, taken.tokens] - logits.mean(1, keepdim=True)) @ taken.weights


def _edits(places: Sequence[dict[Port, list[Place]]], n_positions: int, model: Model) -> list[Edit]:
    """Each row's places set to 0, by a factor [row, position, feature] of 0 there and 1 elsewhere."""
    edits = []
    for port in sorted({port for one in places for port in one}, key=str):
        factor = torch.ones(len(places), n_positions, len(_lengths(model, port)), dtype=torch.float32)
        for row, one in enumerate(places):
            for at, feature in one.get(port, ()):
                factor[row, at, feature] = 0.0
        edits.append(edit.scale(port, factor, rows=list(range(len(places)))))
    return edits
