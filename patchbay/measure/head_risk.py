"""Head risk: the error of a linear head on frozen states, by how many directions of them it reads.

    risk(p) = mean over new items of (y - head(x))^2 / Var(y),    head the least-norm fit to p random orthonormal directions of the states

Every other item is fitted on and the rest are predicted. The risk rises up to p = n, the number of items fitted on, where the head passes through all of
them, and falls after (double descent); p = 0 predicts the mean. Table `sizes`: the median risk over `draws` sets of directions, with its quartiles.
`value`: the risk of the head on all directions, mean over the new items; `null`: that of p = 0 on the same items, p by sign flips. For isotropic
states and targets that are noise the risk is 1 + p / (n - p - 1) below n - 1 and 1 + n / (p - n - 1) above n + 1. One forward pass.

Luo et al. 2024, "Investigating the Impact of Model Complexity in Large Language Models". Lower is better. The risk is of this target at the last token; a head
that reads it well says nothing of what the model uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay.measure._items import finite, resolved, rows_of, texts_only
from patchbay.measure._meter import reading
from patchbay.measure._runs import refuse_by_row
from patchbay.model.model import Model
from patchbay.model.states import depth, last_states
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError

LEAST = 8  # items
UNIT = "share of the variance"


@method(paper="lou2024")
def head_risk(
    model: Model,
    items: str | list[dict[str, Any]],
    *,
    sizes: list[int] | None = None,
    site: str = "resid_out",
    draws: int = 20,
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """Error of a least-norm head on the last layer's states at the last token, on all directions and by their number.

    `peak`, the largest median risk, and `peak_size`; table `sizes`.

    `items`: rows with the fields text and target, a number. `sizes`: how many directions are read, 0 to d_model; without, nine from 0 to all, the number of
    items fitted on among them. `site`: which states: resid_out, resid_in, resid_mid, attn.out, mlp.in or mlp.out. `draws`: sets of random
    directions of each size.
    """
    rows, said = rows_of(resolved(model, items), ("text", "target"))
    texts_only(rows, ("text",))
    if len(rows) < LEAST or draws < 1:
        raise PatchbayError(f"{len(rows)} items and draws={draws}: a head needs {LEAST} items or more, and one draw")
    targets = torch.tensor(
        [finite(row.values["target"], f"{row.where}: target is a number") for row in rows], dtype=torch.float64
    )
    if float(targets[::2].std()) == 0 or float(targets[1::2].std()) == 0:
        raise PatchbayError(
            "the targets of one half of the items are all alike: there is nothing to fit, or to predict"
        )
    refuse_by_row(model)
    port = depth(model, site)[1][-1]
    states = last_states(model, model.encode([row.values["text"] for row in rows]), [port], batch_size)[0]
    n, d = len(targets[::2]), states.shape[1]
    tried = _sizes(n, d) if sizes is None else list(sizes)
    if not tried or min(tried) < 0 or max(tried) > d:
        raise PatchbayError(f"sizes={tried}: numbers of directions lie in 0 to {d}, the width of {port}")
    halves = (states[::2], targets[::2], states[1::2], targets[1::2])
    whole, mean = (risks(*halves, size, 1, seed)[0] for size in (d, 0))  # [item]
    table = []
    for size in tried:
        each = risks(*halves, size, draws, seed).mean(1)  # [draw]
        low, middle, high = each.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
        table.append({"size": size, "risk": middle, "quartile_low": low, "quartile_high": high})
    top = max(table, key=lambda row: row["risk"])
    return reading(
        {"per_item": whole},
        UNIT,
        better="lower",
        null_items=mean,
        more={"peak": (top["risk"], (), UNIT), "peak_size": (torch.tensor(float(top["size"])), (), "directions")},
        tables={"sizes": table},
        notes=[*said, f"fitted on {n} items, every other one; {len(targets) - n} predicted, from states at {port}"],
        seed=seed,
    )


def risks(fit: Tensor, y: Tensor, new: Tensor, truth: Tensor, size: int, draws: int, seed: int) -> Tensor:
    """Squared errors over the variance of `truth` [draw, item] of heads on `size` random directions of states [item, d_model]."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(draws):
        said = torch.full_like(truth, float(y.mean()))
        if size:
            noise = torch.randn(fit.shape[1], size, generator=generator, dtype=torch.float64)
            whole = size == fit.shape[1]  # all directions, in whatever basis
            turn = torch.eye(size, dtype=torch.float64) if whole else torch.linalg.qr(noise).Q  # [d_model, size]
            said = said + new @ turn @ (torch.linalg.pinv(fit @ turn) @ (y - y.mean()))
        found.append((truth - said) ** 2 / truth.var(correction=0))
    return torch.stack(found)


def _sizes(n: int, d: int) -> list[int]:
    wanted: Sequence[int] = (0, n // 4, n // 2, 3 * n // 4, n - 1, n, n + 1, 3 * n // 2, 2 * n, d)
    return sorted({size for size in wanted if size <= d})
