"""Decoders that choose one token of every row at each step, from the laws of the next token, and keep no more than one draft a row.

`step` is all that such a decoder is: from the text so far and what was seen it gives a token for each row, and what it ranks by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from patchbay.decode._loop import Call, refuse_dead_end
from patchbay.decode._result import Draft


class Chosen(NamedTuple):
    """The token of each row [row], what it adds to the score, the log-probability under the law it was drawn from, more by name."""

    tokens: Tensor
    score: Tensor
    logq: Tensor | None = None
    beside: dict[str, Tensor] = {}  # noqa: RUF012


class Reader(Protocol):
    """What reads rows of one length: `Rows`, `Voices`."""

    @property
    def ids(self) -> Tensor: ...
    @property
    def of(self) -> list[int]: ...
    def take(self, rows: Sequence[int]) -> None: ...


def stepwise(
    call: Call,
    reader: Reader,
    run: Callable[[Tensor | None], tuple[Tensor, Any]],
    choose: Callable[[Tensor, Tensor, Any], Chosen],
    drafts: list[list[Draft]],
    number: Sequence[int] | None = None,
) -> None:
    """Continue the rows of a reader until each has ended, into `drafts` [prompt][draft].

    `run` makes a pass and gives the model's logits [row, vocab] and whatever else `choose(ids, logits, rest)` needs. `number`: of
    which draft of its prompt a row is, where there are several. Rows that have ended leave the batch.
    """
    number = list(number or [0] * len(reader.of))
    plain, rest = run(None)
    for step in range(call.n_new):
        logp = torch.log_softmax(plain.float(), -1)  # [row, vocab]
        chosen = choose(reader.ids, refuse_dead_end(call.chosen_from(reader.ids, plain)), rest)
        said = logp.gather(1, chosen.tokens[:, None])[:, 0].tolist()
        rows = zip(reader.of, number, chosen.tokens.tolist(), said, chosen.score.tolist(), strict=True)
        logq = [None] * len(said) if chosen.logq is None else chosen.logq.tolist()
        for row, (prompt, draft, token, log, score) in enumerate(rows):
            beside = {name: float(values[row]) for name, values in chosen.beside.items()}
            drafts[prompt][draft].add(token, log, score, logq[row], **beside)
        over = call.ended(torch.cat([reader.ids, chosen.tokens[:, None].to(reader.ids.device)], 1)).tolist()
        for prompt, draft, ended in zip(reader.of, number, over, strict=True):
            drafts[prompt][draft].finished = ended
        going = [row for row, ended in enumerate(over) if not ended]
        if not going or step == call.n_new - 1:
            return
        if len(going) < len(over):
            reader.take(going)
            number = [number[row] for row in going]
        plain, rest = run(chosen.tokens[going])
