"""Mean mask: the fewest neurons and heads that a task needs when all others give their mean, and the weights between them.

    x_i <- g_i x_i + (1 - g_i) mean(x_i),   g_i = 1 where t_i > 0, else 0     (x: a neuron's activation, a head's z)
    t least in  mean of - log p(right answer) + 1 nat x share of nodes kept,   by Adam; the step passes a gradient as sigmoid(t) would

The mean is over the tokens of `texts`, or of the task's prompts. One half of the prompts trains t; then nodes are ranked by t, and the first n are kept, n the least (by halving) whose
loss on that half is at most `loss`. The other half is told of: `loss` [condition] of the whole model, of the `circuit`, and of `none` (all nodes at their means); and of as many random
nodes, as many in each layer of each kind, `draws` times (`random`, `p`). `n_nodes`, and what joins them in the weights, exactly: `entries`, those of the nodes' own matrices that are not 0, and
`paths`, pairs of an earlier and a later node with a channel of the stream that the one writes and the other reads, neither by a 0. To compare two models, as a weight-sparse
one with its dense twin, give both the same `loss`.

Gao et al. 2025, "Weight-sparse transformers have interpretable circuits", whose nodes are all channels, with the mean of the pretraining text. The norm before a block scales channels, and LayerNorm's
centring mixes them, which `paths` leaves out. A small circuit is enough under its means: what is constant in these texts is in the means and in no node.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.edits.edit import Edit
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError, Port
from patchbay.tasks.task import Task

RATE, WORTH, SLACK = 0.05, 1.0, 0.1  # of Adam; nats of all nodes together; nats over the model's own loss
NATS = "nats"


class Site(NamedTuple):
    """The nodes of one layer and kind: their port, their place among all nodes, the mean of each."""

    port: Port
    span: slice
    mean: Tensor  # [neuron], or [head, d_head]


@method(paper="gao2025")
def mean_mask(
    model: Model,
    task: Task,
    *,
    loss: float | None = None,
    texts: list[str] | None = None,
    steps: int = 100,
    draws: int = 10,
    batch_size: int = 32,
    seed: int = 0,
) -> Result:
    """The fewest nodes that keep the task's loss within `loss` when all others give their mean, beside random ones.

    Main variable `loss` [condition] (model, circuit, none) with ends, on the half of the prompts that did not train the mask; `random` [draw], `p`, `n_nodes`,
    `share`, `entries` and `paths`. The table "nodes" ranks those that are kept.

    `loss`: - log p of the right answer that the circuit may have, in nats; 0.1 above the model's own without. `texts`: what means are of; the task's prompts
    without. `steps`: updates of the mask. `draws`: random sets of as many nodes.
    """
    task.check(model.vocab_size)
    if len(task) < 4 or steps < 1 or draws < 1:
        raise PatchbayError(
            f"{len(task)} prompts, steps={steps}, draws={draws}: 4 prompts or more, a step and a draw or more"
        )
    dev, test = task.split(0.5, seed)
    means = [list(ids) for ids in dev.clean] if texts is None else model.encode(texts)
    sites = _sites(model, means, batch_size)
    nodes = [part for site in sites for part in _parts(site)]
    own = float(_loss(model, dev, [], torch.ones(0), batch_size).mean())
    target = own + SLACK if loss is None else loss
    if own > target:
        raise PatchbayError(
            f"loss={loss}: the whole model's own is {own:.3g} nats on these prompts, and a circuit of it is asked for less; give a larger one"
        )
    weight = _learned(model, dev, sites, len(nodes), steps, batch_size)
    order = weight.argsort(descending=True, stable=True)
    n = _fewest(model, dev, sites, order, target, batch_size)
    kept = _mask(order[:n], len(nodes))
    scores = torch.stack(
        [_loss(model, test, some, g, batch_size) for some, g in (([], kept), (sites, kept), (sites, 0 * kept))]
    )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([_loss(model, test, sites, _like(kept, sites, generator), batch_size) for _ in range(draws)])
    return _result(model, nodes, weight, order[:n].tolist(), scores, drawn, target)


# --- nodes ----------------------------------------------------------------------------------------------


def _sites(model: Model, texts: list[list[int]], batch_size: int) -> list[Site]:
    """Heads and neurons of every layer, with their means over all tokens."""
    ports = [
        Port(signal, i) for i in range(model.n_layers) for signal in ("attn.z", "mlp.act") if signal in model.signals(i)
    ]
    if not ports:
        raise PatchbayError(
            f"no layer of this {model.family.name} model has heads or neurons whose signals are offered"
        )
    total: dict[Port, Any] = dict.fromkeys(ports, 0.0)
    for begin in range(0, len(texts), batch_size):
        trace = run(model, texts[begin : begin + batch_size], taps=ports, logits="last")
        for port in ports:
            total[port] = total[port] + trace[port].double().nan_to_num(0.0).sum((0, 1)).cpu()
    n, at, found = sum(map(len, texts)), 0, []
    for port in ports:
        mean = (total[port] / n).to(model.dtype)
        found.append(Site(port, slice(at, at + len(mean)), mean))
        at += len(mean)
    return found


def _parts(site: Site) -> list[Part]:
    kind = "head" if site.port.signal == "attn.z" else "neuron"
    return [Part(site.port.layer, kind, i) for i in range(len(site.mean))]


def _edits(sites: Sequence[Site], g: Tensor) -> list[Edit]:
    """Nodes times g [node], and the rest of their means."""
    made = []
    for site in sites:
        own = g[site.span] if site.mean.ndim == 1 else g[site.span, None]
        made += [edit.scale(site.port, own), edit.add(site.port, (1.0 - own) * site.mean.to(g))]
    return made


def _loss(model: Model, task: Task, sites: Sequence[Site], g: Tensor, batch_size: int, grad: bool = False) -> Tensor:
    """- log p of the right answer, nats [prompt], float64."""
    found, edits = [], _edits(sites, g.to(model.device, model.dtype))
    for begin in range(0, len(task), batch_size):
        rows = range(begin, min(begin + batch_size, len(task)))
        logits = run(model, [list(task.clean[i]) for i in rows], edits=edits, logits="last", grad=grad).last_logits
        with torch.set_grad_enabled(grad):
            right = torch.tensor([task.right[i] for i in rows], device=logits.device)
            found.append(-logits.double().log_softmax(-1).gather(1, right[:, None])[:, 0].cpu())
    return torch.cat(found)


# --- the mask -------------------------------------------------------------------------------------------


def _learned(model: Model, dev: Task, sites: Sequence[Site], n: int, steps: int, batch_size: int) -> Tensor:
    """t [node] after training."""
    t = torch.ones(n, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([t], lr=RATE, foreach=False)
    for _ in range(steps):
        g = (t.detach() > 0).double().requires_grad_()
        gradient = torch.zeros_like(g)
        for begin in range(0, len(dev), batch_size):
            with torch.enable_grad():
                some = _loss(model, dev[begin : begin + batch_size], sites, g, batch_size, grad=True).sum() / len(dev)
                gradient += torch.autograd.grad(some, g)[0]
        slope = t.detach().sigmoid() * (1.0 - t.detach().sigmoid())
        t.grad = (gradient + WORTH / n) * slope
        adam.step()
    return t.detach()


def _mask(chosen: Tensor, n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.float64).index_fill_(0, chosen, 1.0)


def _fewest(model: Model, dev: Task, sites: Sequence[Site], order: Tensor, target: float, batch_size: int) -> int:
    """The least number of first nodes within the target, by halving: it holds of that number, and not of the one tried below it."""

    def within(n: int) -> bool:
        return float(_loss(model, dev, sites, _mask(order[:n], len(order)), batch_size).mean()) <= target

    low, high = -1, len(order)  # all of them are the model, which is within
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if within(middle) else (middle, high)
    return high


def _like(kept: Tensor, sites: Sequence[Site], generator: torch.Generator) -> Tensor:
    """As many random nodes in every layer of every kind."""
    found = torch.zeros_like(kept)
    for site in sites:
        n = int(kept[site.span].sum())
        found[site.span.start + torch.randperm(len(site.mean), generator=generator)[:n]] = 1.0
    return found


# --- the graph ------------------------------------------------------------------------------------------


def _touched(model: Model, part: Part) -> tuple[Tensor, Tensor, int]:
    """Channels of the stream that a node reads and writes, bool [d_model] each, and its weights that are not 0."""
    assert part.layer is not None
    assert part.index is not None
    layer, i = model.layers[part.layer], part.index
    if part.kind == "neuron":
        mlp = layer.mlp.weights()
        reads = [mlp.W_in[:, i], *([] if mlp.W_gate is None else [mlp.W_gate[:, i]])]
        writes = mlp.W_out[i][None]
    else:
        attn = layer.attn.weights()
        group = i * len(attn.W_K) // len(attn.W_Q)
        reads = [one for matrix in (attn.W_Q[i], attn.W_K[group], attn.W_V[group]) for one in matrix.T]
        writes = attn.W_O[i]
    read = torch.stack(list(reads)).detach().cpu() != 0  # [map, d_model]
    written = writes.detach().cpu() != 0
    return read.any(0), written.any(0), int(read.sum() + written.sum())


def _joined(model: Model, parts: Sequence[Part]) -> tuple[int, int]:
    """Weights that are not 0, and pairs of an earlier and a later node that share a channel."""
    if not parts:
        return 0, 0
    touched = [_touched(model, part) for part in parts]
    reads, writes = (torch.stack([one[at] for one in touched]).double() for at in (0, 1))
    place = torch.tensor(
        [2 * (part.layer or 0) + (part.kind == "neuron" and _behind(model, part.layer or 0)) for part in parts]
    )
    shared = (writes @ reads.T > 0) & (place[:, None] < place[None])
    return sum(one[2] for one in touched), int(shared.sum())


def _behind(model: Model, layer: int) -> bool:
    """Whether the MLP of a layer reads what its attention wrote."""
    return "resid_mid" in model.signals(layer)


# --- what is told ---------------------------------------------------------------------------------------


def _result(
    model: Model, nodes: list[Part], weight: Tensor, chosen: list[int], scores: Tensor, drawn: Tensor, target: float
) -> Result:
    ends = [maths.bootstrap_interval(one) for one in scores]
    mean, random = ends[1].mean, drawn.mean(1)
    p = maths.draws_p(-mean, -random)
    parts, notes = [nodes[i] for i in chosen], []
    values: dict[str, Any] = {
        "loss": ([one.mean for one in ends], ("condition",), NATS),
        "low": ([one.low for one in ends], ("condition",), NATS),
        "high": ([one.high for one in ends], ("condition",), NATS),
        "random": (random, ("draw",), NATS),
        "p": (p, (), "p value"),
        "n_nodes": (float(len(chosen)), (), "nodes"),
        "share": (len(chosen) / len(nodes), (), "share of nodes"),
    }
    try:
        entries, paths = _joined(model, parts)
        values |= {"entries": (float(entries), (), "weights"), "paths": (float(paths), (), "pairs of nodes")}
    except PatchbayError as error:
        notes.append(f"weights are not counted: {error}")
    said = (
        f"{len(chosen)} of {len(nodes)} heads and neurons keep the loss within {target:.3g} nats on the half that chose; on the other it is {mean:.3g}, "
        f"the model's {ends[0].mean:.3g}, with all at their means {ends[2].mean:.3g}, with as many random ones {float(random.mean()):.3g} (p = {p:.2g})"
    )
    if "paths" in values:
        notes.insert(
            0, f"they have {entries} weights that are not 0, and {paths} pairs of them share a channel of the stream"
        )
    rows = [{"node": str(nodes[i]), "weight": float(weight[i])} for i in chosen]
    return Result(
        values,
        coords={"condition": ["model", "circuit", "none"]},
        highlights=parts,
        tables={"nodes": rows},
        notes=[said, *notes],
    )
