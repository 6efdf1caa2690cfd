"""Random dictionaries for tests of features, and the files of other programs as these lay them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import patchbay as pb
from patchbay.features.across import cross_layer
from patchbay.model.attached import width_of
from patchbay.signal.port import Port


def dictionary(model: Any, at: str, *, n: int = 24, seed: int = 0, **more: Any) -> pb.Dictionary:
    """Random tensors of the widths of a place, "L1.resid_out" or "L1.mlp.in to L1.mlp.out"."""
    ports = [model.port(one) for one in at.split(" to ")]
    d_in, d_out = (width_of(model, Port(port.signal, port.layer)) for port in (ports[0], ports[-1]))
    return random(
        d_in, d_out, n=n, seed=seed, layer=ports[0].layer, reads=ports[0].signal, writes=ports[-1].signal, **more
    )


def random(d_in: int = 6, d_out: int = 0, *, n: int = 10, seed: int = 0, **more: Any) -> pb.Dictionary:
    draw = torch.Generator().manual_seed(seed)
    d_out = d_out or d_in

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    held = {
        "W_enc": normal(d_in, n),
        "W_dec": normal(n, d_out) / d_out**0.5,
        "b_enc": normal(n) * 0.3,
        "b_dec": normal(d_out) * 0.3,
    }
    if more.get("form") == "jumprelu" and "threshold" not in more:
        more["threshold"] = normal(n).abs() * 0.3
    return pb.Dictionary(**(held | more))


def crosscoder(d: int, layers: tuple[int, ...], *, n: int = 10, seed: int = 0, **more: Any) -> pb.Dictionary:
    """A crosscoder of random tensors over layers of the stream."""
    draw, s = torch.Generator().manual_seed(seed), len(layers)
    held: dict[str, Any] = {
        "W_enc": torch.randn(s * d, n, generator=draw) / (s * d) ** 0.5,
        "W_dec": torch.randn(n, d, generator=draw) / d**0.5,
        "b_enc": torch.randn(n, generator=draw) * 0.3,
        "b_dec": torch.randn(d, generator=draw) * 0.3,
        "decoders": torch.randn(s - 1, n, d, generator=draw) / d**0.5,
        "biases": torch.randn(s - 1, d, generator=draw) * 0.3,
        "layer": layers[-1],
        "before": layers[:-1],
    }
    if more.get("form") == "jumprelu":
        held["threshold"] = torch.rand(n, generator=draw) * 0.5
    return pb.Dictionary(**(held | more))


def layers(d: int, places: tuple[int, ...], *, n: int = 10, seed: int = 0, **more: Any) -> pb.Dictionary:
    """A cross-layer transcoder of random tensors."""
    draw = torch.Generator().manual_seed(seed + 100)
    pieces = []
    for i, layer in enumerate(places):
        later = places[i + 1 :]
        onward = torch.randn(len(later), n, d, generator=draw) / d**0.5 if later else None
        where: dict[str, Any] = {"layer": layer, "reads": "mlp.in", "writes": "mlp.out"}
        pieces.append(random(d, n=n, seed=seed + i, later=later, onward=onward, **where, **more))
    return cross_layer(pieces)


def write(folder: Path, settings: str, cfg: dict[str, Any], weights: str, tensors: dict[str, torch.Tensor]) -> Path:
    """A folder as another program leaves it."""
    (folder / weights).parent.mkdir(parents=True, exist_ok=True)
    (folder / settings).write_text(json.dumps(cfg))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / weights)
    return folder
