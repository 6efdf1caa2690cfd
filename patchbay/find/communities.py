"""Communities: groups of parts that are wired to one another more than chance, by the weights alone.

The graph has the parts as nodes and, between two, the excess w = sum over kinds of reading of max(0, CS - null mean) of those channels
(`find.channels`, whole writers, both directions of time summed) whose adjusted p is at most `rate`. Groups are those of high
modularity

    Q = sum_ij (w_ij - e_ij) [same group] / 2m,    2m = sum_ij w_ij,

where e_ij = a_i a_j over the pairs that can be wired at all (a writer and a later reader, never two heads of one layer), a chosen
such that every part keeps its total: neither layers nor parts that are wired to everything make a group by that alone. Groups
are found by moving single parts, then joining groups, as long as Q grows (after Blondel et al. 2008; deterministic). Null: the ratios
w_ij / e_ij are dealt out anew among those pairs, `draws` times, and grouped in the same way; p = (1 + hits) / (1 + draws). So p
says whether the wiring falls into groups at all. Cost: that of the scores, and some milliseconds for each draw.

Composition scores: Elhage et al. 2021; channels after Merullo, Eickhoff and Pavlick 2024. A group is no circuit yet: which task
it serves, and whether the model uses it, is for `prove.knockout_curve` with the group's parts to say.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchbay.find import _haar
from patchbay.find._composition import Net, gather, score
from patchbay.maths import benjamini_hochberg
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError
from patchbay.wiring.components import weighed


@method(paper="merullo2024")
def communities(
    model: Model,
    *,
    writers: Sequence[str] = ("head", "mlp", "expert"),
    kinds: Sequence[str] = ("query", "key", "value", "mlp"),
    offsets: Sequence[int] | None = None,
    rate: float = 0.05,
    draws: int = 99,
    seed: int = 0,
) -> Result:
    """Parts in groups by their wiring: `belonging` is the share of a part's wiring that stays in its group.

    `rate`: the adjusted p up to which a channel counts (1: all above chance). Beside `belonging` [part]: `community` (0 is the one of most wiring; -1 for parts
    without any), `weight`; `modularity` with `null_mean`, `null_high` and `p`; table `communities` names the members.

    `writers`: kinds or parts that write, as in `find.channels`. `kinds`: what is read: query, key, value, mlp, router,
    unembed. `offsets`: distances of a rotary model's query and key. `draws`: deals of the same wiring to other pairs
    that make the null.
    """
    if draws < 1:
        raise PatchbayError(f"draws={draws}: at least 1 shuffle is needed for a null")
    net = gather(model, writing=writers, kinds=kinds, offsets=offsets)
    parts, weights, possible = _graph(net, rate)
    if not bool(weights.any()):
        raise PatchbayError(
            f"no channel of this {model.family.name} model passes an adjusted p of {rate}: there is no wiring to group; "
            "other writers= and kinds=, or a higher rate=, are possible"
        )
    expected = expectation(weights, possible)
    groups = _ordered(grouped(weights - expected), weights)
    real = modularity(weights, expected, groups)
    generator = torch.Generator().manual_seed(seed)
    null = torch.tensor([_dealt(weights, expected, possible, generator) for _ in range(draws)], dtype=torch.float64)
    degree = weights.sum(1)
    same = groups[:, None] == groups
    inside = (weights * same).sum(1) / degree.clamp_min(1e-300)
    groups = groups.masked_fill(degree == 0, -1)
    p = (1 + int((null >= real).sum())) / (1 + draws)
    said = f"modularity {real:.3f}; wiring dealt out at random {float(null.mean()):.3f}, p = {p:.2g}"
    scalar: tuple[str, ...] = ()
    return Result(
        {
            "belonging": (inside.masked_fill(degree == 0, torch.nan), ("part",), "share of wiring"),
            "community": (groups, ("part",), "number"),
            "weight": (degree, ("part",), "composition above chance"),
            "modularity": (torch.tensor(real, dtype=torch.float64), scalar, "modularity"),
            "null_mean": (null.mean(), scalar, "modularity"),
            "null_high": (null.quantile(0.95), scalar, "modularity"),
            "p": (torch.tensor(p), scalar, "p"),
        },
        parts=parts,
        tables={"communities": _table(parts, groups, weights)},
        notes=[said, *weighed(model, kinds)],
    )


def _graph(net: Net, rate: float) -> tuple[list[Part], Tensor, Tensor]:
    """Parts, symmetric weights [part, part], and which pairs could have one."""
    found = score(net)
    d = net.model.d_model
    mean, variance, third = _haar.moments(found.written, found.read, d)
    centre, _ = _haar.of_score(mean, variance)
    p = benjamini_hochberg(
        _haar.upper_tail(found.squares, mean, variance, third).masked_fill(found.squares.isnan(), torch.nan).cpu()
    )
    excess = (found.squares.sqrt() - centre).cpu().nan_to_num(0.0).clamp_min(0) * (p <= rate)
    sources, targets = [name.writer for name in net.sources], [part for part, _ in net.targets]
    parts = sorted({part for part in (*sources, *targets) if part.kind != "unembed"})
    place = {part: i for i, part in enumerate(parts)}
    weights = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    possible = torch.zeros(len(parts), len(parts), dtype=torch.bool)
    for i, j in (~found.squares.isnan()).nonzero().tolist():
        if sources[i] in place and targets[j] in place:
            a, b = sorted((place[sources[i]], place[targets[j]]))
            weights[a, b] += excess[i, j]
            possible[a, b] = True
    return parts, weights + weights.T, possible | possible.T


def expectation(weights: Tensor, possible: Tensor) -> Tensor:
    """e_ij = a_i a_j on the possible pairs, with the rows' sums of `weights`: by proportional fitting."""
    degree, mask = weights.sum(1), possible.to(weights)
    a = degree / degree.sum().sqrt()
    for _ in range(500):
        sums = a * (mask @ a)
        if float((sums - degree).abs().max()) <= 1e-9 * float(degree.max()):
            break
        a = (a * (degree / sums.clamp_min(1e-300)).sqrt()).masked_fill(degree == 0, 0.0)
    return torch.outer(a, a) * mask


