"""Intents: prompts that ask for one of two answers, and runs in which the last token's stream is changed at one layer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchbay.edits import edit
from patchbay.edits.edit import Edit
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.task import Task

REACH, LEAD, DROP = (
    0.85,
    0.3,
    0.05,
)  # of the layer search: share of what all layers reach, lead at the output, loss at a layer


@dataclass(frozen=True)
class Items:
    """Prompts and twins in one list: twin n + i is prompt i with the other intent."""

    ids: list[list[int]]
    own: Tensor  # the answer of its own intent, [item]
    other: Tensor  # the answer of the other intent, [item]
    intent: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    def twin(self) -> list[int]:
        """The item that is the same prompt with the other intent."""
        half = len(self) // 2
        return [(i + half) % len(self) for i in range(len(self))]

    def sources(self, seed: int) -> list[int]:
        """For each item one of another prompt, with the other intent, whose answer is not the one the swap should give."""
        rng, half = random.Random(f"context_knob-{seed}"), len(self) // 2
        found = []
        for i in range(len(self)):
            pool = [j for j in range(len(self)) if j % half != i % half and self.intent[j] != self.intent[i]]
            apart = [j for j in pool if int(self.own[j]) != int(self.other[i])]
            if not pool:
                raise PatchbayError("one prompt alone: a source with another question is needed; give more prompts")
            found.append(rng.choice(apart or pool))
        return found


def items(task: Task) -> Items:
    """The prompts and twins of a task of two intents, or PatchbayError that says what it lacks."""
    lacks = [
        name
        for name, there in (
            ("corrupted twins (each prompt with the other intent)", task.corrupted is not None),
            ("a wrong answer (that of the other intent) for each prompt", all(task.wrong)),
            ("the label 'intent'", "intent" in task.labels),
        )
        if not there
    ]
    if lacks:
        raise PatchbayError(
            f"task {task.name} lacks {' and '.join(lacks)}; a knob between two intents is found from prompts that say which"
        )
    kinds = sorted({str(label) for label in task.labels["intent"]})
    if len(kinds) != 2:
        raise PatchbayError(
            f"task {task.name} has the intents {', '.join(kinds)}; two are needed, such as context and prior"
        )
    own = [str(label) for label in task.labels["intent"]]
    right, wrong = list(task.right), [answers[0] for answers in task.wrong]
    return Items(
        [list(ids) for ids in (*task.clean, *(task.corrupted or ()))],
        torch.tensor(right + wrong),
        torch.tensor(wrong + right),
        own + [kinds[1 - kinds.index(one)] for one in own],
    )


def last_streams(model: Model, of: Items, ports: Sequence[Port], batch_size: int) -> Tensor:
    """The signals at each item's last token, [port, item, d_model]."""
    out = torch.zeros(len(ports), len(of), model.d_model)
    for start in range(0, len(of), batch_size):
        trace = run(model, of.ids[start : start + batch_size], taps=ports, logits="last")
        for i, port in enumerate(ports):
            out[i, start : start + batch_size] = trace.last(port).float().cpu()
    return out


def swapped(target: Tensor, source: Tensor, w: Tensor | None) -> Tensor:
    """target + w (w . source - w . target), row by row; the whole source without w."""
    return source if w is None else target + ((source - target) @ w)[:, None] * w


def answers(model: Model, of: Items, put: Sequence[tuple[Port, Tensor]], batch_size: int) -> Tensor:
    """Last logits [item, vocab] with the last token's signals replaced by rows [item, d_model] at each port."""
    out = []
    for start in range(0, len(of), batch_size):
        rows = slice(start, start + batch_size)
        edits = [edit.replace(port, value[rows, None], positions="last") for port, value in put]
        out.append(run(model, of.ids[rows], edits=edits, logits="last").last_logits.float().cpu())
    return torch.cat(out)


def clamped(model: Model, of: Items, edits: Sequence[Edit], batch_size: int) -> Tensor:
    """The most likely next token of each item under these edits, [item]."""
    pieces = [of.ids[i : i + batch_size] for i in range(0, len(of), batch_size)]
    return torch.cat([run(model, piece, edits=edits, logits="last").last_logits.argmax(-1).cpu() for piece in pieces])


def flips(logits: Tensor, of: Items) -> Tensor:
    """1.0 where the most likely token of all is the item's other answer, [item]."""
    return (logits.argmax(-1) == of.other).double()


@dataclass(frozen=True)
class Range:
    """Layers whose attention at the last token carries the intent, and how much of the other answer they bring."""

    layers: list[int]
    reached: float
    runs: int


def attention_range(model: Model, of: Items, batch_size: int) -> Range:
    """Patch what attention adds at the last token, from each item's twin, in a range of layers; bisect both ends.

    The upper end is the smallest u for which layers [0, u) bring, at some depth of the logit lens, REACH of what all layers
    bring; the lower end the largest that keeps it. Layers after it at which the answer is lost again are added one by one
    until the other answer leads by LEAD at the output.
    """
    ports = [Port("attn.out", layer) for layer in range(model.n_layers)]
    taken, twin = last_streams(model, of, ports, batch_size), of.twin()
    seen: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def lens(layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        key = tuple(layers)
        if key not in seen:
            seen[key] = _lens(model, of, [(ports[i], taken[i][twin]) for i in layers], batch_size)
        return seen[key]

    def reached(low: int, high: int) -> float:
        return float(lens(range(low, high))[0].max())

    n, bar = model.n_layers, REACH * reached(0, model.n_layers)
    if bar < REACH * LEAD:
        return Range([], reached(0, n), len(seen))
    low, high = 0, n  # [0, high) reaches the bar, [0, low) does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(0, middle) >= bar else (middle, high)
    upper, low, high = high, 0, high  # [low, upper) reaches the bar, [high, upper) does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if reached(middle, upper) >= bar else (low, middle)
    layers = list(range(low, upper))
    for _ in range(n - upper):
        other, own = lens(layers)
        if float(other[-1] - own[-1]) > LEAD:
            break
        lost = [i for i in range(layers[-1] + 1, n) if float(other[i - 1] - other[i]) > DROP]
        if not lost:
            break
        layers.append(lost[0])
    return Range(layers, float(lens(layers)[0].max()), len(seen))


def _lens(model: Model, of: Items, put: Sequence[tuple[Port, Tensor]], batch_size: int) -> tuple[Tensor, Tensor]:
    """Mean probability of the other and of the own answer in the logit lens after every layer, [layer] each."""
    ports = [Port("resid_out", layer) for layer in range(model.n_layers)]
    total = torch.zeros(2, len(ports), dtype=torch.float64)
    for start in range(0, len(of), batch_size):
        rows = slice(start, start + batch_size)
        edits = [edit.replace(port, value[rows, None], positions="last") for port, value in put]
        trace = run(model, of.ids[rows], taps=ports, edits=edits, logits="last")
        for i, port in enumerate(ports):
            with torch.no_grad():
                p = model.unembed_logits(model.final_norm_module(trace.last(port))).double().softmax(-1).cpu()
            for side, token in enumerate((of.other, of.own)):
                total[side, i] += p.gather(1, token[rows, None]).sum()
    return total[0] / len(of), total[1] / len(of)
