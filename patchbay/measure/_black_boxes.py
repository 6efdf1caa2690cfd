"""Black boxes: functions of one number whose truth is an expression, some with noise and with one interval that obeys another rule, and how well
another function says what they do."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from patchbay.measure._expressions import Expression, Numbers, parse

LOW, HIGH = -128.0, 128.0
PASSES = 0.1  # of the published score: normalised squared error below it
FLAT = 0.01  # a spread below it is none
NEAR = 0.1  # of the function's spread: as near as counts as agreement
HIDDEN = 64  # units of a network in the place of a rule
NAME = re.compile(r"\bx\b")
ATOMS: tuple[str, ...] = (
    "{a}*x + {b}",
    "{c}*x**2 + {a}*x + {b}",
    "{c}*x**3 + {a}*x",
    "({a}*x + {b}) / (x + {far})",
    "{a}*abs(x - {m})",
    "{a}*sqrt(x - {m})",
    "{a}*cbrt(x - {m})",
)
ATOMS += (
    "{b} / (abs(x - {m}) + 1)",
    "{a}*log(abs(x - {m}) + 1)",
    "{a}*step(x - {m})",
    "{a}*rect(x, {m}, {m} + {w})",
    "{a}*relu(x - {m})",
    "{a}*sigmoid((x - {m}) / {w})",
)
ATOMS += (
    "{a}*tanh((x - {m}) / {w})",
    "{a}*sin(x / {w})",
    "{a}*cos(x / {w})",
    "{a}*tan(x / 90)",
    "{a}*ceil(x / {w})",
    "{a}*floor(x / {w})",
)
ATOMS += ("{a}*gaussian((x - {m}) / {w})", "{c}*x*x", "{a}*sign(x - {m})", "{a}*erf((x - {m}) / {w})")


@dataclass(frozen=True)
class Net:
    """A network 1-64-1 of tanh units, fitted to a rule on a grid by its last layer alone: near the rule, and nothing that an expression says."""

    weight: Numbers
    bias: Numbers
    out: Numbers

    @classmethod
    def of(cls, rule: Callable[[Numbers], Numbers], seed: int) -> Net:
        draw, grid = np.random.default_rng(seed), np.linspace(LOW, HIGH, 257)
        weight = draw.choice((-1.0, 1.0), HIDDEN) / draw.uniform(4, 64, HIDDEN)
        bias = -weight * draw.uniform(LOW, HIGH, HIDDEN)  # each bends somewhere in the domain
        y = np.nan_to_num(rule(grid), nan=0.0, posinf=1e6, neginf=-1e6)
        hidden = np.append(np.tanh(grid[:, None] * weight + bias), np.ones((len(grid), 1)), 1)
        return cls(weight, bias, np.linalg.lstsq(hidden, y, rcond=1e-6)[0])

    def __call__(self, x: Numbers) -> Numbers:
        hidden = np.tanh(np.asarray(x)[:, None] * self.weight + self.bias)
        return hidden @ self.out[:-1] + self.out[-1]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class BlackBox:
    """A function of x: its rule, the spread of its noise, and the interval (with the value there) that the rule does not hold in."""

    rule: Expression
    noise: float = 0.0
    interval: tuple[float, float] | None = None
    value: float = 0.0
    seed: int = 0
    net: Net | None = None  # in the place of the rule

    def clean(self, x: Numbers) -> Numbers:
        """What it gives without noise."""
        made = self.rule(x) if self.net is None else self.net(x)
        found = np.nan_to_num(made, nan=0.0, posinf=1e6, neginf=-1e6)
        return (
            found
            if self.interval is None
            else np.where((x >= self.interval[0]) & (x <= self.interval[1]), self.value, found)
        )

    def __call__(self, x: Numbers) -> Numbers:
        """What a query gets; the same query gets the same answer."""
        if not self.noise and self.interval is None:
            return self.clean(x)
        inside = (
            np.zeros(len(x), dtype=bool) if self.interval is None else (x >= self.interval[0]) & (x <= self.interval[1])
        )
        drawn = np.array([random.Random(f"{self.seed} {float(one)}").gauss(0, 1) for one in x])
        return self.clean(x) + drawn * np.where(inside, 0.1, self.noise)  # type: ignore[no-any-return]


def make(kind: str, seed: int, noise: float, corruption: float) -> BlackBox:
    """One function: an atom, or two of them added, multiplied or composed ("composed"), or a network fitted to such a one ("approximated"); `noise` in
    units of its spread; with the chance `corruption` one interval of its domain holds a constant."""
    net, kind = kind == "approximated", "composed" if kind == "approximated" else kind
    rng = random.Random(f"function-{kind}-{seed}")
    grid, spread = np.linspace(LOW, HIGH, 257), 0.0
    while spread < FLAT:  # one that is the same everywhere says nothing
        rule = parse(_drawn(kind, rng))
        spread = float(np.nan_to_num(rule(grid), nan=0.0, posinf=1e6, neginf=-1e6).std())
    interval, value = None, 0.0
    if rng.random() < corruption:
        width = rng.uniform(10, 50)
        low = rng.uniform(LOW, HIGH - width)
        interval, value = (round(low, 2), round(low + width, 2)), rng.gauss(0, 1) * max(spread, 1.0)
    return BlackBox(rule, noise * spread, interval, value, seed, Net.of(rule, seed) if net else None)


def _drawn(kind: str, rng: random.Random) -> str:
    text = _atom(rng)
    if kind == "atomic":
        return text
    other, how = _atom(rng), rng.choice(("added", "multiplied", "inside"))
    return NAME.sub(f"({other})", text) if how == "inside" else f"({text}) {'+' if how == 'added' else '*'} ({other})"


def _atom(rng: random.Random) -> str:
    numbers = {
        "a": rng.uniform(-5, 5),
        "b": rng.uniform(-20, 20),
        "c": rng.uniform(-0.2, 0.2),
        "m": rng.uniform(-64, 64),
        "w": rng.uniform(4, 32),
        "far": rng.uniform(140, 200),
    }
    return rng.choice(ATOMS).format(**{name: f"({value:.3g})" for name, value in numbers.items()})


# --- baselines --------------------------------------------------------------------------------------


def baselines(x: Numbers, y: Numbers) -> dict[str, Callable[[Numbers], Numbers]]:
    """What says something of any function from the same queries: their mean, a line, a polynomial, and the table itself, read between its rows."""
    degree = min(9, len(x) - 1)
    fit = [np.polynomial.Polynomial.fit(x, y, one) for one in (min(1, degree), degree)]
    return {
        "constant": lambda at: np.full(len(at), y.mean()),
        "line": lambda at: np.asarray(fit[0](at)),
        f"polynomial of degree {degree}": lambda at: np.asarray(fit[1](at)),
        "table": lambda at: np.interp(at, x, y),
    }


# --- scores -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """How well one function says what another does: `official` is the published error, `fvu` what a constant cannot pass."""

    official: float  # sum |f - g|^2 / sum |f|^2 at half integers
    fvu: float  # the same over the spread of f, on fresh points
    agreement: float  # share of fresh points where it is within a tenth of the spread
    corrupted: float  # the same inside the interval; NaN where there is none
    overlap: float  # of the interval that it sets apart with the true one; NaN where there is neither

    @property
    def passes(self) -> float:
        return float(self.official < PASSES)

    @property
    def explained(self) -> float:
        return max(0.0, 1.0 - self.fvu)


def score(
    box: BlackBox,
    said: Callable[[Numbers], Numbers],
    asked: Numbers,
    interval: tuple[float, float] | None,
    seed: int = 0,
) -> Score:
    """`said` against the function without its noise; `asked` are the queries, from which fresh points keep away."""
    half = np.arange(LOW, HIGH) + 0.5
    draw = np.random.default_rng(seed)
    fresh = draw.uniform(LOW, HIGH, 1000)
    fresh = fresh[np.abs(fresh[:, None] - asked[None]).min(1) > 1e-6]
    f, g = box.clean(half), _numbers(said(half))
    official = float(((f - g) ** 2).sum() / max(float((f**2).sum()), 1e-12))
    f, g = box.clean(fresh), _numbers(said(fresh))
    spread = float(((f - f.mean()) ** 2).sum())
    near = np.abs(f - g) <= NEAR * max(float(f.std()), 1e-12)
    inside = (
        np.zeros(len(fresh), dtype=bool)
        if box.interval is None
        else (fresh >= box.interval[0]) & (fresh <= box.interval[1])
    )
    fvu = float(((f - g) ** 2).sum()) / spread if spread > 1e-12 else float(not near.all())
    return Score(
        official,
        fvu,
        float(near.mean()),
        float(near[inside].mean()) if inside.any() else float("nan"),
        overlap(box.interval, interval),
    )


def _numbers(values: Numbers) -> Numbers:
    return np.nan_to_num(values, nan=1e9, posinf=1e9, neginf=-1e9)


def overlap(one: tuple[float, float] | None, other: tuple[float, float] | None) -> float:
    """Length of what two intervals share over that of what either has; NaN where there are none, 0 where one is missing."""
    if one is None and other is None:
        return float("nan")
    if one is None or other is None:
        return 0.0
    shared = max(0.0, min(one[1], other[1]) - max(one[0], other[0]))
    return shared / (one[1] - one[0] + other[1] - other[0] - shared)
