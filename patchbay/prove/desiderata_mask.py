"""Desiderata-based component masking (DCM): the fewest heads that, taken from another run, do what is asked of them.

A desideratum is a task: its corrupted prompts are run (the base), heads are taken from the run on its clean prompts
(the source), and the right answers are what should come out. A mask m in [0, 1] over all heads, 1 at the start, blends
at each head

    z = m * z(base) + (1 - m) * z(source)          loss = - mean target logit + penalty * sum(1 - m)

where z(base) is what the head gives in the patched run. Adam with step 0.1 on all training prompts, m clamped to [0, 1]
after each step. After each step the mask is rounded; of all rounded masks, no heads among them, the one of the highest
accuracy on validation prompts is kept, of equals the one with the fewest heads. Each task gives a quarter of its
prompts to training, a quarter to validation, and the other half is only reported: `accuracy`, and `gain`, the rise of
the target logit, against as many random heads of the same layers (`p` = (1 + draws that gain as much) / (1 + draws)).

Which prompts are asked decides what is found: twins that differ in the value name the heads that carry the value, twins
that differ in the place those that carry the place. Several tasks at once ask for heads that do all of it. Cost: per
step one forward and backward pass over the training prompts, and a forward pass over the validation prompts when the
rounded mask is new.

Prakash, Rott Shaham, Haklay, Belinkov and Bau 2024, "Fine-Tuning Enhances Existing Mechanisms"; the method of Davies et
al. 2023, "Discovering Variable Binding Circuitry with Desiderata". One set that is enough is shown, not that it is the
only one: heads that stand in for one another are found as whichever lowers the loss first, and a head whose change
reaches the answer through saturated attention alone has no gradient at m = 1 and is missed. A head is a query head,
also where heads share keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.edits.edit import Edit
from patchbay.errors import one_of
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.prove._cells import batches, check_twins, ends, listed
from patchbay.prove._removal import random_sets, too_few
from patchbay.results.arrays import on_grid
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError, Port
from patchbay.tasks.task import Task

LEARNING_RATE = 0.1
KNOWN = (
    "a learned mask takes heads that do nothing and leaves out some that do: over eleven compiled programs (docs/truth.md) precision "
    "0.45, recall 0.52, average precision 0.77; prove.ablation and prove.activation_patching rank every head that computes first"
)
LEAST_PROMPTS = 4  # one to train, one to validate, two to report


@dataclass(frozen=True)
class Some:
    """Prompts of one length: the base to run, the source's z by layer, and the tokens that should come out."""

    base: list[list[int]]
    source: dict[int, Tensor]  # [prompt, position, head, d_head]
    target: Tensor  # [prompt]
    desideratum: int


@dataclass
class Kept:
    """The best rounded mask so far."""

    accuracy: float
    n_heads: int
    step: int
    mask: Tensor  # [head], not rounded


@method(paper="prakash2024")
def desiderata_mask(
    model: Model,
    task: Task | list[Task],
    *,
    penalty: float = 0.01,
    steps: int = 40,
    positions: Literal["all", "last"] = "all",
    draws: int = 20,
    batch_size: int = 32,
    seed: int = 0,
) -> Result:
    """The heads whose z, taken from the clean run into the corrupted one, gives the right answers; by a learned mask.

    `task`: one desideratum or several; each has twins and at least 4 prompts. `penalty`: logits that a head must be
    worth. `positions`: take z at "all" positions or the "last". Main variable `weight` [layer, head], 1 - m where it
    was kept; `chosen` [layer, head], its rounding; on the reported half `accuracy` with its ends, `accuracy_base` (no
    heads), `accuracy_all` (all heads), `gain` and `difference` (from random heads) with their ends, `random` [draw],
    and `p`.

    `steps`: updates of the mask. `draws`: random sets of as many heads, as the control.
    """
    desiderata = _desiderata(model, task, penalty, steps, positions, draws)
    train, valid, test = ([], [], [])  # type: list[Task], list[Task], list[Task]
    for one in desiderata:
        dev, rest = one.split(0.5, seed)
        for side, piece in zip((train, valid, test), (*dev.split(0.5, seed), rest), strict=True):
            side.append(piece)
    heads = _heads(model)
    mask = Mask(model, heads, positions)
    ready, check = (_prepare(model, side, mask, batch_size) for side in (train, valid))
    kept, rows = _learn(mask, ready, check, penalty, steps)
    report = _prepare(model, test, mask, batch_size)
    chosen = [head for head, m in zip(heads, kept.mask.tolist(), strict=True) if m < 0.5]
    values, notes = _compare(model, mask, chosen, report, draws, seed)
    values |= {"accuracy_validation": (kept.accuracy, (), "share of prompts")}
    table = _by_task(mask, chosen, report, desiderata)
    notes = [_found(chosen, kept, rows, steps), *notes, KNOWN]
    weight = on_grid(heads, 1.0 - kept.mask.float(), model.n_layers, 1 + max(head.index or 0 for head in heads))
    return Result(
        {
            "weight": (weight, ("layer", "head"), "share taken from the source"),
            "chosen": (torch.where(weight.isnan(), weight, (weight > 0.5).to(weight)), ("layer", "head"), "0 or 1"),
            **values,
        },
        highlights=chosen,
        tables={"desiderata": table, "steps": rows},
        notes=notes,
    )


