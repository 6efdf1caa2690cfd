"""ACDC: a circuit by one pass over all edges from the output back, dropping each that is not missed.

    KL(H) = mean over prompts of KL(law of the model | law of circuit H), what is outside H carrying the twin's outputs
    for each reader, from the logits back to the first layer, and for each of its edges w -> r still in H:
        drop it for good if KL(H without it) - KL(H) < threshold

in nats. Readers of one time are taken in the order in which the model lists them (q, then k, then v by index), the writers of a reader
from the last to the first, of a layer from the lowest index: where two edges stand in for one another the first to be asked is dropped, so
the order decides ties. Every run is exact (the edges outside a circuit carry the twin's values, reader by reader). Edges are asked
in growing batches as long as they are dropped, which gives what one at a time gives. `threshold` = 0 keeps every edge whose loss
raises the KL at all: differences within rounding count as 0, and an edge that changes nothing is dropped from a threshold above 0 on.

Half of the prompts choose, the other half are measured: `kl` of the circuit and its `faithfulness`, (score - empty) / (whole - empty),
beside circuits of as many random edges (`kl_random` [draw], `p` that random ones come as close). Cost: about two runs of a circuit
for every edge that is kept, one for every sixteen that are dropped.

Conmy et al. 2023, "Towards Automated Circuit Discovery for Mechanistic Interpretability". A greedy pass finds a circuit, not the smallest, and one
threshold fits no two tasks: `prove.circuit(model, task, scores=found)` draws the whole curve along the rises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchbay import maths
from patchbay.model.model import Model
from patchbay.prove._cells import batches, check_draws, check_twins
from patchbay.prove._graph import Graph, Mixed, outputs
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

MOST = 16  # edges asked together at most
ROUNDING = 2e-6  # nats below which a rise is none


@method(paper="conmy2023")
def acdc(
    model: Model,
    task: Task,
    *,
    threshold: float = 0.01,
    draws: int = 20,
    batch_size: int = 64,
    seed: int = 0,
) -> Result:
    """The edges that are left after every one, from the logits back, was dropped whose loss raised the KL by less than `threshold`.

    Main variable `rise` [edit], in nats, of each edge when it was asked; `kept` [edit], 1 for the circuit; `n_kept`, `kl`,
    `kl_random` [draw], `p`, `faithfulness`, the scores `circuit`, `whole` and `empty`, of the held-out half. Table "circuit".

    `threshold`: the rise of the KL, in nats, from which on an edge stays. `draws`: circuits of as many random edges.
    """
    if not threshold >= 0:
        raise PatchbayError(f"threshold={threshold}: nats, 0 or more")
    check_draws(draws)
    check_twins(model, task)
    dev, test = task.split(seed=seed)
    graph = Graph(model)
    rise, kept = _pruned(graph, dev, threshold, batch_size)
    n = int(kept.sum())
    rows = [kept, torch.ones_like(kept), torch.zeros_like(kept)]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(draws):
        row = torch.zeros_like(kept)
        row[torch.randperm(len(kept), generator=generator)[:n]] = True
        rows.append(row)
    kls, scores = _measured(graph, test, torch.stack(rows), batch_size)
    random = kls[3:].mean(1)
    p = maths.draws_p(-float(kls[0].mean()), -random)
    mean = scores.mean(1)
    over = float(mean[1] - mean[2])
    faithful = float(mean[0] - mean[2]) / over if over else float("nan")
    labels = [graph.label(edge) for edge in graph.edges]
    listed = [{"edge": labels[i], "rise": float(rise[i])} for i in kept.nonzero()[:, 0].tolist()]
    unit = task.unit
    return Result(
        {
            "rise": (rise, ("edit",), "nats"),
            "kept": (kept.double(), ("edit",), "1 if kept"),
            "n_kept": (float(n), (), "edges"),
            "kl": (kls[0].mean(), (), "nats"),
            "kl_random": (random, ("draw",), "nats"),
            "p": (p, (), "probability"),
            "faithfulness": (faithful, (), "share of the model"),
            "circuit": (mean[0], (), unit),
            "whole": (mean[1], (), unit),
            "empty": (mean[2], (), unit),
        },
        coords={"edit": labels},
        tables={"circuit": sorted(listed, key=lambda row: -float(row["rise"]))},
        notes=[
            f"{n} of {len(kept)} edges are kept at a threshold of {threshold:g} nats, chosen on {len(dev)} prompts: on the other {len(test)} their KL is "
            f"{float(kls[0].mean()):.3g} nats, that of as many random edges {float(random.mean()):.3g} (p = {p:.2g}), their faithfulness {faithful:.3g}"
        ],
    )


def order_of(graph: Graph) -> list[int]:
    """Places of the edges as they are asked: readers from the last, of one time as listed; writers of a reader from the last group."""
    sent = {w: group.sent for group in graph.groups for w in range(group.writers.start, group.writers.stop)}
    return sorted(
        range(len(graph.edges)),
        key=lambda i: (-graph.read[graph.edges[i][1]], graph.edges[i][1], -sent[graph.edges[i][0]], graph.edges[i][0]),
    )


def _pruned(graph: Graph, task: Task, threshold: float, batch_size: int) -> tuple[Tensor, Tensor]:
    """The rise of the KL [edge] when each was asked, and whether it was kept."""
    runs = _runs(graph, task, batch_size)
    order = order_of(graph)
    kept = torch.ones(len(order), dtype=torch.bool)
    rise = torch.zeros(len(order), dtype=torch.float64)
    now, at, size = _kl(graph, runs, kept[None])[0], 0, 1
    while at < len(order):
        some = order[at : at + size]
        rows = kept.repeat(len(some), 1)
        for i in range(len(some)):
            rows[i:, some[i]] = False  # each without itself and those before it, which are dropped if it is reached
        found = _kl(graph, runs, rows)
        for i, edge in enumerate(some):
            change = float(found[i] - now)
            rise[edge] = 0.0 if abs(change) <= ROUNDING else change
            at += 1
            if rise[edge] >= threshold:
                size = 1
                break
            kept[edge], now = False, found[i]
        else:
            size = min(MOST, 2 * size)
    return rise, kept


def _runs(graph: Graph, task: Task, batch_size: int) -> list[tuple[Mixed, Tensor]]:
    """Batches of prompts with the law of the whole model, [prompt, vocab]."""
    found = []
    for prompts in batches(task, batch_size):
        some = task[prompts]
        mixed = Mixed(graph, some.clean, outputs(graph, some.corrupted or ()), batch_size)
        found.append((mixed, mixed.logits(graph.valid[None])[0]))
    return found


def _edges(graph: Graph, rows: Tensor) -> Tensor:
    """Circuits [circuit, edge] as [circuit, writer, reader]."""
    keep = torch.zeros(len(rows), *graph.valid.shape, dtype=torch.bool)
    places = torch.tensor(graph.edges)
    keep[:, places[:, 0], places[:, 1]] = rows
    return keep


def _kl(graph: Graph, runs: list[tuple[Mixed, Tensor]], rows: Tensor) -> Tensor:
    """Mean KL of the model from each circuit, [circuit], in nats."""
    total, count = torch.zeros(len(rows), dtype=torch.float64), 0
    for mixed, whole in runs:
        for i, logits in enumerate(mixed.logits(_edges(graph, rows))):
            total[i] += maths.kl(whole, logits).double().sum().cpu()
        count += len(whole)
    return total / count


def _measured(graph: Graph, task: Task, rows: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """KL and score of each circuit, twice [circuit, prompt]."""
    kls, scores = torch.zeros(2, len(rows), len(task), dtype=torch.float64)
    for prompts in batches(task, batch_size):
        some = task[prompts]
        mixed = Mixed(graph, some.clean, outputs(graph, some.corrupted or ()), batch_size)
        whole = mixed.logits(graph.valid[None])[0]
        for i, logits in enumerate(mixed.logits(_edges(graph, rows))):
            kls[i, prompts] = maths.kl(whole, logits).double().cpu()
            scores[i, prompts] = some.score(logits, whole).double().cpu()
    return kls, scores
