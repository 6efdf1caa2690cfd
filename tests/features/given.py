"""Random dictionaries for tests of features, and the files of other programs as these lay them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import patchbay as pb
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


def write(folder: Path, settings: str, cfg: dict[str, Any], weights: str, tensors: dict[str, torch.Tensor]) -> Path:
    """A folder as another program leaves it."""
    (folder / weights).parent.mkdir(parents=True, exist_ok=True)
    (folder / settings).write_text(json.dumps(cfg))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / weights)
    return folder
