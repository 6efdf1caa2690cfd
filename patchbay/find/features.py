"""Features: what each feature of a dictionary adds to a task's score, estimated from one gradient.

    effect_i = sum over positions of z_i d_i . g        z_i: its activation, d_i: its decoder row, g: d score / d signal

in the task's unit, positive where the feature speaks for the answer: what the score would lose without the feature if it were linear in the
signal x. With the same of what the dictionary leaves (`error`, e . g) and of its bias (`bias`) all effects sum to x . g (`total`), exactly: x is the
sum of these. One run with its backward pass a batch, for all features at all positions; with `steps` m, g is the mean over m runs in which all
features are scaled by (k - 1/2) / m, and the effects sum to what the score loses without any feature (`gap`), the nearer the more steps.

`exact` features that are active, drawn at random, are also set to 0 one by one: `removed`, and how well the estimate agrees (Spearman). `null_high` is the 95th
percentile over `draws` of the largest effect where the decoder's rows are shuffled among the features. Intervals are 95 % bootstraps over prompts, p
flips signs prompt by prompt, p_adjusted holds the share of false finds.

Nanda 2023, "Attribution Patching: Activation Patching At Industrial Scale", as Marks et al. 2024, "Sparse Feature Circuits", have it of features. An estimate, no
proof, and blind where the score is flat; a large error says that the dictionary leaves out what matters. Follow with `prove.ablation`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.features.dictionary import Dictionary
from patchbay.features.load import named
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError, Port
from patchbay.sweeps.sweep import sweep
from patchbay.tasks.task import Task

WHAT = "find.features"
SHOWN = 50  # cells of the table


@method(paper="nanda2023")
def features(
    model: Model,
    task: Task,
    features: str,
    *,
    steps: int = 1,
    exact: int = 0,
    draws: int = 20,
    batch_size: int = 16,
    seed: int = 0,
) -> Result:
    """The first-order effect of every feature of a dictionary on a task's score, at all positions at once.

    Main variable `effect` [part] with `low` and `high`, `p`, `p_adjusted`, `active` (share of tokens); scalars `error`, `bias`, `total`, `score`, `null_high`,
    with steps above 1 also `gap`, with `exact` also `removed` [part] and `spearman`. The table `cells` has the largest effects of single positions.

    `features`: the folder of a dictionary, or all of one that the model has attached: "L1.features", "L1.mlp_features", "L1.attn_features". `steps`: runs in which all
    features are scaled up from 0; 1 is the plain gradient. `exact`: for how many features the true loss of leaving them out is measured. `draws`: shuffles of the rows.
    """
    view, it, home = named(model, features)
    _check(task, it, steps, exact, draws)
    seen = _Sums(view, task, it, home, steps, batch_size)
    effect, low, high = maths.intervals(seen.effects, seed=seed)
    p = maths.sign_flip_p(seen.effects, seed=seed)
    one = ("part",)
    values: dict[str, Any] = {
        "effect": (effect, one, task.unit),
        "low": (low, one, task.unit),
        "high": (high, one, task.unit),
        "p": (p, one, "probability"),
        "p_adjusted": (maths.benjamini_hochberg(p), one, "probability"),
        "active": (seen.active, one, "share of tokens"),
    }
    scalars = {"error": seen.error, "bias": seen.bias, "total": seen.total, "score": seen.score}
    values |= {name: (float(value.mean()), (), task.unit) for name, value in scalars.items()}
    values["null_high"] = (_shuffled(seen.moment, it.W_dec, draws, seed), (), task.unit)
    notes = [
        f"{int((effect.abs() > values['null_high'][0]).sum())} of {it.n_features} features at {it.place} have a larger effect than any where rows are "
        f"shuffled; what the dictionary leaves has {values['error'][0]:.3g} of {values['total'][0]:.3g}",
        "an estimate: prove it with prove.ablation",
    ]
    if steps > 1:
        without = _score(view, task, [edit.zero(Port(f"{home}.act", it.layer))], batch_size)
        values["gap"] = (float((task.sign * (seen.score - without)).mean()), (), task.unit)
    if exact:
        values |= _removed(view, task, it, home, seen, exact, seed)
    parts = [Part(it.layer, home.removesuffix("s"), i) for i in range(it.n_features)]
    return Result(values, parts=parts, tables={"cells": seen.cells(parts)}, notes=notes)


def _check(task: Task, it: Dictionary, steps: int, exact: int, draws: int) -> None:
    if it.later or it.family:
        raise PatchbayError(
            f"{WHAT}: the features at {it.place} write in several layers, where no one signal is their sum with an error; "
            "prove.ablation takes them away"
        )
    if steps < 1 or exact < 0 or draws < 1:
        raise PatchbayError(f"{WHAT}: steps={steps} and draws={draws} are 1 or more, exact={exact} is 0 or more")
    if task.metric == "kl":
        raise PatchbayError(
            f"{WHAT}: kl is at its lowest in the run itself, where its gradient is 0: task.with_metric(...)"
        )


class _Sums:
    """Over a task's prompts: effects [prompt, feature], error, bias, total and score [prompt], and sum z g [feature, d] of the mean prompt."""

    def __init__(self, model: Model, task: Task, it: Dictionary, home: str, steps: int, size: int) -> None:
        self.home, self.at, self.written = home, Port(f"{home}.act", it.layer), Port(it.writes, it.layer)
        self.left = Port(f"{home}.error", it.layer)
        n = len(task)
        self.effects = torch.zeros(n, it.n_features, dtype=torch.float64)
        self.error, self.total, self.score = torch.zeros(3, n, dtype=torch.float64)
        self.moment = torch.zeros(it.n_features, it.d_out, dtype=torch.float64)
        self.active = torch.zeros(it.n_features, dtype=torch.float64)
        self.best: list[tuple[float, int, int, int]] = []
        for prompts in _batches(n, size):
            self._add(model, task, it, prompts, steps)
        self.active /= sum(map(len, task.clean))
        self.moment /= n
        self.bias = self.total - self.error - self.effects.sum(1)
        self.best.sort(key=lambda cell: -abs(cell[0]))

    def _add(self, model: Model, task: Task, it: Dictionary, prompts: list[int], steps: int) -> None:
        """One batch of prompts."""
        some, ports = task[prompts], [self.at, self.left, self.written]
        slopes: list[Any] = [0.0] * len(ports)
        for k in range(steps):
            edits = [edit.scale(self.at, (k + 0.5) / steps)] if steps > 1 else []
            trace = run(model, [list(ids) for ids in some.clean], taps=ports, edits=edits, logits=some.reads, grad=True)
            with torch.enable_grad():  # whatever the caller's mode
                score = some.score(trace.read(some.reads))
            if not score.requires_grad:
                raise PatchbayError(
                    f"{WHAT}: the metric {task.metric_name} has no gradient; possible are logit_diff, probability, log_probability or a function in torch"
                )
            found = trace.gradient(score.sum(), *ports)
            slopes = [total + g.detach() / steps for total, g in zip(slopes, found, strict=True)]
        if steps > 1:
            trace = run(model, [list(ids) for ids in some.clean], taps=ports, logits=some.reads)
            score = some.score(trace.read(some.reads))
        z, e, x = (trace[port].detach().flatten(2).double() for port in ports)
        real = (torch.arange(z.shape[1]) < trace.lengths[:, None]).to(z.device)[..., None]
        z, e, x = (y.masked_fill(~real, 0.0) for y in (z, e, x))  # padding is NaN
        dz, de, dx = (task.sign * g.flatten(2).double().nan_to_num() for g in slopes)
        cells = z * dz  # [prompt, position, feature]
        self.effects[prompts] = cells.sum(1).cpu()
        self.error[prompts], self.total[prompts] = (e * de).sum((1, 2)).cpu(), (x * dx).sum((1, 2)).cpu()
        self.score[prompts] = score.detach().double().cpu()
        factor = it.to(z.device).factor(x) if it.reads == it.writes else None
        self.moment += torch.einsum("ptf,ptd->fd", z, dx if factor is None else dx * factor).cpu()
        self.active += (z != 0).sum((0, 1)).cpu()
        top = cells.flatten().abs().topk(min(SHOWN, cells.numel())).indices
        places = torch.stack(torch.unravel_index(top, cells.shape), 1)
        self.best += [(float(cells[i, t, f]), prompts[i], t, f) for i, t, f in places.tolist()]

    def cells(self, parts: Sequence[Part]) -> list[dict[str, Any]]:
        """The largest effects of single positions."""
        return [
            {"part": str(parts[f]), "prompt": prompt, "position": t, "effect": effect}
            for effect, prompt, t, f in self.best[:SHOWN]
            if effect != 0
        ]


