"""AbsTopK: of a token's activations the k largest by size stay, the others are 0.

    y_i = f(x)_i  where |f(x)_i| is among the k largest of the token's, else 0

behind the activation function f of every MLP (of a gated one: behind that of the gate, before it meets the other factor), so that at most k neurons write at a token. Of equal ones the
first stay. Gradients go through what stays.

Gao et al. 2025, "Weight-sparse transformers have interpretable circuits", who do so at all sites and with a quarter of the channels; here at the neurons alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def largest(x: Tensor, k: int) -> Tensor:
    """x with all but its k largest entries by size along the last axis at 0; of equals the first stay."""
    order = x.detach().abs().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    kept = x.new_zeros(x.shape).scatter(-1, order, 1.0)
    return x * kept


class AbsTopK(nn.Module):
    """An activation function, and the k largest of what it gives."""

    def __init__(self, inner: Any, k: int) -> None:
        super().__init__()
        self.inner, self.k = inner, k

    def forward(self, x: Tensor) -> Tensor:
        return largest(self.inner(x), self.k)
