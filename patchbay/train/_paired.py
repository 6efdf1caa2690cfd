"""Paired runs: what a variant changes against its twin, run by run and document by document.

    by_run[contrast, run] = mean over held-out documents of value(arm) - value(other), both of one seed and of the same documents
    effect[contrast]      = mean of by_run over runs

A contrast is an arm against the twin (null arms too), or a variant against a null arm: "beyond" what the null changes. Two doubts, two
readings. `run_low`, `run_high` [contrast, run] and `low`, `high` [contrast] are 95 % bootstraps over documents, drawn once for all runs: would
other texts say the same of these weights? `above`, `below` and `p` [contrast] count runs by sign and are the exact two-sided sign test:
would other seeds? p = min(1, 2 P[Binomial(n, 1/2) >= the larger count]), runs that tie left out, so that n runs give no p below 2^(1-n):
three stop at 0.25, five at 0.0625.

What it does not show: that arms were given equal parameters or compute, which is for those who chose the twin to say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from patchbay import maths
from patchbay.errors import PatchbayError
from patchbay.results.result import Result

FEW = 5  # runs: the fewest whose signs can reach p = 0.0625
AXES = ("condition", "run")


def paired(
    values: Mapping[str, Tensor],
    *,
    twin: str,
    unit: str,
    nulls: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Result:
    """The contrasts of arms, each measured as values[arm] [run, document], or [run] where there is one number for a run.

    Run i of every arm has the same seed and batches; `seeds` names the runs. `twin`: the arm that the others are held against.
    `nulls`: arms that have nothing of what is claimed; each variant is also held against each of them.
    """
    arms = _checked(values, twin, nulls)
    variants = [name for name in arms if name != twin and name not in nulls]
    pairs = [(name, twin) for name in arms if name != twin]
    pairs += [(name, null) for name in variants for null in nulls]
    differences = torch.stack([arms[a] - arms[b] for a, b in pairs])  # [contrast, run, document]
    n_runs, n_documents = differences.shape[1:]
    _, low, high = maths.intervals(
        differences.mean(1).T, n=draws, seed=seed
    )  # over documents, all runs by the same draws
    _, run_low, run_high = maths.intervals(differences.permute(2, 0, 1), n=draws, seed=seed)
    by_run = differences.mean(2)
    above, below = _signs(differences)
    p = [sign_p(a, b) for a, b in zip(above.tolist(), below.tolist(), strict=True)]
    names = [f"{a} - {b}" for a, b in pairs]
    one = ("condition",)
    return Result(
        {
            "effect": (by_run.mean(1), one, unit),
            "low": (low, one, unit),
            "high": (high, one, unit),
            "above": (above, one, "runs"),
            "below": (below, one, "runs"),
            "p": (torch.tensor(p, dtype=torch.float64), one, "probability"),
            "by_run": (by_run, AXES, unit),
            "run_low": (run_low, AXES, unit),
            "run_high": (run_high, AXES, unit),
        },
        coords={"condition": names, "run": list(seeds) if seeds is not None else list(range(n_runs))},
        tables={"arms": [{"arm": name, "mean": float(v.mean()), "unit": unit} for name, v in arms.items()]},
        notes=_told(names, by_run, low, high, above, below, p, unit) + _warned(n_runs, n_documents),
    )


def sign_p(above: int, below: int) -> float:
    """The exact two-sided sign test of so many runs above 0 and so many below; NaN where all tie."""
    n, larger = above + below, max(above, below)
    if not n:
        return math.nan
    return min(1.0, 2.0 * sum(math.comb(n, k) for k in range(larger, n + 1)) / 2.0**n)


def _signs(differences: Tensor) -> tuple[Tensor, Tensor]:
    """Runs above and below 0 of each contrast; what is within the rounding of its documents' sums is neither."""
    mean, size = differences.mean(2), differences.abs().mean(2)
    return (mean > maths.TIES * size).sum(1), (mean < -maths.TIES * size).sum(1)


def _checked(values: Mapping[str, Tensor], twin: str, nulls: Sequence[str]) -> dict[str, Tensor]:
    """The arms as [run, document] in float64, after checking that they are pairs."""
    if unknown := [name for name in (twin, *nulls) if name not in values]:
        raise PatchbayError(f"no arm {', '.join(map(repr, unknown))}; arms are {', '.join(values)}")
    if len(values) < 2 or twin in nulls:
        raise PatchbayError(
            f"arms {', '.join(values)}, twin {twin!r}: two arms or more, the twin no null arm, make a contrast"
        )
    arms = {name: torch.as_tensor(v).detach().double().cpu() for name, v in values.items()}
    arms = {name: v[:, None] if v.ndim == 1 else v for name, v in arms.items()}
    shape = arms[twin].shape
    for name, v in arms.items():
        if v.ndim != 2 or v.shape != shape or not v.numel():
            shapes = f"{tuple(v.shape)} beside {tuple(shape)} of {twin!r}"
            raise PatchbayError(
                f"arm {name!r} is {shapes}: runs are paired by seed and document, [run, document] alike in all arms"
            )
        if not bool(v.isfinite().all()):
            run, document = (~v.isfinite()).nonzero()[0].tolist()
            raise PatchbayError(
                f"arm {name!r}, run {run}, document {document} is {float(v[run, document])}: a run that diverged has no "
                "difference; report the share of such runs, and pair those that are whole in all arms"
            )
    return arms


def _told(
    names: Sequence[str],
    by_run: Tensor,
    low: Tensor,
    high: Tensor,
    above: Tensor,
    below: Tensor,
    p: Sequence[float],
    unit: str,
) -> list[str]:
    """A line for each contrast."""
    n = by_run.shape[1]
    lines = []
    for i, name in enumerate(names):
        ends = maths.between(float(low[i]), float(high[i]), said="95 % over documents ")
        signs = f"{int(above[i])} of {n} runs above 0, {int(below[i])} below"
        lines.append(
            f"{name}: {float(by_run[i].mean()):.3g} {unit}{ends}; {signs}" + (f", p {p[i]:.3g}" if p[i] == p[i] else "")
        )
    return lines


def _warned(n_runs: int, n_documents: int) -> list[str]:
    """What so few runs or documents cannot say."""
    lines = []
    if n_runs < FEW:
        lines.append(
            f"{n_runs} {'run' if n_runs == 1 else 'runs'}: signs alone reach no p below {2.0 ** (1 - n_runs):g}; {FEW} reach "
            f"{2.0 ** (1 - FEW):g}"
        )
    if n_documents == 1:
        lines.append("one number for a run: nothing is said of other documents")
    return lines
