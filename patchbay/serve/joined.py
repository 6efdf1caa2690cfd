"""Texts of different lengths as the rows of one batch: they come and go, each under edits of its own, on one cache.

Columns end together: a shorter text stands on the right, with padding before it that a mask leaves out. So the tokens that run are
always the last column, and positions are those of each text. Where texts come and go, their keys, values and states are joined
and parted; nothing is run again.

A model is believed to allow that only after a short run: texts of three lengths, one of them in two chunks, joined, parted and
continued, have the logits of whole runs. Others run their texts one by one (`Alone`), with the cache where that is believed.

transformers' own continuous batching runs all requests as one row of packed tokens on a paged cache. Edits name rows and positions
of prompts, and a row of packed tokens has neither, so it is not used.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import cache_utils as theirs

from patchbay.decode._loop import Call, Rows
from patchbay.edits.edit import Edit
from patchbay.jacks.arguments import with_cache
from patchbay.jacks.hooks import innermost
from patchbay.jacks.session import Session
from patchbay.knobs.rows import by_row
from patchbay.model.caches import serves
from patchbay.model.model import Model
from patchbay.serve.prefill import Prefill

KNOWN = (
    theirs.DynamicLayer,
    theirs.DynamicSlidingWindowLayer,
    theirs.LinearAttentionLayer,
    theirs.LinearAttentionAndFullAttentionLayer,
    theirs.LinearAttentionAndSlidingWindowAttentionLayer,
)
"""Layers of a cache that are joined by what they hold: keys and values by column, states as they are."""


@dataclass(eq=False)
class Text:
    """One row: its tokens so far, prompt first, and the edits that are its own."""

    ids: list[int]
    edits: tuple[Edit, ...] = ()
    n_prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.n_prompt = len(self.ids)


class Joined:
    """The rows that run now. `texts` are in the order of the logits that `step` returns."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.texts: list[Text] = []
        self.cache: Any = None
        self.places = "position_ids" in inspect.signature(model.hf.forward).parameters
        self._ids = torch.empty(0, 0, dtype=torch.long, device=model.device)  # what the cache holds [row, column]
        self._real = torch.empty(0, 0, dtype=torch.long, device=model.device)  # 1 where a column is no padding
        self._session: Session | None = None
        self._cache_name = next(iter(with_cache(model.hf, None)))

    @property
    def width(self) -> int:
        return self._ids.shape[1]

    def join(self, texts: Sequence[Text], cache: Any) -> None:
        """Texts whose prompts, of one length, have run become the last rows; `cache` is that of their run, in their order."""
        self.close()
        ids = torch.tensor([text.ids for text in texts], device=self._ids.device)
        if self.texts:
            _join(self.cache, cache, max(self.width, ids.shape[1]))
        else:
            self.cache = cache
            self._ids, self._real = ids[:0], ids[:0]
        width = max(self.width, ids.shape[1])
        self._real = torch.cat([_left(self._real, width), _left(torch.ones_like(ids), width)])
        self._ids = torch.cat([_left(self._ids, width), _left(ids, width)])
        self.texts += texts

    def leave(self, gone: Sequence[Text]) -> None:
        """Rows that are done, or that nobody waits for any longer, make room."""
        if not gone:
            return
        self.close()
        kept = [row for row, text in enumerate(self.texts) if text not in gone]
        self.texts = [self.texts[row] for row in kept]
        if not kept:
            self.cache, self._ids, self._real = None, self._ids[:0, :0], self._real[:0, :0]
            return
        index = torch.tensor(kept, device=self._ids.device)
        width = int(self._real[index].sum(1).max())
        self._ids, self._real = self._ids[index, -width:], self._real[index, -width:]
        self.cache.reorder_cache(index)
        for layer in self.cache.layers:
            _trim(layer, width)

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Each row is continued by its token; the logits after it [row, vocab]."""
        for text, token in zip(self.texts, tokens, strict=True):
            text.ids.append(token)
        new = torch.tensor(tokens, device=self._ids.device)[:, None]
        session = self._open()
        if session.where.watched:
            session.where.hold(self.cache, self._ids, self.width, self._real.bool())
        places = {"position_ids": self._real.sum(1, keepdim=True)} if self.places else {}
        self._ids = torch.cat([self._ids, new], 1)
        self._real = torch.cat([self._real, torch.ones_like(new)], 1)
        options = {self._cache_name: self.cache} | places
        output = self.model.hf(new, attention_mask=self._real, use_cache=True, **options)
        session.here.touched.clear()  # nobody asks, and of many tokens it is much
        return output.logits[:, -1].float()

    def _open(self) -> Session:
        """The session of these rows, the innermost of its model: put on again where another has stood in between."""
        scope = innermost(self.model.hf)
        if self._session is not None and (scope is None or scope.session is not self._session):
            self.close()
        if self._session is None:
            prompts = torch.tensor([text.n_prompt for text in self.texts])
            edits = by_row(self.model, [list(text.edits) for text in self.texts])
            self._session = Session(self.model, (), edits, whole=True, prompt_lengths=prompts)
            self._session.__enter__()
        return self._session

    def close(self) -> None:
        """Take the edits off the model: others are due, or none."""
        if self._session is not None:
            session, self._session = self._session, None
            session.here.touched.clear()
            session.__exit__(None, None, None)


class Alone:
    """A text that runs by itself: `step` as of a batch of one. The decoders' rows know which cache is believed."""

    def __init__(self, model: Model, text: Text, n_new: int) -> None:
        call = Call(model, [list(text.ids)], max(n_new, 1), frozenset(), 1, list(text.edits))
        self.text, self.rows = text, Rows(call, [0])

    def start(self) -> Tensor:
        """The prompt's logits [token, vocab]."""
        return self.rows.run(keep=len(self.text.ids)).logits[0]

    def step(self, token: int) -> Tensor:
        self.text.ids.append(token)
        return self.rows.run(torch.tensor([[token]])).last[0]

    def close(self) -> None:
        self.rows.__exit__(None, None, None)


