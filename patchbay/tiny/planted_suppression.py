"""A planted copy-suppression head: one head predicts a marked word, a later head sees that and takes it back."""

from __future__ import annotations

from typing import Unpack

import torch

from patchbay.tiny.planted_canvas import Canvas, Form, Sizes
from patchbay.tiny.planted_truth import Planted, attention, record
from patchbay.tiny.planted_vocabulary import WORDS

COPY_STRENGTH, SUPPRESSION, SHARPNESS, LOGIT_SCALE = 2.0, 1.0, 25.0, 6.0


def copy_suppression(*, form: Form = "gpt2", seed: int = 0, **sizes: Unpack[Sizes]) -> Planted:
    """Layer 0: a head attends to the one marked word of the prompt and copies it. Layer 1: a head's query is what the stream
    predicts (the word code), its key the word a position holds, and it writes minus that word.

    Prompts hold one marked word, which is predicted from there on. truth: copy, suppression (heads),
    suppression_strength, marked_ids, attention (what the suppression head really pays to the marked word from the
    last position), prompts.
    """
    canvas = Canvas(form, seed, **sizes)
    words, mark = canvas.take(canvas.n_vocab), canvas.take(1)
    shuffled = [3 + i for i in canvas.choose(canvas.n_vocab - 3, canvas.n_vocab - 3)]
    marked, plain = sorted(shuffled[:12]), shuffled[12:]
    flag = torch.zeros(canvas.n_vocab, 1)
    flag[marked] = 1.0
    canvas.embed(words + flag * mark)
    first, second = canvas.pick_head(0), canvas.pick_head(1)
    slot = canvas.slots(1)  # [1, d_head]
    q, k = SHARPNESS * canvas.one[:, None] * slot, mark.T @ slot
    canvas.set_head(0, first, q=q, k=k, v=words.T, o=COPY_STRENGTH * words)
    match = canvas.slots(canvas.n_vocab, signed=True)  # [vocab, d_head]
    canvas.set_head(1, second, q=SHARPNESS * words.T @ match, k=words.T @ match, v=words.T, o=-SUPPRESSION * words)
    canvas.unembed(LOGIT_SCALE * words)
    rows = []
    for n in range(12):
        around = [plain[i] for i in canvas.choose(15, len(plain))]
        rows.append([*around[: n % 6], marked[n], *around[n % 6 :]])
    prompts = ["".join(WORDS[i] for i in row) for row in rows]
    back = [15 - n % 6 for n in range(12)]
    return record(
        canvas,
        "copy_suppression",
        copy=f"L0.H{first}",
        suppression=f"L1.H{second}",
        suppression_strength=SUPPRESSION,
        marked_ids=marked,
        attention={f"L1.H{second}": attention(canvas, prompts, 1, second, back=back)},
        prompts=prompts,
    )
