"""Which parts write the answer: direct attribution with its sums, neurons and experts with their words, what heads read, the lens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchbay import find
from patchbay.find._direct import by_source, inside_mlp, precise, read_at_z, reading
from patchbay.find._neurons import neuron_layers
from patchbay.find.neuron_vocabulary import Reader, directions
from patchbay.model.model import Model
from patchbay.model.run import Trace, run
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError, Port
from patchbay.stories._asked import Asked
from patchbay.stories._why_told import SHOWN, Section, Values, strongest

MLPS, WORDS, HEADS, SOURCES = (
    2,
    4,
    5,
    3,
)  # MLPs that are opened, words of a neuron, heads that are read, tokens of a head
CLOSES = 1e-3  # of the largest part: what may remain of half a precision's rounding
MOST_BYTES = 2e9  # of the outputs of all experts at all positions


@dataclass
class Written:
    """Direct attribution of every head, mixer and MLP, in logits; `found` is the finder's Result."""

    parts: list[Part]
    logits: Tensor  # [part]
    found: Result

    def of(self, kind: str) -> dict[Part, float]:
        """Parts of a kind and what they write, largest size first."""
        return {
            self.parts[i]: float(self.logits[i])
            for i in strongest(self.logits.abs())
            if self.parts[i].kind == kind and not bool(self.logits[i].isnan())
        }


def written(asked: Asked) -> Written:
    """What each part writes towards the answer, by `find.direct_logit_attribution`."""
    model = asked.model
    headed = any("attn.z" in model.signals(i) for i in range(model.n_layers))
    found = find.direct_logit_attribution(model, asked.task, part="head" if headed else "layer")
    parts: dict[Part, float] = {}
    for layer in range(model.n_layers):
        if "attn.z" in model.signals(layer):
            parts |= {Part(layer, "head", h): float(found.values[layer, h]) for h in range(model.n_heads(layer))}
        elif "attn.out" in model.signals(layer):
            parts[Part(layer, "attn")] = float(found["attn_bias"][layer])
        if "mlp.out" in model.signals(layer):
            parts[Part(layer, "mlp")] = float(found["mlp"][layer])
    return Written(list(parts), torch.tensor(list(parts.values()), dtype=torch.float64), found)


def parts(asked: Asked, known: Written) -> Section:
    """The strongest parts of either sign."""
    rows = [
        {"part": str(known.parts[i]), "logits": float(known.logits[i])} for i in strongest(known.logits.abs())[:SHOWN]
    ]
    said = [
        f"{len(rows)} of {len(known.parts)} parts, strongest first; what each writes itself at the last position, with norms held as they "
        "were. A part that acts through later ones scores near 0 here"
    ]
    return Section("parts", rows, said)


def sums(asked: Asked, known: Written) -> Section:
    """The parts added up beside the model's own difference."""
    found, kinds = known.found, {"heads": "head", "mixers": "attn", "MLPs": "mlp"}
    counted = {name: [float(v) for v in known.of(kind).values()] for name, kind in kinds.items()}
    mixers = sum(counted["mixers"])
    rows: list[dict[str, Any]] = [
        {"what": f"{len(values)} {name}", "logits": sum(values)} for name, values in counted.items() if values
    ]
    biases = float(found["attn_bias"].nansum()) - mixers
    rows += [
        {"what": "biases of attention", "logits": biases},
        {"what": "embedding of the last token", "logits": float(found["embed"])},
        {"what": "biases of the final norm and unembedding", "logits": float(found["bias"])},
    ]
    total = float(sum(row["logits"] for row in rows))
    difference = float(found["total"])
    rows += [
        {"what": "sum", "logits": total},
        {"what": "the model's own difference", "logits": difference},
        {"what": "remainder", "logits": difference - total},
    ]
    values: Values = {
        "written": (torch.tensor([row["logits"] for row in rows], dtype=torch.float64), ("statistic",), "logits"),
        "remainder": (difference - total, (), "logits"),
    }
    size, rest = float(known.logits.abs().max()), abs(difference - total)
    closes = rest <= CLOSES * max(1.0, size)  # also where it is NaN, it does not
    said = (
        f"the parts are all there is: what remains, {rest:.1e} logits, is rounding"
        if closes
        else (
            f"the parts do NOT add up to the model's difference: {rest:.3g} logits remain, and none of these numbers can be relied on"
        )
    )
    return Section("sums", rows, [said], values, {"statistic": [row["what"] for row in rows]})


