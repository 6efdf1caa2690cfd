"""Sub-networks: what is left of a model whose layers lose their attention or part of their neurons, and which of these nothing of their size beats.

    a choice     for each layer whether its attention stays, and which share of its neurons does: those that write most, mean |activation| x length of what the neuron writes,
                 or without texts the first of them, for which `train.variant(objective="supernet")` tunes a model
    the front    the choices that no other is below in both loss and size
    search       NSGA-II: parents by rank of their front, then by how alone they are on it; children take each gene of either parent, and change one in so many

Where there are few choices, `every` one can be asked; the search is for more. `hypervolume` is the area between a front and a corner: what two searches are compared by.

Sarah et al. 2024, "LLaMA-NAS: Efficient Neural Architecture Search for Large Language Models", whose model is first tuned on random sub-networks, and whose neurons are the first of each width.
A choice is a list of edits, so that nothing is built; what it is worth after tuning of its own they do not say.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from patchbay.edits.edit import Edit, scale, zero
from patchbay.errors import PatchbayError
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.signal.port import Port

Choice = tuple[int, ...]  # of each gene the number of the option
Point = tuple[float, float]  # loss and size: less of both is better
SHARES = (1.0, 0.5, 0.25)  # of a layer's neurons


class Space:
    """The sub-networks of a model: of each layer with or without its attention, and a share of its neurons out of `shares`, the first of which is the whole. Neurons stay
    by what they write on `texts`; without texts, those that stand first."""

    def __init__(
        self, model: Model, texts: Sequence[Sequence[int]] | None = None, shares: Sequence[float] = SHARES
    ) -> None:
        check(model, shares)
        self.model, self.shares = model, list(shares)
        self.order = in_order(model) if texts is None else [one.argsort(descending=True) for one in written(model, texts)]  # fmt: skip
        self.each: list[tuple[int, int]] = []  # numbers of each layer's attention, and of one neuron
        for layer, module, order in zip(model.layers, model.modules, self.order, strict=True):
            weights = layer.mlp.weights()
            own = (weights.W_in, weights.W_gate, weights.W_out, weights.b_in, weights.b_gate)
            attn = module.attn if module.attn is not None else module.attn_added
            n = sum(p.numel() for p in attn.parameters()) if attn is not None else 0
            self.each.append((n, sum(one.numel() for one in own if one is not None) // len(order)))
        self.options = [2, len(self.shares)] * model.n_layers

    def edits(self, choice: Choice) -> list[Edit]:
        """What makes the model the sub-network."""
        return cuts(self.model, self.shares, choice, self.order)

    def size(self, choice: Choice) -> int:
        """Numbers of the attention and the neurons that are left."""
        total = 0
        for layer, ((attention, neuron), order) in enumerate(zip(self.each, self.order, strict=True)):
            off, share = choice[2 * layer : 2 * layer + 2]
            total += (0 if off else attention) + round(self.shares[share] * len(order)) * neuron
        return total


def are_shares(some: Sequence[float]) -> bool:
    """Whether these are shares of a layer's neurons, the first of them all."""
    return bool(some) and some[0] == 1.0 and all(0 <= one <= 1 for one in some)


def check(model: Model, shares: Sequence[float]) -> None:
    """Raise PatchbayError where no such shares can be, or the model has no such parts."""
    if not are_shares(shares):
        raise PatchbayError(f"shares={list(shares)}: of the neurons, from 0 to 1, and first 1, the whole layer")
    for port in (Port(name, layer) for name in ("mlp.act", "attn.out") for layer in range(model.n_layers)):
        model.require(port)


def cuts(model: Model, shares: Sequence[float], choice: Choice, order: Sequence[Tensor]) -> list[Edit]:
    """What makes a model the sub-network of a choice, whose neurons stay in an order, a permutation for each layer."""
    found = []
    for layer, first in enumerate(order):
        off, share = choice[2 * layer : 2 * layer + 2]
        if off:
            found.append(zero(Port("attn.out", layer)))
        if shares[share] < 1:
            keep = torch.zeros(len(first))
            keep[first[: round(shares[share] * len(first))]] = 1.0
            found.append(scale(Port("mlp.act", layer), keep.to(model.device)))
    return found


def in_order(model: Model) -> list[Tensor]:
    """Of each layer, its neurons as they stand."""
    return [torch.arange(model.n_neurons(layer)) for layer in range(model.n_layers)]


