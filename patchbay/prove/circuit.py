"""Circuit: how much of the answer the best edges (or heads) carry alone, what is left without them, which are needed.

Edges (or parts, with all that they send) are put in order by their scores; the circuit C_k is the first k. An edge
outside it carries what its writer puts out on the corrupted twin (or its mean), so every reader sees a stream of its
own; the runs are exact. With m the mean score over prompts, N the whole model and 0 the empty circuit:

    faithfulness(k)  = (m(C_k) - m(0)) / (m(N) - m(0))
    completeness(k)  = 1 - the same of N without C_k: 1 where nothing outside the circuit carries the answer
    minimality(k)    = mean of |faithfulness(C_k) - faithfulness(C_k without e)| over up to 4 of its edges e, the last
                       among them: 0 where the circuit holds what it does not need
    CPR = integral of faithfulness over k / n from 0 to 1        CMD = integral of |1 - faithfulness|

at k / n = .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, rounded to whole edges and at least one, with faithfulness
0 at k = 0, by trapezoids: the areas of Mueller et al. 2025, "MIB: A Mechanistic Interpretability Benchmark", without
its pruning of edges that lead nowhere. Without `scores`, half of the prompts choose (EAP-IG, 5 steps) and the other
half are measured; where the rest carries means, scores are (clean - mean) . gradient of the clean run. The control is circuits of as many random edges: `null_mean` and its range, `cpr_random`, p = (1 +
draws with a CPR as high) / (1 + draws). Intervals are 95 % bootstraps over prompts. Completeness and minimality after
Wang et al. 2022 (by one edge at a time), greedy growth after Hanna et al. 2024. Parts that the scores do not rank
stay as they are.

A faithful circuit is enough for these prompts against these twins, not the only one that is; a ratio may pass 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from patchbay import maths
from patchbay.errors import one_of
from patchbay.model.model import Model
from patchbay.prove._cells import batches, check_draws, check_twins, doubtful, intervals
from patchbay.prove._first_order import check_smooth
from patchbay.prove._graph import Graph, Mixed, Outputs, mean_outputs, outputs
from patchbay.prove._units import Units, order_of, tied, units_of
from patchbay.prove.edge_attribution import edge_attribution, estimate
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part
from patchbay.tasks.task import Task

Select = Literal["abs", "value", "greedy"]
Outside = Literal["corrupted", "mean"]
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
CHECKED = 4  # edges that are taken out one by one
LISTED = 200  # edges in the table, or as many as the smallest circuit has
STEPS, SCORED = 5, 16  # of the scores: runs along the line, prompts at a time
ENOUGH = 0.9  # faithfulness of the smallest circuit


@method(paper="mueller2025")
def circuit(
    model: Model,
    task: Task,
    *,
    scores: Result | list[Part] | None = None,
    select: Select = "abs",
    outside: Outside = "corrupted",
    draws: int = 20,
    batch_size: int = 64,
    seed: int = 0,
) -> Result:
    """Faithfulness, completeness and minimality of circuits of growing size, with their areas CPR and CMD.

    `scores`: a Result of `edge_attribution`, a Result that ranks heads, MLPs or attentions, or such parts, best first;
    without, edges scored on half of the prompts. `select`: the largest scores of either sign, the highest, or "greedy"
    (largest first, among edges that lead to the logits). `outside`: what the rest carries. Main variable `faithfulness`
    [n_parts] with `low`, `high` and the null; `completeness`, `minimality`, `share` of all edges; `cpr`, `cmd` and their
    ends, `cpr_random` [draw], `p`, the scores of the `whole` model and the `empty` circuit, and `smallest`, how many reach a
    faithfulness of 0.9. The table "circuit" holds the order.

    `draws`: circuits of as many random edges, as the control.
    """
    one_of("select", select, ("abs", "value", "greedy"))
    one_of("outside", outside, ("corrupted", "mean"))
    check_draws(draws)
    check_twins(model, task)
    notes = []
    if scores is None:
        dev, task = task.split(seed=seed)
        means = outside == "mean"
        scores = _by_means(model, dev) if means else edge_attribution(model, dev, steps=STEPS)
        how = "EAP from means" if means else f"EAP-IG with {STEPS} steps"
        notes.append(f"edges scored on {len(dev)} prompts by {how}, circuits measured on the other {len(task)}")
    else:
        notes.append(
            "scores were given: faithfulness is optimistic where they come from the prompts that it is measured on"
        )
    units = units_of(Graph(model), scores)
    notes += _flat(units, scores)
    n = len(units.labels)
    order = order_of(units, select)
    sizes = sorted({max(1, round(share * n)) for share in SHARES})
    plan = _plan(order, sizes, draws, seed)
    values = _measure(units, task, plan.members, outside, batch_size)  # [circuit, prompt]
    smallest = _smallest(units, task, order, sizes, plan, values, outside, batch_size)
    return _result(task, units, order, sizes, plan, values, smallest, notes)


def _by_means(model: Model, task: Task) -> Result:
    """Edge scores by what a mean in the writer's place would cost, to first order."""
    check_smooth(task, 1)
    graph = Graph(model)
    mean = mean_outputs([outputs(graph, task[prompts].clean) for prompts in batches(task, SCORED)])
    effects = estimate(graph, task, 1, SCORED, mean)[0]  # [prompt, edge]
    labels = {"edit": [graph.label(edge) for edge in graph.edges]}
    return Result({"effect": (effects.mean(0), ("edit",), task.unit)}, coords=labels)