# --- inside MLPs --------------------------------------------------------------------------------------


def neurons(asked: Asked, known: Written) -> Section:
    """The strongest neurons of the strongest MLPs, and the tokens that they write."""
    model = asked.model
    layers, said = neuron_layers(model, "this section")
    chosen = [part.layer or 0 for part in known.of("mlp") if part.layer in layers][:MLPS]
    trace, towards = opened(asked, [Port(signal, layer) for layer in chosen for signal in ("mlp.act", "mlp.out")])
    given = {
        Part(layer, "neuron", n): float(value)
        for layer in chosen
        for n, value in enumerate(inside_mlp(model, trace, Port("mlp.act", layer), towards)[0])
    }
    top = sorted(given, key=lambda part: -abs(given[part]))[:SHOWN]
    reader, rows = Reader(model, True), []
    for part in top:
        active = float(trace.last(Port("mlp.act", part.layer))[0, part.index])
        vector = directions(model, part.layer or 0, "out", True)[part.index] * (1.0 if active >= 0 else -1.0)
        rows.append(
            {"neuron": str(part), "logits": given[part], "activation": active, "writes": words(asked, reader, vector)}
        )
    for layer in chosen:
        inside = [value for part, value in given.items() if part.layer == layer]
        own = known.of("mlp")[Part(layer, "mlp")]
        said.append(
            f"L{layer}.mlp writes {own:.3g}: its {len(inside)} neurons {sum(inside):.3g}, its bias (or rounding) {own - sum(inside):.2g}"
        )
    values: Values = {
        "neuron_attribution": (
            torch.tensor([given[part] for part in top], dtype=torch.float64),
            ("component",),
            "logits",
        )
    }
    return Section("neurons", rows, said, values, {"component": [str(part) for part in top]})


def experts(asked: Asked, known: Written) -> Section:
    """The strongest experts of the strongest routed layers, how much of each is let through, and the tokens that it writes."""
    model = asked.model
    order = [part.layer or 0 for part in known.of("mlp") if "experts.out" in model.signals(part.layer or 0)][:MLPS]
    held = sum(4.0 * len(asked.ids) * model.n_experts(layer) * model.d_model for layer in order)
    if held > MOST_BYTES:
        raise PatchbayError(
            f"the outputs of all experts at all {len(asked.ids)} positions would take {held / 1e9:.1f} GB"
        )
    trace, towards = opened(asked, [Port(s, layer) for layer in order for s in ("experts.out", "router.weights")])
    rows, reader, said = [], Reader(model, True), []
    for layer in order:
        given = inside_mlp(model, trace, Port("experts.out", layer), towards)[0]
        out, weight = trace.last(Port("experts.out", layer))[0], trace.last(Port("router.weights", layer))[0]
        for expert in strongest(given.abs()):
            if float(weight[expert]) != 0.0:
                rows.append({"expert": f"L{layer}.E{expert}", "logits": float(given[expert]), "router weight": float(weight[expert]),
                             "writes": words(asked, reader, out[expert].float())})  # fmt: skip
        own = known.of("mlp")[Part(layer, "mlp")]
        said.append(
            f"L{layer}.mlp writes {own:.3g}: its {int((weight != 0).sum())} chosen experts {float(given.sum()):.3g} of it"
        )
    values: Values = {
        "expert_attribution": (
            torch.tensor([row["logits"] for row in rows], dtype=torch.float64),
            ("expert",),
            "logits",
        )
    }
    return Section("experts", rows, said, values, {"expert": [str(row["expert"]) for row in rows]})


def opened(asked: Asked, taps: list[Port]) -> tuple[Trace, Tensor]:
    """One run with these taps, and the direction in the stream that reads the difference."""
    model = asked.model
    base = [Port("resid_out", model.n_layers - 1), Port("final_norm")]
    trace = run(model, asked.task, taps=[*base, *taps], logits="last")
    return trace, reading(model, asked.task, trace)


