"""Claims about what texts are written after training with rewards: small networks are trained from weights drawn by the seed, five seeds each.

The model at hand has no part in them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import patchbay as pb
from patchbay.papers.claims._claim import TRAINED, Claim, claim
from patchbay.papers.claims.training import difference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from patchbay.model.model import Model

NEAR = 0.02  # nats per token, by which held-out losses may differ and still be equal
ARMS = {
    "rewards": "inverse-rl:weight=0.1",
    "plain": "ntp",
    "smoothed": "inverse-rl:weight=0,smooth=0.07",  # cost as much held-out loss as the term does, with seed 1000, which is none of those told
}
READ, HELD, SETS, SET = (
    1024,
    64,
    16,
    40,
)  # texts that are trained on and that losses are of, sets of beginnings, and beginnings in a set
LENGTH, BEGUN, SAID, GRAM = (
    32,
    6,
    24,
    4,
)  # tokens of a text, of a beginning, written after it, and of a run that is counted
STEPS, EVERY, BATCH, RATE = 200, 5, 16, 4e-3


@claim("wulfmeier2024", "made", seeds=TRAINED)
def wulfmeier2024(model: Model, seed: int) -> Claim:
    """Confirmed if, at one held-out loss, more runs of four tokens in samples are different after training with rewards than after plain training and than after label smoothing of
    equal strength, whichever has more. All take the same steps; each arm is taken where its held-out loss first is as low as the worst of them ends, and all within .02 nats. Smoothing
    and weight were set with another seed, the bound before any."""
    found = _written(seed)
    told = {name: float(one.distinct.mean()) for name, one in found.items()}
    other = max(("plain", "smoothed"), key=lambda name: told[name])
    lost = {name: one.loss for name, one in found.items()}
    apart = max(lost.values()) - min(lost.values())
    text = (
        f"in networks of 120,000 weights at a held-out loss of {min(lost.values()):.3f} to {max(lost.values()):.3f} nats, {told['rewards']:.1%} of the runs of four tokens are different after training with rewards, {told['plain']:.1%} after plain "
        f"training, {told['smoothed']:.1%} after label smoothing of equal strength (after as many steps: {', '.join(f'{one.last:.3f}' for one in found.values())} nats)"
    )
    far = f"held-out losses differ by {apart:.3f} nats, more than {NEAR}" if apart > NEAR else ""
    gap = difference(found["rewards"].distinct, found[other].distinct)
    return Claim(text, *gap, 0.0, "share of runs", untestable=far)


@dataclass(frozen=True)
class Written:
    """Of one arm: held-out loss and distinct runs of each set of samples where losses are equal, and the loss after all steps."""

    loss: float
    distinct: Tensor  # [set]
    last: float


@functools.cache
def _written(seed: int) -> dict[str, Written]:
    from patchbay.tiny import lab

    tiny = pb.load("tiny")
    texts = lab.pieces(tiny, READ + HELD + SETS * SET, seed, [LENGTH])
    held, begun, read = texts[:HELD], [ids[:BEGUN] for ids in texts[HELD:-READ]], texts[-READ:]
    paths = {name: path(tiny.vocab_size, read, held, objective, seed) for name, objective in ARMS.items()}
    bar = max(one[-1][0] for one in paths.values())
    found = {}
    for name, one in paths.items():
        loss, state = next(reading for reading in one if reading[0] <= bar)
        found[name] = Written(loss, distinct(network(tiny.vocab_size, state), begun), one[-1][0])
    return found


def network(vocab: int, state: dict[str, Tensor]) -> Model:
    from patchbay.tiny import lab

    made = lab.small(vocab, width=48, mlp=96)
    made.hf.load_state_dict(state)
    return made


def path(
    vocab: int, texts: list[list[int]], held: list[list[int]], text: str, seed: int
) -> list[tuple[float, dict[str, Tensor]]]:
    """Held-out loss and weights of a network drawn by the seed, every few steps of its training by an objective and after the last; every arm has the same start and batches."""
    import torch

    from patchbay.papers.claims._grown import nats, said
    from patchbay.tiny import lab
    from patchbay.train._objectives import objective
    from patchbay.train._objectives._objective import collated, learned
    from patchbay.train._plan import Arm, plan_of
    from patchbay.train._runs import Lab, begun

    fresh = begun(Lab(lab.small(vocab, width=48, mlp=96), [], [], plan_of({"fresh": True})), Arm(), seed)
    for weight in fresh.hf.parameters():
        weight.requires_grad_()
    aim, found = objective(text), list[tuple[float, dict[str, Any]]]()

    def read() -> None:
        state = {name: one.detach().clone() for name, one in fresh.hf.state_dict().items()}
        found.append((float(nats(said(fresh.hf, held), held).mean()), state))

    def loss(hf: Any, step: int) -> Tensor:
        if step % EVERY == 0 and step >= STEPS // 2:
            read()
        draw = torch.Generator().manual_seed(1_000_003 * seed + step)
        rows = [(texts[i], texts[i]) for i in torch.randint(len(texts), (BATCH,), generator=draw).tolist()]
        batch = collated(rows)
        return aim.loss(fresh, hf, batch, learned(batch["labels"]))

    lab.steps_of(fresh.hf, loss, STEPS, rate=RATE)
    read()
    return found


def distinct(model: Model, begun: Sequence[Sequence[int]]) -> Tensor:
    """Of the runs of tokens in what a model writes after the beginnings, at temperature 1, the share that are different, in each set [set]; every model has the same draws."""
    import torch

    from patchbay.train._objectives.fine_grained import drawn

    texts = drawn(model.hf, begun, SAID, range(len(begun)))
    per = len(texts) // SETS
    return torch.tensor([different(texts[i * per : (i + 1) * per]) for i in range(SETS)], dtype=torch.float64)


def different(texts: Sequence[Sequence[int]]) -> float:
    """Runs of `GRAM` tokens that are different, as a share of all, over texts together."""
    runs = [tuple(one[i : i + GRAM]) for one in texts for i in range(len(one) - GRAM + 1)]
    return len(set(runs)) / len(runs)
