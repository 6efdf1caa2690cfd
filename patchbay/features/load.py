"""Dictionaries from files, believed after they rebuild the signal that they are said to be of.

    FVU = sum |x - x^|^2 / sum |x - mean x|^2        over all tokens but the first of each text, which is an attention sink in most models

of several layers the mean over them. What a file leaves open is found on text: by what its
input was scaled, and whether a transcoder's bias was taken from what it reads. Features that are silent there are counted, and where what is
rebuilt would be nearer to the signal at another length, it is said by how much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchbay.features import files, folds, formats
from patchbay.features.across import by_site, cross_layer, reads_of, said, writes_of
from patchbay.features.dictionary import Dictionary, placed
from patchbay.model.attached import HOME, attach
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.signal.port import HOMES, PatchbayError, Port, parse_part

WORST = 0.5  # of the variance, unexplained: a dictionary of another model, site or scale leaves more
LENGTH = 0.1  # how far from 1 the best length of what is rebuilt may be unsaid


def load_dictionary(
    source: str | Path,
    *,
    at: str | None = None,
    model: Model | None = None,
    texts: Any = None,
    worst: float = WORST,
) -> Dictionary:
    """Read a sparse dictionary (SAE, transcoder, cross-layer transcoder, crosscoder) that SAELens, sparsify, Gemma Scope, Llama Scope,
    circuit-tracer or Patchbay wrote; then `model.with_dictionaries(it)`.

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
    """The same dictionary with its FVU in its notes; refused where that is `worst` or more, or where no feature is ever active."""
    found = _tried(it, model, texts)
    where = f"the dictionary of {it.source or 'these tensors'}"
    if found["silent"] == 1:
        raise PatchbayError(
            f"{where} has no feature that is active at {it.place} on these texts: all {it.n_features} are dead"
        )
    if not found["fvu"] < worst:
        raise PatchbayError(
            f"{where} leaves {found['fvu']:.3g} of the variance of {it.place} unexplained on these texts, and "
            f"{worst:g} is the most that is believed: another model, layer or signal (at=), other text, or another scale"
        )
    notes = [f"FVU {found['fvu']:.3g} on {len(model.encode(texts))} texts"]
    if found["silent"]:
        notes.append(f"{found['silent']:.0%} of its features are silent on them")
    if abs(found["length"] - 1) > LENGTH:
        notes.append(
            f"what it rebuilds would be nearest to the signal at {found['length']:.3g} times its length: shrunk, or of another scale"
        )
    told = it.trained_on.get("patchbay_fingerprint")
    if told is not None and told != model.fingerprint:
        notes.append(
            f"trained on other weights ({it.trained_on.get('model_name')}, {str(told)[:8]}) than these ({model.fingerprint[:8]})"
        )
    return replace(it, notes=(*it.notes, *notes))


def signals(it: Dictionary, model: Model, texts: Any) -> tuple[Tensor, Tensor]:
    """What is read and what is written, [token, d], at all tokens but the first of each text; those of several layers side by side."""
    attach(model, [it])  # which says what does not fit
    reads, writes = reads_of(it), writes_of(it)
    trace = run(model, texts, taps=list(dict.fromkeys((*reads, *writes))), logits="last")
    real = torch.arange(trace.ids.shape[1])[None] < trace.lengths[:, None]
    real[:, 0] = False
    if not bool(real.any()):
        raise PatchbayError("a dictionary is proved on texts of two tokens or more: the first of each is left out")

    def held(ports: list[Port]) -> Tensor:
        return torch.cat([trace[port].flatten(2)[real.to(trace[port].device)] for port in ports], 1)

    return held(reads), held(writes)


def unexplained(written: Tensor, rebuilt: Tensor) -> float:
    """FVU: the share of the variance of [token, d] that is not rebuilt."""
    x = written.double()
    return float((x - rebuilt.double()).pow(2).sum() / (x - x.mean(0)).pow(2).sum())


def fvu(it: Dictionary, model: Model, texts: Any) -> float:
    """The share of the variance of what it writes that it does not explain on texts."""
    return _tried(it, model, texts)["fvu"]


def _tried(it: Dictionary, model: Model, texts: Any) -> dict[str, float]:
    """FVU, the mean over its sites; the share of features that are silent; at what length what is rebuilt, less its mean, is nearest to the signal."""
    here = it.to(model.device)
    read, written = signals(here, model, texts)
    found, z = said(here, read)
    pairs = [tuple(by_site(it, x)[:, s].double() for x in (written, found)) for s in range(len(writes_of(it)))]
    off = [unexplained(*pair) for pair in pairs]
    moved = sum(float((y - y.mean(0)).pow(2).sum()) for _, y in pairs)
    along = sum(float(((y - y.mean(0)) * (x - x.mean(0))).sum()) for x, y in pairs)
    silent = float((z == 0).all(0).double().mean())
    return {"fvu": sum(off) / len(off), "silent": silent, "length": along / moved if moved else 1.0}


def named(model: Model, features: str) -> tuple[Model, Dictionary, str]:
    """The model with a dictionary attached, the dictionary whole, and where it is: of a folder, or of one that is attached, "L1.features"."""
    try:
        part = parse_part(features)
    except PatchbayError:
        it = load_dictionary(features)
        return attach(model, [it]), it, HOME[it.writes]
    if part.kind not in HOMES or part.layer is None:
        raise PatchbayError(
            f"features={features!r}: the folder of a dictionary, or all of one that is attached, such as L1.features, L1.mlp_features, L1.attn_features"
        )
    model.require(part.port("act"))
    found: Any = model.dictionaries[part.layer, part.kind]
    if found.family:  # the others of a cross-layer transcoder write here too
        held: dict[tuple[int, str], Any] = dict(model.dictionaries)
        found = cross_layer([one for (_, kind), one in sorted(held.items()) if kind == part.kind])
    return model, found, part.kind


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
