"""N-gram layers: each token also gets the mean of what followed the last n tokens before.

    y_i = A mean_{j in M_n(i)} h_j + B h_i,     M_n(i) = the j < i with x_{j-n} .. x_{j-1} = x_{i-n+1} .. x_i

so that what `find.ngram_heads` looks for is built in, and nothing has to be learned to find it; where the last n tokens are new, the mean is 0. They stand between the token embedding and
the first layer, one behind the other, in the module that embeds: `embed` is what comes out, the table is still `weight`. A starts at 0 and B at the identity, so that a model
which gets them computes what it did before. O(n T^2) comparisons and d^2 products a token.

Akyürek, Wang, Kim and Andreas 2024, "In-Context Language Learning: Architectures and Algorithms"; there they also stand between layers. They read the text's own ids: embeddings
alone do not say what came before, and a cache does not hold it, so that a text runs whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def followers(ids: Tensor, order: int) -> Tensor:
    """M_n: bool [prompt, query, key], the key just behind an earlier occurrence of the query's last `order` tokens and before the query."""
    n = ids.shape[1]
    same = (ids[:, :, None] == ids[:, None, :]).tril(-2)  # [prompt, query, where an earlier one ends]
    whole = same.clone()
    for back in range(1, min(order, n)):
        whole[:, back:, back:] &= same[:, : n - back, : n - back]
        whole[:, :back] = whole[:, :, :back] = False  # too near the start to have so many
    if order > n:
        whole[:] = False
    return nn.functional.pad(whole[:, :, :-1], (1, 0))


class NGram(nn.Module):
    """One layer of one order."""

    def __init__(self, d: int, order: int) -> None:
        super().__init__()
        self.order = order
        self.A, self.B = nn.Parameter(torch.zeros(d, d)), nn.Parameter(torch.eye(d))

    def forward(self, h: Tensor, ids: Tensor) -> Tensor:
        """y [prompt, position, d] of h [prompt, position, d] and ids [prompt, position]."""
        share = followers(ids, self.order).to(h)
        mean = share @ h / share.sum(-1, keepdim=True).clamp_min(1.0)
        return mean @ self.A.T + h @ self.B.T


class Embedding(nn.Embedding):
    """A token embedding with n-gram layers behind it."""

    def __init__(self, table: nn.Embedding, orders: Sequence[int]) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, table.padding_idx, _weight=table.weight.data)
        self.weight = table.weight
        self._is_hf_initialized = True  # the table has its numbers
        self.ngrams = nn.ModuleList(NGram(table.embedding_dim, order) for order in orders)

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings [prompt, position, d]."""
        h = super().forward(ids)
        for layer in self.ngrams:
            h = layer(h, ids)
        return h
