"""Which part or port is asked of a model, by its text; what the model lacks is refused with what it has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patchbay.signal.port import Part, PatchbayError, Port, by_group, parse_part, parse_port

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
    layer, axis = port.layer or 0, port.index_axis
    if axis == "head":
        return model.n_groups(layer) if port.signal in ("attn.k", "attn.v") else model.n_heads(layer)
    return model.n_neurons(layer) if axis == "neuron" else model.n_experts(layer)


def part(model: Model, text: str) -> Part:
    """What `Model.part` documents."""
    found = parse_part(text)
    if found.layer is not None and not found.layer < model.n_layers:
        raise PatchbayError(f"{text}: the model has layers 0..{model.n_layers - 1}")
    if found.kind in ("head", "group", "neuron", "expert"):
        _require(model, found.port())
    return found


def port(model: Model, text: str) -> Port:
    """What `Model.port` documents."""
    found = parse_port(text)
    if by_group(text):
        _require(model, Port("attn.z", found.layer, found.index))
        layer = found.layer or 0
        found = Port(found.signal, layer, (found.index or 0) * model.n_groups(layer) // model.n_heads(layer))
    _require(model, found)
    return found
