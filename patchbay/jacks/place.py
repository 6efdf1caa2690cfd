"""Where the tokens that run now stand: in their prompts, in what a cache holds, beside padding.

Positions are those of the prompt, however its tokens arrive: padded on either side under a mask, in several calls on one cache,
continued token by token. Inside `generate` the prompt is what it was given. Outside, it ends where the first call
ends, or after `prompt_length` tokens; more tokens on that cache, where an edit counts from the prompt's end and nobody said where
that is, are refused. After generated tokens, several more are a new turn, whose end is then the prompt's.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchbay.edits.edit import Edit
from patchbay.jacks.arguments import CACHE_NAMES, cache_among
from patchbay.signal.port import PatchbayError
from patchbay.signal.positions import Batch, Token, chosen, counts_from_end


@dataclass
class History:
    """What went into a cache: token ids [prompt, column], which columns are real, and the column where the prompt ends."""

    ids: Tensor
    real: Tensor | None
    prompt_end: int


class Now(threading.local):
    """The call that is going on, of each thread its own. `given`: inside `generate`, the prompt that it was given."""

    def __init__(self) -> None:
        self.latest: History | None = None
        self.given: History | None = None


class Place:
    """Follows the calls of one session. `begin` gives the batch, where the tokens start and end, and their columns' positions."""

    def __init__(
        self,
        edits: Sequence[Edit],
        lengths: Tensor | None,
        prompt_length: int | None,
        prompt_lengths: Tensor | None = None,
    ) -> None:
        self.edits, self.lengths, self.prompt_length = edits, lengths, prompt_length
        self.prompts = lengths if prompt_lengths is None else prompt_lengths
        self.positioned = any(e.positions is not None or e.keys is not None or e.spread for e in edits)
        ends = [e for e in edits if counts_from_end(e.positions) or counts_from_end(e.keys)]
        self.from_end: Edit | None = next(iter(ends), None)
        self.histories: weakref.WeakKeyDictionary[Any, History] = weakref.WeakKeyDictionary()
        self.here = Now()

    def end(self, output: Any) -> None:
        """After a call: the cache that it made, where none was given, holds what it ran."""
        cache = next((found for name in CACHE_NAMES if (found := getattr(output, name, None)) is not None), None)
        if cache is not None and self.here.latest is not None and not isinstance(cache, tuple):
            self.histories[cache] = self.here.latest

    def hold(self, cache: Any, ids: Tensor, prompt_end: int) -> None:
        """Told by who moved, repeated or dropped the rows of a cache, or filled it under the same edits: what it holds now [row, column]."""
        self.histories[cache] = History(ids, None, prompt_end)

    def generating(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, its prompt noted."""
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            return inner(*args, **kwargs)
        beams = kwargs.get("num_beams") or getattr(kwargs.get("generation_config"), "num_beams", None) or 1
        moved = next((e for e in self.edits if e.by_row or isinstance(e.positions, Token)), None)
        if beams > 1 and moved is not None:
            raise PatchbayError(
                f"{moved}: beam search reorders the batch, so edits by row or by token do not hold there"
            )
        mask, outer = kwargs.get("attention_mask"), self.here.given
        real = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        end = ids.shape[1] if real is None else max(ids.shape[1], real.shape[1])
        self.here.given = History(ids, real, end)
        try:
            return inner(*args, **kwargs)
        finally:
            self.here.given = outer

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], model: Any) -> tuple[Batch, int, int, Tensor | None]:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:  # inputs_embeds: positions are known, tokens are not
            embeds = kwargs["inputs_embeds"]
            ids = torch.full(embeds.shape[:2], -1, device=embeds.device)
        cache = cache_among(args, kwargs)
        known = self.histories.get(cache) if cache is not None else None
        if known is not None and len(known.ids) != len(ids):
            known = None
        seen = _held(cache, known)
        end = seen + ids.shape[1]
        if known is not None and known.ids.shape[1] < seen:
            known = None
        prompt_end = self._prompt_end(known, seen, end)
        columns = self._all_ids(known, ids, seen)
        real = self._real(kwargs.get("attention_mask"), known, len(ids), seen, end)
        self.here.latest = History(columns, self._known_real(real, len(ids), seen, end), prompt_end)
        if cache is not None:
            self.histories[cache] = self.here.latest
        batch, column_of = self._batch(columns, real, prompt_end, seen, model)
        if seen and known is None and self.positioned:
            self._refuse_held(batch, column_of, seen)
        return batch, seen, end, column_of

    def _prompt_end(self, known: History | None, seen: int, end: int) -> int:
        if self.prompt_length is not None:
            return self.prompt_length
        if self.here.given is not None:
            return self.here.given.prompt_end
        if not seen or known is None:
            return end
        if self.lengths is not None:  # the caller said how long each prompt of the first call is
            return known.prompt_end
        after = known.ids.shape[1] > known.prompt_end and seen > known.prompt_end
        if self.from_end is None or after:  # after generated tokens several more are a new turn
            return known.prompt_end if end - seen == 1 else end
        raise PatchbayError(
            f"{self.from_end}: its positions count from the prompt's end, which was taken to be after token {known.prompt_end}, and "
            f"{end - seen} more come: give the whole prompt to generate, say where it ends, model.edited(..., prompt_length=n), "
            "or name positions from the start"
        )

    def _all_ids(self, known: History | None, ids: Tensor, seen: int) -> Tensor:
        """Ids of every column so far, -1 where a cache was filled unseen."""
        if not seen:
            return ids
        given = self.here.given
        if known is not None:
            before = known.ids[:, :seen]
        elif given is not None and given.ids.shape[1] >= seen and len(given.ids) == len(ids):
            before = given.ids[:, :seen]
        else:
            before = ids.new_full((len(ids), seen), -1)
        return torch.cat([before.to(ids.device), ids], 1)

    def _real(self, mask: Any, known: History | None, n: int, seen: int, end: int) -> Tensor | None:
        """Which columns hold tokens and which padding, bool [prompt, column]; None where all hold tokens."""
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= end:
            real = mask[:, :end].bool().cpu()
        elif known is not None and known.real is not None:
            real = torch.cat([known.real[:, :seen], torch.ones(n, end - seen, dtype=torch.bool)], 1)
        elif self.here.given is not None and self.here.given.real is not None and n % len(self.here.given.real) == 0:
            start = self.here.given.real.cpu().repeat_interleave(n // len(self.here.given.real), 0)
            real = torch.nn.functional.pad(start, (0, max(0, end - start.shape[1])), value=True)[:, :end]
        else:
            return None
        return None if bool(real.all()) else real

    def _known_real(self, real: Tensor | None, n: int, seen: int, end: int) -> Tensor | None:
        """What later calls on this cache need to know of padding: without a mask, the lengths of the first call say it."""
        if real is None and not seen and self.lengths is not None and len(self.lengths) == n:
            return torch.arange(end) < self.lengths[:, None]
        return real

    def _batch(
        self, ids: Tensor, real: Tensor | None, prompt_end: int, seen: int, model: Any
    ) -> tuple[Batch, Tensor | None]:
        n, end = ids.shape
        if real is None:
            full = torch.full((n,), end)
            lengths = full if seen or self.lengths is None else self.lengths
            prompts = torch.full((n,), prompt_end) if seen or self.prompts is None else self.prompts
            if self.prompt_length is None and self.here.given is None:
                prompts = prompts.clamp(max=end)
            return Batch(ids, lengths, prompts, model), None
        place = (real.long().cumsum(1) - 1).masked_fill(~real, -1)  # [prompt, column]
        lengths = real.sum(1)
        compact = ids.new_zeros(n, end)
        row, column = real.nonzero(as_tuple=True)
        compact[row.to(ids.device), place[row, column].to(ids.device)] = ids[row.to(ids.device), column.to(ids.device)]
        whole = real
        if (
            prompt_end > end and self.here.given is not None and self.here.given.real is not None
        ):  # the rest of the prompt's mask
            whole = self.here.given.real.cpu().repeat_interleave(n // len(self.here.given.real), 0)
        prompts = whole[:, :prompt_end].sum(1) + max(0, prompt_end - whole.shape[1])
        return Batch(compact, lengths, prompts, model), place

    def _refuse_held(self, batch: Batch, column_of: Tensor | None, seen: int) -> None:
        """An edit at a position that the cache held before it came into this block would not be made."""
        for edit in self.edits:
            everywhere = edit.positions is None or edit.positions == slice(None, None, None)
            if everywhere or edit.port.signal in ("attn.k", "attn.v"):  # keys and values are edited where they are read
                continue
            touched = chosen(edit.positions, batch, what=str(edit)) >= 0
            if column_of is not None:
                touched = touched.gather(1, column_of.clamp(min=0)) & (column_of >= 0)
            if bool(touched[:, :seen].any()):
                raise PatchbayError(
                    f"{edit}: the cache already holds {seen} tokens, run before this block, and among them positions that the edit "
                    "names; fill the cache inside the block, or run the whole prompt"
                )


def _held(cache: Any, known: History | None) -> int:
    """Tokens in the cache. One without a length (state space) holds what was run with it."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError, NotImplementedError, IndexError, StopIteration):
        return 0 if known is None else known.ids.shape[1]
