"""What the tensors of a dictionary have to be: shapes that fit one another, numbers, a form with what it needs; refused by name."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from patchbay.signal.port import PatchbayError

Form = Literal["relu", "jumprelu", "topk", "groupmax"]
FORMS: tuple[str, ...] = get_args(Form)
Norm = Literal["none", "layer_norm", "constant_norm_rescale"]
TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", "W_skip", "density", "decoders", "biases", "onward")


def check(it: Any) -> None:
    """Refuse tensors that do not fit one another, or hold no numbers, by name."""
    _shapes(it)
    _form(it)
    _layers(it)


def _shapes(it: Any) -> None:
    d, n, out = it.W_enc.shape[0] if it.W_enc.ndim == 2 else -1, len(it.W_dec), it.W_dec.shape[-1]
    before, later = len(it.before), len(it.later)
    wanted = {
        "W_enc": (d, n),
        "W_dec": (n, out),
        "b_enc": (n,),
        "b_dec": (out,),
        "W_skip": (d, out),
        "density": (n,),
        "decoders": (before, n, out),
        "biases": (before, out),
        "onward": (later, n, out),
    }
    for name, shape in wanted.items():
        value = getattr(it, name)
        if value is not None and tuple(value.shape) != shape:
            told = f"W_enc {list(it.W_enc.shape)}, W_dec {list(it.W_dec.shape)}"
            raise PatchbayError(
                f"a dictionary: {name} has shape {list(value.shape)}, not {list(shape)} ({told}, [d, feature] and [feature, d])"
            )
    if not n:
        raise PatchbayError("a dictionary of 0 features")
    for name in TENSORS:
        value = getattr(it, name)
        if value is not None and not bool(torch.isfinite(value).all()) and name != "density":
            bad = int((~torch.isfinite(value)).sum())
            raise PatchbayError(f"a dictionary: {name} holds {bad} numbers that are NaN or infinite")


def _form(it: Any) -> None:
    d, n, out = len(it.W_enc), len(it.W_dec), it.W_dec.shape[-1]
    if it.form not in FORMS:
        raise PatchbayError(f"a dictionary of form {it.form!r}; possible are {', '.join(FORMS)}")
    if (it.threshold is not None) != (it.form == "jumprelu"):
        raise PatchbayError(
            f"a dictionary of form {it.form} {'needs' if it.form == 'jumprelu' else 'has no'} threshold"
        )
    if it.threshold is not None and tuple(it.threshold.shape) not in ((), (1,), (n,)):
        raise PatchbayError(
            f"a dictionary: {it.threshold.numel()} thresholds for {n} features, of shape {list(it.threshold.shape)} and not [{n}], or one number"
        )
    if (it.k is not None) != (it.form in ("topk", "groupmax")) or (it.k is not None and not 0 < it.k <= n):
        raise PatchbayError(f"a dictionary of form {it.form} with k={it.k}, of {n} features")
    if it.form == "groupmax" and n % (it.k or 1):
        raise PatchbayError(f"a dictionary of form groupmax: {n} features do not make {it.k} groups")
    if it.subtract and d != out:
        raise PatchbayError(
            f"a dictionary that reads {d} numbers and writes {out} cannot take b_dec from what it reads"
        )
    if it.normalise not in get_args(Norm):
        raise PatchbayError(f"a dictionary with normalise={it.normalise!r}; possible are {', '.join(get_args(Norm))}")


def _layers(it: Any) -> None:
    """Of one that reads or writes other layers than its own: which, in order, and with all their tensors."""
    sites, written = (*it.before, it.layer), (it.layer, *it.later)
    if list(sites) != sorted(set(sites)) or list(written) != sorted(set(written)):
        raise PatchbayError(
            f"a dictionary of layer {it.layer} that reads layers {sites} and writes {written}: layers stand in order, each once; before it "
            "is read, after it written"
        )
    if it.before and (it.decoders is None or it.biases is None or len(it.W_enc) % len(sites)):
        raise PatchbayError(
            f"a crosscoder of layers {sites} needs W_enc [{len(sites)} x d, feature], decoders and biases of the layers before its own"
        )
    if it.later and it.onward is None:
        raise PatchbayError(f"a dictionary that writes at layers {written} needs onward [{len(it.later)}, feature, d]")
    if (it.before or it.later) and (it.subtract or it.normalise != "none" or (it.before and it.transcodes)):
        raise PatchbayError(
            "a dictionary of several layers takes no b_dec from what it reads, normalises no token, and is either a crosscoder or a transcoder"
        )
