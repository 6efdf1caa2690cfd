"""Boolean functions: whether a model learns a function of bits from examples in its prompt, beside learners that are known.

    1 0 1 is 1. 0 0 1 is 0. 1 1 0 is

Each of `functions` random functions is told by `pairs` examples; the answer to every one is predicted from those before it. Classes: conjunction and
disjunction of literals (each bit has none with .7, itself with .15, its opposite with .15; one at least), dnf (two conjunctions, either of which), parity and
majority of some of the bits, and taught: a conjunction whose first examples are its teaching sequence, after which it is the only one
left. 30 % of a conjunction's inputs are made to satisfy it (of a disjunction, not to). `value`: the accuracy on the second half of the examples, mean over
functions; `null`: that of always saying what was seen most often, p by sign flips over functions. Table `curves` has it by the number of examples, with
the nearest neighbour and, for conjunctions and disjunctions, elimination: all literals that no positive example denied.

Bhattamishra et al. 2023, "Understanding In-Context Learning in Transformers and LLMs by Learning to Learn Discrete Functions". Higher is better. To be as
good as elimination is not to do what it does.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from patchbay.measure._answers import outcomes
from patchbay.measure._meter import reading
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError

KINDS = ("conjunction", "disjunction", "dnf", "parity", "majority", "taught")
Kind = Literal["conjunction", "disjunction", "dnf", "parity", "majority", "taught"]
Bits = tuple[int, ...]
Pair = tuple[Bits, int]
Signs = tuple[int, ...]  # of each bit: 1 where it is a literal, -1 where its opposite is, 0 where neither
SHARE = "share of answers"


@method(paper="bhattamishra2023")
def boolean_functions(
    model: Model,
    *,
    kind: Kind = "conjunction",
    bits: int = 4,
    pairs: int = 12,
    functions: int = 40,
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """Accuracy of answers to functions of bits that the prompt shows examples of, on the second half of the examples.

    `nearest` [prompt] and, where there is one, `elimination` [prompt], of the same answers; `mass`, the mean probability of 0 and 1; table `curves`.

    `kind`: conjunction, disjunction, dnf, parity, majority or taught. `bits`: of every input. `pairs`: examples of each function, in the prompt one after
    another. `functions`: random functions.
    """
    if kind not in KINDS or bits < 1 or pairs < 2 or functions < 1:
        raise PatchbayError(
            f"kind={kind!r} is one of {', '.join(KINDS)}; bits={bits} and functions={functions} are 1 or more, pairs={pairs} 2 or more"
        )
    told = [examples(kind, bits, pairs, random.Random(f"{kind}-{seed}-{i}")) for i in range(functions)]
    prompts = [written(each, at) for each in told for at in range(pairs)]
    where = [f"function {i}, example {at}" for i in range(functions) for at in range(pairs)]
    found = outcomes(model, prompts, [[" 0", " 1"]] * len(prompts), where=where, batch_size=batch_size)
    logp = found.logp.view(functions, pairs, 2)
    truth = torch.tensor([[answer for _, answer in each] for each in told])  # [function, pair]
    right = {"model": _shared(logp[..., 1] - logp[..., 0], truth)}
    for name, reader in _readers(kind).items():
        said = [[reader(each[:at], each[at][0]) for at in range(pairs)] for each in told]
        right[name] = _shared(torch.tensor(said, dtype=torch.float64) - 0.5, truth)
    late = {name: values[:, pairs // 2 :].mean(1) for name, values in right.items()}  # [function]
    curves = [{"reader": name, "examples": at, "accuracy": float(values[:, at].mean())} for name, values in right.items() for at in range(pairs)]  # fmt: skip
    return reading(
        {"per_item": late["model"]},
        SHARE,
        better="higher",
        null_items=late["majority"],
        more={name: (late[name], ("prompt",), SHARE) for name in late if name not in ("model", "majority")}
        | {"mass": (found.mass.mean(), (), "probability")},
        tables={"curves": curves},
        notes=[f"{float(truth.double().mean()):.2f} of the answers are 1"],
        seed=seed,
    )  # fmt: skip


def _shared(margin: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """1 where a margin for the answer 1 is on the right side, a half where it is 0."""
    return 0.5 + 0.5 * margin.sign().double() * (2.0 * truth.double() - 1.0)


def written(pairs: Sequence[Pair], n: int) -> str:
    """The first n pairs, and the input of the next."""
    lines = [f"{' '.join(map(str, x))} is {answer}. " for x, answer in pairs[:n]]
    return "".join(lines) + f"{' '.join(map(str, pairs[n][0]))} is"


# --- functions --------------------------------------------------------------------------------------


def literals(bits: int, chance: random.Random) -> Signs:
    """Literals of a conjunction, one at least."""
    while True:
        signs = tuple(chance.choices((0, 1, -1), (0.7, 0.15, 0.15))[0] for _ in range(bits))
        if any(signs):
            return signs


def holds(signs: Signs, x: Bits) -> int:
    """Whether a conjunction of literals is true of an input."""
    return int(all(not sign or (sign > 0) == bool(bit) for sign, bit in zip(signs, x, strict=True)))


def satisfied(signs: Signs, x: Bits) -> Bits:
    """The input with the literals' bits as they have to be."""
    return tuple(int(sign > 0) if sign else bit for sign, bit in zip(signs, x, strict=True))


