"""What a sweep's edits do, strongest first: each edit's mean score over prompts, less that of the unedited model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LISTED = 100


def ranking(values: Tensor, base: Tensor, edits: list[str], n: int = LISTED) -> list[dict[str, Any]]:
    """Rows of edit, effect, value and base, by the size of the effect. `values` [edit, prompt], `base` [prompt]; prompts without
    a score in either are left out of both."""
    change = effects(values, base)
    measured = (~change.isnan()).nonzero()[:, 0]
    order = measured[change[measured].abs().argsort(descending=True, stable=True)][:n]
    return [
        {
            "edit": edits[i],
            "effect": float(change[i]),
            "value": float(values[i].double().nanmean()),
            "base": float(base.double().nanmean()),
        }
        for i in order.tolist()
    ]


def effects(values: Tensor, base: Tensor) -> Tensor:
    """Mean over prompts of value minus base, [edit]."""
    return (values.double() - base.double()).nanmean(1) if values.shape[1] else torch.full((len(values),), torch.nan)
