"""What several claims share: reading a number and its interval off a Result, and repeating a measurement on fresh prompts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import patchbay as pb
from patchbay.papers.claims._claim import Claim, Interval
from patchbay.signal.port import PatchbayError
from patchbay.tasks import words
from patchbay.tasks.spell import single_tokens, tokenizer_of

if TYPE_CHECKING:
    from torch import Tensor

N = 60  # prompts
FEW = N // 4  # prompts of one of several sets
SETS = 8  # sets of fresh prompts, where a number has no interval over prompts of its own
DRAWS = 40  # random sets beside what is claimed, where the model has as many
LEVEL = 0.05
STUDENT = {8: 2.365, 10: 2.262, 20: 2.093}  # 97.5 % of Student's t with one degree of freedom less


def at_part(result: Any, name: str, part: Any) -> float:
    """A variable of a Result [layer, head] at a head."""
    return float(result[name][part.layer, part.index])


def ends_of(result: Any, *names: str) -> Interval:
    """A number of a Result and the ends of its interval."""
    value, low, high = (float(result[name]) for name in names)
    return value, low, high


def ends(found: Any) -> Interval:
    """A meter's value and the ends of its interval, NaN where it has none."""
    value, low, high = (float(found[name]) if name in found else float("nan") for name in ("value", "low", "high"))
    return value, low, high


def first_of(found: Any) -> Any:
    """The best part of a Result. Raises PatchbayError where nothing has a score."""
    best = found.top(1)
    if not best:
        raise PatchbayError("no part has a score here: there is none to claim anything of")
    return best[0]


def apart(found: Any, n: int = 2) -> list[Any]:
    """The best parts of a Result, one a layer: a layer alone has few other parts to draw at random."""
    best: dict[int, Any] = {}
    for part in found.top(10**6):
        best.setdefault(part.layer, part)
    return list(best.values())[:n]


# --- against random parts -------------------------------------------------------------------------------


def joint(model: pb.Model, parts: Any, task: Any, seed: int, text: str) -> Claim:
    """That parts cost more, taken away together, than as many random ones of their layers; prompts and draws both vary."""
    found = pb.prove.ablation(model, task, parts, draws=DRAWS, seed=seed)
    interval = ends_of(found, "difference", "difference_low", "difference_high")
    return beyond_random(text, interval, float(found["p"]), len(found["random"]), task.unit)


def beyond_random(text: str, interval: Interval, p: float, draws: int, unit: str) -> Claim:
    """That a difference to random parts is above 0, by its interval and by the call's own p; untestable with few draws."""
    value, low, high = interval
    low = low if p <= LEVEL else min(low, 0.0)
    few = f"{draws} different random sets: p is at least {1 / (1 + draws):.2g}" if 1 / (1 + draws) > LEVEL else ""
    return Claim(text, value, low, high, 0.0, unit, untestable=few)


# --- over sets of prompts -------------------------------------------------------------------------------


def against(one: Interval, other: Interval) -> Interval:
    """The difference of two numbers, with the ends of their intervals against each other: at least 95 %, however they go together."""
    return one[0] - other[0], one[1] - other[2], one[2] - other[1]


def over_sets(measure: Callable[[int], float], seed: int) -> Interval:
    """The mean of what is measured on SETS sets of prompts of their own, with Student's interval."""
    return student([measure(100 * (seed + 1) + at) for at in range(SETS)])


def student(values: Sequence[float]) -> Interval:
    """Mean of some values and the ends of Student's 95 % interval."""
    mean = sum(values) / len(values)
    spread = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    half = STUDENT[len(values)] * spread / len(values) ** 0.5
    return mean, mean - half, mean + half


def one_more(values: Sequence[float]) -> float:
    """What one more value like these stays below in 97.5 %: their mean and spread count as the estimates that they are."""
    mean, _, high = student(values)
    return mean + (high - mean) * (len(values) + 1) ** 0.5


def unrelated(n: int) -> float:
    """What the correlation of two unrelated rankings of n stays below in 97.5 %."""
    return min(1.0, 1.96 / max(1, n - 1) ** 0.5)


def removals(model: pb.Model, task: pb.Task, parts: Sequence[Any]) -> Tensor:
    """What the task's mean score loses when each part alone writes nothing, [part]."""
    found = pb.sweep(model, task, [pb.zero(part.port()) for part in parts])
    lost: Tensor = task.sign * (found["base"] - found["value"]).mean(-1)
    return lost


# --- prompts and networks -------------------------------------------------------------------------------


def stories(n: int, seed: int) -> list[str]:
    """Texts of three sentences about nothing in particular."""
    rng = random.Random(f"claims-{seed}")
    return [words.sentences(rng, 3)[1:] for _ in range(n)]


def known_words(model: pb.Model, listed: Sequence[str]) -> list[str]:
    """The words that are one token with their space in this model's tokenizer, with that space."""
    found = single_tokens(tokenizer_of(model, "this claim"), listed)
    if len(found) < 2:
        raise PatchbayError(
            f"of {', '.join(listed[:5])} and their like {len(found)} are single tokens here; two are needed"
        )
    return [f" {word}" for word in found]


def untrained(model: pb.Model, seed: int) -> pb.Model:
    """A network of the same form, with the weights that it starts training with and the model's own tokenizer."""
    from patchbay.results.untrained import untrained as made_new

    made = made_new(model, seed)
    if isinstance(made, str):
        raise PatchbayError(f"an untrained network of this form is asked for and there is none: {made}")
    return pb.load(made.hf, tokenizer=model.tokenizer, family=model.family)
