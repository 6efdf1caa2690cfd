"""Planted models whose truth is a layer: where a property is written, where a prior is, where one language becomes another.

| function | mechanism                                                | truth keys                                        |
|----------|----------------------------------------------------------|---------------------------------------------------|
| carried  | every word carries a number, which no noise reads; a head of `layer` writes it, at the next word, into a direction that nothing else uses | layer head values |
| bias     | a head of `layer` writes a log prior for every word, whatever was said: `strength` x prior in logits | layer head log_prior |
| pivot    | a head of layer 0 answers a cue in language A, a head of `layer` turns each A word into its B twin | layer cues first second |

Built like those of `planted.py`; there the answer is a head, here the layer at which it stands is what a finder of layers must name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch

from patchbay.tiny.planted import LOGIT_SCALE, SHARPNESS
from patchbay.tiny.planted_canvas import Canvas, Form, Sizes
from patchbay.tiny.planted_truth import Planted, record

__all__ = ["bias", "carried", "pivot"]


def carried(
    values: Sequence[float],
    *,
    layer: int = 1,
    strength: float = 4.0,
    form: Form = "gpt2",
    seed: int = 0,
    **sizes: Unpack[Sizes],
) -> Planted:
    """`values[token]` stands in the embedding of every token; after `layer` the next position has `strength` times it too."""
    sizes.setdefault("n_layers", 4)
    canvas = Canvas(form, seed, **sizes)
    own, copied = canvas.take(1, protect=True), canvas.take(1, protect=True)
    words = canvas.take(canvas.n_vocab)
    canvas.embed(words + torch.tensor(values, dtype=torch.float32)[:, None] * own)
    head = canvas.pick_head(layer)
    q, k = canvas.offset_maps(1, SHARPNESS)
    canvas.set_head(layer, head, q=q, k=k, v=own.T, o=strength * copied)
    canvas.unembed(LOGIT_SCALE * words)
    return record(canvas, "carried", layer=layer, head=f"L{layer}.H{head}", values=list(values))


def bias(
    *, layer: int = 1, strength: float = 1.0, form: Form = "gpt2", seed: int = 0, **sizes: Unpack[Sizes]
) -> Planted:
    """Log priors are normal with standard deviation 1; words of a prompt are otherwise only told from each other by noise."""
    sizes.setdefault("n_layers", 4)
    canvas = Canvas(form, seed, **sizes)
    words = canvas.take(canvas.n_vocab)
    canvas.embed(words)
    log_prior = canvas.normal(canvas.n_vocab)
    head = canvas.pick_head(layer)
    nowhere = torch.zeros(canvas.d_model, 1)
    write = strength / LOGIT_SCALE * (log_prior @ words)[None]  # [1, d_model]
    canvas.set_head(layer, head, q=nowhere, k=nowhere, v=canvas.one[:, None], o=write)
    canvas.unembed(LOGIT_SCALE * words)
    return record(canvas, "bias", layer=layer, head=f"L{layer}.H{head}", log_prior=log_prior.tolist())


def pivot(*, layer: int = 3, form: Form = "gpt2", seed: int = 0, **sizes: Unpack[Sizes]) -> Planted:
    """Twelve cues, twelve words of A and their twins in B, drawn from the seed; the answer to a cue ends in B."""
    sizes.setdefault("n_layers", 5)
    canvas = Canvas(form, seed, **sizes)
    words = canvas.take(canvas.n_vocab)
    drawn = [3 + i for i in canvas.choose(36, canvas.n_vocab - 3)]
    cues, first, second = drawn[:12], drawn[12:24], drawn[24:]
    canvas.embed(words)
    q, k = canvas.offset_maps(0, SHARPNESS)
    heads = canvas.pick_head(0), canvas.pick_head(layer)
    canvas.set_head(0, heads[0], q=q, k=k, v=words[cues].T, o=2.0 * words[first])
    canvas.set_head(layer, heads[1], q=q, k=k, v=words[first].T, o=1.5 * words[second] - words[first])
    canvas.unembed(LOGIT_SCALE * words)
    return record(
        canvas,
        "pivot",
        layer=layer,
        heads=[f"L0.H{heads[0]}", f"L{layer}.H{heads[1]}"],
        cues=cues,
        first=first,
        second=second,
    )
