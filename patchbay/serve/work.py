"""One prompt's share of a request, as the engine runs it: what it is given, and what it tells of its texts as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from patchbay.decode._loop import generators
from patchbay.edits.edit import Edit
from patchbay.serve.asking import Sampling
from patchbay.serve.choosing import Chooser, Told
from patchbay.serve.guard import Refusal
from patchbay.serve.joined import Text
from patchbay.serve.words import Words


@dataclass(frozen=True)
class Piece:
    """More of the text of one choice: its words so far certain, and the tokens behind them where they were asked for."""

    choice: int
    text: str = ""
    tokens: tuple[Told, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """What an echo tells of the prompt, before its choices."""

    tokens: tuple[Told, ...]


@dataclass(frozen=True)
class End:
    """A choice is over, after `n` tokens: by an end token or a stop ("stop"), or for want of room ("length")."""

    choice: int
    reason: str
    n: int


Event = Piece | Prompt | End | Refusal


@dataclass(eq=False)
class Work:
    """A prompt with its edits, how often and how far it is continued. `tell` is called with events, in the engine's thread."""

    ids: list[int]
    edits: tuple[Edit, ...]
    n: int
    n_new: int
    sampling: Sampling
    seed: int
    stops: tuple[str, ...] = ()
    logprobs: int | None = None
    echo: bool = False
    whole: bool = False  # nobody listens before a text is over: it is told in one piece
    tell: Callable[[Event], None] = field(default=lambda event: None, repr=False)
    gone: bool = False  # nobody waits for it any longer
    begun: float = 0.0
    first: float = 0.0  # when the first of its tokens was chosen

    @property
    def total(self) -> int:
        return len(self.ids) + self.n_new

    @property
    def cost(self) -> int:
        """Columns of the batch that it may come to fill."""
        return self.n * self.total


class Line:
    """One choice of a work in flight: its text, how its tokens are chosen, its words so far, the token that is to run next."""

    def __init__(self, work: Work, choice: int, own: Sequence[Any], tokenizer: Any, ends: frozenset[int]) -> None:
        self.work, self.choice, self.ends = work, choice, ends
        self.text = Text(list(work.ids), work.edits)
        self.chooser = Chooser(work.sampling, own, None if work.sampling.greedy else _chance(work, choice))
        self.words = Words(tokenizer, work.ids, work.stops, late=work.whole)
        self.said, self.about = "", list[Told]()  # not told yet
        self.next, self.n = -1, 0
        self.over = False

    @property
    def events(self) -> Callable[[Event], None]:
        return self.work.tell

    def take(self, token: int, about: tuple[Told, ...]) -> None:
        """A token was chosen: tell of it, and whether the text is over."""
        self.next, self.n = token, self.n + 1
        self.work.first = self.work.first or time.monotonic()
        ended = token in self.ends
        self.said += "" if ended else self.words.add(token)
        self.about += about
        last = ended or self.words.stopped or self.n >= self.work.n_new
        if last and not self.words.stopped:
            self.said += self.words.end()
        if (last or not self.work.whole) and (self.said or self.about):
            self.events(Piece(self.choice, self.said, tuple(self.about)))
            self.said, self.about = "", []
        if last:
            stopped = ended or self.words.stopped
            self.finish("stop" if stopped else "length")

    def finish(self, reason: str) -> None:
        self.over = True
        self.events(End(self.choice, reason, self.n))


def _chance(work: Work, choice: int) -> torch.Generator:
    """The stream of chance of a choice, which depends on its seed, its prompt and its place alone."""
    return generators(work.seed, [work.ids], choice + 1)[0][choice]