# --- what is asked --------------------------------------------------------------------------------------


def _desiderata(model: Model, given: Any, penalty: float, steps: int, positions: str, draws: int) -> list[Task]:
    """The tasks, each with what a desideratum needs."""
    one_of("positions", positions, ("all", "last"))
    if not penalty >= 0.0 or steps < 1 or draws < 1:
        raise PatchbayError(
            f"penalty={penalty}, steps={steps}, draws={draws}: 0 or more, and at least 1 of each of the others"
        )
    tasks = [given] if isinstance(given, Task) else list(given)
    for one in tasks:
        if not isinstance(one, Task):
            raise PatchbayError(
                f"a desideratum is a Task (corrupted: base, clean: source, right: target), got {type(one).__name__}"
            )
        check_twins(model, one)
        if len(one) < LEAST_PROMPTS:
            raise PatchbayError(
                f"task {one.name} has {len(one)} prompts: a mask needs {LEAST_PROMPTS} or more of each desideratum, to train, "
                "to validate and to report"
            )
    if not tasks:
        raise PatchbayError("no desiderata were given: pass a Task, or several")
    return tasks


def _heads(model: Model) -> list[Part]:
    layers = [layer for layer in range(model.n_layers) if "attn.z" in model.signals(layer)]
    if not layers:
        model.require(Port("attn.z", 0))  # raises, and says what the family lacks
    return [Part(layer, "head", i) for layer in layers for i in range(model.n_heads(layer))]


# --- the mask -------------------------------------------------------------------------------------------


class Mask:
    """Runs under a mask m [head] over all heads of the model: 1 leaves a head alone, 0 takes it from the source."""

    def __init__(self, model: Model, heads: Sequence[Part], positions: str) -> None:
        self.model, self.heads = model, list(heads)
        self.positions: Literal["last"] | None = "last" if positions == "last" else None
        self.spans: dict[int, slice] = {}  # layer -> its heads
        for i, head in enumerate(heads):
            layer = head.layer or 0
            self.spans[layer] = slice(self.spans[layer].start if layer in self.spans else i, i + 1)

    def edits(self, m: Tensor, source: Mapping[int, Tensor]) -> list[Edit]:
        out = []
        for layer, span in self.spans.items():
            part = m[span, None]  # [head, 1], against z [prompt, position, head, d_head]
            port = Port("attn.z", layer)
            out.append(edit.scale(port, part, positions=self.positions))
            out.append(edit.add(port, (1.0 - part) * source[layer].to(m.device), positions=self.positions))
        return out

    def logits(self, m: Tensor, some: Some, grad: bool = False) -> Tensor:
        """Last logits [prompt, vocab] of the base under the mask."""
        m = m.to(self.model.device)
        return run(self.model, some.base, edits=self.edits(m, some.source), logits="last", grad=grad).last_logits

    def of(self, chosen: Sequence[Part]) -> Tensor:
        """The rounded mask that takes these heads from the source."""
        return torch.tensor([0.0 if head in set(chosen) else 1.0 for head in self.heads], dtype=self.model.dtype)

    @torch.no_grad()
    def scores(self, chosen: Sequence[Part], pieces: Sequence[Some]) -> tuple[Tensor, Tensor]:
        """Accuracy (over the whole vocabulary) and target logit of every prompt, two times [prompt]."""
        right, target = [], []
        for some in pieces:
            logits = self.logits(self.of(chosen), some).float()
            right.append(maths.accuracy(logits, some.target).double().cpu())
            target.append(logits.cpu().gather(1, some.target[:, None])[:, 0].double())
        return torch.cat(right), torch.cat(target)


def _prepare(model: Model, tasks: Sequence[Task], mask: Mask, batch_size: int) -> list[Some]:
    """Base, source and target of all tasks, in batches of one length."""
    ports = [Port("attn.z", layer) for layer in mask.spans]
    out = []
    for number, task in enumerate(tasks):
        for prompts in batches(task, batch_size):
            trace = run(model, [list(task.clean[i]) for i in prompts], taps=ports, logits="last")
            found = {port.layer or 0: trace[port] for port in ports}
            if mask.positions == "last":
                found = {layer: z[:, -1:] for layer, z in found.items()}
            base = [list((task.corrupted or ())[i]) for i in prompts]
            out.append(Some(base, found, torch.tensor([task.right[i] for i in prompts]), number))
    return out


