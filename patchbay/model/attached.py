"""Dictionaries attached to a model: a view of it whose layers have features for parts, `L3.F12`, `L3.mlp.F12`, `L3.attn.F12`.

Which it is follows from the signal that the dictionary writes: the stream, what an MLP adds (or its neurons), what attention adds (or its
heads' z). A layer has one of each, so that a part's text means one feature. The view shares all else with the model, which stays as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from patchbay.jacks.modelled import Dictionary
from patchbay.signal.port import PatchbayError, Port, as_port, by_home

if TYPE_CHECKING:
    from patchbay.jacks.modelled import Modelled

M = TypeVar("M")
HOME = dict.fromkeys(("resid_in", "resid_mid", "resid_out"), "features")
HOME |= dict.fromkeys(("mlp.in", "mlp.act", "mlp.out"), "mlp_features") | dict.fromkeys(
    ("attn.z", "attn.out"), "attn_features"
)
IN_ORDER = ("resid_in", "attn.z", "attn.out", "resid_mid", "mlp.in", "mlp.act", "mlp.out", "resid_out")


def attach(model: M, dictionaries: Sequence[Any]) -> M:
    """What `Model.with_dictionaries` documents."""
    lent: Any = model
    found: dict[tuple[int, str], Dictionary] = dict(lent.dictionaries)
    signals = list(lent.modules and [lent.signals(i) for i in range(lent.n_layers)])
    given = [one for whole in dictionaries for one in (whole, *getattr(whole, "rest", ()))]
    for dictionary in given:
        if not all(hasattr(dictionary, name) for name in ("reads", "writes", "layer", "encode", "W_dec")):
            raise PatchbayError(
                f"expected dictionaries, such as pb.load_dictionary(FOLDER), got {type(dictionary).__name__}"
            )
        _check(lent, dictionary)
        key = (dictionary.layer, HOME[dictionary.writes])
        if key in found:
            other = found[key]
            raise PatchbayError(
                f"layer {key[0]} has a dictionary at {other.writes} already, and one at {dictionary.writes} was given: a layer takes one of "
                "the stream, one of attention and one of the MLP; make two views, each with its own"
            )
        found[key] = (
            replace(dictionary, rest=()).to(lent.device)
            if getattr(dictionary, "rest", ())
            else dictionary.to(lent.device)
        )
        signals[key[0]] = (*signals[key[0]], f"{key[1]}.act", f"{key[1]}.error")
    _check_families(found)
    view = copy.copy(lent)
    view.__dict__.pop("layers", None)
    view.dictionaries, view._signals = found, signals
    return view  # type: ignore[no-any-return]


def _check(model: Modelled, dictionary: Any) -> None:
    """Refuse a dictionary of a place that the model has not, or of another width, by name."""
    reads, writes = dictionary.reads, dictionary.writes
    if reads not in HOME or writes not in HOME or IN_ORDER.index(reads) > IN_ORDER.index(writes):
        raise PatchbayError(
            f"a dictionary that reads {reads} and writes {writes}: possible are {', '.join(HOME)}, written where it reads or later in the layer"
        )
    sites = getattr(dictionary, "sites", (dictionary.layer,))
    read = [(Port(reads, layer), dictionary.d_in // len(sites)) for layer in sites]
    written = [Port(writes, layer) for layer in (dictionary.layer, *getattr(dictionary, "later", ()))]
    for port, width in (*read, *((port, dictionary.d_out) for port in written)):
        model.require(port)
        found = width_of(model, port)
        if found != width:
            raise PatchbayError(
                f"the dictionary is made for {width} numbers, {port} of {model.source or type(model.hf).__name__} has {found}"
            )


def _check_families(found: Mapping[tuple[int, str], Any]) -> None:
    """Refuse a cross-layer transcoder that is not whole: what its layers leave unsaid could not be told."""
    families: dict[str, list[int]] = {}
    for (layer, _), one in found.items():
        if getattr(one, "family", ""):
            families.setdefault(one.family, []).append(layer)
    for family, layers in families.items():
        n = int(family.partition("/")[2])
        if len(layers) != n:
            raise PatchbayError(
                f"layers {sorted(layers)} of a cross-layer transcoder of {n} were given: its layers write into one another, so that it is attached "
                "whole, as pb.load_dictionary gives it"
            )


def width_of(model: Any, port: Port | str) -> int:
    """How many numbers a dictionary at this signal sees: those of all heads or neurons together."""
    port = as_port(port)
    layer = port.layer or 0
    if port.signal == "attn.z":
        return int(model.n_heads(layer) * model.W_O(layer).shape[1])
    return int(model.n_neurons(layer) if port.signal == "mlp.act" else model.d_model)


def attached(model: Any) -> dict[str, Any]:
    """For records: whose features the model has, by their numbers' digest; nothing where there are none."""
    held = getattr(model, "dictionaries", {})
    found = {
        f"L{layer}.{home}": {"digest": one.digest, "source": str(getattr(one, "source", ""))}
        for (layer, home), one in sorted(held.items())
    }
    return {"dictionaries": found} if found else {}


def other_dictionary(model: Any, made_on: Mapping[str, Any], ports: Sequence[Port]) -> str:
    """Which features of another dictionary than theirs some ports would mean on this model, as a sentence; "" where none."""
    made, here = made_on.get("dictionaries") or {}, attached(model).get("dictionaries", {})
    for port in ports:
        place = f"L{port.layer}.{port.signal.split('.')[0]}"
        was, now = (held.get(place, {}).get("digest") for held in (made, here))
        if by_home(port) is not None and was is not None and now is not None and was != now:
            return (
                f"it was made on the features of {made[place].get('source') or 'a dictionary'} ({was}) and {place} here are those of "
                f"{here[place].get('source') or 'another'} ({now})"
            )
    return ""
