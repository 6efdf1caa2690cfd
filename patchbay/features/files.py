"""Files of a dictionary: which program wrote them, their settings and tensors as they lie. Nothing is unpickled, nothing runs."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from patchbay.signal.port import PatchbayError

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
KINDS = (  # program, settings, weights
    ("saelens", "cfg.json", "sae_weights.safetensors"),
    ("sparsify", "cfg.json", "sae.safetensors"),
    ("llama_scope", "hyperparams.json", "checkpoints/final.safetensors"),
    ("gemma_scope_2", "config.json", "params.safetensors"),
    ("gemma_scope", "", "params.npz"),
)


@dataclass
class Files:
    """What lies in a folder: the program that wrote it, its settings, its tensors."""

    program: str
    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    folder: Path


def read(path: Path) -> Files:
    """The dictionary in a folder, or beside one of its files. Raises PatchbayError where there is none, or a damaged or pickled one."""
    if path.suffix.lower() in PICKLES:
        raise _pickled(path)
    folder = path if path.is_dir() else path.parent
    if path.is_file() and path.name == "final.safetensors":
        folder = path.parent.parent
    for program, settings, weights in KINDS:
        if (folder / weights).is_file() and (not settings or (folder / settings).is_file()):
            return Files(program, _settings(folder / settings) if settings else {}, tensors(folder / weights), folder)
    if (folder / "W_enc_0.safetensors").is_file():
        return _layers(folder)
    held = sorted(one.name for one in folder.iterdir()) if folder.is_dir() else []
    pickled = next((folder / name for name in held if Path(name).suffix in PICKLES), None)
    if pickled is not None:
        raise _pickled(pickled)
    inside = [name for name in held if (folder / name).is_dir()]
    forms = "; ".join(f"{program} ({' and '.join(filter(None, (s, w)))})" for program, s, w in KINDS)
    forms += "; circuit_tracer (W_enc_0.safetensors and W_dec_0.safetensors, ...)"
    raise PatchbayError(
        f"{path} holds no dictionary: known are {forms}. "
        + (
            f"It has folders: {', '.join(inside[:8])}; give one of them"
            if inside
            else f"It has {', '.join(held[:8]) or 'nothing'}"
        )
    )


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PatchbayError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise PatchbayError(f"{path} holds {type(found).__name__}, not settings by name")
    return found


def tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise PatchbayError(f"{path} is damaged, or holds objects that would run code: {error}") from error


def _layers(folder: Path) -> Files:
    """A cross-layer transcoder, two files a layer."""
    held: dict[str, Tensor] = {}
    for path in sorted(folder.glob("W_enc_*.safetensors")) + sorted(folder.glob("W_dec_*.safetensors")):
        held |= tensors(path)
    return Files("circuit_tracer", _settings_of_layers(folder), held, folder)


def _settings_of_layers(folder: Path) -> dict[str, Any]:
    """What `config.yaml` says; nothing where there is none."""
    import yaml

    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise PatchbayError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise PatchbayError(f"{path} holds {type(found).__name__}, not settings by name")
    return found


def _pickled(path: Path) -> PatchbayError:
    target = path.with_suffix(".safetensors")
    return PatchbayError(
        f"{path} is a pickle, which runs code when it is opened, and is not read. Where you trust who made it, convert it once, in a process of "
        f"its own:\n  python -c \"import torch; from safetensors.torch import save_file; s = torch.load('{path}', map_location='cpu', "
        "weights_only=True); s = s.get('state_dict', s); print({k: tuple(v.shape) for k, v in s.items()}); save_file({k: "
        f"v.contiguous() for k, v in s.items()}}, '{target}')\"\n"
        "and make the dictionary from its tensors: patchbay.features.dictionary.Dictionary(W_enc, W_dec, b_enc, b_dec, form, layer, reads)"
    )
