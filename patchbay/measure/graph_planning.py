"""Graph planning: whether the way that a model writes through a graph told in its prompt exists, arrives, and is a shortest one.

    Doors: A to B, A to C, B to D. From C to D: C          a way is the rooms that are named after this, up to the goal

Each of `per_prompt` samples is one of: optimal; longer (arrives by edges that exist, in more steps than are needed); hallucinated (a step along no edge); loop (a
room twice before the goal); no goal. `value`: the share optimal, mean over items. `null`: that of a random walk, the sum over shortest ways of the product of
1 / degree; p by sign flips over items. Table `kinds` has the share of each kind.

Momennejad et al. 2023, "Evaluating Cognitive Maps and Planning in Large Language Models with CogEval". Higher is better. A shortest way between neighbours is
only a copied edge: read items by their distance.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from patchbay.measure._items import resolved, rows_of
from patchbay.measure._meter import reading
from patchbay.measure._samples import samples, texts_of
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.table import Row

KINDS = ("optimal", "longer", "hallucinated", "loop", "no goal")
MADE = ("tree", "line", "ring")
FRAME = "Doors: {edges}. From {start} to {goal}: {start}"
SHARE = "share of ways"


class Plan(NamedTuple):
    """An undirected graph as neighbours of each node, where a way starts and where it is to end."""

    near: dict[str, set[str]]
    start: str
    goal: str


@method(paper="momennejad2023")
def graph_planning(
    model: Model,
    items: str | list[dict[str, Any]],
    *,
    frame: str = FRAME,
    per_prompt: int = 4,
    max_new_tokens: int = 24,
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """Share of sampled ways through a graph that are shortest ones, beside what a random walk finds.

    `distance` [prompt], steps that are needed; tables `kinds` and `ways` (the first sample of each item).

    `items`: rows with the fields edges (a list such as A-B, or tree, line or ring with a number of rooms, tree:7), start and goal. `frame`: the prompt, with
    {edges}, {start} and {goal}. `per_prompt`: samples of each item. `max_new_tokens`: tokens of a sample.
    """
    rows, said = rows_of(resolved(model, items), ("edges", "start", "goal"))
    if any(hole not in frame for hole in ("{edges}", "{start}", "{goal}")):
        raise PatchbayError(f"frame={frame!r} holds {{edges}}, {{start}} and {{goal}}")
    edges = [_edges(row) for row in rows]
    plans = [_plan(row, pairs) for row, pairs in zip(rows, edges, strict=True)]
    prompts = [
        frame.replace("{edges}", ", ".join(" to ".join(pair) for pair in pairs)).replace("{start}", plan.start).replace("{goal}", plan.goal)
        for plan, pairs in zip(plans, edges, strict=True)
    ]  # fmt: skip
    drawn = samples(
        model, prompts, per_prompt, max_new_tokens=max_new_tokens, seed=seed, batch_size=batch_size
    )  # fmt: skip
    texts = [texts_of(model, each) for each in drawn]
    ways = [[way_of(plan, text) for text in each] for plan, each in zip(plans, texts, strict=True)]
    kinds = [[kind_of(plan, way) for way in each] for plan, each in zip(plans, ways, strict=True)]
    flat = [kind for each in kinds for kind in each]
    return reading(
        {"per_item": torch.tensor([each.count("optimal") / per_prompt for each in kinds], dtype=torch.float64)},
        SHARE,
        better="higher",
        null_items=torch.tensor([by_chance(plan) for plan in plans], dtype=torch.float64),
        more={"distance": (torch.tensor([float(distances(plan)[plan.start]) for plan in plans]), ("prompt",), "steps")},
        tables={
            "kinds": [{"kind": kind, "share": flat.count(kind) / len(flat)} for kind in KINDS],
            "ways": [
                {"item": row.where, "way": " ".join(way[0]), "kind": kind[0]}
                for row, way, kind in zip(rows, ways, kinds, strict=True)
            ],
        },
        notes=said,
        seed=seed,
    )


def graph(name: str, n: int) -> list[tuple[str, str]]:
    """The edges of a binary tree, a line or a ring of n rooms, A, B, C and so on; of a tree A is the root."""
    rooms = [chr(ord("A") + i) for i in range(n)]
    if name == "tree":
        return [(rooms[(i - 1) // 2], rooms[i]) for i in range(1, n)]
    line = list(itertools.pairwise(rooms))
    return line if name == "line" else [*line, (rooms[-1], rooms[0])]


def _edges(row: Row) -> list[tuple[str, str]]:
    given = row.values["edges"]
    if isinstance(given, str):
        name, _, number = given.partition(":")
        if name in MADE:
            n = int(number) if number.isdecimal() else 0 if number else 7
            if not 3 <= n <= 26:
                raise PatchbayError(f"{row.where}: {given!r} has a number of rooms, 3 to 26, as tree:7")
            return graph(name, n)
        given = [piece for piece in re.split(r"[,|]", given) if piece.strip()]
    found = [tuple(end.strip() for end in str(edge).split("-")) for edge in given]
    wrong = next((edge for edge in found if len(edge) != 2 or not all(edge) or edge[0] == edge[1]), None)
    if wrong is not None or not found:
        raise PatchbayError(f"{row.where}: an edge is two rooms with - between them, got {'-'.join(wrong or ('',))!r}")
    return [(a, b) for a, b in found]


def _plan(row: Row, edges: Sequence[tuple[str, str]]) -> Plan:
    near: dict[str, set[str]] = {}
    for a, b in edges:
        near.setdefault(a, set()).add(b)
        near.setdefault(b, set()).add(a)
    plan = Plan(near, str(row.values["start"]), str(row.values["goal"]))
    outside = [node for node in (plan.start, plan.goal) if node not in near]
    if outside or plan.start == plan.goal or plan.start not in distances(plan):
        raise PatchbayError(
            f"{row.where}: no way leads from {plan.start} to {plan.goal}; the rooms are {', '.join(near)}, and a way has a step or more"
        )
    return plan


def distances(plan: Plan) -> dict[str, int]:
    """Steps to the goal from every node that has a way."""
    found, ring = {plan.goal: 0}, [plan.goal]
    while ring:
        new = sorted({b for a in ring for b in plan.near[a]} - found.keys())
        found |= dict.fromkeys(new, found[ring[0]] + 1)
        ring = new
    return found


def by_chance(plan: Plan) -> float:
    """The probability that a random walk takes a shortest way: at each node, each neighbour alike."""
    steps = distances(plan)
    at = {plan.start: 1.0}
    for _ in range(steps[plan.start]):
        now: dict[str, float] = {}
        for a, p in at.items():
            for b in plan.near[a]:
                if steps[b] == steps[a] - 1:
                    now[b] = now.get(b, 0.0) + p / len(plan.near[a])
        at = now
    return at.get(plan.goal, 0.0)


def way_of(plan: Plan, text: str) -> list[str]:
    """The start and the rooms that a text names after it, whole words alone, up to the goal; the start named again at once counts once."""
    names = sorted(plan.near, key=len, reverse=True)
    found = re.findall("|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in names), text)
    way = [plan.start, *(found[1:] if found[:1] == [plan.start] else found)]
    return way[: way.index(plan.goal) + 1] if plan.goal in way else way


def kind_of(plan: Plan, way: Sequence[str]) -> str:
    """Which of the kinds a way is: the first that holds of hallucinated, loop, no goal, optimal, longer."""
    if any(b not in plan.near[a] for a, b in itertools.pairwise(way)):
        return "hallucinated"
    if len(set(way)) < len(way):
        return "loop"
    if way[-1] != plan.goal:
        return "no goal"
    return "optimal" if len(way) - 1 == distances(plan)[plan.start] else "longer"