def words(asked: Asked, reader: Reader, vector: Tensor) -> str:
    """The tokens that a direction of the stream raises most."""
    tokens = reader.top(vector[None], min(WORDS, asked.model.vocab_size))[1][0].tolist()
    return ", ".join(asked.text(token) for token in tokens)


# --- the lens, and what heads read --------------------------------------------------------------------


def lens(asked: Asked) -> Section:
    """What the stream at the last position would say after each layer, by `find.logit_lens`."""
    found = find.logit_lens(asked.model, asked.task, positions=1)
    best, rows = found.tables["most_likely"], []
    for i, layer in enumerate(found.labels_of("layer")):
        cell = best[i]
        rows.append({"after": layer, "most likely": asked.text(cell["token"]), "its probability": cell["probability"],
                     "answer's probability": float(found["probability"][i, 0]), "answer's place": int(found["rank"][i, 0]) + 1,
                     "answer less against": float(found["logit_diff"][i, 0])})  # fmt: skip
    first = next(
        (row["after"] for i, row in enumerate(rows) if all(later["answer's place"] == 1 for later in rows[i:])), None
    )
    said = (
        [f"the answer is the most likely token from {first} on"]
        if first
        else ["the answer is not the most likely token at the end"]
    )
    grid = ("layer",)
    values: Values = {
        "lens_probability": (found["probability"][:, 0], grid, "probability"),
        "lens_rank": (found["rank"][:, 0], grid, "rank"),
        "lens_difference": (found["logit_diff"][:, 0], grid, "logits"),
    }
    return Section("lens", rows, said, values, {"layer": found.labels_of("layer")})


def reads(asked: Asked, known: Written) -> Section:
    """What the strongest heads attend to from the last position, and what each token gives through them."""
    model = asked.model
    layers = {i for i in range(model.n_layers) if {"attn.z", "attn.pattern", "attn.v"} <= set(model.signals(i))}
    heads = [part for part in known.of("head") if part.layer in layers][:HEADS]
    if not heads:
        raise PatchbayError(f"no head of this {model.family.name} model has a pattern to read")
    given, attention = _by_token(asked, sorted({part.layer or 0 for part in heads}))
    rows, gap = [], 0.0
    for part in heads:
        gives, looks = given[part.layer or 0][part.index or 0], attention[part.layer or 0][part.index or 0]  # [key]
        gap = max(gap, abs(float(gives.sum()) - known.of("head")[part]))
        for place in strongest(gives.abs())[:SOURCES]:
            rows.append({"head": str(part), "position": place, "token": asked.text(asked.ids[place]),
                         "attention": float(looks[place]), "gives": float(gives[place])})  # fmt: skip
    pick = [(part.layer or 0, part.index or 0) for part in heads]
    values: Values = {
        "gives": (torch.stack([given[layer][head] for layer, head in pick]), ("writer", "position"), "logits"),
        "attention": (
            torch.stack([attention[layer][head] for layer, head in pick]),
            ("writer", "position"),
            "attention",
        ),
    }
    said = [
        f"a head's tokens sum to what it writes, within {gap:.1g} logits; shown are the {SOURCES} strongest of each"
    ]
    return Section(
        "heads read", rows, said, values, {"writer": [str(part) for part in heads], "position": asked.labels}
    )


def _by_token(asked: Asked, layers: list[int]) -> tuple[Mapping[int, Tensor], Mapping[int, Tensor]]:
    """layer -> what each key gives through each head at the last position, and the attention it gets: [head, key]."""
    model = asked.model
    wanted = [Port(signal, layer) for layer in layers for signal in ("attn.z", "attn.v", "attn.out")]
    trace, towards = opened(asked, [*wanted, *(Port("attn.pattern", layer, None, (-1,)) for layer in layers)])
    found = {layer: by_source(model, trace, layer, read_at_z(model, trace, layer, towards)) for layer in layers}
    return {i: pair[0][0] for i, pair in found.items()}, {i: precise(pair[1])[0] for i, pair in found.items()}


def has_experts(model: Model) -> bool:
    return any("experts.out" in model.signals(layer) for layer in range(model.n_layers))