# --- what a cache holds -----------------------------------------------------------------------------------


def _left(x: Tensor, width: int) -> Tensor:
    """[row, column] widened by 0 on the left."""
    return F.pad(x, (width - x.shape[1], 0))


def _join(cache: Any, other: Any, width: int) -> None:
    """Put the rows of another cache below those of `cache`, both as wide as `width` columns."""
    for mine, yours in zip(cache.layers, other.layers, strict=True):
        if _holds_keys(mine):
            stored = max(mine.keys.shape[-2], yours.keys.shape[-2])
            mine.keys = torch.cat([_columns(one.keys, stored) for one in (mine, yours)])
            mine.values = torch.cat([_columns(one.values, stored) for one in (mine, yours)])
        if hasattr(mine, "cumulative_length"):
            mine.cumulative_length = width
        for name in ("conv_states", "recurrent_states"):
            held, more = getattr(mine, name, {}), getattr(yours, name, {})
            held.update({key: torch.cat([held[key], more[key]]) for key in held if isinstance(held[key], Tensor)})


def _trim(layer: Any, width: int) -> None:
    """Forget columns that are padding in every row that is left."""
    if _holds_keys(layer) and layer.keys.shape[-2] > width:
        layer.keys, layer.values = layer.keys[..., -width:, :], layer.values[..., -width:, :]
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = width


def _holds_keys(layer: Any) -> bool:
    keys = getattr(layer, "keys", None)
    return isinstance(keys, Tensor) and keys.ndim == 4


def _columns(x: Tensor, n: int) -> Tensor:
    """[row, head, column, d] widened by 0 on the left of the columns."""
    return F.pad(x, (0, 0, n - x.shape[-2], 0))


# --- whether a model allows it ----------------------------------------------------------------------------


def joins(model: Model) -> str:
    """How texts of this model may run as rows of one batch that come and go: "chunks" where their prompts may also come in pieces,
    "whole" where they may not, "" where they may not at all. Asked of the model once."""
    if "_joins" not in model.__dict__:
        ways = {"chunks": True, "whole": False}
        model.__dict__["_joins"] = next(
            (way for way, pieces in ways.items() if model.causal and _proved(model, pieces)), ""
        )
    return str(model.__dict__["_joins"])


def fits(model: Model, text: Text, n_new: int) -> bool:
    """Whether this text may be a row: its positions mean the same at any length, and no edit of it has a number for each key."""
    by_key = any(
        edit.port.signal == "attn.pattern" and isinstance(edit.value, Tensor) and edit.value.ndim for edit in text.edits
    )
    return bool(joins(model)) and not by_key and serves(model, 1, len(text.ids) + n_new)


@torch.no_grad()
def _proved(model: Model, pieces: bool) -> bool:
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(model.vocab_size, (n,), generator=draw).tolist() for n in (5, 9, 3)]
    tokens = torch.randint(model.vocab_size, (3, 3), generator=draw).tolist()
    texts, rows = [Text(list(ids)) for ids in prompts], Joined(model)
    seen: list[tuple[list[int], Tensor]] = []
    try:
        for at, text in enumerate(texts):
            start = Prefill(model, [text.ids])
            for n in (4, 9) if at == 1 and pieces else (9,):
                start.run(n)
            if type(start.cache) is not theirs.DynamicCache or any(type(x) not in KNOWN for x in start.cache.layers):
                return False
            rows.join([text], start.cache)
            if at == 1:
                logits = rows.step(tokens[0][:2])
                seen.append((list(text.ids), logits[1]))
        for step in (1, 2):
            logits = rows.step(tokens[step][: len(rows.texts)])
            seen += [(list(text.ids), one) for text, one in zip(rows.texts, logits, strict=True)]
            rows.leave([texts[1]])
    except Exception:  # a model's own code, given what it does not take
        return False
    finally:
        rows.close()
    return all(_near(model, ids, logits) for ids, logits in seen)


@torch.no_grad()
def _near(model: Model, ids: list[int], logits: Tensor) -> bool:
    sent = torch.tensor([ids], device=model.device)
    with Session(model, whole=True):
        whole = model.hf(sent, attention_mask=torch.ones_like(sent), use_cache=False).logits[0, -1].double()
    gap = (logits.double() - whole).square().mean().sqrt() / whole.std().clamp(min=1e-30)
    return float(gap) <= (2e-5 if model.dtype in (torch.float32, torch.float64) else 0.25)
