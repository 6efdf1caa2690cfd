"""Finished: the dictionary that tensors of signals side by side make, by what their places are."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from patchbay.features.across import cross_layer
from patchbay.features.dictionary import Dictionary
from patchbay.train._places import Places


def finished(held: dict[str, Any], density: Tensor, places: Places) -> Dictionary:
    """`held`: W_enc [sites x d, feature], W_dec [feature, sites x d], b_enc, b_dec [sites x d], and what belongs to the form.

    Of a crosscoder of two models the second stands where the last layer does, under the number that follows: it is read by nobody's model.
    """
    reads, writes, layers = places.reads[0].signal, places.writes[0].signal, places.layers
    where: dict[str, Any] = {"reads": reads, "writes": writes}
    if places.kind in ("plain", "transcoder"):
        return Dictionary(**held, density=density, layer=layers[0], subtract=places.kind == "plain", **where)
    sites = len(layers)
    rows, biases = held["W_dec"].unflatten(1, (sites, -1)).transpose(0, 1), held["b_dec"].unflatten(0, (sites, -1))
    if places.kind == "crosscoder":
        layers = layers if len(set(layers)) == sites else [layers[0] + i for i in range(sites)]
        own = held | {"W_dec": rows[-1], "b_dec": biases[-1], "decoders": rows[:-1], "biases": biases[:-1]}
        return Dictionary(**own, density=density, layer=layers[-1], before=tuple(layers[:-1]), **where)
    n = len(density) // sites
    pieces = []
    for i, layer in enumerate(layers):
        mine = slice(i * n, (i + 1) * n)
        own = {name: value for name, value in held.items() if name in ("form", "k")}
        own |= {name: held[name][mine] for name in ("b_enc", "threshold") if name in held}
        own |= {
            "W_enc": held["W_enc"].unflatten(0, (sites, -1))[i][:, mine],
            "W_dec": rows[i][mine],
            "b_dec": biases[i],
        }
        later: dict[str, Any] = {
            "later": tuple(layers[i + 1 :]),
            "onward": rows[i + 1 :, mine] if i + 1 < sites else None,
        }
        pieces.append(Dictionary(**own, **later, density=density[mine], layer=layer, **where))
    return cross_layer(pieces)
