"""Planted remainders: tokens that count as numbers, coded as round plus remainder, and a head that adds one to the remainder."""

from __future__ import annotations

from typing import Unpack

import torch

from patchbay.tiny.planted_canvas import Canvas, Form, Sizes
from patchbay.tiny.planted_truth import Planted, record

STRENGTH, SHARPNESS, LOGIT_SCALE = 2.0, 25.0, 6.0
MODULUS, N_ROUNDS = 10, 6


def remainder(*, form: Form = "gpt2", seed: int = 0, **sizes: Unpack[Sizes]) -> Planted:
    """Tokens 3..62 stand for the numbers 0..59: round code + remainder code. A last-layer head attends to its own position
    and sends remainder r to r + 1 (9 to 0), keeping the round; so it names the successor of all but 9, 19, ...

    truth: head, number_ids, modulus, codes [remainder, d_model].
    """
    canvas = Canvas(form, seed, **sizes)
    rounds, rest, other = canvas.take(N_ROUNDS), canvas.take(MODULUS), canvas.take(canvas.n_vocab)
    n = N_ROUNDS * MODULUS
    tokens = other.clone()  # what is no number has a code of its own
    value = torch.arange(n)
    tokens[3 : 3 + n] = (rounds[value // MODULUS] + rest[value % MODULUS]) / 2**0.5
    canvas.embed(tokens)
    layer = canvas.n_layers - 1
    head = canvas.pick_head(layer)
    q, k = canvas.offset_maps(0, SHARPNESS)
    codes = torch.cat([rounds, rest])  # [round and remainder, d_model]
    written = torch.cat([rounds, rest.roll(-1, 0)])
    canvas.set_head(layer, head, q=q, k=k, v=codes.T, o=STRENGTH * written)
    canvas.unembed(LOGIT_SCALE * tokens)
    return record(
        canvas,
        "remainder",
        head=f"L{layer}.H{head}",
        number_ids=list(range(3, 3 + n)),
        modulus=MODULUS,
        codes=rest.clone(),
    )
