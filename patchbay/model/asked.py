"""Which part or port is asked of a model, by its text; what the model lacks is refused with what it has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patchbay.errors import by_kind
from patchbay.signal.port import (
    FEATURES,
    HOMES,
    KINDS,
    Part,
    PatchbayError,
    Port,
    by_group,
    by_home,
    parse_part,
    parse_port,
)

if TYPE_CHECKING:
    from patchbay.jacks.modelled import Modelled as Model


def require(model: Model, asked: Port | str) -> None:
    """What `Model.require` documents."""
    if isinstance(asked, str):
        port(model, asked)
        return
    _require(model, asked)


def _require(model: Model, port: Port) -> None:
    if not isinstance(port, Port):
        raise PatchbayError(
            f"expected a Port such as model.layers[3].heads[5].z or model.port('L3.H5.z'), got {port!r}"
        )
    if port.layer is None:
        return
    if not 0 <= port.layer < model.n_layers:
        raise PatchbayError(f"{port}: the model has layers 0..{model.n_layers - 1}")
    offered = model.signals(port.layer)
    if port.signal not in offered and by_home(port) is not None:
        raise _no_dictionary(model, port)
    if port.signal not in offered:
        elsewhere = [i for i in range(model.n_layers) if port.signal in model.signals(i)]
        where = f"layers {elsewhere} have it" if elsewhere else f"no layer of this {model.family.name} model has it"
        apart = getattr(model.__dict__.get("check"), "apart", {}).get(port.layer) if port.signal == "mlp.act" else None
        why = (
            ""
            if apart is None
            else f" (what its MLP adds is not what its last map makes of neurons: off by {apart:.1e})"
        )
        raise PatchbayError(f"{port}: layer {port.layer} offers {', '.join(offered)}; {where}{why}")
    if port.index is not None and not 0 <= port.index < _count(model, port):
        raise PatchbayError(f"{port}: layer {port.layer} has {_count(model, port)} (0..{_count(model, port) - 1})")


def _count(model: Model, port: Port) -> int:
    return n_parts(model, Port(port.signal, port.layer, 0).part.kind, port.layer or 0)


def n_parts(model: Model, kind: str, layer: int) -> int:
    """How many parts of a kind a layer has: heads, key/value groups, neurons, experts, or features of the dictionaries attached there."""
    if kind in FEATURES:
        dictionary = model.dictionaries.get((layer, f"{kind}s"))
        return 0 if dictionary is None else dictionary.n_features
    counts = {"head": model.n_heads, "group": model.n_groups, "neuron": model.n_neurons, "expert": model.n_experts}
    return counts[kind](layer)


def _no_dictionary(model: Model, port: Port) -> PatchbayError:
    here = [str(Part(layer, home)) for layer, home in model.dictionaries if layer == port.layer]
    return PatchbayError(
        f"{port}: layer {port.layer} has {'no dictionary' if not here else 'the features ' + ', '.join(here) + ' alone'}; a dictionary is "
        "attached with model.with_dictionaries(pb.load_dictionary(...)), on the command line --dictionary FOLDER"
    )


def _at_home(model: Model, port: Port) -> Port:
    """`L3.F5` is a feature of the stream, or of the one dictionary that layer 3 has."""
    found = by_home(port)
    homes = [home for layer, home in model.dictionaries if layer == port.layer]
    if found is None or found[0] != "features" or len(homes) != 1:
        return port
    return Port(f"{homes[0]}.{found[1]}", port.layer, port.index)


@by_kind
def part(model: Model, text: str) -> Part:
    """What `Model.part` documents."""
    found = parse_part(text)
    if found.layer is not None and not found.layer < model.n_layers:
        raise PatchbayError(f"{text}: the model has layers 0..{model.n_layers - 1}")
    if found.kind in (*KINDS, *HOMES):
        port = _at_home(model, found.port())
        _require(model, port)
        return port.part if port.signal != found.port().signal else found
    return found


@by_kind
def port(model: Model, text: str) -> Port:
    """What `Model.port` documents."""
    found = parse_port(text)
    if by_group(text):
        _require(model, Port("attn.z", found.layer, found.index))
        layer = found.layer or 0
        found = Port(found.signal, layer, (found.index or 0) * model.n_groups(layer) // model.n_heads(layer))
    found = _at_home(model, found)
    _require(model, found)
    return found
