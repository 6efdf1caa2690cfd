"""Why nearest neighbours help: what a store of states gains on held-out text, part by part, beside what simpler means gain.

    loss    - log P(next token), P the mixture of `decode.knn`, at the temperature and weight that are best on the first half of the texts;
            told of the other half, and so is every other line
    L4.mlp.in, ...       the signals that the store has, each as key: another representation of the context
    ..., temperature 1   the first of them with the temperature that softmax has by itself
    ..., cells           the first of them, searched in a few of its cells alone
    one mean a token     no store: of each token the mean of its keys, as one key
    temperature          no neighbours: the model's own law at its best temperature
    unigram              no neighbours: the model's law mixed with how often tokens stand in the store

Temperatures are tried at 0.01 to 2 times the mean squared distance of the neighbours, weights from 0 to 0.9: weight 0, the model, is
among them, so that what gains nothing stays what it was on the half that chooses. `gain` is the model's loss less the line's, text by text,
and the table `tokens` tells by which tokens the first line gains: where it is one token that the model foretells badly, the store
teaches a format.

One pass over the texts for all lines. Texts that stand in the store are refused, since they would find themselves.

Xu et al. 2023, "Why do Nearest Neighbor Language Models Work?", whose parts these are; they train an extra softmax where the mean keys
stand here. It does not show that text written with a store is better: `decode.knn` writes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.decode._neighbours import Store, read_store, weights_of
from patchbay.model.kept import KeptTrace, load_trace
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port

SCALES = (0.01, 0.03, 0.1, 0.2, 0.5, 1.0, 2.0)  # of the mean squared distance
WEIGHTS = (0.0, 0.01, 0.03, 0.1, 0.25, 0.5, 0.75, 0.9)
HEATS = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0)  # temperatures of the model's own law
NEIGHBOURS = 256


@dataclass
class Read:
    """Texts as they were read: of every position that has a next token its text [token], that token, its log-probability, the same at each
    of HEATS [token, heat], and the states that are looked up, by port [token, d]."""

    text: Tensor
    target: Tensor
    logp: Tensor
    heated: Tensor
    states: dict[Port, Tensor]


@dataclass(frozen=True)
class Line:
    """One way: the loss of every token at its best options on the texts that choose, and those options."""

    loss: Tensor  # [token]
    weight: float
    temperature: float


def read(model: Model, texts: Sequence[Sequence[int]], ports: Sequence[Port], batch_size: int) -> Read:
    """One pass over the texts under the edits in force."""
    found: list[Read] = []
    for at in range(0, len(texts), batch_size):
        trace = run(model, [list(text) for text in texts[at : at + batch_size]], taps=ports)
        for row, n in enumerate(trace.lengths.tolist()):
            logits, target = trace.logits[row, : n - 1].double(), trace.ids[row, 1:n, None]
            heated = torch.cat([torch.log_softmax(logits / heat, -1).gather(1, target) for heat in HEATS], 1)
            states = {port: trace[port][row, : n - 1].float().cpu() for port in ports}
            logp = torch.log_softmax(logits, -1).gather(1, target)[:, 0]
            found.append(Read(torch.full((n - 1,), at + row), target[:, 0].cpu(), logp.cpu(), heated.cpu(), states))
    joined = {name: torch.cat([getattr(one, name) for one in found]) for name in ("text", "target", "logp", "heated")}
    return Read(**joined, states={port: torch.cat([one.states[port] for one in found]) for port in ports})


def mixed(logp: Tensor, near: Tensor, weight: float) -> Tensor:
    """Loss of each token where its probability is weight * near + (1 - weight) * model."""
    return -torch.log(weight * near + (1 - weight) * logp.exp()) if weight else -logp


def tuned(logp: Tensor, near: Callable[[float], Tensor], temperatures: Sequence[float], chooses: Tensor) -> Line:
    """The line of the temperature and weight with the least loss over the tokens that choose [token]; of equals the smaller weight."""
    best: Line | None = None
    least = math.inf
    for temperature in temperatures:
        given = near(temperature)
        for weight in WEIGHTS:
            loss = mixed(logp, given, weight)
            mean = float(loss[chooses].mean())
            if mean < least:
                best, least = Line(loss, weight, temperature), mean
    assert best is not None
    return best


def looked_up(read: Read, store: Store, k: int, index: str, chooses: Tensor, scales: Sequence[float] = SCALES) -> Line:
    """The line of a store; with no scales at temperature 1."""
    apart, found = store.nearest(read.states[store.port], k, index)
    hit = store.values[found.clamp(min=0)] == read.target[:, None]
    mean = float(apart[apart.isfinite()].mean())

    def near(temperature: float) -> Tensor:
        return (weights_of(apart, temperature) * hit).sum(-1)

    return tuned(read.logp, near, [mean * scale for scale in scales] or [1.0], chooses)


def means_of(store: Store) -> Store:
    """A store of one key for each token that is a value: the mean of its keys."""
    values, at = store.values.unique(return_inverse=True)
    sums = torch.zeros(len(values), store.keys.shape[1], dtype=torch.float64).index_add_(0, at, store.keys.double())
    keys = sums / torch.bincount(at)[:, None]
    return Store(keys.float(), values, store.port, store.texts, store.places[: len(values)])


def lines(read: Read, stores: Sequence[Store], k: int, cells: Sequence[int], chooses: Tensor) -> dict[str, Line]:
    """Every line by its name, the model first."""
    first, vocab = stores[0], int(max(int(read.target.max()), int(stores[0].values.max()))) + 1
    found = {"model": Line(-read.logp, 0.0, 1.0)}
    found |= {str(store.port): looked_up(read, store, k, "exact", chooses) for store in stores}
    found[f"{first.port}, temperature 1"] = looked_up(read, first, k, "exact", chooses, ())
    found[f"{first.port}, cells"] = looked_up(read, first, k, f"cells({cells[0]}, {cells[1]})", chooses)
    means = means_of(first)
    found["one mean a token"] = looked_up(read, means, min(k, len(means)), "exact", chooses)
    heat = int(read.heated[chooses].mean(0).argmax())
    found["temperature"] = Line(-read.heated[:, heat], 0.0, HEATS[heat])
    often = torch.bincount(first.values, minlength=vocab).double() / len(first)
    found["unigram"] = tuned(read.logp, lambda _: often[read.target], [1.0], chooses)
    return found


def by_token(model: Model, read: Read, gain: Tensor, n: int = 10) -> list[dict[str, Any]]:
    """The tokens that gain most of all that is gained: how often they stand there, what they gain, its share of the whole (NaN where
    nothing is gained)."""
    total = torch.zeros(int(read.target.max()) + 1, dtype=torch.float64).index_add_(0, read.target, gain)
    counts = torch.bincount(read.target)
    there = counts.nonzero()[:, 0]
    order = there[total[there].argsort(descending=True, stable=True)][:n].tolist()
    whole = float(gain.sum())
    return [
        {
            "token": str(token) if model.tokenizer is None else repr(model.tokenizer.decode([token])),
            "times": int(counts[token]),
            "gain": float(total[token]),
            "share": float(total[token]) / whole if whole > 0 else math.nan,
        }
        for token in order
    ]


def _checked(
    model: Model, store: Any, texts: Any, neighbours: int | None, cells: Sequence[int]
) -> tuple[list[Store], list[list[int]], int]:
    trace = store if isinstance(store, KeptTrace) else load_trace(store)
    edits = model.active_edits()
    stores = [read_store(trace, model, edits, port) for port in trace.ports]
    ids = model.encode(texts)
    if len(ids) < 4 or min(map(len, ids)) < 2:
        raise PatchbayError(
            f"texts: {len(ids)} texts of at least {min(map(len, ids))} tokens; four or more of two or more, the first half to choose by"
        )
    held = {tuple(text) for text in stores[0].texts}
    inside = next((at for at, text in enumerate(ids) if tuple(text) in held), None)
    if inside is not None:
        raise PatchbayError(f"texts: text {inside} stands in the store, where it would find itself; hold it out")
    n = len(stores[0])
    k = min(NEIGHBOURS, n) if neighbours is None else neighbours
    if not 1 <= k <= n:
        raise PatchbayError(f"neighbours={k}: from 1 to the {n} keys of the store")
    if len(cells) != 2 or not 1 <= cells[1] <= cells[0] <= n:
        raise PatchbayError(
            f"cells={list(cells)}: how many cells, up to the {n} keys, and how many of them are looked into"
        )
    return stores, ids, k


@method(paper="xu2023")
def knn_parts(
    model: Model,
    store: str | Any,
    texts: list[str] | list[list[int]] | Any,
    *,
    neighbours: int | None = None,
    cells: list[int] | tuple[int, ...] = (32, 8),
    seed: int = 0,
    batch_size: int = 16,
) -> Result:
    """`loss` of each line [condition] in nats per token on the second half of the texts, and what it gains on the model, with intervals.

    `low` and `high` of `gain` are of a bootstrap over texts, whose losses are `text_loss` [condition, prompt]; `weight` and `temperature` are what was chosen on the first half.

    `store`: the folder of a trace of one or more signals of the stream's width; the first is taken apart. `texts`: what is predicted; none stands in the
    store, the first half chooses. `neighbours`: how many, 256 or the whole
    store where it is smaller. `cells`: into how many cells the keys are put, and how many of them the search in cells looks into.
    """
    stores, ids, k = _checked(model, store, texts, neighbours, cells)
    seen = read(model, ids, [one.port for one in stores], batch_size)
    half = len(ids) // 2
    found = lines(seen, stores, k, cells, seen.text < half)
    told = [(seen.text == at) for at in range(half, len(ids))]
    losses = {name: torch.stack([line.loss[rows].mean() for rows in told]) for name, line in found.items()}
    plain = losses["model"]
    gains = [maths.paired_interval(plain, own, seed=seed) for own in losses.values()]
    axes = ("condition",)
    variables: dict[str, Any] = {"loss": (torch.stack([own.mean() for own in losses.values()]), axes, "nats per token")}
    for name, end in (("gain", "mean"), ("low", "low"), ("high", "high")):
        variables[name] = (
            torch.tensor([getattr(one, end) for one in gains], dtype=torch.float64),
            axes,
            "nats per token",
        )
    variables["text_loss"] = (torch.stack(list(losses.values())), ("condition", "prompt"), "nats per token")
    variables["weight"] = (torch.tensor([line.weight for line in found.values()]).double(), axes, "weight")
    variables["temperature"] = (
        torch.tensor([line.temperature for line in found.values()]).double(),
        axes,
        "squared distance, or of logits",
    )
    names = list(found)
    rows = [
        {
            "line": name,
            "loss": float(losses[name].mean()),
            "gain": gain.mean,
            "low": gain.low,
            "high": gain.high,
            "weight": found[name].weight,
        }
        for name, gain in zip(names, gains, strict=True)
    ]
    late = seen.text >= half
    own = (found["model"].loss - found[names[1]].loss)[late]
    tokens = by_token(model, Read(seen.text[late], seen.target[late], seen.logp[late], seen.heated[late], {}), own)
    if found[names[1]].weight == 0 or float(own.sum()) <= 0:
        note = f"{names[1]} gains nothing {'where it was chosen' if found[names[1]].weight == 0 else 'where it is told of'}"
    else:
        note = f"{names[1]} gains {tokens[0]['share']:.0%} of what it gains on the token {tokens[0]['token']}"
    return Result(variables, coords={"condition": names}, tables={"lines": rows, "tokens": tokens}, notes=[note])
