"""Which features of given dictionaries write the answer: what each active one adds along the direction that reads the difference.

    feature f at the last position:   z_f (W_dec[f] . r),    r that direction at the signal which the dictionary writes

and beside their sum what the whole signal gives: what is missing is the dictionary's error and its bias, each told. A dictionary of the
stream is read as the stream is: what already stands there, not what a layer adds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchbay.features.load import load_dictionary
from patchbay.features.reading import written
from patchbay.find._direct import precise, read_at_z
from patchbay.find.neuron_vocabulary import Reader
from patchbay.model.model import Model
from patchbay.model.run import Trace
from patchbay.signal.port import PatchbayError, Port
from patchbay.stories._asked import Asked
from patchbay.stories._why_parts import opened, words
from patchbay.stories._why_told import SHOWN, Section, Values

KINDS = {"features": "feature", "mlp_features": "mlp_feature", "attn_features": "attn_feature"}


def with_features(model: Model, given: list[str]) -> Model:
    """The model with the dictionaries of these folders beside those that it has; FOLDER@PLACE says where a file does not."""
    if isinstance(given, str) or not all(isinstance(text, str) for text in given):
        raise PatchbayError(
            f"dictionaries={given!r:.80}: a list of folders, or FOLDER@PLACE; one that is loaded goes to model.with_dictionaries(...)"
        )
    asked = [text.rpartition("@") if "@" in text else (text, "", "") for text in given]
    return (
        model.with_dictionaries(*(load_dictionary(folder, at=place or None) for folder, _, place in asked))
        if asked
        else model
    )


def features(asked: Asked) -> Section:
    """The strongest features of the model's dictionaries, the tokens that they write, and what the dictionaries leave out."""
    model, rows, said = asked.model, [], []
    reader = Reader(model, True)
    held: dict[tuple[int, str], Any] = dict(model.dictionaries)
    for (layer, home), one in sorted(held.items()):
        if one.spans or one.later:
            raise PatchbayError(
                f"the dictionary at L{layer} reads or writes several layers, which no direction at one of them reads: find.attribution_graph"
            )
        after = [Port("attn.out", layer)] if one.writes == "attn.z" else []
        taps = [
            Port(one.reads, layer),
            Port(one.writes, layer),
            *after,
            *(Port(f"{home}.{s}", layer) for s in ("act", "error")),
        ]
        trace, towards = opened(asked, list(dict.fromkeys(taps)))
        z = precise(trace.last(Port(f"{home}.act", layer)))[0]  # [feature]
        vectors, along = _writes(asked, trace, layer, home, towards)
        given = z * along
        name = f"L{layer}.{'' if home == 'features' else home.removesuffix('features').replace('_', '.')}F"
        for f in given.abs().argsort(descending=True)[:SHOWN].tolist():
            if float(z[f]):
                part = f"{name}{f}"
                rows.append({"feature": part, "logits": float(given[f]), "activation": float(z[f]), "writes": words(asked, reader, vectors[f].float())})  # fmt: skip
        said.append(_closing(asked, trace, layer, home, towards, given, int((z != 0).sum())))
    rows = sorted(rows, key=lambda row: -abs(float(str(row["logits"]))))[:SHOWN]
    said.append("features are not among the parts that are taken away below: prove.ablation takes them")
    values: Values = {
        "feature_attribution": (
            torch.tensor([row["logits"] for row in rows], dtype=torch.float64),
            ("feature",),
            "logits",
        )
    }
    return Section("features", rows, said, values, {"feature": [str(row["feature"]) for row in rows]})


def _writes(asked: Asked, trace: Trace, layer: int, home: str, towards: Tensor) -> tuple[Tensor, Tensor]:
    """Of each feature at activation 1: what it writes to the stream [feature, d_model], and how much of that is along the difference [feature]."""
    model = asked.model
    one: Any = model.dictionaries[layer, home]
    at = model.modules[layer]
    if one.writes == "mlp.act" and at.mlp_added is not at.mlp and at.mlp_added is not at.mlp_proj:
        raise PatchbayError(
            f"a norm follows the MLP of L{layer}, whose neurons the dictionary writes: give one of mlp.out"
        )
    factor = one.factor(trace.last(Port(one.reads, layer)).flatten(1))
    scale = 1.0 if factor is None else float(factor)
    vectors = precise(written(model, layer, KINDS[home])) * scale
    if one.writes == "attn.z":
        return vectors, precise(one.W_dec) * scale @ read_at_z(model, trace, layer, towards)[0].flatten()
    inner = model.residual_scale if one.writes == "mlp.act" else 1.0
    return vectors, vectors @ towards[0] * inner


def _closing(asked: Asked, trace: Trace, layer: int, home: str, towards: Tensor, given: Tensor, active: int) -> str:
    """The features' sum beside what the whole signal gives along the difference."""
    one: Any = asked.model.dictionaries[layer, home]
    whole = precise(trace.last(Port(one.writes, layer)))[0].flatten()
    error = precise(trace.last(Port(f"{home}.error", layer)))[0].flatten()
    if one.writes == "attn.z":
        read = read_at_z(asked.model, trace, layer, towards)[0].flatten()
    elif one.writes == "mlp.act":
        out = precise(asked.model.layers[layer].mlp.weights().W_out) * asked.model.residual_scale
        read = out @ towards[0]
    else:
        read = towards[0]
    own, lost = float(whole @ read), float(error @ read)
    return (
        f"L{layer}.{one.writes} gives {own:.3g}: {active} active features of {one.n_features} {float(given.sum()):.3g}, what they do not "
        f"rebuild {lost:.3g}, their bias {own - float(given.sum()) - lost:.3g}"
    )
