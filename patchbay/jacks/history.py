"""What went into a cache of keys, values and states, noted on the cache: so a copy of it (`copy.deepcopy`) is known as well.

The note is one attribute of the cache object, which no model looks at; a cache that takes none, or that ran outside every block, has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from patchbay.edits.edit import Edit
from patchbay.signal.port import PatchbayError

NOTE = "_patchbay_history"


@dataclass(frozen=True, eq=False)
class History:
    """What went into a cache: token ids [prompt, column], which columns are real, the column where the prompt ends, whether
    somebody said that it ends there, each edit with the column from which on it was made, and where (`touched`: by its place among
    them, see `notes.py`)."""

    ids: Tensor
    real: Tensor | None
    prompt_end: int
    said: bool = False
    edits: tuple[tuple[Edit, int], ...] = ()
    touched: dict[int, list[Any]] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> History:
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # on disk a cache has no history

    def notes(self, edits: Sequence[Edit]) -> dict[int, list[Any]]:
        """Where these edits were made so far in what the cache holds, by their places: lists of their own, to be gone on with."""
        place = {id(edit): i for i, (edit, _) in reversed(list(enumerate(self.edits)))}
        known = {i: self.touched.get(place.get(id(edit), -1), ()) for i, edit in enumerate(edits)}
        return {i: list(notes) for i, notes in known.items() if notes}


def note(cache: Any, history: History) -> None:
    if cache is not None:
        with suppress(AttributeError, TypeError):
            setattr(cache, NOTE, history)


def history_of(cache: Any) -> History | None:
    found = getattr(cache, NOTE, None)
    return found if isinstance(found, History) else None


def held(cache: Any, known: History | None, mask: Any, ids: Tensor, placed: Sequence[Edit]) -> int:
    """Tokens in the cache. One without a length (state space) holds what was run with it, or what a mask has before these tokens.

    Raises PatchbayError where it holds something, nobody says how much, and edits count positions."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError, NotImplementedError, IndexError, StopIteration):
        pass
    if not _filled(cache):
        return 0
    if known is not None:
        return known.ids.shape[1]
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > ids.shape[1]:
        return mask.shape[1] - ids.shape[1]
    if placed:
        raise PatchbayError(
            f"{placed[0]}: the {type(cache).__name__} that was given holds tokens that ran before this block and does not say how many; "
            "fill it inside the block, or run the whole prompt"
        )
    return 0


def _filled(cache: Any) -> bool:
    """Whether a cache without a length holds anything; one that does not say is taken to."""
    try:
        return bool(cache.has_previous_state())
    except (AttributeError, ValueError, NotImplementedError, IndexError, TypeError, StopIteration):
        return True
