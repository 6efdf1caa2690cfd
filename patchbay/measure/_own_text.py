"""Fluency: how likely the plain model finds what a turned one writes.

    loss = the mean over new tokens of -log p(token | text before it), p the model as it is, of text that is sampled under the edits

Of its own samples a model has a certain loss. What a turned one writes may be unlikely (noise) or far too likely ("her her her",
which the plain model goes on with at a loss near 0): text whose loss leaves the range about the plain model's own is neither's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from patchbay import maths
from patchbay.edits.edit import Edit
from patchbay.knobs.rows import generate_rows
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import seeded

PROMPTS, NEW_TOKENS = 8, 24
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def own_losses(
    model: Model, prompts: Sequence[Sequence[int]], lists: Sequence[Sequence[Edit]], seed: int
) -> list[float]:
    """Loss in nats per token, under the model as it is, of continuations of some of the prompts sampled under each list of edits.

    Raises PatchbayError where the model cannot continue text under such edits."""
    some = [list(ids) for ids in prompts[:PROMPTS]]
    room = NEW_TOKENS if model.longest_prompt is None else model.longest_prompt - max(map(len, some))
    entries = [list(edits) for edits in lists for _ in some]
    with seeded(seed):
        grown = generate_rows(model, some * len(lists), entries, max(1, min(NEW_TOKENS, room)), **SAMPLED)
    found = []
    for at in range(len(lists)):
        rows = grown[at * len(some) : (at + 1) * len(some)]
        logits = run(
            model, [row[:-1] for row in rows]
        ).logits  # [text, position, vocab]; nothing follows the last token
        each = [_losses(logits[i], row, len(ids)) for i, (row, ids) in enumerate(zip(rows, some, strict=True))]
        found.append(float(torch.cat(each).mean()))
    return found


def _losses(logits: torch.Tensor, row: Sequence[int], length: int) -> torch.Tensor:
    """Of each new token of a row, from the logits before it."""
    new = torch.tensor(row[length:], device=logits.device)
    return -maths.log_probability(logits[length - 1 : len(row) - 1], new).double().cpu()


def allowed(plain: float, cap: float) -> tuple[float, float]:
    """The range of losses that still are fluent: from half the plain model's own (or a cap below it) to two caps above it."""
    return min(plain / 2, plain - cap), plain + 2 * cap
