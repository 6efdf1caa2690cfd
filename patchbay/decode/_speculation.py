"""Tokens proposed by a cheap law and checked by the model's own: the coupling that keeps the model's law, and who proposes.

A proposal x ~ q is kept with chance min(1, p(x) / q(x)); else a token is drawn from (p - q)+ over its sum. What comes out has the law p,
whatever q is. The chances of a position are fixed by the seed, the prompt and the position, so that the text does not depend on how
far ahead is proposed, nor on who else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from patchbay.decode._loop import Call, Rows, drawn_at

LawOf = Callable[[Tensor, Tensor], Tensor]  # ids [row, position], logits [row, vocab] -> probabilities [row, vocab]


def law_of(call: Call, steps: Sequence[Callable[[Tensor, Tensor], Tensor]] | None) -> LawOf:
    """The law that tokens are drawn from: of the logits after the call's processors and these steps, or without steps (None) their largest."""

    def law(ids: Tensor, logits: Tensor) -> Tensor:
        logits = call.chosen_from(ids, logits)
        if steps is None:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
        for step in steps:
            logits = step(ids, logits)
        return logits.double().softmax(-1)

    return law


def proposed(q: Tensor, points: Tensor) -> Tensor:
    """The token that each row proposes [row]; -1 where its law [row, vocab] is empty."""
    return drawn_at(q, points).masked_fill(q.sum(-1) == 0, -1)


def decided(p: Tensor, q: Tensor, tokens: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """The token of each row and whether it is the proposed one, from both laws [row, vocab], the proposals (-1: none) and points
    [row, 2] between 0 and 1."""
    at = tokens.clamp(min=0)[:, None]
    kept = (points[:, 0].to(p) * q.gather(1, at)[:, 0] < p.gather(1, at)[:, 0]) & (tokens >= 0)
    rest = (p - q).clamp(min=0)
    rest = torch.where(
        rest.sum(-1, keepdim=True) > 0, rest, p
    )  # equal laws, of which a proposal is refused by rounding alone
    return torch.where(kept, tokens, drawn_at(rest, points[:, 1])), kept


class Proposer(Protocol):
    """Who proposes: `law(text)` is q of the next token [row, vocab]; `keep(n)` forgets all but the first n tokens of each row."""

    def law(self, text: Tensor) -> Tensor: ...
    def keep(self, n: int) -> None: ...
    def take(self, rows: Sequence[int]) -> None: ...


class Drafter:
    """Another model, or the same one under a knob, with a cache of its own. `barred` [vocab]: tokens that its law lacks."""

    def __init__(self, rows: Rows, law: LawOf, barred: Tensor | None) -> None:
        self.rows, self._law, self.barred = rows, law, barred

    def law(self, text: Tensor) -> Tensor:
        more = text[:, self.rows.ids.shape[1] :]
        logits = self.rows.run(more if more.shape[1] else None).last.to(text.device)
        if self.barred is not None:
            logits = logits.masked_fill(self.barred, -torch.inf)
        return self._law(text, logits).nan_to_num(0.0)  # where processors bar all that is kept, nothing is proposed

    def keep(self, n: int) -> None:
        self.rows.drop(max(0, self.rows.ids.shape[1] - n))

    def take(self, rows: Sequence[int]) -> None:
        self.rows.take(rows)


class Lookup:
    """The token that followed the longest earlier copy of the text's end, of at most `longest` tokens, the latest such copy."""

    def __init__(self, vocab: int, longest: int) -> None:
        self.vocab, self.longest = vocab, longest

    def law(self, text: Tensor) -> Tensor:
        found = [after(ids, self.longest) for ids in text.tolist()]
        q = torch.zeros(len(found), self.vocab, dtype=torch.float64, device=text.device)
        for row, token in enumerate(found):
            if token is not None:
                q[row, token] = 1.0
        return q

    def keep(self, n: int) -> None:
        pass

    def take(self, rows: Sequence[int]) -> None:
        pass


def after(ids: Sequence[int], longest: int) -> int | None:
    """What followed the latest earlier copy of the longest end of `ids` that has one, of up to `longest` tokens."""
    for n in range(min(longest, len(ids) - 1), 0, -1):
        end = ids[-n:]
        for at in range(len(ids) - n - 1, -1, -1):
            if ids[at : at + n] == end:
                return ids[at + n]
    return None


def blocks(kept: Sequence[float], ahead: int, n_new: int) -> list[int]:
    """How many proposals each pass of the model keeps where a text is written alone: `kept` [position] is 1 where the proposed token stands."""
    found, at = [], 0
    while at < len(kept):
        room, run = min(ahead, n_new - at - 1), 0
        while run < room and at + run < len(kept) and kept[at + run] == 1.0:
            run += 1
        found.append(run)
        at += run + 1
    return found