def _dealt(weights: Tensor, expected: Tensor, possible: Tensor, generator: torch.Generator) -> float:
    """Modularity of groups found where the ratios of weights to what is expected are dealt to other possible pairs."""
    pairs = possible.triu() & (expected > 0)
    ratios = weights[pairs] / expected[pairs]
    out = torch.zeros_like(weights)
    out[pairs] = expected[pairs] * ratios[torch.randperm(len(ratios), generator=generator)]
    out = out + out.T
    fresh = expectation(out, possible)
    return modularity(out, fresh, grouped(out - fresh))


# --- grouping -----------------------------------------------------------------------------------------


def modularity(weights: Tensor, expected: Tensor, groups: Tensor) -> float:
    """Q of a grouping, below 1; 0 for one group of all."""
    same = groups[:, None] == groups
    return float(((weights - expected) * same).sum() / weights.sum())


def grouped(gain: Tensor) -> Tensor:
    """Groups of high modularity, one number per node, from what each pair in one group adds to it."""
    gain = gain.clone().fill_diagonal_(0.0)
    groups = torch.arange(len(gain))
    before = None
    while before is None or not torch.equal(before, groups):
        before = groups.clone()
        _move(gain, groups)
        _join(gain, groups)
    return groups


def _move(gain: Tensor, groups: Tensor) -> None:
    """Each node to the group in which it gains most, until none moves."""
    n = len(groups)
    belongs = torch.nn.functional.one_hot(groups, n).to(gain)  # [node, group]
    moved = True
    while moved:
        moved = False
        for node in range(n):
            towards = gain[node] @ belongs  # [group]
            best, here = int(towards.argmax()), int(groups[node])
            if float(towards[best]) > float(towards[here]) + 1e-12:
                belongs[node, here], belongs[node, best] = 0.0, 1.0
                groups[node], moved = best, True


def _join(gain: Tensor, groups: Tensor) -> None:
    """The two groups that gain most by being one, as long as some do."""
    n = len(groups)
    while True:
        belongs = torch.nn.functional.one_hot(groups, n).to(gain)
        between = belongs.T @ gain @ belongs  # [group, group]
        between.fill_diagonal_(-1.0)
        best = int(between.argmax())
        if float(between.flatten()[best]) <= 1e-12:
            return
        groups[groups == best // n] = best % n


def _ordered(groups: Tensor, weights: Tensor) -> Tensor:
    """Numbers from 0, the group of most wiring first."""
    degree = weights.sum(1)
    names = sorted(set(groups.tolist()), key=lambda g: -float(degree[groups == g].sum()))
    renamed = {name: i for i, name in enumerate(names)}
    return torch.tensor([renamed[g] for g in groups.tolist()])


def _table(parts: list[Part], groups: Tensor, weights: Tensor) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for group in range(int(groups.max()) + 1):
        members = (groups == group).nonzero()[:, 0].tolist()
        inner = weights[members][:, members].sum() / weights[members].sum().clamp_min(1e-300)
        names = " ".join(str(parts[i]) for i in members)
        rows.append({"community": group, "parts": names, "n_parts": len(members), "inside": float(inner)})
    return rows
