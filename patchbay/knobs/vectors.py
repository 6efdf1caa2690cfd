"""Steering vectors of other programs, read as edits that add them to the stream behind their layers.

| file                         | made by                              | what its entries mean                                    |
|------------------------------|--------------------------------------|----------------------------------------------------------|
| `.gguf`                      | repeng, llama.cpp, our own export    | `direction.N`: added behind layer N, counted from 0       |
| `.safetensors`               | our own export                       | a port's text, `L3.attn.out`: added there                 |
| `.safetensors`               | anybody                              | a name that ends in a number, `layer.3`, `3`: behind layer 3; `self_attn.3`, `mlp.3`: behind that block of it; a lone array [layer, d_model]: row i behind layer i |
| `.npy`                       | numpy                                | [layer, d_model]: row i behind layer i                    |
| pickle (`.pt`, `.pkl`, ...)  | repeng, steering-vectors             | refused: reading it runs code; the conversion is printed  |

"Behind layer i" is the port `Li.resid_out`. A row of zeros adds nothing and is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from patchbay.edits.edit import Edit, add
from patchbay.errors import PatchbayError
from patchbay.knobs.gguf import read_gguf
from patchbay.signal.port import Port, parse_port

if TYPE_CHECKING:
    from patchbay.model.model import Model

CONVERSION = """import numpy as np, torch
from safetensors.numpy import save_file
made = torch.load({path!r}, weights_only=False)  # or pickle.load: runs code that the file holds, so only if you trust it
found = getattr(made, "directions", None) or made.layer_activations  # repeng; steering-vectors
kind = getattr(made, "layer_type", "direction")  # steering-vectors' may be added behind a block of the layer
save_file(dict(zip(map((kind + ".{{}}").format, found), map(np.float32, found.values()))), {new!r})"""
BLOCKS = {
    "self_attn": "attn.out",
    "attn": "attn.out",
    "attention": "attn.out",
    "mlp": "mlp.out",
    "feed_forward": "mlp.out",
}


def kind_of(path: Path) -> str:
    """What a file is by its first bytes: gguf, npy, pickle or, where it is none of these, safetensors."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # a length, which may begin as a pickle does, and a header
        return "safetensors"
    starts = {b"GGUF": "gguf", b"\x93NUMPY": "npy", b"\x80": "pickle", b"PK": "pickle"}
    return next((kind for mark, kind in starts.items() if start.startswith(mark)), "safetensors")


def read_vectors(path: Path, model: Model | None = None) -> list[Edit]:
    """One adding edit for each vector of a file, by the table above; checked against `model` where one is given.

    Raises PatchbayError where a file is none of these, does not say which layers its vectors belong to, or does not fit."""
    kind = kind_of(path)
    if kind == "gguf":
        fields, arrays = read_gguf(path)
        _check_hint(path, fields.get("general.architecture"))
        found = _placed(path, arrays)
    elif kind == "npy":
        found = _rows(path, _array(path), model)
    elif kind == "pickle":
        new = f"{path.stem}.safetensors"
        raise PatchbayError(
            f"{path} is a pickle, and reading one runs code that it holds; where you trust it, convert it first and load {new}:\n"
            + CONVERSION.format(path=str(path), new=new)
        )
    else:
        found = _of_safetensors(path, model)
    edits = [add(port, vector) for port, vector in found.items() if bool(vector.any())]
    if not edits:
        raise PatchbayError(f"{path} holds no vector that is not 0")
    for edit in edits if model is not None else ():
        _check_fits(path, edit, model)
    return edits


def _check_hint(path: Path, kind: object) -> None:
    if kind != "controlvector":
        raise PatchbayError(f"{path} is a GGUF file of {kind!r}, not a control vector; a model is loaded with pb.load")


