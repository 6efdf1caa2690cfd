"""What an edit does to a signal, and where: rows of a batch, values by row and position, cuts of attention by key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from patchbay.edits.edit import Edit
from patchbay.signal.port import PatchbayError
from patchbay.signal.positions import Batch, chosen


def row_mask(edit: Edit, n_prompts: int) -> Tensor:
    """int64 [prompt]: -1 where the edit leaves the prompt alone, else the ordinal of the prompt among `rows`."""
    if edit.rows is None:
        return torch.arange(n_prompts)
    bad = [row for row in edit.rows if not 0 <= row < n_prompts]
    if bad:
        raise PatchbayError(f"{edit}: row {bad[0]} asked, the batch has prompts 0..{n_prompts - 1}")
    out = torch.full((n_prompts,), -1)
    out[torch.tensor(edit.rows)] = torch.arange(len(edit.rows))
    return out


def acts_on(edit: Edit, batch: Batch) -> Tensor:
    """bool [prompt, position]: where the edit acts (for `block`, the queries that it cuts from some key), or where its probe decides."""
    places = (chosen(edit.positions, batch, what=str(edit)) >= 0) & (row_mask(edit, len(batch.ids)) >= 0)[:, None]
    if edit.op == "block":
        keys = chosen(edit.keys, batch, what=str(edit)) >= 0
        places = places & (keys.long().cumsum(1) > 0)  # a query sees the keys at and before it
    return places


def for_prompts(edit: Edit, prompts: Sequence[int], n_prompts: int, width: int) -> Edit | None:
    """The edit as it acts on some prompts of a batch of `n_prompts`, run by themselves in a batch `width` tokens wide.

    Rows, masks, values by row and attention by key are cut to what those prompts need; None where it names none of them.
    """
    if not edit.by_row and not isinstance(edit.positions, Tensor) and not isinstance(edit.keys, Tensor):
        return _cut_keys(edit, width)
    n_rows = n_prompts if edit.rows is None else len(edit.rows)
    ordinals = row_mask(edit, n_prompts)[torch.tensor(prompts)]  # [prompt], -1 where the edit leaves it alone
    kept = (ordinals >= 0).nonzero()[:, 0]
    if not len(kept):
        return None
    value = edit.value
    if isinstance(value, Tensor) and edit.spread and value.ndim == len(edit.port.axes) and len(value) > 1:
        if len(value) != n_rows:
            raise PatchbayError(f"{edit}: a value for each of {len(value)} rows was given, the edit has {n_rows}")
        value = value[ordinals[kept].to(value.device)]
    masks = [
        mask[list(prompts) if len(mask) > 1 else [0], :width] if isinstance(mask, Tensor) else mask
        for mask in (edit.positions, edit.keys)
    ]
    rows = None if edit.rows is None else tuple(kept.tolist())
    return _cut_keys(replace(edit, value=value, positions=masks[0], rows=rows, keys=masks[1]), width)


def _cut_keys(edit: Edit, width: int) -> Edit:
    """An edit of a pattern may have a number for each key: it keeps those of the keys that are there."""
    value = edit.value
    if (
        edit.port.signal != "attn.pattern"
        or not isinstance(value, Tensor)
        or not value.ndim
        or value.shape[-1] <= width
    ):
        return edit
    value = value[:width, :width] if edit.op == "project" else value[..., :width]
    return replace(edit, value=value)


def apply(edit: Edit, signal: Tensor, ordinal: Tensor | None, row: Tensor | None) -> Tensor:
    """The edited signal. `signal` [prompt, position, ...features]; `ordinal` [prompt, position] and `row` [prompt] as from
    `chosen` and `row_mask`, None where everything is touched. Never changes `signal` in place."""
    value = value_for(edit, signal, ordinal, row)
    if edit.op == "replace" or edit.op == "mean":
        new = value.expand_as(signal)
    elif edit.op == "add":
        new = signal + value
    elif edit.op == "scale":
        new = signal * value
    elif edit.op == "zero":
        new = torch.zeros_like(signal)
    elif edit.op == "project":
        new = signal @ value.T  # the projector is symmetric; .T for the reader: features are rows
    else:
        raise PatchbayError(f"{edit.op} is not applied to a signal's values")
    if ordinal is None:
        return new
    touched = ordinal >= 0 if row is None else (ordinal >= 0) & (row >= 0)[:, None]
    return torch.where(touched.reshape(touched.shape + (1,) * (signal.ndim - 2)), new, signal)


def value_for(edit: Edit, signal: Tensor, ordinal: Tensor | None, row: Tensor | None) -> Tensor:
    """The edit's value in the signal's dtype and device, shaped to broadcast against [prompt, position, ...features]."""
    if not isinstance(edit.value, Tensor):
        return signal.new_tensor(0.0 if edit.value is None else float(edit.value))
    value = edit.value.to(device=signal.device, dtype=signal.dtype)
    if edit.op == "project":
        if value.shape[0] != signal.shape[-1]:
            raise PatchbayError(
                f"{edit}: directions have {value.shape[0]} features, {edit.port} has {signal.shape[-1]}"
            )
        return value
    features = tuple(signal.shape[2:])
    extra = value.ndim - len(features)
    feature_shape = value.shape[max(extra, 0) :]
    fits = all(a in (1, b) for a, b in zip(reversed(feature_shape), reversed(features), strict=False))
    if extra > 2 or not fits:
        raise _wrong_shape(edit, signal)
    if extra <= 0:
        return value
    n_rows = len(edit.rows) if edit.rows is not None else signal.shape[0]
    if extra == 2 and value.shape[0] not in (1, n_rows):
        raise _wrong_shape(edit, signal)
    value = value if extra == 2 else value[None]  # [row, selected position, ...features]
    row_index = torch.zeros(signal.shape[0], dtype=torch.long) if value.shape[0] == 1 else row
    if value.shape[1] == 1:
        return value if value.shape[0] == 1 else value[_known(row_index, edit).clamp(min=0)]
    ordinal = _known(ordinal, edit)
    if int(ordinal.max()) >= value.shape[1]:
        raise _wrong_shape(edit, signal, int(ordinal.max()) + 1)
    rows = _known(row_index, edit).clamp(min=0)[:, None].to(ordinal.device)
    return value[rows, ordinal.clamp(min=0)]  # [prompt, position, ...features]


def _known(index: Tensor | None, edit: Edit) -> Tensor:
    if index is None:
        raise PatchbayError(f"{edit}: a value for each row or position needs their index")
    return index


def _wrong_shape(edit: Edit, signal: Tensor, n_selected: int | None = None) -> PatchbayError:
    features = list(signal.shape[2:])
    found = list(edit.value.shape) if isinstance(edit.value, Tensor) else edit.value
    rows = len(edit.rows) if edit.rows is not None else signal.shape[0]
    places = n_selected if n_selected is not None else "n_positions"
    return PatchbayError(
        f"{edit}: value has shape {found}; {edit.port} takes {features}, [{places}, *{features}] for each selected position, "
        f"or [{rows}, 1 or {places}, *{features}] for each row"
    )