def _learn(
    mask: Mask, train: Sequence[Some], valid: Sequence[Some], penalty: float, steps: int
) -> tuple[Kept, list[dict[str, Any]]]:
    """The kept mask, and a row for each step."""
    m = torch.ones(len(mask.heads), dtype=mask.model.dtype, requires_grad=True)
    optimiser = torch.optim.Adam([m], lr=LEARNING_RATE)
    n_prompts = sum(len(some.base) for some in train)
    seen: dict[tuple[bool, ...], float] = {}
    kept: Kept | None = None
    rows: list[dict[str, Any]] = []
    for step in range(steps + 1):
        taken = tuple((m < 0.5).tolist())
        if taken not in seen:
            chosen = [head for head, there in zip(mask.heads, taken, strict=True) if there]
            seen[taken] = float(mask.scores(chosen, valid)[0].mean())
        if kept is None or (seen[taken], -sum(taken)) > (kept.accuracy, -kept.n_heads):
            kept = Kept(seen[taken], sum(taken), step, m.detach().clone())
        rows.append({"step": step, "n_heads": sum(taken), "accuracy": seen[taken]})
        if step == steps:
            break
        gradient, loss = torch.zeros_like(m), float(penalty * (1.0 - m.detach()).sum())
        with torch.enable_grad():
            for some in train:
                logits = mask.logits(m, some, grad=True)
                part = -logits.gather(1, some.target.to(logits.device)[:, None]).sum() / n_prompts
                gradient += torch.autograd.grad(part, m)[0]
                loss += float(part.detach())
        rows[-1]["loss"] = loss
        m.grad = gradient - penalty
        optimiser.step()
        with torch.no_grad():
            m.clamp_(0.0, 1.0)
    assert kept is not None
    return kept, rows


# --- what is reported -----------------------------------------------------------------------------------


def _compare(
    model: Model, mask: Mask, chosen: list[Part], pieces: Sequence[Some], draws: int, seed: int
) -> tuple[dict[str, Any], list[str]]:
    """Held-out accuracy and gain of the chosen heads, of none, of all, and of random ones."""
    notes: list[str] = []
    right, target = mask.scores(chosen, pieces)
    base_right, base_target = mask.scores([], pieces)
    every_right, every_target = mask.scores(mask.heads, pieces)
    accuracy, gain = maths.bootstrap_interval(right), maths.paired_interval(target, base_target)
    share, unit = "share of prompts", "logits"
    values: dict[str, Any] = ends("accuracy", accuracy, share) | ends("gain", gain, unit)
    values |= {"accuracy_base": (base_right.mean(), (), share), "accuracy_all": (every_right.mean(), (), share)}
    values |= {"gain_all": ((every_target - base_target).mean(), (), unit)}
    try:
        sets = random_sets(model, chosen, draws, seed) if chosen else [()]
    except PatchbayError as error:  # the same variables, without values
        nothing = maths.Interval(torch.nan, torch.nan, torch.nan)
        values |= ends("difference", nothing, unit) | {"random": (torch.full((1,), torch.nan), ("draw",), unit)}
        return values | {"p": (torch.nan, (), "probability")}, [f"no random control: {error}"]
    gained = torch.stack([mask.scores(drawn, pieces)[1] - base_target for drawn in sets])  # [draw, prompt]
    difference = maths.beyond_draws(target - base_target, gained)
    values |= ends("difference", difference, unit) | {"random": (gained.mean(1), ("draw",), unit)}
    values["p"] = (maths.draws_p(gain.mean, gained.mean(1)), (), "probability")
    if chosen:
        notes.append(
            f"held out: accuracy {accuracy.mean:.2f}{maths.between(accuracy.low, accuracy.high, '.2f', '')}, {base_right.mean():.2f} with "
            f"no head taken, {every_right.mean():.2f} with all; target logit up {gain.mean:.3g}, {gained.mean():.3g} with random "
            f"heads, p = {values['p'][0]:.3g}"
        )
        notes += too_few(sets, draws)
    return values, notes


def _by_task(mask: Mask, chosen: list[Part], pieces: Sequence[Some], tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """For each desideratum: prompts reported, accuracy with no head taken and with the chosen ones."""
    rows = []
    for number, task in enumerate(tasks):
        own = [some for some in pieces if some.desideratum == number]
        before, after = mask.scores([], own)[0], mask.scores(chosen, own)[0]
        rows.append(
            {
                "task": task.name,
                "prompts": len(after),
                "accuracy_base": float(before.mean()),
                "accuracy": float(after.mean()),
            }
        )
    return rows


def _found(chosen: list[Part], kept: Kept, rows: Sequence[Mapping[str, Any]], steps: int) -> str:
    if not chosen:
        return f"no heads: in {steps} steps no mask was better on validation prompts than taking none ({kept.accuracy:.2f})"
    last = "" if rows[-1]["n_heads"] == len(chosen) else f"; the last mask had {rows[-1]['n_heads']}"
    return f"{len(chosen)} heads, {listed(chosen)}, of step {kept.step}: validation accuracy {kept.accuracy:.2f}{last}"
