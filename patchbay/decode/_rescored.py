"""Finished texts read again: log-probabilities of their new tokens from a run of their own behind the prompt that was read already,
under the edits in force."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchbay.decode._loop import Rows
from patchbay.decode._result import Draft


def rescore(prompts: Rows, first: Tensor, drafts: Sequence[Sequence[Draft]]) -> None:
    """Set `logp` of every draft [prompt][draft] of prompts that were read, whose next tokens have the logits `first` [row, vocab]. One pass
    of up to `batch_size` drafts at a time, over their tokens alone where there is a cache."""
    rows_of = [(row, one) for row, prompt in enumerate(prompts.of) for one in drafts[prompt]]
    size = prompts.call.batch_size
    for at in range(0, len(rows_of), size):
        some = rows_of[at : at + size]
        width = max(len(one.tokens) for _, one in some)
        tokens = torch.tensor([one.tokens + [0] * (width - len(one.tokens)) for _, one in some], device=first.device)
        index = [row for row, _ in some]
        logits = first[index][:, None]  # [row, token, vocab]
        if width > 1:
            with prompts.again() as rows:
                rows.take(index)
                logits = torch.cat([logits, rows.run(tokens[:, :-1], keep=width - 1).logits], 1)
        said = torch.log_softmax(logits, -1).gather(-1, tokens[..., None])[..., 0].tolist()
        for (_, one), row in zip(some, said, strict=True):
            one.logp = row[: len(one.tokens)]
