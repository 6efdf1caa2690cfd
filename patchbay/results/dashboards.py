"""Dashboards of features as a batch file of Neuronpedia: what a Result of `find.feature_names` tells, under the names that its importer reads.

One file holds the features of one layer and kind. Lists that belong to no reading of ours (alignment with neurons, correlated features) are empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from patchbay.results.arrays import Arrays
from patchbay.signal.port import PatchbayError, parse_part

TABLES = ("promotes", "contexts", "histograms")
EMPTY: tuple[str, ...] = (
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_pearson",
)
EMPTY += (
    "correlated_neurons_l1",
    "correlated_features_indices",
    "correlated_features_pearson",
    "correlated_features_l1",
    "decoder_weights_dist",
)


def batch(result: Arrays, set_name: str = "patchbay") -> dict[str, Any]:
    """The batch of all parts of a Result. Raises PatchbayError where they are of several layers or kinds, or the Result is another."""
    if not set(TABLES) <= set(result.tables) or result.parts is None:
        raise PatchbayError("this Result holds no contexts of features; find.feature_names makes one")
    parts = [parse_part(str(part)) for part in result.parts]
    places = sorted({(part.layer or 0, part.kind) for part in parts})
    if len(places) != 1:
        raise PatchbayError(
            f"a batch is of one layer and kind of part, and these are of {len(places)}: "
            + ", ".join(f"L{i} ({kind}s)" for i, kind in places)
        )
    rows = {name: {row["part"]: row for row in result.tables[name]} for name in ("promotes", "histograms")}
    contexts: dict[str, list[dict[str, Any]]] = {}
    for row in result.tables["contexts"]:
        contexts.setdefault(row["part"], []).append(row)
    density = dict(zip(map(str, parts), result["density"].tolist(), strict=True))
    model = result.provenance.get("model") or {}
    return {
        "model_id": str(model.get("source") or model.get("fingerprint") or "model")
        if isinstance(model, Mapping)
        else "model",
        "layer": str(places[0][0]),
        "sae_set": set_name,
        "features": [
            _feature(
                part.index or 0,
                rows["promotes"][str(part)],
                rows["histograms"][str(part)],
                contexts.get(str(part), []),
                density[str(part)],
            )
            for part in parts
        ],
    }


def _feature(
    index: int, effect: dict[str, Any], bars: dict[str, Any], contexts: list[dict[str, Any]], density: float
) -> dict[str, Any]:
    width, step = (bars["width"] or [0.0])[0], (effect["low"][1] - effect["low"][0]) if len(effect["low"]) > 1 else 0.0
    return {
        "feature_index": index,
        "pos_str": effect["most"],
        "pos_values": effect["most_values"],
        "neg_str": effect["least"],
        "neg_values": effect["least_values"],
        "frac_nonzero": density,
        "freq_hist_data_bar_heights": bars["count"],
        "freq_hist_data_bar_values": [low + width / 2 for low in bars["low"]],
        "logits_hist_data_bar_heights": effect["count"],
        "logits_hist_data_bar_values": [low + step / 2 for low in effect["low"]],
        "activations": [
            {
                "tokens": row["tokens"],
                "values": row["values"],
                "bin_min": row["low"],
                "bin_max": row["high"],
                "bin_contains": row["share"] if row["share"] is not None else -1.0,
                "qualifying_token_index": row["at"],
            }
            for row in contexts
        ],
        **{name: [] for name in EMPTY},
    }