def _flat(units: Units, scores: Result | list[Part]) -> list[str]:
    """What is to be said where scores cannot put the units in order, and which scores were exact."""
    notes, (equal, zero), n = [], tied(units), len(units.labels)
    edges = isinstance(scores, Result) and scores.axes == ("edit",)
    if equal > 1:
        way = f"scores=prove.edge_attribution(model, task, exact={n})" if edges else "scores of their own"
        notes.append(
            f"{equal} of {n} scores are equal to another's, {zero} of them 0: among these the order says nothing, and a circuit "
            f"that reaches past them is larger than it need be; exact effects tell them apart: {way}"
        )
    if isinstance(scores, Result) and "exact" in scores:
        notes.append(f"{int((~scores['exact'].isnan()).sum())} of {n} edges are ordered by their exact effects")
    return notes


# --- which circuits are run -----------------------------------------------------------------------------


@dataclass
class Plan:
    """Circuits [circuit, unit]: the empty and the whole one first, and where the others stand."""

    members: Tensor
    inside: list[int]
    rest: list[int]
    without: list[list[int]]  # of each size, circuits with one unit taken out
    random: list[list[int]]  # of each draw, one circuit of each size


def _plan(order: list[int], sizes: list[int], draws: int, seed: int) -> Plan:
    n = len(order)
    rows: list[Tensor] = []

    def add(chosen: list[int], *, turned: bool = False) -> int:
        row = torch.zeros(n, dtype=torch.bool)
        row[chosen] = True
        rows.append(~row if turned else row)
        return len(rows) - 1

    add([])
    add(order)
    inside = [add(order[:k]) for k in sizes]
    rest = [add(order[:k], turned=True) for k in sizes]
    without = []
    for k in sizes:
        out = sorted({round((i + 1) * k / CHECKED) - 1 for i in range(CHECKED)} & set(range(k)))
        without.append([add(order[:i] + order[i + 1 : k]) for i in out])
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(n, generator=generator).tolist() for _ in range(draws)]
    random = [[add(shuffled[:k]) for k in sizes] for shuffled in drawn]
    return Plan(torch.stack(rows), inside, rest, without, random)


def _measure(units: Units, task: Task, members: Tensor, outside: str, batch_size: int) -> Tensor:
    """Scores [circuit, prompt]; what is equal is run once."""
    graph = units.graph
    members, place = torch.unique(members, dim=0, return_inverse=True)
    whole = int(members.all(1).nonzero()[0])
    mean = _means(graph, task, batch_size) if outside == "mean" else None
    values = torch.zeros(len(members), len(task), dtype=torch.float64)
    for prompts in batches(task, batch_size):
        some = task[prompts]
        other = mean or outputs(graph, some.corrupted or ())
        mixed = Mixed(graph, some.clean, other, batch_size)
        reference = mixed.logits(units.keep(members[whole][None]))[0]
        for rows in torch.arange(len(members)).split(mixed.size()):
            for row, logits in zip(rows.tolist(), mixed.logits(units.keep(members[rows])), strict=True):
                values[row, prompts] = some.score(logits, reference).double().cpu()
    return values[place]


def _smallest(
    units: Units,
    task: Task,
    order: list[int],
    sizes: list[int],
    plan: Plan,
    values: Tensor,
    outside: str,
    batch_size: int,
) -> int | None:
    """The size of a faithful circuit, halving the step between the first size that is and the one before; None without any."""
    over = float((values[1] - values[0]).mean())
    found = [float((values[at] - values[0]).mean()) / over if over else float("nan") for at in plan.inside]
    place = next((i for i, f in enumerate(found) if f >= ENOUGH), None)
    if place is None:
        return None
    low, high = (sizes[place - 1] if place else 0), sizes[place]
    while high - low > 1:
        middle = (low + high) // 2
        members = torch.ones(2, len(order), dtype=torch.bool)
        members[1, order[middle:]] = False
        scores = _measure(units, task, members, outside, batch_size)[1]
        low, high = (low, middle) if float((scores - values[0]).mean()) / over >= ENOUGH else (middle, high)
    return high


def _means(graph: Graph, task: Task, batch_size: int) -> Outputs:
    return mean_outputs([outputs(graph, task[prompts].clean) for prompts in batches(task, batch_size)])


