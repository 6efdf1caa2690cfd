"""Turns: one component held or multiplied at the last position; the best of some on the prompts that choose, and rivals alike.

A rival is what chance would have chosen: as many components, drawn from heads of the same layers, with the same turns, the
best of them by the same rule on the same prompts. So the rivals were selected as hard as the channel was.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import patchbay as pb
from patchbay.draw import screen
from patchbay.model.model import Model
from patchbay.signal.channel import Channel
from patchbay.signal.port import Part
from patchbay.stories._lists import screened
from patchbay.tasks.task import Task
from patchbay.wiring.components import components

STRENGTHS = (-1.0, 0.0, 0.5, 2.0, 3.0, 4.0)
STEPS = (-3.0, -1.0, 1.0, 3.0)  # coordinates, in standard deviations from the mean at the last position
N_RIVALS = 19  # as many as p = 0.05 needs
LEAST = 1e-5  # of a head's largest singular value: components below write nothing


@dataclass(frozen=True)
class Turn:
    """A component and what is done to it: kept at `strength` of its size, or set to a coordinate."""

    channel: Channel
    strength: float | None = None
    coordinate: float | None = None

    def knob(self, model: Model, positions: str | None = "last") -> pb.Knob:
        options = {"strength": self.strength, "coordinate": self.coordinate, "positions": positions}
        return pb.turn.channel(model, self.channel, **options)  # type: ignore[arg-type]

    def __str__(self) -> str:
        how = f"x {self.strength:g}" if self.strength is not None else f"= {self.coordinate:.3g}"
        return f"{self.channel.source} {how}"


@dataclass
class Search:
    """Every turn that was tried, the share of right answers on the choosing prompts, and who was chosen."""

    turns: list[Turn]
    share: Tensor  # [turn], every length counts the same
    base: float
    best: int
    rivals: list[int]  # the best turn of each draw of random components
    n_candidates: int
    n_random: int


def search(
    model: Model, dev: Task, right: Tensor, candidates: Sequence[Channel], *, n_random: int, seed: int, quiet: bool
) -> Search:
    """Try every turn of every candidate, and of `n_random` random components, on the choosing prompts."""
    rng = random.Random(f"talking-heads-{seed}")
    others = _others(model, candidates, n_random, rng)
    turns, shares = [], []
    by_head: dict[Part, list[Channel]] = {}
    for channel in [*candidates, *others]:
        by_head.setdefault(channel.writer, []).append(channel)
    weight = _weights(dev)
    with screen.progress("turning components", quiet=quiet) as bar:
        for i, (head, channels) in enumerate(by_head.items()):
            made = [turn for channel in channels for turn in _turns(model, dev, channel)]
            hits = screened(model, dev, head, [turn.knob(model) for turn in made])  # [turn, prompt]
            turns += made
            shares.append(hits @ weight)
            bar(i + 1, len(by_head))
    share = torch.cat(shares)
    mine = [i for i, turn in enumerate(turns) if turn.channel in set(candidates)]
    best = max(mine, key=lambda i: (float(share[i]), -i))
    rivals = []
    for _ in range(N_RIVALS):
        drawn = set(rng.sample(others, min(len(candidates), len(others))))
        rivals.append(max((i for i, t in enumerate(turns) if t.channel in drawn), key=lambda i: (float(share[i]), -i)))
    return Search(turns, share, float(right @ weight), best, rivals, len(candidates), len(others))


def _weights(task: Task) -> Tensor:
    """Weights of prompts [prompt] that add to 1, every length together as much as every other."""
    sizes = torch.tensor(task.labels["n_objects"])
    _, place, counts = torch.unique(sizes, return_inverse=True, return_counts=True)
    return (1.0 / (counts[place] * len(counts))).double()


def _others(model: Model, candidates: Sequence[Channel], n: int, rng: random.Random) -> list[Channel]:
    """Random components of heads of the candidates' layers, none of them a candidate."""
    taken = {channel.source for channel in candidates}
    layers = sorted({channel.writer.layer or 0 for channel in candidates})
    heads = [Part(layer, "head", h) for layer in layers for h in range(model.n_heads(layer))]
    sizes = {head: components(model, head).s for head in heads}
    pool = [Channel(head, i) for head, s in sizes.items() for i in range(int((s > LEAST * s[0]).sum()))]
    pool = [channel for channel in pool if channel.source not in taken]
    return rng.sample(pool, min(n, len(pool)))


def _turns(model: Model, task: Task, channel: Channel) -> list[Turn]:
    """Every turn of a component: strengths, and coordinates about its mean on these prompts' last positions."""
    found = [Turn(channel, strength=strength) for strength in STRENGTHS]
    port = channel.writer.port("z")
    pieces = [task[i : i + 64] for i in range(0, len(task), 64)]
    read = components(model, channel.writer).read_z[int(channel.component or 0)].to(model.device)
    c = torch.cat([pb.run(model, some, taps=[port], logits="last").last(port).to(read) @ read for some in pieces])
    mean, spread = float(c.mean()), float(c.std())
    return found + [Turn(channel, coordinate=mean + step * spread) for step in STEPS if spread > 0]
