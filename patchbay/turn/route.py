"""Route: a knob that switches experts off, forces them, or makes them more or less likely.

    forbid   logit - 1e9 before top-k: the next-best expert takes the place, and the family's own softmax, top-k and
             renormalisation follow; every token still has as many experts as the model gives it
    boost    logit + strength before top-k (below 0: less likely); every token has as many experts as the model gives it
    force    weights <- (1 - strength) weights + strength x an even split over the experts, after top-k: each of them is
             used for every token with at least its part of `strength`, beside the experts that the router chose

At strength 0 the model is untouched bit for bit. What is always used (shared experts) is no routed expert and stays. An
expert that is forbidden adds exactly nothing. Where scores pass a sigmoid, a correction and groups (DeepSeek), a forbidden one
may still be named among the chosen, with weight 0, and no boost can lift one whose group is not chosen: force does. Making the knob runs nothing, unless `texts` are given: its evidence `load` then
holds the share of tokens that each expert of these layers gets, without the knob and with it.

Dahlke et al. 2025, "Mixture of Tunable Experts", where the ten of 14,848 experts that a contrast of prompts singled out are
switched off. Another expert does not do nothing in the place of one that is off: compare with experts of the same load.
"""

from __future__ import annotations

from typing import Literal

import torch

from patchbay.edits import edit
from patchbay.edits.edit import Edit
from patchbay.errors import one_of
from patchbay.knobs.knob import Knob
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError, Port
from patchbay.turn._places import Place, places

To = Literal["forbid", "boost", "force"]
OFF = -1e9  # a logit below every other: its softmax is 0 in every precision
WAYS = ("forbid", "boost", "force")


@method(paper="dahlke2025")
def route(
    model: Model,
    experts: list[Part] | Part,
    *,
    to: To = "forbid",
    strength: float = 1.0,
    positions: Place = None,
    texts: list[str] | list[list[int]] | None = None,
    name: str | None = None,
) -> Knob:
    """A knob that routes tokens away from `experts` (`to="forbid"`), towards them ("boost") or to them ("force").

    `experts`: as "L1.E2,L2.E0". `strength`: for boost in logits; for force the share of the weights that they get; forbid
    is on at any strength above 0. `positions`: as in "last", [1, 2], "2:5"; all without. `texts`: text on which to count the load.

    `to`: "forbid" the experts, "boost" their logits, or "force" tokens to them.
    """
    one_of("to", to, WAYS)
    by_layer = _by_layer(model, [experts] if isinstance(experts, Part) else experts, to)
    at, edits = places(positions), []
    for layer, chosen in by_layer.items():
        n = model.n_experts(layer)
        marked = torch.zeros(n)
        marked[chosen] = 1.0
        if to == "force":
            even = marked / len(chosen) * _total(model)
            edits.append(edit.replace(Port("router.weights", layer), even, positions=at))
        else:
            edits.append(
                edit.add(Port("router.logits", layer), OFF * marked if to == "forbid" else marked, positions=at)
            )
    listed = [f"L{layer}.E{e}" for layer, chosen in by_layer.items() for e in chosen]
    shown = "+".join(listed[:4]) + (f"+{len(listed) - 4} more" if len(listed) > 4 else "")
    knob = Knob(name or f"{to} {shown}", edits, strength)
    return knob if texts is None else knob.with_evidence(load=_load(model, list(by_layer), knob, texts))


def _by_layer(model: Model, experts: list[Part], to: To) -> dict[int, list[int]]:
    """Layer -> experts, checked: each one there, its router reached, and with forbid enough others left."""
    found: dict[int, list[int]] = {}
    for part in dict.fromkeys(experts):
        if part.kind != "expert":
            raise PatchbayError(f"{part} is no expert; experts are written L4.E2")
        model.require(Port("router.weights" if to == "force" else "router.logits", part.layer))
        model.require(part.port("weight"))
        found.setdefault(part.layer or 0, []).append(part.index or 0)
    if not found:
        raise PatchbayError("no experts were given; they are written L4.E2")
    n_chosen = int(getattr(model.config, "num_experts_per_tok", None) or 1)
    for layer, chosen in found.items():
        left = model.n_experts(layer) - len(chosen)
        if to == "forbid" and left < n_chosen:
            raise PatchbayError(
                f"layer {layer}: {len(chosen)} of {model.n_experts(layer)} experts forbidden leaves {left}, and every token "
                f"needs {n_chosen}"
            )
    return {layer: sorted(chosen) for layer, chosen in sorted(found.items())}


def _total(model: Model) -> float:
    """What the weights of a token add up to where the family renormalises them."""
    return float(getattr(model.config, "routed_scaling_factor", None) or 1.0)


def _load(model: Model, layers: list[int], knob: Knob, texts: object) -> Result:
    """Share of tokens that use each expert, without and with the knob: [condition, expert] over the parts of these layers."""
    ports = [Port("router.weights", layer) for layer in layers]
    used = []
    for edits in ([], knob.edits_at()):
        trace = run(model, texts, taps=ports, edits=edits)
        rows = [trace[port].flatten(0, 1) for port in ports]  # [token, expert] each, NaN at padding
        used.append(torch.cat([(row[~row.isnan().any(1)] != 0).double().mean(0) for row in rows]))
    before, after = used
    parts = [Part(layer, "expert", e) for layer in layers for e in range(model.n_experts(layer))]
    unit = "share of tokens"
    return Result(
        {
            "load": (after, ("part",), unit),
            "without": (before, ("part",), unit),
            "shift": (after - before, ("part",), unit),
        },
        parts=parts,
        highlights=sorted({part for e in knob.edits for part in parts if _names(e, part)}),
        notes=[
            f"strength {knob.strength:g}: experts used per token {after.sum():.3g} in all, {before.sum():.3g} without"
        ],
    )


def _names(made: Edit, part: Part) -> bool:
    assert isinstance(made.value, torch.Tensor)
    return made.port.layer == part.layer and bool(made.value[part.index or 0] != 0)
