"""Proving: the rows that fit a model are tried in order, and the first that passes is adopted.

A row passes when the self-check holds; one that does not name the model's type has to pass the proofs of structure as well. Where
attention does not ask transformers' interface, the row is tried once more with attention read at the operators that it calls. A
row that is right in all but how its weights lie is adopted when no other is: those weights are refused where they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from patchbay.errors import PatchbayError
from patchbay.model.families import Family
from patchbay.model.proofs import graph_error
from patchbay.model.versions import prove_unseen

# what a row that does not fit a model raises when it is tried
UNFIT = (RuntimeError, TypeError, AttributeError, AssertionError, KeyError, IndexError, PatchbayError)


def prove(model: Any, rows: Iterator[Family], given: bool) -> None:
    """Adopt the first row that passes. `given`: the row was described by hand. Raises PatchbayError when none passes."""
    failed: list[str] = []
    unread: Family | None = None  # right in all but how its weights lie
    for row in _ways(model, rows, failed):
        named = getattr(model.config, "model_type", "") in row.model_types
        why = str(model.check) if not model.check.passed else None if named else graph_error(model)
        if why is None and (named or given or not model.check.weights):
            prove_unseen(model)
            return
        unread = unread or (row if why is None else None)
        failed.append(f"{row.name}: {why}")
    if unread is None:
        raise PatchbayError(
            f"{type(model.hf).__name__}: the self-check failed, so nothing that Patchbay showed of this model could be trusted. "
            + "; ".join(failed[:3])
            + ". If the paths of the family row are wrong for it, pass family=patchbay.Family(...)"
        )
    model._adopt(unread)
    prove_unseen(model)


def _ways(model: Any, rows: Iterator[Family], failed: list[str]) -> Iterator[Family]:
    """Rows that could be adopted, each adopted as it is given out; of the others, why not is added to `failed`."""
    for row in rows:
        try:
            model._adopt(row)
        except UNFIT as error:
            inline = row.attention == "interface" and _inline(error)
            if not inline:
                failed.append(f"{row.name}: {type(error).__name__}: {error}")
                continue
            row = replace(row, attention="operators")
            try:
                model._adopt(row)
            except UNFIT as again:
                failed.append(
                    f'{row.name}: its attention neither asks transformers\' attention interface nor, as attention="operators" of '
                    f"a family row reads it, multiplies queries with keys, takes a softmax and multiplies with values "
                    f"({type(again).__name__}: {again})"
                )
                continue
        yield row


def _inline(error: BaseException) -> bool:
    """Whether a row failed because attention never asked the interface: no config that names it, or no queries seen."""
    unseen = isinstance(error, KeyError) and "attn." in str(error)
    return unseen or (
        isinstance(error, AttributeError) and ("'config'" in str(error) or "_attn_implementation" in str(error))
    )
