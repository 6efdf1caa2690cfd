"""Folds: other tensors of a dictionary that compute the same. Each is exact in algebra; a test holds them to 1e-13 in float64.

unit rows        d_i / |d_i|, W_enc |d_i|, b_enc |d_i|, threshold |d_i|: activations are then in units of the signal
scaled input     trained on s x: W_enc s, W_dec / s, b_dec / s; activations and thresholds stay
whitened input   trained on (x - u) M: W_enc <- M W_enc, b_enc - u M W_enc, W_dec <- W_dec M^-1, b_dec <- b_dec M^-1 + u
bias of input    (x - b_dec) W_enc = x W_enc - b_dec W_enc: into b_enc
before the gain  trained on a norm's output without its gain g and bias b, to read what our `mlp.in` is: W_enc <- diag(1/g) W_enc,
                 b_enc - (b/g) W_enc
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from patchbay.features.dictionary import Dictionary
from patchbay.signal.port import PatchbayError


def unit_rows(it: Dictionary) -> Dictionary:
    """Decoder rows of norm 1. Not of topk or groupmax, whose choice among features it would change; rows of norm 0 stay."""
    norms = it.W_dec.norm(dim=1)
    if it.form not in ("relu", "jumprelu"):
        if bool((norms - 1).abs().max() < 1e-4):
            return it
        raise PatchbayError(
            f"a {it.form} dictionary chooses among features by their activations, which unit rows would multiply: other features would be chosen"
        )
    n = torch.where(norms > 0, norms, 1.0)
    threshold = None if it.threshold is None else it.threshold * n
    return replace(it, W_enc=it.W_enc * n, b_enc=it.b_enc * n, W_dec=it.W_dec / n[:, None], threshold=threshold)


def selected_by_norm(it: Dictionary) -> Dictionary:
    """A dictionary whose activations were chosen by pre |d_i|: these numbers become its activations, and its rows get norm 1."""
    n = it.W_dec.norm(dim=1).clamp_min(torch.finfo(it.W_dec.dtype).tiny)
    return replace(it, W_enc=it.W_enc * n, b_enc=it.b_enc * n, W_dec=it.W_dec / n[:, None])


def scaled_input(it: Dictionary, s: float) -> Dictionary:
    """For x what it was for s x, read and written."""
    if not s > 0:
        raise PatchbayError(f"a dictionary trained on {s} times its signal")
    return replace(it, W_enc=it.W_enc * s, W_dec=it.W_dec / s, b_dec=it.b_dec / s)


def whitened(it: Dictionary, matrix: Tensor, mean: Tensor) -> Dictionary:
    """For x what it was for (x - mean) matrix, read and written."""
    inverse = torch.linalg.inv(matrix.double()).to(matrix.dtype)
    plain = bias_in(it)
    return replace(
        plain,
        W_enc=matrix @ plain.W_enc,
        b_enc=plain.b_enc - mean @ matrix @ plain.W_enc,
        W_dec=plain.W_dec @ inverse,
        b_dec=plain.b_dec @ inverse + mean,
    )


def bias_in(it: Dictionary) -> Dictionary:
    """The decoder's bias that is taken from what is read, as part of the encoder's."""
    if not it.subtract:
        return it
    return replace(it, subtract=False, b_enc=it.b_enc - it.b_dec @ it.W_enc)


def after_gain(it: Dictionary, gain: Tensor, bias: Tensor | None = None) -> Dictionary:
    """For g y + b what it was for y, the output of a norm before its gain; a gain of 0 lets nothing through and is refused."""
    if bool((gain == 0).any()):
        raise PatchbayError(
            f"the norm's gain is 0 at {int((gain == 0).sum())} coordinates: what was there cannot be read behind it"
        )
    plain = bias_in(it)
    inner = plain.W_enc / gain[:, None]
    shift = 0.0 if bias is None else bias @ inner
    return replace(plain, W_enc=inner, b_enc=plain.b_enc - shift)


def oriented(weight: Tensor, d: int, name: str, *, d_first: bool, square: bool) -> Tensor:
    """A matrix with the signal's width `d` first (or last), whichever way the file holds it; `square`: as the file means it when both are d."""
    if weight.ndim != 2 or d not in weight.shape:
        raise PatchbayError(f"{name} has shape {list(weight.shape)}, and the signal {d} numbers: none of its sides")
    if weight.shape[0] == weight.shape[1]:
        return weight.T if square else weight
    return weight if (weight.shape[0] == d) == d_first else weight.T
