"""One strength: chosen on some prompts and texts, held to a cap on divergence and to fluent text, reported of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.measure._own_text import allowed
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

LEVEL = 0.05
SHARE, NATS = "share of prompts", "nats per token"
NEAR, POINTS = (
    0.1,
    0.05,
)  # of the highest gain in score, of the share of right answers: strengths so near to the best compete
LEAST = 4  # prompts: two to choose on and two to test on


@dataclass(frozen=True)
class Curves:
    """What was seen at each strength. seen [1 + strength, prompt], controls [draw, strength, prompt], harm [strength, text]."""

    task: Task
    steps: list[float]
    neutral: float
    seen: Mapping[str, Tensor]
    controls: Tensor
    harm: Tensor | None
    own: Callable[
        [Sequence[int], Sequence[int]], list[float]
    ]  # (prompts, places of strengths) -> losses, the plain first
    cap: float
    seed: int

    @property
    def open(self) -> list[int]:
        """The prompts on which there is something to change: those not answered right as the model is."""
        return [i for i, right in enumerate(self.seen["right"][0].tolist()) if not right]

    @property
    def cost(self) -> Tensor:
        """Of each strength: its divergence on the texts that choose, or without texts its distance from neutral."""
        if self.harm is None:
            return (torch.tensor(self.steps) - self.neutral).abs().double()
        return self.harm[:, ::2].mean(-1)


def choice(curves: Curves) -> tuple[dict[str, Any], list[str]]:
    """The chosen strength and what it does to the prompts and texts that chose nothing; or in words why there is none."""
    n, n_open, harm = len(curves.task), len(curves.open), curves.harm
    said = [f"{n - n_open} of {n} prompts are answered right as the model is"] if n_open < n else []
    if n_open < LEAST and n_open < n:
        return {}, [
            f"{said[0]}: too little is left to raise, and no strength is recommended; give prompts that are answered otherwise, "
            "such as a task's twins, or to lower a score exchange right and wrong answers"
        ]
    if n_open < LEAST or (harm is not None and harm.shape[1] < 2):
        return {}, [*said, "too few prompts or texts to choose a strength on one half and test it on the other"]
    said = [f"{said[0]}: they are left out where a strength is chosen and tested"] if said else []
    dev, test = _halves(curves.task, curves.open, curves.seed)
    under = [i for i, cost in enumerate(curves.cost.tolist()) if harm is None or cost <= curves.cap]
    if not _near(curves, dev, range(len(curves.steps)))[0]:
        return {}, [
            *said,
            "no strength raises the share of right answers or the score on the choosing half: none was chosen",
        ]
    if not _near(curves, dev, under)[0]:
        return {}, [*said, _over(curves, dev)]
    own, fluent, told = _fluent(curves, dev, under)
    near, rule = _near(curves, dev, fluent)
    if not near:
        return own, [*said, *told, _over(curves, dev, own)]
    found, words = _reported(curves, min(near, key=lambda i: float(curves.cost[i])), rule, test)
    return own | found, [*said, *told, *words]


def _halves(task: Task, some: list[int], seed: int) -> tuple[list[int], list[int]]:
    """Places of the prompts of the two halves of `task.split`, of some of them."""
    numbered = replace(task, labels={"place": range(len(task))})
    dev, test = (numbered if len(some) == len(task) else numbered[some]).split(0.5, seed)
    return list(dev.labels["place"]), list(test.labels["place"])


def _near(curves: Curves, dev: list[int], among: Sequence[int]) -> tuple[list[int], str]:
    """The strengths that do about as well as the best of `among`, and by what measure; none where nothing gains."""
    if not among:
        return [], ""
    right = {i: float(curves.seen["right"][1 + i, dev].mean()) for i in among}
    plain, most = float(curves.seen["right"][0, dev].mean()), max(right.values())
    if most > plain + POINTS:
        return [i for i in among if right[i] >= max(most - POINTS, plain)], "share of right answers"
    scores = curves.seen["score"]
    gain = {i: float((scores[1 + i] - scores[0])[dev].mean()) * sign(curves.task) for i in among}
    best = max(gain.values())
    return [i for i in among if best > 0 and gain[i] >= (1.0 - NEAR) * best], "gain in score"


def _fluent(curves: Curves, dev: list[int], under: list[int]) -> tuple[dict[str, Any], list[int], list[str]]:
    """The losses of own text, the strengths of `under` whose text stays in range, and what is to be said."""
    try:
        plain, *losses = curves.own(dev, under)
    except PatchbayError as error:
        return {}, under, [f"what the model writes at a strength was not measured: {error}"]
    whole = torch.full((len(curves.steps),), torch.nan, dtype=torch.float64)
    whole[under] = torch.tensor(losses, dtype=torch.float64)
    own = {"own_loss": (whole, ("strength",), NATS), "own_loss_without": (torch.tensor(plain).double(), (), NATS)}
    low, high = allowed(plain, curves.cap)
    kept = [i for i, loss in zip(under, losses, strict=True) if low <= loss <= high]
    return own, kept, [f"what it writes is held to a loss of {max(low, 0.0):.3g} to {high:.3g} nats per token under the model as it is (whose own text has {plain:.3g})"]  # fmt: skip


def _over(curves: Curves, dev: list[int], own: Mapping[str, Any] | None = None) -> str:
    """Why no strength is recommended, by the one that would have been."""
    near, _ = _near(curves, dev, range(len(curves.steps)))
    at = min(near, key=lambda i: float(curves.cost[i]))
    why = f"at {curves.steps[at]:g}, which gains most for least, "
    if curves.harm is not None and float(curves.cost[at]) > curves.cap:
        why += f"neutral text diverges by {float(curves.cost[at]):.3g} nats per token"
    elif own:
        why += (
            f"what it writes has a loss of {float(own['own_loss'][0][at]):.3g} nats per token under the model as it is"
        )
    kept = f"divergence at {curves.cap:g} nats per token or below" if curves.harm is not None else ""
    return f"no strength that helps keeps {kept}{' and ' * bool(kept)}fluent text, so none is recommended: {why}"


# --- what it does -------------------------------------------------------------------------------------


def _reported(curves: Curves, at: int, rule: str, test: list[int]) -> tuple[dict[str, Any], list[str]]:
    """The strength at place `at`, on the prompts and texts that chose nothing."""
    scores, seed, harm, task = curves.seen["score"], curves.seed, curves.harm, curves.task
    few: list[str] = []
    values = {"test_effect": maths.paired_interval(scores[1 + at, test], scores[0, test], seed=seed)}
    values["test_right"] = maths.bootstrap_interval(curves.seen["right"][1 + at, test], seed=seed)
    units = {"test_right": SHARE}
    numbers: dict[str, tuple[float, str]] = {"chosen": (curves.steps[at], "strength")}
    if len(curves.controls):
        plain, drawn = scores[0, test], curves.controls[:, at][:, test]  # [prompt], [draw, prompt]
        values["test_against_random"] = maths.beyond_draws(scores[1 + at, test], drawn, seed=seed)
        p = maths.draws_p(values["test_effect"].mean, (drawn - plain).mean(1), two_sided=True)
        numbers["p"] = (p, "probability")
        if 1 / (1 + len(drawn)) > LEVEL:
            least = 1 / (1 + len(drawn))
            few = [f"{len(drawn)} random knobs: p is at least {least:.2g}, whatever the knob; draws=19 can show 0.05"]
    if harm is not None:
        values["test_kl"], units["test_kl"] = maths.bootstrap_interval(harm[at, 1::2], seed=seed), NATS
    for name, interval in values.items():
        ends = zip(("", "_low", "_high"), interval, strict=True)
        numbers |= {name + end: (value, units.get(name, task.unit)) for end, value in ends if value == value}
    found = {name: (torch.tensor(value, dtype=torch.float64), (), unit) for name, (value, unit) in numbers.items()}
    return found, [*few, _verdict(curves.steps[at], rule, values, task, len(test))]


def sign(task: Task) -> float:
    """Of ranks, lower is better."""
    return -1.0 if task.metric == "rank" else 1.0


def _verdict(step: float, rule: str, values: Mapping[str, maths.Interval], task: Task, n_test: int) -> str:
    """What the test half says, in words."""
    judged = [values[name] for name in ("test_effect", "test_against_random") if name in values]
    holds = all(min(sign(task) * interval.low, sign(task) * interval.high) > 0 for interval in judged)
    effect = values["test_effect"]
    numbers = f"{effect.mean:+.3g} ({effect.low:+.3g} to {effect.high:+.3g}) {task.unit} on {n_test} prompts that chose nothing"
    against = " and more than random knobs" if "test_against_random" in values else ""
    outcome = f"an effect{against}" if holds else "NOT confirmed" + (against and ", or no more than random knobs")
    harm = f", at {values['test_kl'].mean:.3g} nats per token on other text" if "test_kl" in values else ""
    return f"strength {step:g}, chosen by {rule} on the other half, changes the score by {numbers}{harm}: {outcome}"