def _batches(n: int, size: int) -> Iterator[list[int]]:
    for start in range(0, n, size):
        yield list(range(start, min(start + size, n)))


def _shuffled(moment: Tensor, rows: Tensor, draws: int, seed: int) -> float:
    """The 95th percentile over draws of the largest effect with decoder rows of other features."""
    draw, own = torch.Generator().manual_seed(seed), rows.double().cpu()
    largest = [float((moment * own[torch.randperm(len(own), generator=draw)]).sum(1).abs().max()) for _ in range(draws)]
    return float(torch.tensor(largest, dtype=torch.float64).quantile(0.95))


def _score(model: Model, task: Task, edits: list[Any], size: int) -> Tensor:
    """The score of every prompt under edits."""
    found = []
    for prompts in _batches(len(task), size):
        some = task[prompts]
        trace = run(model, [list(ids) for ids in some.clean], edits=edits, logits=some.reads)
        found.append(some.score(trace.read(some.reads)).double().cpu())
    return torch.cat(found)


def _removed(model: Model, task: Task, it: Dictionary, home: str, seen: _Sums, exact: int, seed: int) -> dict[str, Any]:
    """What the score loses without each of some random active features, and the agreement with the estimate."""
    among = (seen.active > 0).nonzero()[:, 0].tolist()
    some = sorted(random.Random(f"features-{seed}").sample(among, min(exact, len(among))))
    lost = torch.full((it.n_features,), torch.nan, dtype=torch.float64)
    if not some:
        return {"removed": (lost, ("part",), task.unit)}
    swept = sweep(model, task, [edit.zero(Port(f"{home}.act", it.layer, i)) for i in some])
    lost[some] = (task.sign * (swept["base"] - swept["value"])).double().mean(1)
    found: dict[str, Any] = {"removed": (lost, ("part",), task.unit)}
    if len(some) > 2:
        found["spearman"] = (maths.spearman(seen.effects.mean(0)[some], lost[some]), (), "correlation")
    return found
