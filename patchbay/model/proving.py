"""Proving: the rows that fit a model are tried in order, and the first that passes is adopted.

A row passes when the self-check holds; one that does not name the model's type, or meets code of its name that is not the
transformers' that the row was proved on, has to pass the proofs of structure as well. Where
attention does not ask transformers' interface, the row is tried once more with attention read at the operators that it calls. A
row that is right in all but how its weights lie is adopted when no other is: those weights are refused where they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from patchbay.errors import PatchbayError
from patchbay.model.families import Family
from patchbay.model.linear import overridden
from patchbay.model.proofs import ahead_error, graph_error
from patchbay.model.stream import refuse_normed
from patchbay.model.versions import prove_unseen

# what a row that does not fit a model raises when it is tried
UNFIT = (RuntimeError, TypeError, AttributeError, AssertionError, KeyError, IndexError, PatchbayError)


def prove(model: Any, rows: Iterator[Family], given: bool) -> None:
    """Adopt the first row that passes. `given`: the row was described by hand. Raises PatchbayError when none passes."""
    kind = model.device.type
    if torch.is_autocast_enabled(kind):  # the caller's: it rounds what is compared
        with torch.autocast(kind, enabled=False):
            prove(model, rows, given)
        return
    failed: list[str] = []
    unread: Family | None = None  # right in all but how its weights lie
    for row in _ways(model, rows, failed):
        mine = getattr(model.config, "model_type", "") in row.model_types
        named = mine and as_published(model)
        why = str(model.check) if not model.check.passed else None if named else graph_error(model)
        if why is None and (mine or given or not (model.check.weights or model.check.apart)):
            _look_ahead(model, named)
            prove_unseen(model)
            return
        unread = unread or (row if why is None else None)
        failed.append(f"{row.name}: {why}")
    if unread is None:
        refuse_normed(model.hf)
        raise PatchbayError(
            f"{type(model.hf).__name__}: the self-check failed, so nothing that Patchbay showed of this model could be trusted. "
            + "; ".join(failed[:3])
            + ". If the paths of the family row are wrong for it, pass family=patchbay.Family(...)"
        )
    model._adopt(unread)
    _look_ahead(model, False)
    prove_unseen(model)


def _look_ahead(model: Any, named: bool) -> None:
    """Of code that is not the row's own, ask of more tokens than the self-check has whether they see later ones."""
    if not named and model.check.causal:
        model.check = replace(model.check, ahead=max(model.check.ahead, ahead_error(model)))


def as_published(model: Any) -> bool:
    """Whether the model runs transformers' own code: its class, its layers and their blocks are defined there, and nobody put
    another forward on one of its modules. Linear maps inside may be anybody's: they are asked what they compute."""
    blocks = [block for at in model.modules for block in (at.layer, at.attn, at.mlp, at.norm_attn, at.norm_mlp)]
    classes = {type(block) for block in (model.hf, model.final_norm_module, *blocks) if block is not None}
    own = all(kind.__module__.split(".")[0] in ("transformers", "torch") or _linear(kind) for kind in classes)
    return own and not any(overridden(module) for module in model.hf.modules())


def _linear(kind: type) -> bool:
    """A block that is a linear map itself, as OPT's MLP is."""
    return issubclass(kind, nn.Linear)


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