def examples(kind: str, bits: int, n: int, chance: random.Random) -> list[Pair]:
    """n inputs and what one random function of the kind says of them."""
    drawn: Callable[[], Bits] = lambda: tuple(chance.randrange(2) for _ in range(bits))  # noqa: E731
    signs = literals(bits, chance)
    forced = kind in ("conjunction", "disjunction", "taught")
    opposite = kind == "disjunction"  # an or of literals is no and of their opposites
    function = _function(kind, signs, bits, chance)
    found: list[Pair] = [(x, function(x)) for x in teaching(signs, drawn())] if kind == "taught" else []
    while len(found) < n:
        x = drawn()
        x = satisfied(tuple(-s for s in signs) if opposite else signs, x) if forced and chance.random() < 0.3 else x
        found.append((x, function(x)))
    return found[:n]


def _function(kind: str, signs: Signs, bits: int, chance: random.Random) -> Callable[[Bits], int]:
    if kind in ("conjunction", "taught"):
        return lambda x: holds(signs, x)
    if kind == "disjunction":
        return lambda x: 1 - holds(tuple(-s for s in signs), x)
    if kind == "dnf":
        other = literals(bits, chance)
        return lambda x: max(holds(signs, x), holds(other, x))
    chosen = [i for i in range(bits) if chance.random() < 0.5] or [chance.randrange(bits)]
    if kind == "parity":
        return lambda x: sum(x[i] for i in chosen) % 2
    return lambda x: int(2 * sum(x[i] for i in chosen) > len(chosen))


def teaching(signs: Signs, x: Bits) -> list[Bits]:
    """Inputs that leave one conjunction: two that satisfy it and differ in all other bits, and for each literal one that denies it alone."""
    one = satisfied(signs, x)
    other = tuple(bit if sign else 1 - bit for sign, bit in zip(signs, one, strict=True))
    return [one, other, *(tuple(1 - b if k == i else b for k, b in enumerate(one)) for i, s in enumerate(signs) if s)]


# --- readers ----------------------------------------------------------------------------------------


def _readers(kind: str) -> dict[str, Callable[[Sequence[Pair], Bits], float]]:
    """What is said of an input after some pairs, 1, 0 or a half; by their names."""
    found: dict[str, Callable[[Sequence[Pair], Bits], float]] = {"nearest": nearest, "majority": majority}
    if kind in ("conjunction", "taught"):
        found["elimination"] = elimination
    if kind == "disjunction":  # its opposite is a conjunction
        found["elimination"] = lambda seen, x: 1.0 - elimination([(a, 1 - b) for a, b in seen], x)
    return found


def elimination(seen: Sequence[Pair], x: Bits) -> float:
    """Whether all literals hold of the input that no positive example has denied; 0 before the first."""
    positive = [a for a, answer in seen if answer]
    if not positive:
        return 0.0
    return float(all(len({a[i] for a in positive}) > 1 or x[i] == positive[0][i] for i in range(len(x))))


def nearest(seen: Sequence[Pair], x: Bits) -> float:
    """The answer of the example with the most bits in common, of equals the mean; a half before the first."""
    if not seen:
        return 0.5
    near = [sum(a == b for a, b in zip(other, x, strict=True)) for other, _ in seen]
    answers = [answer for (_, answer), n in zip(seen, near, strict=True) if n == max(near)]
    return sum(answers) / len(answers)


def majority(seen: Sequence[Pair], x: Bits) -> float:
    """The answer seen most often; a half before the first and where both were as often."""
    ones = sum(answer for _, answer in seen)
    return 0.5 if 2 * ones == len(seen) else float(2 * ones > len(seen))