# --- the result -----------------------------------------------------------------------------------------


def area(share: Tensor, curve: Tensor, start: float = 0.0) -> Tensor:
    """Trapezoids under a curve [size, ...] over the share of edges [size], from `start` at a share of 0."""
    points = torch.cat([torch.full_like(curve[:1], start), curve])
    widths = torch.cat([torch.zeros(1).double(), share]).diff()
    return torch.tensordot(widths, (points[1:] + points[:-1]) / 2, dims=1)


def _areas(share: Tensor, above: Tensor, over: Tensor, n: int = 2000) -> dict[str, float]:
    """CPR and CMD with their ends, prompts drawn anew: above [size, prompt] and over [prompt] are scores above the empty circuit's."""
    count = len(over)
    drawn = torch.randint(count, (n, count), generator=torch.Generator().manual_seed(0))
    times = torch.zeros(n, count).double().scatter_add_(1, drawn, torch.ones(n, count).double())
    times = torch.cat([torch.ones(1, count).double(), times])  # as they are, then each draw
    curves = (times @ above.T / (times @ over)[:, None]).T  # [size, draw]
    found = {"cpr": area(share, curves), "cmd": area(share, (1.0 - curves).abs(), 1.0)}
    out: dict[str, float] = {}
    for name, values in found.items():
        low, high = torch.nanquantile(values[1:], torch.tensor([0.025, 0.975]).double()).tolist()
        ends = (low, high) if count > 1 else (float("nan"), float("nan"))
        out |= {name: float(values[0]), f"{name}_low": ends[0], f"{name}_high": ends[1]}
    return out


def _result(
    task: Task,
    units: Units,
    order: list[int],
    sizes: list[int],
    plan: Plan,
    values: Tensor,
    smallest: int | None,
    notes: list[str],
) -> Result:
    n, share = len(units.labels), torch.tensor(sizes).double() / len(units.labels)
    above, over = values - values[0], values[1] - values[0]  # [circuit, prompt], [prompt]
    mean, low, high = intervals(above.T, over)  # faithfulness of every circuit that was run
    areas = _areas(share, above[plan.inside], over)
    random = mean[torch.tensor(plan.random)]  # [draw, size]
    cpr_random = area(share, random.T)
    p = (1 + int((cpr_random >= areas["cpr"] - 1e-9).sum())) / (1 + len(random))
    lost = [(mean[at] - mean[rows]).abs().mean() for at, rows in zip(plan.inside, plan.without, strict=True)]
    curves = {"faithfulness": mean[plan.inside], "low": low[plan.inside], "high": high[plan.inside]}
    curves |= {"null_mean": random.mean(0), "null_low": random.amin(0), "null_high": random.amax(0)}
    curves |= {"completeness": 1.0 - mean[plan.rest], "minimality": torch.stack(lost)}
    ranked: list[dict[str, int | float | str]] = [
        {"rank": i, "unit": units.labels[u], "score": float(units.scores[u])} for i, u in enumerate(order, 1)
    ]
    return Result(
        {name: (value, ("n_parts",), "share of the model") for name, value in curves.items()}
        | {"share": (share, ("n_parts",), "share of edges or parts")}
        | {name: (value, (), "area") for name, value in areas.items()}
        | {"cpr_random": (cpr_random, ("draw",), "area"), "p": (p, (), "probability")}
        | {"smallest": (torch.nan if smallest is None else float(smallest), (), "edges or parts")}
        | {name: (row.mean(), (), task.unit) for name, row in (("whole", values[1]), ("empty", values[0]))},
        coords={"n_parts": sizes},
        notes=[*_notes(task, n, smallest, areas, cpr_random, p, over), *notes],
        tables={"circuit": ranked[: max(LISTED, smallest or 0)]},
    )


def _notes(
    task: Task, n: int, smallest: int | None, areas: dict[str, float], random: Tensor, p: float, over: Tensor
) -> list[str]:
    reach = f"none of the circuits up to {n} reaches" if smallest is None else f"the first {smallest} of {n} reach"
    listed = max(LISTED, smallest or 0)
    cut = [f"the table holds the first {listed} of {n}"] if n > listed else []
    notes = [
        f"{reach} a faithfulness of {ENOUGH}; CPR {areas['cpr']:.3g}{maths.between(areas['cpr_low'], areas['cpr_high'])}, "
        f"CMD {areas['cmd']:.3g}; random circuits CPR {float(random.mean()):.3g} (draws {float(random.min()):.3g} to "
        f"{float(random.max()):.3g}), p = {p:.3g}",
        *cut,
    ]
    if gap := doubtful(task.sign * over, task.unit):
        notes.append(
            f"the whole model does not score clearly better than the empty circuit ({gap}): faithfulness means little"
        )
    return notes
