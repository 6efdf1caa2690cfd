"""A copy of a model to be trained, and the checkpoint that is written of it; the lent model is not touched."""

from __future__ import annotations

import copy
from pathlib import Path

from patchbay.files import write_folder
from patchbay.jacks.hooks import LOCK
from patchbay.model.model import Model


def copied(model: Model) -> Model:
    """The same view over a copy of the weights, in evaluation mode; checked again, as on loading."""
    twin = copy.copy(model)
    twin.__dict__.pop("layers", None)  # views of the lent model
    with LOCK:  # other threads may be putting hooks on it
        twin.hf = copy.deepcopy(model.hf).eval()
    twin._fingerprint, twin._heads = None, {}
    twin._adopt(model.family)
    return twin


def write(model: Model, tuned: Model, folder: Path) -> str:
    """Save as a Hugging Face checkpoint, whole or not at all."""

    def save(fresh: Path) -> None:
        tuned.hf.save_pretrained(fresh)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(fresh)

    write_folder(folder, save)
    return str(folder)
