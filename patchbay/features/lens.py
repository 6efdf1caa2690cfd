"""Lenses: an affine map for each depth from the stream there to the last layer's, and the folders that hold one.

    read[l] = unembed(final_norm(map[l](stream entering block l)))

A tuned lens is h + A h + b, learned; a Jacobian lens is J h. Depth 0 is the embedding, depth i the stream after block i - 1; the last
block's stream is the model's own and has no map. A folder is `config.json` and `params.safetensors` with `l.weight` [d, d] and `l.bias` [d],
which is how the tuned-lens package names them; its own folders hold a pickle, `params.pt`, and are refused with how to convert it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as write_tensors
from torch import Tensor

from patchbay.features.files import PICKLES, tensors
from patchbay.files import write_folder
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError, Port

SETTINGS, WEIGHTS = "config.json", "params.safetensors"
TUNED, JACOBIAN = "linear_tuned_lens", "jacobian_lens"


@dataclass(frozen=True)
class Lens:
    """Maps of all depths but the last: `weight` [depth, d_model out, d_model in], `bias` [depth, d_model]; with `adds`, beside the state itself."""

    weight: Tensor
    bias: Tensor
    adds: bool  # h + A h + b, else A h + b
    made: dict[str, Any] = field(default_factory=dict)

    def __call__(self, depth: int, state: Tensor) -> Tensor:
        """The state [..., d_model] at a depth in the last layer's terms; that of the last depth is it already."""
        if depth >= len(self.weight):
            return state
        weight, bias = (x[depth].to(state.device, state.dtype) for x in (self.weight, self.bias))
        read = state @ weight.T + bias
        return state + read if self.adds else read


def depths(model: Model) -> list[str]:
    """The rows of a lens, as parts that the stream leaves: the embedding, then each layer."""
    return ["embed", *(f"L{i}" for i in range(model.n_layers))]


def stream_ports(model: Model) -> list[Port]:
    """Where the stream of each row is read; the last is the model's own."""
    return [Port("resid_in", 0), *(Port("resid_out", i) for i in range(model.n_layers))]


def save(lens: Lens, folder: str | Path) -> str:
    """Write a lens to a new folder, whole or not at all."""
    named = {
        f"{depth}.{name}": value[depth].detach().cpu().contiguous().clone()
        for name, value in (("weight", lens.weight), ("bias", lens.bias))
        for depth in range(len(value))
    }
    kind = TUNED if lens.adds else JACOBIAN
    settings = {
        "lens_type": kind,
        "d_model": lens.weight.shape[-1],
        "num_hidden_layers": len(lens.weight),
        "bias": True,
    }

    def write(fresh: Path) -> None:
        (fresh / SETTINGS).write_text(json.dumps(settings | lens.made, indent=1), encoding="utf-8")
        (fresh / WEIGHTS).write_bytes(write_tensors(named))

    write_folder(Path(folder), write)
    return str(folder)


def load(folder: str | Path, model: Model, kind: str) -> Lens:
    """The lens of a folder, for this model. Raises PatchbayError where there is none, of another kind or model, damaged or pickled."""
    path = Path(folder)
    if not (path / WEIGHTS).is_file():
        raise _lacking(path)
    try:
        settings = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
        held = settings.get("lens_type", TUNED)
    except (OSError, ValueError, AttributeError) as error:
        raise PatchbayError(f"{path / SETTINGS} is missing or damaged: {error}") from error
    if held != kind:
        raise PatchbayError(f"{path} holds a {held}, and a {kind} is asked for")
    found, d = tensors(path / WEIGHTS), model.d_model
    shapes = {f"{depth}.weight": (d, d) for depth in range(model.n_layers)}
    wrong = [name for name, shape in shapes.items() if name not in found or tuple(found[name].shape) != shape]
    others = sorted(set(found) - set(shapes) - {f"{depth}.bias" for depth in range(model.n_layers)})
    if wrong or others:
        told = {name: tuple(value.shape) for name, value in sorted(found.items())[:4]}
        raise PatchbayError(
            f"{path} is no lens of this model, which has {model.n_layers} maps of {d} by {d}, named 0.weight to "
            f"{model.n_layers - 1}.weight; it holds {told}{' ...' if len(found) > 4 else ''}"
        )
    if not all(bool(torch.isfinite(value).all()) for value in found.values()):
        raise PatchbayError(f"{path}: numbers that are NaN or infinite are no lens")
    whose = settings.get("patchbay_fingerprint")
    if whose not in (None, model.fingerprint):
        raise PatchbayError(
            f"{path} was made for another model ({settings.get('base_model_name_or_path')}), or other weights of it"
        )
    bias = [found.get(f"{depth}.bias", torch.zeros(d)) for depth in range(model.n_layers)]
    if any(tuple(one.shape) != (d,) for one in bias):
        raise PatchbayError(f"{path}: a bias is {d} numbers, got {[tuple(one.shape) for one in bias][:4]}")
    weight = torch.stack([found[f"{depth}.weight"].float() for depth in range(model.n_layers)])
    return Lens(weight, torch.stack([one.float() for one in bias]), kind == TUNED, settings)


def described(model: Model) -> dict[str, Any]:
    """What a folder says of the model that a lens is for."""
    return {
        "base_model_name_or_path": model.source or type(model.hf).__name__,
        "patchbay_fingerprint": model.fingerprint,
    }


def _lacking(path: Path) -> PatchbayError:
    held = sorted(one.name for one in path.iterdir()) if path.is_dir() else []
    pickled = [name for name in held if Path(name).suffix in PICKLES] or ([path.name] if path.suffix in PICKLES else [])
    if not pickled:
        return PatchbayError(
            f"{path} holds no lens: that is a folder with {SETTINGS} and {WEIGHTS}; it has {', '.join(held[:8]) or 'nothing'}"
        )
    source = path / pickled[0] if path.is_dir() else path
    return PatchbayError(
        f"{source} is a pickle, which runs code when it is opened, and is not read. Where you trust who made it, convert it once, in a process of "
        f"its own:\n  python -c \"import torch; from safetensors.torch import save_file; s = torch.load('{source}', map_location='cpu', "
        f"weights_only=True); s = s.get('J', s); save_file({{(k if str(k).count('.') else f'{{k}}.weight'): v.float().contiguous() for k, v in s.items()}}, "
        f"'{source.parent / WEIGHTS}')\"\nand see that {SETTINGS} beside it says lens_type, {TUNED} or {JACOBIAN}, and that names are 0.weight, 0.bias, 1.weight, ..."
    )