def written(model: Model, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Of each layer, how much each neuron writes on texts: mean |activation| x length of its row of W_out, float64 [neuron]."""
    acts = [Port("mlp.act", layer) for layer in range(model.n_layers)]
    seen = run(model, [list(ids) for ids in texts], taps=acts, logits="last")
    sizes = [layer.mlp.weights().W_out.double().norm(dim=1).cpu() for layer in model.layers]
    return [seen[port].flatten(0, -2).abs().double().nanmean(0).cpu() * size for port, size in zip(acts, sizes, strict=True)]  # fmt: skip


def every(options: Sequence[int]) -> list[Choice]:
    """All choices."""
    return list(itertools.product(*(range(n) for n in options)))


def search(
    ask: Callable[[Choice], Point], options: Sequence[int], *, evaluations: int, population: int = 12, seed: int = 0
) -> dict[Choice, Point]:
    """What was asked, by choice: the whole model, and then so many choices in all as NSGA-II meets them; none twice."""
    if evaluations < 1 or population < 2 or not options or min(options) < 1:
        raise PatchbayError(
            f"evaluations={evaluations}, population={population}, options={list(options)}: 1 or more, 2 or more, and an option or more for each gene"
        )
    draw, found = random.Random(f"subnetworks {seed}"), dict[Choice, Point]()
    limit = min(evaluations, math.prod(options))
    new = [(0,) * len(options), *(_drawn(options, draw) for _ in range(population - 1))]
    parents: list[Choice] = []
    while True:
        for choice in dict.fromkeys(new):
            if choice not in found and len(found) < limit:
                found[choice] = ask(choice)
                parents.append(choice)
        if len(found) >= limit:
            return found
        ranked = best(parents, found)
        parents = ranked[:population]
        new = [_child(parents, options, draw) for _ in range(population)]
        while all(one in found for one in new):  # nothing new is left near by
            new.append(_drawn(options, draw))


def _drawn(options: Sequence[int], draw: random.Random) -> Choice:
    return tuple(draw.randrange(n) for n in options)


def _child(ranked: Sequence[Choice], options: Sequence[int], draw: random.Random) -> Choice:
    """Of two parents, each the better of two that are drawn; one gene in so many is drawn anew."""
    one, other = (ranked[min(draw.randrange(len(ranked)) for _ in range(2))] for _ in range(2))
    mixed = [draw.choice(pair) for pair in zip(one, other, strict=True)]
    return tuple(draw.randrange(n) if draw.random() < 1 / len(mixed) else gene for gene, n in zip(mixed, options, strict=True))  # fmt: skip


def front(points: Sequence[Point]) -> list[int]:
    """The places of the points that no other is below in one and not above in the other."""
    return [i for i, one in enumerate(points) if not any(_beats(other, one) for other in points)]


def _beats(one: Point, other: Point) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one != other


def best(choices: Sequence[Choice], found: dict[Choice, Point]) -> list[Choice]:
    """Choices front by front, and on a front those first that are alone."""
    left, ranked = list(dict.fromkeys(choices)), list[Choice]()
    while left:
        here = [left[i] for i in front([found[one] for one in left])]
        alone = crowding([found[one] for one in here])
        ranked += [here[i] for i in sorted(range(len(here)), key=lambda i: -alone[i])]
        left = [one for one in left if one not in here]
    return ranked


def crowding(points: Sequence[Point]) -> list[float]:
    """How far the neighbours of each point of a front are from one another, in shares of what the front spans; infinite at its ends."""
    found = [0.0] * len(points)
    for axis in (0, 1):
        order = sorted(range(len(points)), key=lambda i: points[i][axis])
        span = points[order[-1]][axis] - points[order[0]][axis]
        found[order[0]] = found[order[-1]] = math.inf
        for before, at, after in zip(order, order[1:], order[2:], strict=False):
            found[at] += (points[after][axis] - points[before][axis]) / span if span else 0.0
    return found


def hypervolume(points: Sequence[Point], corner: Point) -> float:
    """The area of what lies above and right of some point, up to the corner."""
    inside = sorted(one for one in points if one[0] < corner[0] and one[1] < corner[1])
    total, least = 0.0, corner[1]
    for i, (x, y) in enumerate(inside):
        least = min(least, y)
        to = inside[i + 1][0] if i + 1 < len(inside) else corner[0]
        total += (to - x) * (corner[1] - least)
    return total
