"""Expert specialisation: which experts of a mixture fire for which behaviour (functional token resonance).

    relevance[layer, expert] = share of A's tokens that choose the expert - share of B's tokens that do

A are the prompts whose `label` is `value`, B all others; without a label, the prompts against their corrupted twins; with
more than two values and none asked, every value is held against the rest and an expert is ranked by the one it fires for
most. The tokens read are each prompt's last, where the behaviour is decided, or all of them (a prompt is then the share of
its tokens). `measure="weight"` takes the routing weight in place of the choice. The choice is read behind the router, at
the experts' own door, with whatever groups, biases and capacities the family's routing has.

Null: prompts dealt to the groups at random, `p` = (1 + deals with a difference as large) / (1 + `DEALS`), two-sided, and
adjusted over all experts (and values) by Benjamini and Hochberg; `low` and `high` are 95 % bootstrap ends over
prompts. With one prompt in a group there are only as many deals as prompts, and p cannot be small. `load` is how often an
expert is chosen at all: over the experts of a layer it sums to the number of choices per token. Shared experts, which every
token passes, are not ranked. One forward pass.

The table `tokens` says at which tokens the first experts fire: share of a token's occurrences that choose the expert, less
the expert's load. The table `controls` names for each of them the expert of the same layer with the nearest load, to be
switched off beside it.

Dahlke et al. 2025, "Mixture of Tunable Experts - Behavior Modification of DeepSeek-R1 at Inference Time" (fTRI).

An expert that fires more for a behaviour need not cause it: routing follows the words too. Follow with `prove.ablation` of
the expert and of its control.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from patchbay import maths
from patchbay.errors import one_of
from patchbay.find._groups import Groups, groups_of, value_of
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError, Port
from patchbay.tasks.task import Task

DEALS, DRAWS = 2000, 1000
SHOWN = 5
AT_LEAST = 3  # occurrences of a token before it is shown
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
NAME = "expert_specialisation"
Read = Literal["last", "all"]
Measure = Literal["choice", "weight"]


@method(paper="dahlke2025")
def expert_specialisation(
    model: Model,
    task: Task,
    *,
    label: str | None = None,
    value: str | None = None,
    positions: Read = "last",
    measure: Measure = "choice",
    batch_size: int = 32,
    seed: int = 0,
) -> Result:
    """How much more often each expert is chosen on the prompts whose `label` is `value` than on the others.

    Main variable `relevance` [layer, expert] with `low`, `high`, `p`, `p_adjusted`, `load` and `group` (its number in
    `condition`); `each` and `frequency` [condition, layer, expert]. Tables `tokens` and `controls`.

    `label`: the task's label that makes the groups; without, prompts against their corrupted twins. `value`: the
    label's value of the first group; without, each value against the rest. `positions`: read each prompt's "last"
    token, or "all" of them. `measure`: count the "choice" of an expert, or its routing "weight".
    """
    one_of("positions", positions, ("last", "all"))
    one_of("measure", measure, ("choice", "weight"))
    layers, notes = expert_layers(model)
    groups = groups_of(model, task, label, NAME)
    chosen = value_of(groups, value, label, NAME)
    seen = _observe(model, groups, layers, positions, measure, batch_size)
    members = torch.stack([groups.of == i for i in range(len(groups.names))]).double()  # [group, prompt]
    each = _contrast(seen.fired, members)  # [group, layer, expert]
    tested = list(range(len(groups.names))) if chosen is None else [groups.names.index(chosen)]
    p = torch.full_like(each, torch.nan)
    p[tested] = _dealt(seen.fired, members[tested], seed)
    adjusted = maths.benjamini_hochberg(p)
    low, high = _bootstrap(seen.fired, groups, tested, seed)
    best = each[tested].nan_to_num(-9.0).argmax(0)
    grid, unit = ("layer", "expert"), "share of tokens" if measure == "choice" else "routing weight"

    def of_best(values: Tensor) -> Tensor:
        return values.gather(0, best[None])[0]

    relevance = of_best(each[tested])
    group = torch.tensor(tested).double()[best].where(relevance.isfinite(), torch.nan)
    frequency = torch.stack([seen.fired[row > 0].mean(0) for row in members])
    values: dict[str, Any] = {
        "relevance": (relevance, grid, unit),
        "low": (of_best(low), grid, unit),
        "high": (of_best(high), grid, unit),
        "p": (of_best(p[tested]), grid, "probability"),
        "p_adjusted": (of_best(adjusted[tested]), grid, "probability"),
        "load": (seen.load, grid, unit),
        "group": (group, grid, "number of the group"),
        "each": (each, ("condition", *grid), unit),
        "frequency": (frequency, ("condition", *grid), unit),
    }
    counts = ", ".join(f"{int(row.sum())} of {name!r}" for name, row in zip(groups.names, members, strict=True))
    notes.insert(0, f"prompts: {counts}; read at {'the last token' if positions == 'last' else 'all tokens'}")
    tables = {"tokens": _tokens(model, seen, relevance), "controls": _controls(seen.load, relevance)}
    return Result(values, coords={"condition": groups.names}, tables=tables, notes=notes)


# --- what there is ----------------------------------------------------------------------------------


def expert_layers(model: Model) -> tuple[list[int], list[str]]:
    """Layers whose experts can be read, and notes on what is not; an error, never silence, where none can be."""
    layers = [i for i in range(model.n_layers) if "router.weights" in model.signals(i)]
    config = model.hf.config
    said = {name: int(n) for name in COUNTS if (n := getattr(config, name, None)) and int(n) > 1}
    if not layers:
        named = ", ".join(f"{name}={n}" for name, n in said.items())
        raise PatchbayError(
            f"{NAME} needs experts behind a router (router.experts, experts.out), and no layer of this "
            f"{model.family.name} model offers experts.out or router.weights"
            + (
                f"; its config says {named}, so they are there and not found: describe them, "
                "pb.load(model, family=patchbay.Family(..., router='path.from.layer', experts='path.from.layer'))"
                if said
                else ": it has no mixture of experts"
            )
        )
    others = [i for i in range(model.n_layers) if i not in layers]
    notes = [f"layers {', '.join(map(str, others[:8]))} have no routed experts"] if others else []
    mlps = [model.modules[i].mlp for i in layers]
    if any(hasattr(mlp, name) for mlp in mlps for name in ("shared_expert", "shared_experts", "shared_mlp")):
        notes.append("shared experts are on at every token and are not ranked")
    return layers, notes


class Seen(NamedTuple):
    """What the routers did: by prompt [prompt, layer, expert], on the whole [layer, expert], and by token id."""

    fired: Tensor
    load: Tensor
    by_token: dict[int, Tensor]  # token id -> sum over its occurrences, [layer, expert]
    occurrences: Counter[int]
    all_positions: Tensor  # load over all positions, whatever was read


def _observe(model: Model, groups: Groups, layers: list[int], read: str, measure: str, batch_size: int) -> Seen:
    widest = max(model.n_experts(i) for i in layers)
    grid = (model.n_layers, widest)
    fired = torch.full((len(groups.prompts), *grid), torch.nan, dtype=torch.float64)
    by_token: dict[int, Tensor] = defaultdict(lambda: torch.zeros(grid, dtype=torch.float64))
    occurrences: Counter[int] = Counter()
    read_out, total, n_read = torch.zeros(grid).double(), torch.zeros(grid).double(), 0
    for start in range(0, len(groups.prompts), batch_size):
        batch = groups.prompts[start : start + batch_size]
        ports = [Port("router.weights" if measure == "weight" else "router.experts", i) for i in layers]
        trace = run(model, batch, taps=ports, logits="last")
        for row, ids in enumerate(batch):
            here = torch.full((len(ids), *grid), torch.nan, dtype=torch.float64)  # [position, layer, expert]
            for i, port in zip(layers, ports, strict=True):
                here[:, i, : model.n_experts(i)] = _dense(trace[port][row, : len(ids)], model.n_experts(i), measure)
            kept = here[-1:] if read == "last" else here
            fired[start + row] = kept.mean(0)
            read_out, n_read = read_out + kept.sum(0), n_read + len(kept)
            total = total + here.sum(0)
            for token, value in zip(ids, here, strict=True):
                by_token[token] += value
            occurrences.update(ids)
    return Seen(fired, read_out / n_read, dict(by_token), occurrences, total / occurrences.total())


def _dense(signal: Tensor, n_experts: int, measure: str) -> Tensor:
    """[position, expert]: routing weights as they are, or 1 where the expert is among the chosen ones [position, choice]."""
    signal = signal.cpu()
    if measure == "weight":
        return signal.double()
    return torch.zeros(len(signal), n_experts, dtype=torch.float64).scatter_(1, signal, 1.0)


# --- contrast and null ------------------------------------------------------------------------------


def _contrast(fired: Tensor, members: Tensor) -> Tensor:
    """Mean over each group's prompts less the mean over all others: [group, layer, expert]."""
    n_in = members.sum(1)[:, None]
    flat = fired.flatten(1)  # [prompt, layer * expert]
    inside, total = members @ flat, flat.sum(0)
    return (inside / n_in - (total - inside) / (len(flat) - n_in)).unflatten(1, fired.shape[1:])


