"""DAS, distributed alignment search: the subspace of a signal that, taken from another run, brings that run's value of a variable over.

    x <- x + (x_source - x) R^T M R

R is orthogonal and learned, M keeps its first `dims` rows; without `dims` a boundary b is learned too (boundless): M_i = sigmoid((b d_model - i) / T)
with a temperature T that falls, and 0.1 b is added to the loss; in the end the first round(b d_model) rows are kept whole. The loss is the mean of - log p(right
answer) of the base run under the swap, by Adam, on half of the prompts; the rest is held out and reported. Each prompt's twin (`corrupted`) is the base, the
prompt itself (`clean`) the source, and `right` what the base should say with the source's value.

`accuracy` [condition], right over the whole vocabulary: `swapped`; `base`, nothing swapped; `whole`, all of x; `random`, a random subspace of as many
dimensions; `shuffled`, a subspace trained on answers dealt anew among the prompts; `untrained`, the search on a network with new weights. A search that
does as well on the last two found its own strength and not the model's variable. Cost: 3 `steps` runs with their backward passes.

`direction` [feature, d_model] holds the rows that are kept, orthonormal: `turn.project(at, directions)` removes the subspace as a knob, and
`pb.project(at, directions)` with `pb.add(at, value)` sets it.

Geiger, Wu, Potts, Icard and Goodman 2024, "Finding Alignments Between Interpretable Causal Variables and Distributed Neural Representations"; the boundary
after Wu et al. 2023, "Interpretability at Scale". That a subspace can be used in this way does not show that it is the one that is used: `dims` =
d_model always swaps everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from patchbay import maths
from patchbay.edits import edit
from patchbay.edits.edit import Edit
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.prove._cells import batches, check_twins
from patchbay.results.method import method, seeded
from patchbay.results.result import Result
from patchbay.results.untrained import untrained
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.task import Task

RATE = 0.4  # over the root of the width, falling to 0 in a straight line
PENALTY = 0.1  # of the boundary, as a share of the width, in nats
TEMPERATURES = (10.0, 0.1)  # of the boundary, in dimensions
SHARE = "share of prompts"


@method(paper="geiger2024")
def das(
    model: Model,
    task: Task,
    at: Port,
    *,
    dims: int | None = None,
    positions: str = "last",
    steps: int = 100,
    batch_size: int = 32,
    seed: int = 0,
) -> Result:
    """Held-out accuracy of the base run when a learned subspace of one signal is taken from the source run, beside its controls.

    `at`: a signal of the stream's kind, such as L1.resid_out. `dims`: dimensions of the subspace; without, a boundary is learned. `positions`: "last", or
    a mark of one position of every prompt. `steps`: updates of the rotation, of `batch_size` prompts each. Variables `accuracy` [condition] with
    `low` and `high`, `difference` from the shuffled search with ends and `p`, `direction` [feature, d_model] and `dims`.
    """
    whole = _checked(model, task, at, dims, positions, steps)
    halves = task.split(0.5, seed)
    dev, test = (_pairs(model, half, at, positions, batch_size) for half in halves)
    basis = _search(model, dev, at, dims, steps, seed, shuffle=False)
    shuffled = _search(model, dev, at, len(basis), steps, seed, shuffle=True)
    with seeded(seed):
        random = maths.orthonormal(torch.randn(len(basis), whole))
    right = {"swapped": _right(model, test, at, basis), "base": _right(model, test, at, basis[:0])}
    right |= {"whole": _right(model, test, at, torch.eye(whole)), "random": _right(model, test, at, random)}
    right["shuffled"] = _right(model, test, at, shuffled)
    notes = []
    fresh = untrained(model, seed)
    if isinstance(fresh, str):
        notes.append(f"no untrained network to search: {fresh}")
    else:
        own, other = (_pairs(fresh, half, at, positions, batch_size) for half in halves)
        right["untrained"] = _right(fresh, other, at, _search(fresh, own, at, len(basis), steps, seed, shuffle=False))
    return _result(right, basis, notes, at)


class Pairs(NamedTuple):
    """Prompts of one length: base ids, the source's signal [prompt, 1, feature], its place [prompt, position], and right answers [prompt]."""

    base: list[list[int]]
    source: Tensor
    mask: Tensor
    right: Tensor


def _checked(model: Model, task: Task, at: Port, dims: int | None, positions: str, steps: int) -> int:
    """The width of the signal."""
    model.require(at)
    check_twins(model, task)
    if at.axes != ("prompt", "position", "d_model"):
        raise PatchbayError(
            f"at={at} has the axes {', '.join(at.axes)}: a search needs [prompt, position, d_model], such as L1.resid_out or L1.mlp.out"
        )
    if steps < 1 or (dims is not None and not 1 <= dims <= model.d_model):
        raise PatchbayError(f"dims={dims}, steps={steps}: 1 to {model.d_model} dimensions, and 1 or more steps")
    if len(task) < 4:
        raise PatchbayError(
            f"task {task.name} has {len(task)} prompts: 4 or more, half to search on and half to report"
        )
    single = [name for name, groups in task.marks.items() if all(len(group) == 1 for group in groups)]
    if positions not in ("last", *single):
        raise PatchbayError(
            f"positions={positions!r}: possible are {', '.join(['last', *single])}; marks of one position"
        )
    return model.d_model


