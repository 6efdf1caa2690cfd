"""Where the tokens that run now stand: in their prompts, in what a cache holds, beside padding.

Positions are those of the prompt, however its tokens arrive: padded on either side under a mask, in several calls on one cache,
continued token by token. Inside `generate` the prompt is what it was given. Outside, it ends where the first call
ends, or after `prompt_length` tokens; more tokens on that cache may be the prompt's or generated, and where an edit means other tokens
by that, they are refused. After an end that is known, several more are a new turn, whose end is then the prompt's.

What went into a cache is noted on the cache itself (`history.py`), so that a copy of it is known too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay.edits.edit import Edit
from patchbay.jacks.arguments import cache_among, cache_of, named
from patchbay.jacks.history import History, held, history_of, note
from patchbay.signal.port import PatchbayError
from patchbay.signal.positions import Batch, Role, Token, chosen


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
        self.told = (
            prompt_lengths if lengths is None else None
        )  # of texts that end together, and began in their own time
        self.counted = [e for e in edits if _counts(e)]
        self.watched = [e for e in edits if _counts(e) or e.by_row]
        self.by_token = next((e for e in edits if Token in (type(e.positions), type(e.keys))), None)
        self.by_words = next((e for e in edits if _reads(e)), None)
        self.turned = (
            False  # whether who runs the calls turns queries and keys itself, so that position_ids say nothing
        )
        self.here = Now()

    @property
    def touched(self) -> dict[int, list[Any]]:
        """Where each edit, by its place, was made in the text of the call that is going on, in which it is noted."""
        return {} if self.here.latest is None else self.here.latest.touched

    def end(self, output: Any) -> None:
        """After a call: the cache that it made, where none was given, holds what it ran."""
        if self.here.latest is not None:
            note(cache_of(output), self.here.latest)

    def hold(self, cache: Any, ids: Tensor, prompt_end: int, real: Tensor | None = None) -> None:
        """Told by who moved, repeated or dropped the rows of a cache, or filled it under the same edits: what it holds now [row, column],
        and which of it is no padding."""
        touched = {} if self.here.latest is None else self.here.latest.notes(self.edits)
        note(cache, History(ids, real, prompt_end, True, tuple((edit, 0) for edit in self.edits), touched))

    # ---- inside generate ----

    def generating(self, model: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, its prompt noted."""
        given = named(inner, args, kwargs)
        ids = _ids(given, "input_ids", "inputs")
        if ids is None:
            return inner(*args, **kwargs)
        self._refuse_moved_rows((given, given.get("generation_config"), getattr(model, "generation_config", None)))
        mask, outer = given.get("attention_mask"), self.here.given
        real = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        end = ids.shape[1] if real is None else max(ids.shape[1], real.shape[1])
        if outer is not None and len(outer.ids) == len(ids) and torch.equal(ids[:, : outer.ids.shape[1]], outer.ids):
            end = outer.prompt_end  # the model drafts for itself
        self.here.given = History(ids, real, end, said=True)
        try:
            return inner(*args, **kwargs)
        finally:
            self.here.given = outer

    def _refuse_moved_rows(self, configs: tuple[Any, ...]) -> None:
        """Refuse options under which a row is not the prompt of its place, where an edit goes by rows or tokens."""

        def read(name: str) -> Any:
            found = (c.get(name) if isinstance(c, dict) else getattr(c, name, None) for c in configs)
            return next((value for value in found if value is not None), None) or 1

        by_row = next((e for e in self.edits if e.by_row), None)
        moved = by_row or self.by_token
        if read("num_beams") > 1 and moved is not None:
            raise PatchbayError(
                f"{moved}: beam search reorders the batch, so edits by row or by token do not hold there"
            )
        if read("num_return_sequences") > 1 and by_row is not None:
            raise PatchbayError(
                f"{by_row}: num_return_sequences={read('num_return_sequences')} repeats the prompts, so that rows are no longer those "
                "that the edit names; repeat the prompts yourself and name all their rows"
            )
        if read("guidance_scale") != 1 and self.counted:
            raise PatchbayError(
                f"{self.counted[0]}: guidance_scale runs a second prompt beside the first, in which its positions are not known; "
                "edit everywhere, or leave guidance_scale out"
            )

    # ---- one call ----

    def begin(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], model: Any
    ) -> tuple[Batch, int, int, Tensor | None]:
        """Where the tokens of a call stand; `function`: the forward that is called, which names what is given by place."""
        given = named(function, args, kwargs)
        ids = _ids(given, "input_ids") if "input_ids" in given or not args else args[0]
        if ids is None:
            ids = self._unread(given)
        cache = cache_among(args, kwargs)
        known, mask = history_of(cache), given.get("attention_mask")
        seen = held(cache, known, mask, ids, self.counted)
        end = seen + ids.shape[1]
        known = self._rows_of(known, len(ids)) if known is not None and 0 < seen <= known.ids.shape[1] else None
        if self.counted and self.lengths is None:
            self._refuse_untold(mask, given.get("position_ids"))
        columns = self._all_ids(known, ids, seen)
        real = self._real(mask, known, len(ids), seen, end)
        prompt_end, said = self._prompt_end(known, columns, real, seen, end, model)
        begun = {id(e): column for e, column in known.edits} if known is not None else {}
        made = tuple((e, begun.get(id(e), seen)) for e in self.edits)
        before, touched = self.here.latest, {} if known is None else known.notes(self.edits)
        self.here.latest = History(
            columns, self._known_real(real, len(ids), seen, end), prompt_end, said, made, touched
        )
        note(cache, self.here.latest)
        if (
            seen and before is not None and history_of(cache) is not self.here.latest
        ):  # it takes no notes: the latest run's
            touched.update(before.notes(self.edits))
        batch, column_of = self._batch(columns, real, prompt_end, seen, model)
        if seen:
            self._refuse_held(made, batch, column_of)
        return batch, seen, end, column_of

    def _unread(self, given: dict[str, Any]) -> Tensor:
        """Places of `inputs_embeds`, whose positions are known and whose tokens are not."""
        embeds = given.get("inputs_embeds")
        if embeds is None:
            raise PatchbayError(
                f"the model was called with {', '.join(given) or 'nothing'}: neither input_ids nor inputs_embeds"
            )
        if self.by_words is not None:
            raise PatchbayError(
                f"{self.by_words}: inputs_embeds do not say which tokens they stand for; give input_ids"
            )
        return torch.full(embeds.shape[:2], -1, device=embeds.device)

    def _rows_of(self, known: History, n: int) -> History | None:
        """What went into a cache, for the rows that it has now."""
        if len(known.ids) == n:
            return known
        if len(known.ids) == 1:
            real = None if known.real is None else known.real.expand(n, -1)
            touched = {i: [one.repeated(n) for one in notes] for i, notes in known.touched.items()}
            return History(known.ids.expand(n, -1), real, known.prompt_end, known.said, known.edits, touched)
        if self.watched:
            raise PatchbayError(
                f"{self.watched[0]}: the cache was filled with {len(known.ids)} rows and now runs {n}, and which of them is which is not "
                "known; fill it inside the block as it is used"
            )
        return None

    def _refuse_untold(self, mask: Any, places: Any) -> None:
        """Refuse what does not say which columns hold a prompt's tokens."""
        if self.here.given is not None:
            return
        if isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.ndim != 2):
            raise PatchbayError(
                f"{self.counted[0]}: an attention mask {list(mask) if isinstance(mask, dict) else list(mask.shape)} does not say which "
                "columns are padding; give one [prompt, column], or run the prompts with pb.run"
            )
        real = mask.bool() if isinstance(mask, Tensor) else None
        if isinstance(places, Tensor) and places.ndim == 2 and places.shape[1] > 1 and not self.turned:
            back = places[:, 1:] <= places[:, :-1]
            if real is not None:
                both = real[:, -places.shape[1] :]
                back = back & (both[:, 1:] & both[:, :-1]).to(back.device)
            if bool(back.any()):
                raise PatchbayError(
                    f"{self.counted[0]}: position_ids go back inside a row, as where several prompts are packed into one; give each prompt "
                    "a row of its own"
                )

    def _prompt_end(
        self, known: History | None, ids: Tensor, real: Tensor | None, seen: int, end: int, model: Any
    ) -> tuple[int, bool]:
        """The column where the prompt ends, and whether somebody said so."""
        if self.prompt_length is not None:
            return self.prompt_length, True
        given = self.here.given
        if given is None and (not seen or known is None):
            return end, False
        if (
            given is None and self.lengths is not None and known is not None
        ):  # the caller said how long each prompt of the first call is
            return known.prompt_end, True
        taken = end if given is None else given.prompt_end
        if given is None and known is not None and end - seen == 1:
            taken = known.prompt_end
        if known is None or known.said:  # after an end that is known come generated tokens, one by one, and new turns
            return taken, given is not None or (known is not None and taken == known.prompt_end)
        longest = max(end, taken)
        moved = next((e for e in self.counted if self._depends(e, ids, real, (known.prompt_end, longest), model)), None)
        if moved is None:
            return taken, given is not None
        raise PatchbayError(
            f"{moved}: its positions hang on the prompt's end, which was taken to be after token {known.prompt_end}, and "
            f"{end - seen} more come: give the whole prompt to generate, say where it ends, model.edited(..., prompt_length=n), "
            "or name positions from the start"
        )

    def _depends(self, edit: Edit, ids: Tensor, real: Tensor | None, ends: tuple[int, int], model: Any) -> bool:
        """Whether an edit means other tokens of those that ran where the prompt ends at the second and not at the first."""
        both = [self._batch(ids, real, end, ids.shape[1], model)[0] for end in ends]
        for positions in (edit.positions, edit.keys):
            if positions is None or isinstance(
                positions, Token | Role | Tensor
            ):  # a known chat says by itself where it ends
                continue
            try:
                first, second = (chosen(positions, batch, what=str(edit)) for batch in both)
            except PatchbayError:  # outside the one, inside the other: the same token where it counts from the start
                if min((positions,) if isinstance(positions, int) else positions, default=0) < 0:  # type: ignore[type-var,arg-type]
                    return True
                continue
            if not torch.equal(first, second):
                return True
        return False

    def _all_ids(self, known: History | None, ids: Tensor, seen: int) -> Tensor:
        """Ids of every column so far, -1 where a cache was filled unseen."""
        if not seen:
            return ids.clone()  # a history outlives the call, and the caller may write new tokens into what was given
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
            return Batch(ids, lengths, prompts if self.told is None else self.told, model), None
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
        return Batch(compact, lengths, prompts if self.told is None else self.told, model), place

    def _refuse_held(self, made: Sequence[tuple[Edit, int]], batch: Batch, column_of: Tensor | None) -> None:
        """An edit at a position that the cache held before it came under this edit, up to a column, would not be made."""
        for edit, column in made:
            if not column or not _counts(edit):
                continue
            if _reads(edit) and bool((batch.ids[:, :column] < 0).any()):
                raise PatchbayError(
                    f"{edit}: the cache holds {column} tokens that ran before this block, and which they are is not known; "
                    "fill the cache inside the block, or run the whole prompt"
                )
            everywhere = edit.positions is None or edit.positions == slice(None, None, None)
            if everywhere or edit.port.signal in ("attn.k", "attn.v"):  # keys and values are edited where they are read
                continue
            touched = chosen(edit.positions, batch, what=str(edit)) >= 0
            if column_of is not None:
                touched = touched.gather(1, column_of.clamp(min=0)) & (column_of >= 0)
            if bool(touched[:, :column].any()):
                raise PatchbayError(
                    f"{edit}: the cache already holds {column} tokens, run before this block, and among them positions that the edit "
                    "names; fill the cache inside the block, or run the whole prompt"
                )


def _counts(edit: Edit) -> bool:
    """Whether it depends on where a token stands what the edit does there."""
    return edit.positions is not None or edit.keys is not None or edit.spread


def _reads(edit: Edit) -> bool:
    """Whether the tokens themselves say where the edit is made."""
    return isinstance(edit.positions, Token | Role) or isinstance(edit.keys, Token | Role)


def _ids(given: dict[str, Any], *names: str) -> Tensor | None:
    """The token ids of a call, or places of what was embedded already."""
    ids = next((given[name] for name in names if given.get(name) is not None), None)
    embeds = given.get("inputs_embeds")
    if ids is None and len(names) > 1 and isinstance(embeds, Tensor):  # generate's own prompt, embedded
        return torch.full(embeds.shape[:2], -1, device=embeds.device)
    return ids if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point() else None
