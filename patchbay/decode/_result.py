"""What every decoder returns: its drafts as a Result.

`score` [prompt, draft] is what the method ranked by; `logp` [prompt, draft, position] the log-probability of each new token under the
plain model as it stood (edits in, processors out), NaN after the end; `tokens` likewise, -1 after the end; `logq` the log-probability
under the law that a token was drawn from, where that is another. `calls` are forward passes and `fed` the token positions they were
sent. The table `texts` prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from patchbay.decode._loop import Call
from patchbay.model.generate import returned
from patchbay.model.text import Prompts
from patchbay.results.result import Result

NATS = "nats"


@dataclass
class Draft:
    """One continuation, as it grows. `beside`: further numbers of each token by name; `whole`: numbers of the draft by name."""

    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    score: float = 0.0
    finished: bool = False
    logq: list[float] | None = None
    beside: dict[str, list[float]] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)

    def add(self, token: int, logp: float, score: float = 0.0, logq: float | None = None, **beside: float) -> None:
        """One more token."""
        self.tokens.append(int(token))
        self.logp.append(float(logp))
        self.score += float(score)
        if logq is not None:
            self.logq = [*(self.logq or []), float(logq)]
        for name, value in beside.items():
            self.beside.setdefault(name, []).append(float(value))


def as_result(
    call: Call,
    drafts: Sequence[Sequence[Draft]],
    score: str = NATS,
    *,
    units: dict[str, str] | None = None,
    scalars: dict[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> Result:
    """The Result of drafts [prompt][draft]. `score`: the unit of what they were ranked by; `units` those of the further numbers."""
    flat, units = [one for several in drafts for one in several], units or {}
    axes = ("prompt", "draft")
    variables: dict[str, Any] = {"score": (_each(drafts, [one.score for one in flat]), axes, score)}
    for name in dict.fromkeys(key for one in flat for key in one.whole):
        values = _each(drafts, [one.whole.get(name, float("nan")) for one in flat])
        variables[name] = (values, axes, units.get(name, NATS))
    drawn = any(one.logq is not None for one in flat)
    names = ["logp", *(["logq"] if drawn else []), *dict.fromkeys(key for one in flat for key in one.beside)]
    for name in names:
        rows = [{"logp": one.logp, "logq": one.logq or [], **one.beside}.get(name, []) for one in flat]
        variables[name] = (_each(drafts, _rows(rows, float("nan"))), (*axes, "position"), units.get(name, NATS))
    tokens = _each(drafts, _rows([one.tokens for one in flat], -1), -1)
    variables["tokens"] = (tokens.long(), (*axes, "position"), "token id")
    variables |= {"calls": (call.calls, (), "passes"), "fed": (call.fed, (), "token positions"), **(scalars or {})}
    return Result(variables, tables={"texts": _texts(call, drafts)}, notes=[*call.notes, *notes])


def _rows(lists: Sequence[Sequence[float]], empty: float) -> Tensor:
    """Lists of different lengths as one tensor [draft, position]."""
    width = max(map(len, lists))
    return torch.tensor([[*one, *[empty] * (width - len(one))] for one in lists], dtype=torch.float64)


def _each(drafts: Sequence[Sequence[Draft]], values: Tensor | list[float], empty: float = float("nan")) -> Tensor:
    """Values of all drafts in a row, by prompt: [draft of all, ...] -> [prompt, draft, ...]."""
    flat = torch.as_tensor(values, dtype=torch.float64)
    found = torch.full((len(drafts), max(map(len, drafts)), *flat.shape[1:]), empty, dtype=torch.float64)
    at = 0
    for i, several in enumerate(drafts):
        found[i, : len(several)] = flat[at : at + len(several)]
        at += len(several)
    return found


def _texts(call: Call, drafts: Sequence[Sequence[Draft]]) -> list[dict[str, Any]]:
    """A row for each draft: its text after the prompt, what it was ranked by, and its log-probability under the plain model."""
    said = new_texts(call, drafts)
    return [
        {
            "prompt": i,
            "draft": j,
            "text": said[i][j],
            "score": one.score,
            "logp": sum(one.logp),
            "tokens": len(one.tokens),
            "finished": one.finished,
        }
        for i, several in enumerate(drafts)
        for j, one in enumerate(several)
    ]


def new_texts(call: Call, drafts: Sequence[Sequence[Draft]]) -> list[list[str]]:
    """The text of each draft after its prompt; of a model without a tokenizer its ids."""
    if call.model.tokenizer is None:
        return [[" ".join(map(str, one.tokens)) for one in several] for several in drafts]
    rows = [(ids, ids + one.tokens) for ids, several in zip(call.prompts, drafts, strict=True) for one in several]
    given = Prompts([ids for ids, _ in rows], False, True)
    said = iter(returned(call.model, given, [row for _, row in rows], True))
    return [[next(said) for _ in several] for several in drafts]
