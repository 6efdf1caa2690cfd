"""Several drafts of each prompt, each drawn after a chain of steps with a stream of chance of its own; one prefill for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchbay.decode._loop import Call, Rows, draw, generators, refuse_too_many
from patchbay.decode._result import Draft
from patchbay.decode._samplers import chain_of
from patchbay.decode._stepwise import Chosen, stepwise
from patchbay.signal.port import PatchbayError


class Many:
    """Rows that become `drafts` rows of each prompt after the first pass; `number` [row] says of which draft each is."""

    def __init__(self, rows: Rows, drafts: int) -> None:
        self.rows, self.drafts = rows, drafts
        self.number = list(range(drafts)) * len(rows.of)

    @property
    def ids(self) -> Tensor:
        return self.rows.ids

    @property
    def of(self) -> list[int]:
        return self.rows.of

    def run(self, tokens: Tensor | None) -> tuple[Tensor, list[tuple[int, int]]]:
        """Logits [row, vocab], and of each row its prompt and draft."""
        last = self.rows.run(tokens).last
        if tokens is None:
            last = last.repeat_interleave(self.drafts, 0)
            self.rows.take(torch.arange(len(self.of)).repeat_interleave(self.drafts))
        return last, list(zip(self.of, self.number, strict=True))

    def take(self, rows: Sequence[int]) -> None:
        self.rows.take(rows)
        self.number = [self.number[row] for row in rows]


def drawn(call: Call, chain: Sequence[str], drafts: int, seed: int) -> list[list[Draft]]:
    """Drafts [prompt][draft] of a call. Where `batch_size` prompts have several drafts, fewer of them run at a time."""
    if drafts < 1:
        raise PatchbayError(f"drafts={drafts}: one or more of each prompt")
    room = max(1, call.batch_size // drafts)
    refuse_too_many(call, drafts, f"drafts={drafts}", room)
    make, chance = chain_of(chain, call), generators(seed, call.prompts, drafts)
    steps = [[make(one) for one in several] for several in chance]
    found = [[Draft() for _ in range(drafts)] for _ in call.prompts]

    def choose(ids: Tensor, logits: Tensor, of: list[tuple[int, int]]) -> Chosen:
        laws = []
        for row, (place, at) in enumerate(of):
            law = logits[row : row + 1]
            for step in steps[place][at]:
                law = step(ids[row : row + 1], law)
            laws.append(torch.log_softmax(law.double(), -1))
        law = torch.cat(laws)
        tokens = draw(law, [chance[place][at] for place, at in of])
        said = law.gather(1, tokens[:, None])[:, 0]
        return Chosen(tokens, said, said)

    for batch in call.batches():
        for members in (batch[at : at + room] for at in range(0, len(batch), room)):
            with call.rows(members) as rows:
                many = Many(rows, drafts)
                stepwise(call, many, many.run, choose, found, many.number)
    return found
