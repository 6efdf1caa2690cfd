"""Dictionaries from files, believed after they rebuild the signal that they are said to be of.

    FVU = sum |x - x^|^2 / sum |x - mean x|^2        over all tokens but the first of each text, which is an attention sink in most models

What a file leaves open is found on text: by what its input was scaled, and whether a transcoder's bias was taken from what it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchbay.features import files, folds, formats
from patchbay.features.dictionary import Dictionary, placed
from patchbay.model.attached import attach
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.signal.port import PatchbayError, Port

WORST = 0.5  # of the variance, unexplained: a dictionary of another model, site or scale leaves more


def load_dictionary(
    source: str | Path,
    *,
    at: str | None = None,
    model: Model | None = None,
    texts: Any = None,
    worst: float = WORST,
) -> Dictionary:
    """Read a sparse dictionary (SAE or transcoder) that SAELens, sparsify, Gemma Scope, Llama Scope or Patchbay wrote; then
    `model.with_dictionaries(it)`.

    `source`: a folder, one of its files, or the name of a repository on the Hugging Face hub and a folder in it ("org/name/folder").
    `at`: the signal that it is of, where the files do not say or are not to be believed: "L3.resid_out", or of a transcoder
    "L3.mlp.in to L3.mlp.out". `model` and `texts`: with both it has to leave less than `worst` of the signal's variance unexplained on
    these texts (FVU), else it is refused with the number. Pickles are refused with how to convert them.
    """
    found = files.read(_local(source))
    it, left = formats.made(found, at)
    it = it if at is None else placed(it, at)
    if found.program == "saelens":
        it = _with_density(it, found.folder)
    if (model is None) != (texts is None):
        raise PatchbayError("a dictionary is proved on a model and texts: give model= and texts= together, or neither")
    if model is None:
        if left == "scale":
            raise PatchbayError(
                f"{source} was trained on activations times sqrt(d) over their mean norm, which the file does not hold: give model= and texts="
            )
        return replace(it, notes=(*it.notes, "not proved on text: give model= and texts="))
    if left is not None:
        it = _settled(it, left, model, texts)
    return proved(it, model, texts, worst)


def proved(it: Dictionary, model: Model, texts: Any, worst: float = WORST) -> Dictionary:
    """The same dictionary with its FVU in its notes; refused where that is `worst` or more."""
    found = fvu(it, model, texts)
    if not found < worst:
        raise PatchbayError(
            f"the dictionary of {it.source or 'these tensors'} leaves {found:.3g} of the variance of {it.place} unexplained on these texts, and "
            f"{worst:g} is the most that is believed: another model, layer or signal (at=), other text, or another scale"
        )
    return replace(it, notes=(*it.notes, f"FVU {found:.3g} on {len(model.encode(texts))} texts"))


def signals(it: Dictionary, model: Model, texts: Any) -> tuple[Tensor, Tensor]:
    """What is read and what is written, [token, d], at all tokens but the first of each text."""
    attach(model, [it])  # which says what does not fit
    ports = [Port(name, it.layer) for name in (it.reads, it.writes)]
    trace = run(model, texts, taps=list(dict.fromkeys(ports)), logits="last")
    real = torch.arange(trace.ids.shape[1])[None] < trace.lengths[:, None]
    real[:, 0] = False
    if not bool(real.any()):
        raise PatchbayError("a dictionary is proved on texts of two tokens or more: the first of each is left out")
    read, written = (trace[port].flatten(2)[real.to(trace[port].device)] for port in ports)
    return read, written


def unexplained(written: Tensor, rebuilt: Tensor) -> float:
    """FVU: the share of the variance of [token, d] that is not rebuilt."""
    x = written.double()
    return float((x - rebuilt.double()).pow(2).sum() / (x - x.mean(0)).pow(2).sum())


def fvu(it: Dictionary, model: Model, texts: Any) -> float:
    """The share of the variance of what it writes that it does not explain on texts."""
    read, written = signals(it, model, texts)
    here = it.to(read.device)
    return unexplained(written, here.decode(here.encode(read), read))


def _settled(it: Dictionary, left: str, model: Model, texts: Any) -> Dictionary:
    """What the files leave open, found on text."""
    read, written = signals(it, model, texts)
    if left == "scale":
        s = it.d_in**0.5 / float(read.double().norm(dim=1).mean())
        return replace(
            folds.scaled_input(it, s),
            notes=(*it.notes, f"its input times {s:.4g}: sqrt(d) over the mean norm on these texts"),
        )
    ways = [replace(it, subtract=subtract) for subtract in (False, True)]
    rebuilt: Callable[[Dictionary], float] = lambda way: unexplained(written, way.decode(way.encode(read), read))  # noqa: E731
    offs = [rebuilt(way) for way in ways]
    best = ways[offs[1] < offs[0]]
    told = f"b_dec {'is' if best.subtract else 'is not'} taken from what it reads: FVU {min(offs):.3g}, the other way {max(offs):.3g}"
    return replace(best, notes=(*it.notes, told))


def _with_density(it: Dictionary, folder: Path) -> Dictionary:
    path = folder / "sparsity.safetensors"
    if not path.is_file():
        return it
    held = files.tensors(path)
    log = held.get("sparsity")
    return it if log is None or log.shape != (it.n_features,) else replace(it, density=10.0 ** log.float())


def _local(source: str | Path) -> Path:
    """The folder or file; a repository's is fetched, or found in the cache."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    parts = str(source).split("/")
    if len(parts) < 2 or ".." in parts or str(source).startswith((".", "/", "~")):
        raise PatchbayError(
            f"{source} is not there; a dictionary is a folder, a file, or ORG/NAME/FOLDER on the Hugging Face hub"
        )
    from huggingface_hub import snapshot_download

    inner = "/".join(parts[2:])
    try:
        where = snapshot_download("/".join(parts[:2]), allow_patterns=[f"{inner}/*" if inner else "*"])
    except Exception as error:  # whatever the hub or its absence leads to
        raise PatchbayError(
            f"{source} is no folder here, and could not be had from the Hugging Face hub: {error}"
        ) from error
    return Path(where) / inner