def _array(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
    except Exception as error:  # numpy reads the header as Python's literals: damage raises errors of many kinds
        raise PatchbayError(f"{path} is no array of numbers: {error}") from error


def _of_safetensors(path: Path, model: Model | None) -> dict[Port, Tensor]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise PatchbayError(f"{path} is no knob and no file of vectors, or a damaged one: {error}") from error
    if len(tensors) == 1:
        (only,) = tensors.values()
        if only.ndim == 2:
            return _rows(path, only, model)
    return _placed(path, tensors, model)


def _rows(path: Path, array: Tensor, model: Model | None) -> dict[Port, Tensor]:
    """Row i of [layer, d_model] behind layer i."""
    if array.ndim != 2:
        raise PatchbayError(
            f"{path} holds an array of shape {list(array.shape)} that does not say which layer it belongs to: [layer, d_model] is "
            "read, row i added behind layer i; or make the edit, pb.add(model.layers[i].resid_out, vector)"
        )
    if model is not None and len(array) != model.n_layers:
        aside = (
            "; hidden_states have one more, the embeddings first: leave row 0 out"
            if len(array) == model.n_layers + 1
            else ""
        )
        raise PatchbayError(f"{path} has {len(array)} rows and the model {model.n_layers} layers: one for each{aside}")
    return {Port("resid_out", i): row.float() for i, row in enumerate(array)}


def _behind(path: Path, name: str, layer: int, model: Model | None) -> Port:
    """Behind a layer, or behind the block of it that the name speaks of, whose output must be what enters the stream."""
    words = re.findall(r"[a-z_]+", name.lower())
    if any("norm" in word for word in words):
        raise PatchbayError(
            f"{path}: {name!r} is added behind a norm, which is no place of the stream; make it anew behind a layer"
        )
    signal = next((BLOCKS[word] for word in words if word in BLOCKS), "resid_out")
    if signal != "resid_out" and model is not None and layer < model.n_layers:
        at = model.modules[layer]
        block, added = (at.attn, at.attn_added) if signal == "attn.out" else (at.mlp, at.mlp_added)
        proj = at.attn_proj if signal == "attn.out" else at.mlp_proj
        if block is None or model.residual_scale != 1 or (added is not block and added is not proj):
            raise PatchbayError(
                f"{path}: {name!r} is added to what a block of layer {layer} returns, and in this {model.family.name} model a norm or "
                "a scale stands between that and the stream; make the vector anew behind a layer"
            )
    return Port(signal, layer)


def _placed(path: Path, tensors: Mapping[str, Tensor], model: Model | None = None) -> dict[Port, Tensor]:
    """Where named vectors are added: at the port of that text, or behind the layer of the number at the name's end."""
    found: dict[Port, Tensor] = {}
    for name, vector in tensors.items():
        try:
            port = parse_port(name) if re.match(r"L\d+\.|embed|final_norm|logits", name) else None
        except PatchbayError as error:
            raise PatchbayError(f"{path}: {name!r} names no port: {error}") from error
        number = re.search(r"(?:^|[^\d])(\d+)$", name)
        if port is None and number is None:
            raise PatchbayError(
                f"{path}: {name!r} does not say where it is added; a port's text (L3.resid_out) or a name that ends in the layer "
                "(direction.3) does"
            )
        port = port or _behind(path, name, int(number[1]), model)  # type: ignore[index]
        if port in found:
            raise PatchbayError(f"{path}: {name!r} is a second vector for {port}")
        found[port] = vector.squeeze().float() if vector.numel() > 1 else vector.reshape(1).float()
        if found[port].ndim != 1 and number is not None and name != str(port):
            raise PatchbayError(f"{path}: {name!r} has shape {list(vector.shape)}; a vector is needed")
    return found


def _check_fits(path: Path, edit: Edit, model: Model | None) -> None:
    assert model is not None
    assert isinstance(edit.value, Tensor)
    model.require(edit.port)
    if edit.port.axes[-1] == "d_model" and edit.value.shape[-1] not in (1, model.d_model):
        raise PatchbayError(
            f"{path}: its vector for {edit.port} has {edit.value.shape[-1]} numbers, the stream of this model {model.d_model}"
        )
