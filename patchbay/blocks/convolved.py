"""Convolved queries, keys and values: a causal convolution along the text, behind the maps that make them.

    q'_t = sum_j w_j * q_{t-j},  j = 0, 1, ..., width - 1,   w_j [channel] of its own for every channel; the same for k and v

before rotation and before heads are told apart. Taps are stored as [width, channel], tap j reads j tokens back; (1, 0, 0) is no convolution, exactly. A convolved key
knows its predecessor, so that one layer does induction without a previous-token head; with taps 1 and 2 set to 0 (`cut`) it cannot.

Yusuf et al. 2023, "RCMHA: Relative Convolutional Multi-Head Attention", whose scores are Transformer-XL's: (q_i + u) . k_j + (q_i + w) . W_R R_{i-j};
`relative_shift` is their shift of products by place into products by distance.

A module in the place of each map, in any family: q, k and v that are tapped are convolved, and no matrix times the stream, so that weights by head of such
a layer are refused by name. Text in pieces (a cache, padding on the left) would lack its earlier tokens, and is refused or run whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from patchbay.errors import PatchbayError


def check_width(width: Any, longest: int | None) -> None:
    """Raise PatchbayError for a width that no text of the model, of `longest` tokens, has."""
    if not isinstance(width, int) or isinstance(width, bool) or width < 2:
        raise PatchbayError(f"convolution={width!r}: the width, 2 tokens or more (1 is a scale)")
    if longest and width > longest:
        raise PatchbayError(
            f"convolution={width}: this model reads at most {longest} tokens, and no tap would see more"
        )


class Convolved(nn.Module):
    """A map of tokens [prompt, position, d] and a depthwise causal convolution of what it makes."""

    def __init__(self, inner: nn.Module, channels: int, width: int) -> None:
        super().__init__()
        self.inner = inner
        self.taps = nn.Parameter(torch.randn(width, channels) * width**-0.5)

    @torch.no_grad()
    def silence(self) -> None:
        """Taps (1, 0, ..., 0): no convolution, where training starts from a model that had none."""
        self.taps.zero_()[0] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self.inner(x), self.taps)


def convolve(x: Tensor, taps: Tensor) -> Tensor:
    """x [..., position, channel] by taps [width, channel], tap j on the token j places back; before the text there is 0."""
    out = x * taps[0]
    for back in range(1, min(len(taps), x.shape[-2])):
        out = out + nn.functional.pad(x[..., :-back, :], (0, 0, back, 0)) * taps[back]
    return out


@torch.no_grad()
def cut(model: nn.Module, taps: tuple[int, ...] = (1,)) -> None:
    """Set these taps of every convolution in the model to 0, in place: what they brought is gone."""
    for module in model.modules():
        if isinstance(module, Convolved):
            module.taps[[tap for tap in taps if tap < len(module.taps)]] = 0.0


def relative_shift(products: Tensor) -> Tensor:
    """Products [..., query, distance] with distance T-1, ..., 0 in columns, as [..., query, key]: key j of query i stands at distance i - j.

    Above the diagonal there is nothing to read; what stands there is hidden by the causal mask. Dai et al. 2019, "Transformer-XL", appendix B.
    """
    *first, n, columns = products.shape
    padded = nn.functional.pad(products, (1, 0)).reshape(*first, columns + 1, n)
    return padded[..., 1:, :].reshape(*first, n, columns)
