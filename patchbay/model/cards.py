"""Cards: what `patchbay show` says of a model, or of one of its parts, as plain data."""

from __future__ import annotations

from typing import Any

from patchbay.errors import PatchbayError
from patchbay.model.carried import carried, said
from patchbay.model.model import Model
from patchbay.signal.port import Part, Port, parse_part, signals_of


def model_card(model: Model) -> dict[str, Any]:
    """What `show MODEL` says, as plain data."""
    layers = [
        {
            "layer": i,
            "heads": model.n_heads(i),
            "groups": model.n_groups(i),
            "d_head": model.d_head(i) if model.n_heads(i) else None,
            "neurons": model.n_neurons(i),
            "experts": model.n_experts(i),
            "signals": model.signals(i),
        }
        for i in range(model.n_layers)
    ]
    check = model.check
    return {
        "source": model.source,
        "family": model.family.name,
        "model_type": model.config.model_type,
        "parameters": sum(p.numel() for p in model.hf.parameters()),
        "d_model": model.d_model,
        "vocab": model.vocab_size,
        "max_positions": model.max_positions,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "fingerprint": model.fingerprint,
        "carried": said(carried(model.hf, model.source)),
        "check": {"stream": check.stream, "logits": check.logits, "heads": check.heads, "tolerance": check.tolerance, "passed": check.passed},
        "layers": layers,
    }  # fmt: skip


def part_card(model: Model, text: str) -> dict[str, Any]:
    """What `show MODEL PART` says, as plain data: a part's ports with their axes, or those of one port."""
    try:
        parse_part(text)
    except PatchbayError:
        port = model.port(text)
        ports, part = [port], port.part
    else:
        part = model.part(text)
        ports = _ports(model, part)
    rows = [{"port": str(port), "axes": port.axes, "editable": port.editable} for port in ports]
    return {"model": model.source, "part": str(part), "kind": part.kind, "ports": rows}


def _ports(model: Model, part: Part) -> list[Port]:
    """The ports of a part that this model offers; keys and values of a head are those of its group."""
    if part.kind == "layer":
        return [port for port in model.ports() if port.layer == part.layer]
    return [
        model.port(f"{part}.{signal}") if part.layer is not None else part.port(signal)
        for signal in signals_of(part.kind)
        if part.layer is None or part.port(signal).signal in model.signals(part.layer)
    ]
