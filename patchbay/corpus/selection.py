"""Selection (GOT-D): the texts of a pool that bring it nearest to a target, by the gradient of a transport cost.

    OT(pool, target) with dual potential f;   g_i = f_i - sum_{j != i} f_j / (N - 1);   the k texts of lowest g are taken

g_i is how the cost changes as mass moves from all others to text i: more of what is low brings the pool nearer to the target. The plan is
entropic (Sinkhorn, on logarithms): its potentials are unique up to a constant, which g does not see; those of the exact optimum with even weights
on both sides are not, so that an exact solver's gradient may be far off. `reach` is the regularisation, as a share of the mean cost. `pick` takes the states of pool and
target together: states that are centred on means of their own no longer tell the one from the other.

Kang et al. 2024, "Get more for less: Principled Data Selection for Warming Up Fine-Tuning in LLMs". Nearest neighbours of the target answer
another question: they take the commonest kind of it again and again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay.corpus.reading import no_text
from patchbay.errors import PatchbayError
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.signal.port import Port


def states(model: Model, texts: Sequence[Any], *, layer: int | None = None, batch_size: int = 32) -> Tensor:
    """The mean stream of each text after a layer (the middle one without), less the mean of all that are given, float64 [text, d_model]."""
    texts, at = list(no_text(texts)), model.n_layers // 2 if layer is None else layer
    port, found = Port("resid_out", at), []
    for i in range(0, len(texts), batch_size):
        trace = run(model, list(texts[i : i + batch_size]), taps=[port], logits="last")
        real = torch.arange(trace.ids.shape[1])[None] < trace.lengths[:, None].cpu()
        streams = torch.where(real[..., None], trace[port].double().cpu(), 0.0)  # nothing is known of padding
        found.append(streams.sum(1) / real.sum(1, keepdim=True))
    if not found:
        raise PatchbayError("no texts to select from")
    rows = torch.cat(found)
    return rows - rows.mean(0)


def transport(
    cost: Tensor, a: Tensor, b: Tensor, *, reach: float = 0.05, steps: int = 2000, exact: float = 1e-9
) -> tuple[Tensor, Tensor]:
    """The entropic transport cost between weights a [n] and b [m] under cost [n, m], and the potential f [n] of the first.

    The cost is the dual's value, whose gradient by a, along changes that keep the sum, is f.
    """
    if cost.ndim != 2 or cost.shape != (len(a), len(b)) or not min(cost.shape):
        raise PatchbayError(f"a cost of shape {tuple(cost.shape)} between {len(a)} and {len(b)} texts")
    eps = reach * float(cost.mean())
    if not eps > 0 or bool((a <= 0).any()) or bool((b <= 0).any()):
        raise PatchbayError(
            f"reach={reach} of a mean cost of {float(cost.mean()):.3g}, weights of {float(min(a.min(), b.min())):.3g}: all above 0"
        )
    log_a, log_b = a.log(), b.log()
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(steps):
        g = -eps * torch.logsumexp(log_a[:, None] + (f[:, None] - cost) / eps, 0)
        new = -eps * torch.logsumexp(log_b[None] + (g[None] - cost) / eps, 1)
        moved, f = float((new - f).abs().max()), new
        if moved < exact * float(cost.mean()):
            break
    return (a * f).sum() + (b * g).sum(), f


def gradient(f: Tensor) -> Tensor:
    """How the cost changes as mass moves to each text from all others alike, from the potential [n]."""
    return f - (f.sum() - f) / (len(f) - 1)


def select(pool: Tensor, target: Tensor, k: int, *, reach: float = 0.05) -> list[int]:
    """Places of the k texts of the pool, states [n, d], of lowest gradient towards the target, states [m, d]; the lowest first."""
    if (
        pool.ndim != 2
        or target.ndim != 2
        or pool.shape[1] != target.shape[1]
        or not 1 <= k <= len(pool)
        or len(pool) < 2
    ):
        raise PatchbayError(
            f"{k} of a pool {tuple(pool.shape)} for a target {tuple(target.shape)}: states of one width, two texts or more, and at most all of them"
        )
    cost = torch.cdist(pool.double(), target.double()).square()
    even = [torch.full((len(one),), 1.0 / len(one), dtype=torch.float64) for one in (pool, target)]
    _, f = transport(cost, *even, reach=reach)
    order: list[int] = gradient(f).argsort(stable=True)[:k].tolist()
    return order


def pick(
    model: Model, pool: Sequence[Any], target: Sequence[Any], k: int, *, layer: int | None = None, reach: float = 0.05
) -> list[int]:
    """Places of the k texts of a pool that bring it nearest to the texts of a target, by the model's states after a layer (the middle one without); the lowest gradient first."""
    pool, target = list(no_text(pool)), list(no_text(target))
    if not pool or not target:
        raise PatchbayError(f"a pool of {len(pool)} texts, a target of {len(target)}: one or more of each")
    both = states(model, pool + target, layer=layer)
    return select(both[: len(pool)], both[len(pool) :], k, reach=reach)
