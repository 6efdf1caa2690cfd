"""What a user gives as edits (edits, knobs and lists of them, as one flat list of edits in order), as ports (Ports and their text) and
as prompts, which run together where they have one length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from patchbay.edits.edit import Edit
from patchbay.signal.port import PatchbayError, Port, as_port

if TYPE_CHECKING:
    from patchbay.jacks.modelled import Modelled as Model


def flat_edits(
    given: Sequence[Any], strength: float | Sequence[float] | None = None, model: Model | None = None
) -> list[Edit]:
    """Edits from edits and knobs (anything with `edits_at(strength)`), in order; a `KnobConflict` warns where it matters.

    With `model`, a knob that was made on other weights is refused."""
    if not given and strength is None:
        return []
    items = list(_flat(given))
    knobs = [item for item in items if not isinstance(item, Edit)]
    for knob in knobs if model is not None else ():
        if hasattr(knob, "check"):  # others that have `edits_at` know nothing of weights
            knob.check(model)
    several = isinstance(strength, Sequence) and not isinstance(strength, str)
    strengths: list[Any] = list(strength) if several else [strength] * len(knobs)  # type: ignore[arg-type]
    if len(strengths) != len(knobs):
        raise PatchbayError(
            f"{len(strengths)} strengths were given for {len(knobs)} knobs: one number, or one for each"
        )
    telling = [i for i, knob in enumerate(knobs) if hasattr(knob, "warn_of_conflicts")]
    if len(telling) > 1:
        first, *others = (knobs[i] for i in telling)
        first.warn_of_conflicts(others, [strengths[i] for i in telling])
    left = iter(strengths)
    return [made for item in items for made in ([item] if isinstance(item, Edit) else item.edits_at(next(left)))]


def _flat(given: Sequence[Any]) -> Iterator[Any]:
    """Edits and knobs of nested lists, in order."""
    if not isinstance(given, Iterable):
        raise PatchbayError(f"expected edits or knobs, got {type(given).__name__}")
    for item in given:
        if isinstance(item, Edit) or hasattr(item, "edits_at"):
            yield item
        elif isinstance(item, list | tuple):
            yield from _flat(item)
        else:
            said = f": {item.notes[0]}" if getattr(item, "notes", ()) else ""
            raise PatchbayError(f"expected edits or knobs, got {type(item).__name__}{said}")


def flat_ports(given: Any, model: Model) -> list[Port]:
    """Ports from Ports and their text, one alone or several; the keys and values of a query head are those of its group."""
    items = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    return [model.port(item) if isinstance(item, str) else as_port(item) for item in items]


def by_length(prompts: Sequence[Sequence[int]], size: int | None = None) -> list[list[int]]:
    """Places of prompts that run as one batch: of one length, the shortest first, at most `size` at a time."""
    found = []
    for length in sorted(set(map(len, prompts))):
        same = [i for i, ids in enumerate(prompts) if len(ids) == length]
        found += [same[start : start + (size or len(same))] for start in range(0, len(same), size or len(same))]
    return found
