"""The causal check of `why`: what is lost without the parts that write most, beside as many random parts of their kind."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.prove._removal import Set, measured, others, random_sets
from patchbay.signal.port import Part, PatchbayError
from patchbay.stories._asked import Asked
from patchbay.stories._why_parts import Written
from patchbay.stories._why_told import Section, Values

MOST = {"head": 3, "attn": 1, "mlp": 1, "neuron": 5, "expert": 2}  # parts of a kind that are taken away together
NAMES = {"head": "heads", "attn": "mixers", "mlp": "MLPs", "neuron": "neurons", "expert": "experts"}
WORTH = 0.25  # of what the strongest of its kind writes: what writes less is not taken away with it


@dataclass(frozen=True)
class Chosen:
    """Parts of one kind that write for the answer (or against it), and what each writes."""

    kind: str
    wrote: dict[Part, float]

    @property
    def sign(self) -> float:
        return 1.0 if sum(self.wrote.values()) > 0 else -1.0

    @property
    def name(self) -> str:
        return f"{NAMES[self.kind]} {'for' if self.sign > 0 else 'against'}"


def candidates(known: Written, inside: list[dict[Part, float]]) -> list[Chosen]:
    """The strongest of each kind on the side of the very strongest; of heads on both sides. At most half of all of a kind."""
    everything = {kind: known.of(kind) for kind in ("head", "attn", "mlp")}
    for given in inside:
        for part, value in given.items():
            everything.setdefault(part.kind, {})[part] = value
    found = []
    for kind, given in ((kind, given) for kind, given in everything.items() if given):
        most = min(MOST[kind], len(given) // 2) if kind in ("head", "attn", "mlp") else MOST[kind]
        order = sorted(given, key=lambda part: -abs(given[part]))
        worth = [part for part in order if abs(given[part]) >= WORTH * abs(given[order[0]]) > 0]
        sides = [[part for part in worth if sign * given[part] > 0][:most] for sign in (1.0, -1.0)]
        kept = sides if kind == "head" else [side for side in sides if order[0] in side]
        found += [Chosen(kind, {part: given[part] for part in side}) for side in kept if side]
    return found


def n_runs(known: Written, draws: int, *, routed: bool) -> int:
    """How many runs without parts the check makes at most, before it is known what is chosen."""
    kinds = [kind for kind in ("head", "attn", "mlp") if known.of(kind)]
    opened = (["neuron"] if "mlp" in kinds else []) + (["expert"] if routed else [])
    return sum((2 if kind == "head" else 1) * (draws + 1 + MOST[kind]) for kind in [*kinds, *opened])


def checks(asked: Asked, chosen: list[Chosen], draws: int, seed: int) -> tuple[Section, Section, dict[Part, float]]:
    """Two tables: each kind's parts together beside random ones, and part by part; and what each part cost."""
    by = "mean" if len(asked.ids) > 1 else "zero"
    rows: list[dict[str, Any]] = []
    said: list[str] = []
    lost: dict[Part, float] = {}
    wrote: dict[Part, float] = {}
    drawn: list[Tensor] = []
    for one in chosen:
        try:
            sets = _sets(asked, list(one.wrote), draws, seed, said)
        except PatchbayError as error:
            said.append(f"{one.name} not taken away: {error}")
            continue
        effects = _lost(asked, [tuple(one.wrote), *((part,) for part in one.wrote), *sets], by, seed)
        n = 1 + len(one.wrote)
        lost |= dict(zip(one.wrote, effects[1:n].tolist(), strict=True))
        wrote |= one.wrote
        drawn.append(effects[n:])
        rows.append(_row(one, float(effects[0]), effects[n:]))
    taken = "their mean over the positions of this prompt" if by == "mean" else "zero"
    said.append(
        f"lost: how far the difference falls without them, {taken} in their place at all positions. p: the rank among as many random parts "
        "of the kind, with the own counted: at least 1 / (1 + sets)"
    )
    together = Section("causal check", rows, said, *_values(rows, drawn, draws))
    singles = [{"part": str(part), "wrote": wrote[part], "lost without it": effect} for part, effect in lost.items()]
    alone = "the two differ where other parts stand in for one that is gone, or where it acts through later ones"
    return together, Section("one by one", singles, [alone] if singles else ["no part was taken away"]), lost


def _row(one: Chosen, joint: float, random_ones: Tensor) -> dict[str, Any]:
    return {
        "kind": one.name,
        "without": ", ".join(map(str, one.wrote)),
        "wrote": sum(one.wrote.values()),
        "lost": joint,
        "random: mean": float(random_ones.mean()),
        "lowest": float(random_ones.min()),
        "highest": float(random_ones.max()),
        "sets": len(random_ones),
        "p": maths.draws_p(one.sign * joint, one.sign * random_ones),
    }


def _values(rows: list[dict[str, Any]], drawn: list[Tensor], draws: int) -> tuple[Values, dict[str, Sequence[Any]]]:
    if not rows:
        return {}, {}
    padded = torch.full((len(rows), draws), torch.nan, dtype=torch.float64)
    for row, random_ones in zip(padded, drawn, strict=True):
        row[: len(random_ones)] = random_ones
    values: Values = {
        "set_lost": ([row["lost"] for row in rows], ("condition",), "logits"),
        "random": (padded, ("condition", "draw"), "logits"),
    }
    return values | {"set_p": ([row["p"] for row in rows], ("condition",), "probability")}, {
        "condition": [row["kind"] for row in rows]
    }


def _sets(asked: Asked, parts: list[Part], draws: int, seed: int, said: list[str]) -> list[Set]:
    """Random sets of other parts of the same layers; of any layers where these have fewer sets than are drawn."""
    found = random_sets(asked.model, parts, draws, seed)
    if len(found) == draws:
        return found
    model, kind = asked.model, parts[0].kind
    pool = [part for layer in range(model.n_layers) for part in others(model, kind, layer, set(parts))]
    rng, sets = random.Random(f"why-{seed}"), dict.fromkeys(found)
    for _ in range(20 * draws):
        if len(sets) == draws:
            break
        sets[tuple(sorted(rng.sample(pool, len(parts))))] = None
    few = "" if len(sets) == draws else f"; all there are, {len(sets)}"
    said.append(
        f"random {NAMES[kind]} beside {', '.join(map(str, parts))} are of any layer: their own have too few others{few}"
    )
    return list(sets)


def _lost(asked: Asked, sets: list[Set], by: Any, seed: int) -> Tensor:
    """How far the difference falls without each set, [set]."""
    scores, _ = measured(asked.model, asked.task, [(), *sets], by, 64, seed)
    return scores[0, 0] - scores[1:, 0]
