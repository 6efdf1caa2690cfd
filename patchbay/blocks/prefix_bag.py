"""Prefix bag of words: a term of the logits that knows which words came before, and not in which order.

    h_i = tanh(e + sum_{q < i} W[:, v_q] + lam c_i),   logits_i = b + U h_i

c_i is a language model's state at position i; at lam = 0 the term is unchanged when the prefix is permuted, so that what a model gains over it is order.

Gupta et al. 2018, "textTOvec: Deep Contextualized Neural Autoregressive Topic Models of Language with Distributed Compositional Prior" (ctx-DocNADE), of which this is the portable part. The prediction at position i is of the token at i.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patchbay.errors import PatchbayError


class PrefixBag(nn.Module):
    """The term for a vocabulary, of `width` hidden numbers; `state`: the width of a language model's states, 0 for none."""

    def __init__(self, vocab: int, width: int, *, state: int = 0, lam: float = 0.0) -> None:
        super().__init__()
        self.words, self.read = nn.Embedding(vocab, width), nn.Linear(width, vocab)
        self.start = nn.Parameter(torch.zeros(width))
        self.context = nn.Linear(state, width, bias=False) if state else None
        self.lam = lam

    def forward(self, ids: Tensor, states: Tensor | None = None) -> Tensor:
        """Logits [prompt, position, vocab] of the token at each position of ids [prompt, position], from those before it."""
        if self.lam and (self.context is None or states is None):
            raise PatchbayError(
                f"lam={self.lam:g}: the term then reads a model's states; give `state`, their width, and states [prompt, position, state], or lam=0"
            )
        before = self.words(ids).cumsum(1)[:, :-1]
        total = self.start + nn.functional.pad(before, (0, 0, 1, 0))
        if self.lam and self.context is not None:
            total = total + self.lam * self.context(states)
        return self.read(torch.tanh(total))  # type: ignore[no-any-return]
