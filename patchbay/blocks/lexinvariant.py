"""Lexinvariant models: no token has a meaning of its own; each text gets an embedding that is drawn for it.

    E_b [vocab, d] ~ N(0, I / d) for each text b,   x = E_b[ids],   logits = h E_b^T

so that the model can tell tokens apart and no more, and has to work by matching. Renaming tokens and moving rows of E with them moves the logits with them, exactly. One fixed table is an ordinary tied model,
which is what stands in `embed_tokens`: in training mode each row of a batch draws its own table, in evaluation the fixed one is used, so that parts, unembedding and attribution exist.

Huang et al. 2023, "Lexinvariant Language Models": approaches an ordinary model with context, deciphers substitution ciphers, four times as good at synthetic in-context reasoning.

A table that is drawn for a row would make a batch another thing than its prompts: `tables` seeds each by the prompt's own tokens. Loss is to be read by position: at the first one nothing is known, and it is ln(vocab) at best.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor


def fresh(n: int, vocab: int, d: int, like: Tensor) -> Tensor:
    """n tables [n, vocab, d] from torch's global random state, as training draws them."""
    return torch.randn(n, vocab, d, device=like.device, dtype=like.dtype) * d**-0.5


def tables(ids: Tensor, vocab: int, d: int, *, mask: Tensor | None = None, seed: int = 0) -> Tensor:
    """A table for each prompt of ids [prompt, position], that follows from its tokens and the seed: [prompt, vocab, d]. `mask`: as the model's, 0 at padding, which is no part of a prompt."""
    made = []
    for at, padded in enumerate(ids.tolist()):
        row = padded if mask is None else [token for token, real in zip(padded, mask[at].tolist(), strict=True) if real]
        digest = hashlib.sha256(repr((seed, row)).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        made.append(torch.randn(vocab, d, generator=generator) * d**-0.5)
    return torch.stack(made)


def logits(hf: Any, ids: Tensor, embedding: Tensor, **options: Any) -> Tensor:
    """Logits [prompt, position, vocab] under tables [prompt, vocab, d], or one [vocab, d] for all prompts."""
    embedding = embedding if embedding.ndim == 3 else embedding.expand(len(ids), *embedding.shape)
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    out = hf.base_model(inputs_embeds=embedding[rows, ids], **options)
    return out.last_hidden_state @ embedding.transpose(1, 2)


@torch.no_grad()
def freeze(hf: Any, seed: int = 0) -> None:
    """Draw the fixed table anew, in place: what analysis of the model stands on is one draw of many."""
    weight = hf.get_input_embeddings().weight
    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * weight.shape[1] ** -0.5)