def _dealt(fired: Tensor, members: Tensor, seed: int) -> Tensor:
    """Two-sided permutation p of each contrast, [group, layer, expert]."""
    generator = torch.Generator().manual_seed(seed)
    flat = fired.flatten(1)  # [prompt, layer * expert]
    n, n_cells = flat.shape
    total, block = flat.sum(0), max(1, 2**22 // max(n, n_cells))
    observed = _contrast(fired, members).abs()
    hits = torch.zeros_like(observed).flatten(1)
    for done in range(0, DEALS, block):
        order = torch.rand(min(block, DEALS - done), n, generator=generator).argsort(1)
        for i, row in enumerate(members):
            n_in = row.sum()
            inside = row[order] @ flat  # [deal, layer * expert]
            dealt = inside / n_in - (total - inside) / (n - n_in)
            hits[i] += (dealt.abs() >= observed[i].flatten() - 1e-9).sum(0)
    return ((1.0 + hits.reshape(observed.shape)) / (1 + DEALS)).where(observed.isfinite(), torch.nan)


def _bootstrap(fired: Tensor, groups: Groups, tested: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """95 % ends of each contrast over prompts drawn with replacement within group and rest; NaN where one has one prompt."""
    generator = torch.Generator().manual_seed(seed)
    ends = []
    for i in tested:
        sides = [fired[groups.of == i], fired[groups.of != i]]
        if min(map(len, sides)) < 2:
            ends.append(torch.full((2, *fired.shape[1:]), torch.nan, dtype=torch.float64))
            continue
        means = []
        for side in sides:
            drawn = torch.randint(len(side), (DRAWS, len(side)), generator=generator)
            weights = torch.zeros(DRAWS, len(side), dtype=torch.float64)
            weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
            means.append((weights @ side.flatten(1) / len(side)).unflatten(1, fired.shape[1:]))
        ends.append((means[0] - means[1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0))
    low, high = torch.stack(ends, 1)
    return low, high


# --- tables -----------------------------------------------------------------------------------------


def _first(relevance: Tensor) -> list[tuple[int, int]]:
    order = relevance.flatten().nan_to_num(-9.0).argsort(descending=True, stable=True)[:SHOWN].tolist()
    places = [divmod(place, relevance.shape[1]) for place in order]
    return [(layer, expert) for layer, expert in places if relevance[layer, expert].isfinite()]


def _tokens(model: Model, seen: Seen, relevance: Tensor) -> list[dict[str, Any]]:
    """For the first experts, the tokens at which they fire most above their load."""
    rows = []
    common = [token for token, n in seen.occurrences.items() if n >= AT_LEAST]
    for layer, expert in _first(relevance):
        load = float(seen.all_positions[layer, expert])
        excess = {
            token: float(seen.by_token[token][layer, expert]) / seen.occurrences[token] - load for token in common
        }
        for token in sorted(excess, key=lambda one: (-excess[one], one))[:SHOWN]:
            text = model.decode([token]) if model.tokenizer is not None else str(token)
            row = {"part": Part(layer, "expert", expert), "token": text, "share": excess[token] + load}
            rows.append(row | {"excess": excess[token], "occurrences": seen.occurrences[token]})
    return rows


def _controls(load: Tensor, relevance: Tensor) -> list[dict[str, Any]]:
    """For the first experts, the other one of the layer whose load is nearest."""
    rows = []
    for layer, expert in _first(relevance):
        gap = (load[layer] - load[layer, expert]).abs()
        gap[expert] = torch.nan
        if bool(gap.isfinite().any()):
            twin = int(gap.nan_to_num(torch.inf).argmin())
            row = {"part": Part(layer, "expert", expert), "control": str(Part(layer, "expert", twin))}
            rows.append(row | {"load": float(load[layer, expert]), "control_load": float(load[layer, twin])})
    return rows
