"""Finished texts read again: log-probabilities of their new tokens from runs of their own, under the edits in force."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from patchbay.decode._loop import Call
from patchbay.decode._result import Draft


def rescore(call: Call, drafts: Sequence[Sequence[Draft]]) -> None:
    """Set `logp` of every draft [prompt][draft]. The passes are not counted: they decide nothing."""
    apart = replace(call)
    for members in apart.batches():
        rows_of = [(prompt, draft) for prompt in members for draft in range(len(drafts[prompt]))]
        for at in range(0, len(rows_of), apart.batch_size):
            some = rows_of[at : at + apart.batch_size]
            lists = [drafts[prompt][draft].tokens for prompt, draft in some]
            width = max(map(len, lists))
            tokens = torch.tensor([row + [0] * (width - len(row)) for row in lists], device=apart.model.device)
            with apart.rows([prompt for prompt, _ in some]) as rows:
                logits = rows.run(tokens, keep=width + 1).logits[:, :-1]  # [row, token, vocab]
            said = torch.log_softmax(logits, -1).gather(-1, tokens[..., None])[..., 0].tolist()
            for (prompt, draft), row in zip(some, said, strict=True):
                own = drafts[prompt][draft]
                own.logp = row[: len(own.tokens)]