def _pairs(model: Model, task: Task, at: Port, positions: str, batch_size: int) -> list[Pairs]:
    out = []
    for rows in batches(task, batch_size):
        some = task[rows]
        trace = run(model, some, taps=[at], logits="last")
        places = (
            [len(ids) - 1 for ids in some.clean]
            if positions == "last"
            else [group[0] for group in some.marks[positions]]
        )
        value = torch.stack([trace[at][i, place] for i, place in enumerate(places)])[:, None]  # [prompt, 1, feature]
        mask = torch.zeros(len(places), len(some.clean[0]), dtype=torch.bool)
        mask[torch.arange(len(places)), torch.tensor(places)] = True
        out.append(Pairs([list(ids) for ids in some.corrupted or ()], value, mask, torch.tensor(some.right)))
    return out


def _edits(at: Port, pairs: Pairs, kept: Tensor) -> list[Edit]:
    """The swap as edits: x (I - P) + source P, P [feature, feature] the weighed projector."""
    eye = torch.eye(len(kept), dtype=kept.dtype, device=kept.device)
    return [Edit("project", at, eye - kept, pairs.mask), edit.add(at, pairs.source @ kept, positions=pairs.mask)]


def _logits(model: Model, at: Port, pairs: Pairs, kept: Tensor, grad: bool) -> Tensor:
    kept = kept.to(pairs.source.device, pairs.source.dtype)
    return run(model, pairs.base, edits=_edits(at, pairs, kept), logits="last", grad=grad).last_logits.float()


@torch.no_grad()
def _right(model: Model, pieces: Sequence[Pairs], at: Port, basis: Tensor) -> Tensor:
    """Whether each prompt is right with this subspace swapped, [prompt]."""
    found = []
    for pairs in pieces:
        kept = basis.T @ basis if len(basis) else torch.zeros(pairs.source.shape[-1], pairs.source.shape[-1])
        found.append(maths.accuracy(_logits(model, at, pairs, kept, False).cpu(), pairs.right).double())
    return torch.cat(found)


def _search(
    model: Model, pieces: Sequence[Pairs], at: Port, dims: int | None, steps: int, seed: int, *, shuffle: bool
) -> Tensor:
    """The rows that are kept of the learned rotation, [feature, d_model]; `shuffle`: on answers dealt anew."""
    d, generator = pieces[0].source.shape[-1], torch.Generator().manual_seed(seed)
    answers = torch.cat([pairs.right for pairs in pieces])
    answers = answers[torch.randperm(len(answers), generator=generator)] if shuffle else answers
    dealt = list(answers.split([len(pairs.right) for pairs in pieces]))
    with seeded(seed), torch.enable_grad():
        turn = parametrizations.orthogonal(nn.Linear(d, d if dims is None else dims, bias=False))
    boundary = torch.tensor(0.5, requires_grad=dims is None)
    params = [*turn.parameters(), *([boundary] if dims is None else [])]
    adam = torch.optim.Adam(params, lr=RATE)
    for step in range(steps):
        piece = step % len(pieces)
        heat = TEMPERATURES[0] * (TEMPERATURES[1] / TEMPERATURES[0]) ** (step / max(1, steps - 1))
        with torch.enable_grad():
            rows = turn.weight
            weight = (
                torch.ones(len(rows))
                if dims is not None
                else torch.sigmoid((boundary * d - torch.arange(d) - 0.5) / heat)
            )
            logits = _logits(model, at, pieces[piece], rows.T @ (weight[:, None] * rows), True)
            loss = nn.functional.cross_entropy(logits, dealt[piece].to(logits.device)) + (
                0.0 if dims is not None else PENALTY * boundary
            )
            gradients = torch.autograd.grad(loss, params)
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        for group in adam.param_groups:
            group["lr"] = RATE / d**0.5 * (1 - step / steps)
        adam.step()
        with torch.no_grad():
            boundary.clamp_(1 / d, 1.0)
    count = dims if dims is not None else max(1, round(float(boundary.detach()) * d))
    return turn.weight.detach()[:count].clone()


def _result(right: dict[str, Tensor], basis: Tensor, notes: list[str], at: Port) -> Result:
    ends = [maths.bootstrap_interval(x) for x in right.values()]
    gap = maths.paired_interval(right["swapped"], right["shuffled"])
    variables: dict[str, Any] = {
        name: (torch.tensor([float(end[i]) for end in ends], dtype=torch.float64), ("condition",), SHARE)
        for i, name in enumerate(("accuracy", "low", "high"))
    }
    variables |= {
        name: (float(value), (), SHARE)
        for name, value in zip(("difference", "difference_low", "difference_high"), gap, strict=True)
    }
    variables["p"] = (maths.permutation_p(right["swapped"], right["shuffled"]), (), "probability")
    variables |= {"direction": (basis, ("feature", "d_model"), "stream"), "dims": (float(len(basis)), (), "dimensions")}
    told = ", ".join(f"{name} {float(end[0]):.2f}" for name, end in zip(right, ends, strict=True))
    n = len(right["swapped"])
    note = f"{len(basis)} dimensions of {basis.shape[1]} at {at}; right of {n} held-out prompts: {told}"
    return Result(variables, coords={"condition": list(right)}, notes=[note, *notes])
