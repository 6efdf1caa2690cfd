"""A copy of a model to be trained, and the checkpoint that is written of it; the lent model is not touched."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

from patchbay.files import write_folder
from patchbay.jacks.hooks import LOCK
from patchbay.model.model import Model
from patchbay.model.source import quietly


def copied(model: Model) -> Model:
    """The same view over a copy of the weights, in evaluation mode; checked again, as on loading."""
    twin = copy.copy(model)
    twin.__dict__.pop("layers", None)  # views of the lent model
    with LOCK:  # other threads may be putting hooks on it
        twin.hf = copy.deepcopy(model.hf).eval()
    twin._fingerprint, twin._heads = None, {}
    twin._adopt(model.family)
    return twin


def write(model: Model, tuned: Model, folder: Path, beside: Mapping[str, str] | None = None) -> str:
    """Save as a Hugging Face checkpoint, whole or not at all; files of the names in `beside` with it."""

    def save(fresh: Path) -> None:
        with quietly():
            tuned.hf.save_pretrained(fresh)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(fresh)
        for name, text in (beside or {}).items():
            (fresh / name).write_text(text, encoding="utf-8")

    write_folder(folder, save)
    return str(folder)
