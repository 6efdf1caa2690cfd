"""What is kept of a run of some prompts, so that their layers can be called again, and the rows of such a call.

A row that differs from the base run from layer l and position p on is computed from there alone; left of p it has the base run's
keys and values. Rows of many starts lie side by side as one long sequence of tokens: `Places` says which token is whose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchbay.model.model import Model
from patchbay.signal.port import Port

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module was called with: arguments, and arguments by name."""


class Past:
    """Keys and values of the base run left of `start`, for the rows of one call; what layers take for a cache."""

    def __init__(self, base: Base, start: int, prompts: Tensor) -> None:
        self.base, self.start, self.prompts = base, start, prompts
        self.is_compileable = False

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.start == 0:
            return key, value
        old_key, old_value = self.base.keys[layer_idx], self.base.values[layer_idx]  # [prompt, group, position, d]
        return self._before(old_key, key), self._before(old_value, value)

    def _before(self, old: Tensor, new: Tensor) -> Tensor:
        left = old[:, :, : self.start]
        left = left.expand(len(new), -1, -1, -1) if len(old) == 1 else left[self.prompts]
        return torch.cat([left, new], 2)

    def get_seq_length(self, *_: Any) -> int:
        return self.start


@dataclass
class Base:
    """One run of prompts of one length, with all that a restarted row needs."""

    model: Model
    ids: Tensor  # [prompt, position]
    layer_calls: list[Call]
    attn_calls: list[Call]
    resid: list[Tensor]  # n_layers + 1 streams, [prompt, position, d_model]
    taps: dict[Port, Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    heads: list[tuple[Tensor, ...]] = field(default_factory=list)  # q, k, v of layers, [prompt, position, head, d]
    halves: bool = False  # attention and MLP can be called apart
    flat: bool = False  # attention can be called on the tokens of rows of many starts at once
    narrow: bool = False  # and on other tokens than those that it is asked for
    refusal: str | None = None  # why rows of this model cannot restart; None when they can

    masks: dict[Any, Tensor] = field(default_factory=dict)
    where: Tensor | None = None  # prompt * n_positions + position of each token that the running call is about

    @property
    def n_positions(self) -> int:
        return self.ids.shape[1]

    def tokens(self, start: int, prompts: Tensor) -> Tensor:
        """Where the tokens of rows stand in the base run: prompt * n_positions + position, [row, position - start]."""
        return (prompts[:, None] * self.n_positions + torch.arange(start, self.n_positions)[None]).to(self.ids.device)

    def at(self, prompts: Tensor, places: Places) -> Tensor:
        """The same for tokens of rows of these prompts, [token]."""
        return (prompts[places.row] * self.n_positions + places.place).to(self.ids.device)

    def mask(self, layer: int, start: int, query: Tensor, implementation: str) -> Tensor | None:
        """The mask of queries from `start` on, [prompt or 1, 1, query, key]; None where nothing is hidden or causal says all."""
        args, kwargs = self.attn_calls[layer]
        given = kwargs.get("attention_mask", next((a for a in args[1:] if isinstance(a, Tensor) and a.ndim == 4), None))
        if given is not None and given.ndim == 4:
            return given[:, :, start:]
        if implementation == "sdpa" and (start == 0 or query.shape[2] == 1):
            return None  # it is causal by itself, and a last query sees every key
        held = self.masks.get((start, implementation))
        if held is None:
            place = torch.arange(self.n_positions, device=query.device)
            held = (place[None, :] <= place[start:, None])[None, None]
            held = held if implementation == "sdpa" else numbers(held, query)
            self.masks[start, implementation] = held
        return held


class Piece(NamedTuple):
    """Rows for a call of attention: their stream at the positions from `start` on that are given, and from where on it is asked
    what attention adds."""

    start: int
    x: Tensor  # [row, position, d_model]
    prompts: Tensor  # [row]
    asked: int


@dataclass(frozen=True)
class Places:
    """Tokens of rows side by side: the row and the position of each, [token]."""

    row: Tensor
    place: Tensor

    @classmethod
    def of(cls, rows: Sequence[int], begins: Sequence[int], ends: Sequence[int]) -> Places:
        """`rows[i]` rows with positions `begins[i]` .. `ends[i]` each."""
        many = torch.tensor(rows)
        begin, width = torch.tensor([begins, [e - b for b, e in zip(begins, ends, strict=True)]]).repeat_interleave(
            many, 1
        )
        row = torch.arange(len(width)).repeat_interleave(width)
        first = width.cumsum(0) - width  # of each row, among the tokens
        return cls(row, torch.arange(len(row)) + (begin - first)[row])

    def of_rows(self, begin: int, end: int) -> tuple[slice, Places]:
        """The tokens of rows `begin` to `end`, and where they are among all: rows lie one after the other."""
        left, right = torch.searchsorted(self.row, torch.tensor([begin, end])).tolist()
        return slice(left, right), Places(self.row[left:right] - begin, self.place[left:right])

    def among(self, first: int, n_positions: int) -> tuple[Tensor, Tensor | None]:
        """Where tokens lie in rows that begin at position `first`, [token], and which of them these are: None for all."""
        at = self.row * (n_positions - first) + self.place - first
        if first == 0 or bool((kept := self.place >= first).all()):
            return at, None
        which = kept.nonzero()[:, 0]
        return at[which], which


def numbers(mask: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(~mask, torch.finfo(like.dtype).min)
