"""Where a model comes from: a hub name, a local folder, or the name of a built-in model. Weights are safetensors only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from patchbay.port import PatchbayError, suggest

BUILT_IN = Path(__file__).parent / "tiny" / "weights"


def built_in_names() -> list[str]:
    """Names of the trained models that ship with the package."""
    return (
        sorted(path.name for path in BUILT_IN.iterdir() if (path / "config.json").is_file())
        if BUILT_IN.is_dir()
        else []
    )


def folder(source: str) -> str:
    """The folder of a built-in model; any other source as it is."""
    return str(BUILT_IN / source) if source in built_in_names() else source


def from_pretrained(source: str, **options: Any) -> Any:
    """The Hugging Face model of a source, in evaluation mode; options that are None are left out."""
    from transformers import AutoModelForCausalLM

    given = {name: value for name, value in options.items() if value is not None}
    path = Path(folder(source))
    if path.is_dir() and not (path / "config.json").is_file():
        raise PatchbayError(
            f"{source}: this folder has no config.json; found {sorted(p.name for p in path.iterdir())[:8]}"
        )
    try:
        return AutoModelForCausalLM.from_pretrained(str(path), use_safetensors=True, **given).eval()
    except (
        Exception
    ) as error:  # a hub name that is not there, no network, a damaged file: transformers raises many kinds
        hint = suggest(source, built_in_names())
        raise PatchbayError(
            f"could not load {source!r}: {type(error).__name__}: {str(error).strip().splitlines()[0][:300]}. "
            f"A model is a local folder with config.json and safetensors, a hub name, or a built-in ({', '.join(built_in_names()) or 'none'}){hint}"
        ) from error
