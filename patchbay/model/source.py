"""Where a model comes from: a hub name, a local folder, or the name of a built-in model. Weights are safetensors only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from patchbay.signal.port import PatchbayError, suggest

BUILT_IN = Path(__file__).parents[1] / "tiny" / "weights"


def built_in_names() -> list[str]:
    """Names of the trained models that ship with the package."""
    return (
        sorted(path.name for path in BUILT_IN.iterdir() if (path / "config.json").is_file())
        if BUILT_IN.is_dir()
        else []
    )


def folder(source: str) -> str:
    """The folder of a built-in model; any other source as it is, its `~` written out."""
    return str(BUILT_IN / source) if source in built_in_names() else os.path.expanduser(source)


def from_pretrained(source: str, **options: Any) -> Any:
    """The Hugging Face model of a source, in evaluation mode; options that are None are left out."""
    from transformers import AutoModelForCausalLM

    given = {name: value for name, value in options.items() if value is not None}
    path = Path(folder(source))
    if path.is_dir() and not (path / "config.json").is_file():
        raise PatchbayError(
            f"{source}: this folder has no config.json; found {sorted(p.name for p in path.iterdir())[:8]}"
        )
    if not path.exists() and (path.is_absolute() or source.startswith((".", "~"))):  # no hub name looks like that
        raise _not_loaded(source, "there is no such folder")
    try:
        return AutoModelForCausalLM.from_pretrained(str(path), use_safetensors=True, **given).eval()
    except Exception as error:  # a name that is not there, no network, a damaged file: transformers raises many kinds
        said = str(error).strip().splitlines()
        raise _not_loaded(source, f"{type(error).__name__}: {said[0][:300] if said else ''}") from error


def _not_loaded(source: str, why: str) -> PatchbayError:
    known = built_in_names()
    return PatchbayError(
        f"could not load {source!r}: {why.rstrip('.')}. A model is a local folder with config.json and safetensors, a hub name, "
        f"or a built-in ({', '.join(known) or 'none'}){suggest(source, known)}"
    )
