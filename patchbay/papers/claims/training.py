"""Claims about training another way: small networks of the lab's own are trained from weights drawn by the seed, beside a twin.

The model at hand has no part in them.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import patchbay as pb
from patchbay.papers.claims._claim import TRAINED, Claim, claim

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from patchbay.model.model import Model
    from patchbay.train._plan import Arm

FACTS = 24


def pair(
    network: Model, data: Any, of: Callable[[Model], Tensor], seed: int, arms: tuple[Arm, Arm], **plan: float
) -> tuple[Tensor, Tensor]:
    """A number for each item, of a variant and of its twin, both trained from weights drawn by the seed on all of the data."""
    found = trained(network, data, of, seed, dict(zip(("one", "other"), arms, strict=True)), fresh=True, **plan)
    return found["one"], found["other"]


def alone(network: Model, data: Any, of: Callable[[Model], Tensor], seed: int, arm: Arm, **plan: float) -> Tensor:
    """A number for each item, of one way to train."""
    return trained(network, data, of, seed, {"alone": arm}, fresh=True, **plan)["alone"]


def trained(
    network: Model, data: Any, of: Callable[[Model], Tensor], seed: int, arms: dict[str, Arm], **plan: float
) -> dict[str, Tensor]:
    """A number for each item, of each arm, all trained from the same weights on the same documents in the same order."""
    from patchbay.train._documents import read
    from patchbay.train._plan import plan_of
    from patchbay.train._runs import Lab, ended

    how = plan_of({"held": 0.0, **plan})
    documents = read(network, data, how.length)
    share = Lab(network, documents, documents, how)
    return {name: of(ended(share, arm, seed)) for name, arm in arms.items()}


def difference(one: Tensor, other: Tensor) -> tuple[float, float, float]:
    """The mean of one less the other, item by item, and the ends of its interval."""
    from patchbay import maths

    mean, low, high = maths.paired_interval(one, other)[:3]
    return mean, low, high


@claim("guo2024", "made", seeds=TRAINED)
def guo2024(model: Model, seed: int) -> Claim:
    """Confirmed if, of facts that were read one way alone, more are known the other way after units were permuted than after plain
    training, by more than half of the facts."""
    one, other = _reversal(seed)
    text = (
        f"in networks of 50,000 weights, facts read one way alone are known the other way by {float(one.mean()):.0%} after units were permuted "
        f"and by {float(other.mean()):.0%} after plain training"
    )
    return Claim(text, *difference(one, other), 0.5, "share of facts")


@functools.cache
def _reversal(seed: int) -> tuple[Tensor, Tensor]:
    import torch

    from patchbay.tiny import lab
    from patchbay.train._plan import Arm

    known = lab.facts(FACTS, seed)
    unread = known[FACTS // 2 :]

    def right(tuned: Model) -> Tensor:
        logits = pb.run(tuned, [b + r for _, r, b in unread], logits="last").last_logits.cpu()
        return (logits.argmax(-1) == torch.tensor([a[0] for a, _, _ in unread])).double()

    network = lab.small(lab.FACT_VOCAB, width=48, mlp=96)
    return pair(network, lab.read_one_way(known), right, seed, (Arm("spt"), Arm()), steps=400, batch_size=24)


@claim("gao2025", "made", seeds=TRAINED)
def gao2025(model: Model, seed: int) -> Claim:
    """Confirmed if, at one loss, the nodes that a task needs have fewer weights in a weight-sparse network than in its dense twin, by more than the
    ratio of all their weights: what the zeros alone take away shows nothing of circuits."""
    one, other, nodes, ratio = _circuits(seed)
    text = (
        f"at one loss the circuit that repeats a string has {float(other.exp().mean()):.0f} weights in a dense network of one layer and {float(one.exp().mean()):.0f} in "
        f"its weight-sparse twin ({nodes[1]:.0f} and {nodes[0]:.0f} nodes; of all weights there are {ratio:.2g} times as many)"
    )
    return Claim(text, *difference(other, one), math.log(ratio), "log of the ratio")


@functools.cache
def _circuits(seed: int) -> tuple[Tensor, Tensor, tuple[float, float], float]:
    """Log weights of the circuits of several sets of prompts [set], sparse and dense; their mean nodes; the ratio of all weights."""
    import torch

    from patchbay.tiny import lab
    from patchbay.train._plan import Arm
    from patchbay.train._sparse import nonzero

    strings = {"vocab": 24, "length": 16, "least": 4, "most": 4}
    sets = [lab.repeats(24, seed + 1000 + i, **strings) for i in range(4)]
    tasks = [
        pb.Task("repeat", [ids[:14] for ids in rows], [ids[14] for ids in rows], [[]] * 24, metric="log_probability")  # type: ignore[arg-type]
        for rows in sets
    ]

    def lost(tuned: Model) -> float:
        return max(-float(task.score(pb.run(tuned, task, logits="last").last_logits).mean()) for task in tasks)

    found: list[Model] = []

    def keep(tuned: Model) -> Tensor:
        found.append(tuned)
        return torch.zeros(1)

    network, arms = lab.small(24, layers=1, width=48, mlp=48), (Arm(optimizer="sparse:keep=0.1,over=150"), Arm())
    pair(network, lab.repeats(2048, seed, **strings), keep, seed, arms, steps=300, batch_size=24, rate=4e-3)
    bound = 1.5 * max(map(lost, found)) + 0.2
    told = [
        [pb.prove.mean_mask(one, task, loss=bound, steps=40, draws=1, seed=seed) for task in tasks] for one in found
    ]
    weights = [torch.tensor([float(one["entries"]) for one in side]).double().clamp_min(1.0).log() for side in told]
    nodes = [sum(float(one["n_nodes"]) for one in side) / len(side) for side in told]
    return weights[0], weights[1], (nodes[0], nodes[1]), nonzero(found[1].hf) / nonzero(found[0].hf)


@claim("yusuf2023", "made", seeds=TRAINED)
def yusuf2023(model: Model, seed: int) -> Claim:
    """Confirmed if one attention layer whose queries, keys and values are convolved repeats what it has read more often than a plain one, by
    more than 0.3 of the tokens. The paper's own claim is of accuracy on other tasks, and its sentence on memory contradicts itself."""
    one, other = _one_layer(seed)
    text = (
        f"in networks of one layer, convolved queries, keys and values repeat a random string with {float(one.mean()):.0%} of tokens right, and plain ones "
        f"with {float(other.mean()):.0%}"
    )
    return Claim(text, *difference(one, other), 0.3, "share of tokens")


@functools.cache
def _one_layer(seed: int) -> tuple[Tensor, Tensor]:
    import torch

    from patchbay.tiny import lab
    from patchbay.train._plan import Arm

    strings = {"vocab": 24, "length": 24, "most": 8}
    held = lab.repeats(40, seed + 1000, **strings)

    def right(tuned: Model) -> Tensor:
        said = pb.run(tuned, held).logits.cpu()[:, 15:-1].argmax(-1)
        return (said == torch.tensor(held)[:, 16:]).double().mean(1)

    network, arms = lab.small(24, layers=1, mlp=1), (Arm(blocks='{"convolution": 3}'), Arm())
    return pair(network, lab.repeats(2048, seed, **strings), right, seed, arms, steps=350, batch_size=24, rate=4e-3)


@claim("gu2024", "made", seeds=TRAINED)
def gu2024(model: Model, seed: int) -> Claim:
    """Confirmed if a head of the softmax rests on the first token, from tokens at which it has nothing to do, and one of the sigmoid does not:
    the difference by text of attention there less attention at triggers, of the head that other texts chose, beyond what even attention gives."""
    one, other = _resting(seed)
    text = (
        f"in networks of one layer, a softmax head gives the first token {float(one.mean()):.2f} more attention where it has nothing to copy than where it has, and a sigmoid head "
        f"{float(other.mean()):.2f}"
    )
    return Claim(text, *difference(one, other), 0.08, "attention")


@functools.cache
def _resting(seed: int) -> tuple[Tensor, Tensor]:
    import json
    import math

    import torch

    from patchbay.tiny import lab
    from patchbay.train._plan import Arm

    held = [text for text in lab.backcopies(96, seed + 1000) if sum(1 <= one <= 3 for one in text[2:]) > 1][:64]
    ids = torch.tensor(held)
    late = torch.arange(ids.shape[1]) > 1
    trigger = (ids >= 1) & (ids <= 3) & late

    def rests(tuned: Model) -> Tensor:
        port = pb.Port("attn.pattern", 0)
        first = pb.run(tuned, held, taps=[port], logits="last")[port][..., 0].double().cpu()  # [text, head, query]
        at = [(first * some[:, None]).sum(2) / some.sum(1)[:, None] for some in (~trigger & late, trigger)]
        gap = at[0] - at[1]  # [text, head]
        return gap[32:, int(gap[:32].mean(0).argmax())]

    sigmoid = json.dumps({"attention": {"kind": "sigmoid", "bias": -math.log(32)}})
    network, arms = lab.small(64, layers=1, heads=2, mlp=1), (Arm(), Arm(blocks=sigmoid))
    return pair(network, lab.backcopies(2048, seed), rests, seed, arms, steps=240, batch_size=16)


@claim("kallini2024", "made", seeds=TRAINED)
def kallini2024(model: Model, seed: int) -> Claim:
    """Confirmed if stretches whose windows of three tokens are shuffled are learned worse than the same stretches backwards, each scored in its own
    language, by more than half a nat. The paper's ranking is of GPT-2 on many more languages."""
    one, other = _impossible(seed)
    text = (
        f"in networks of 120,000 weights, stories with windows of three tokens shuffled cost {float(one.mean()):.2f} nats per token and the same stories backwards "
        f"{float(other.mean()):.2f}"
    )
    return Claim(text, *difference(one, other), 0.5, "nats per token")


@functools.cache
def _impossible(seed: int) -> tuple[Tensor, Tensor]:
    from patchbay.tiny import lab
    from patchbay.train._objectives import objective
    from patchbay.train._plan import Arm, plan_of
    from patchbay.train._runs import Lab, ended

    tiny = pb.load("tiny")
    pieces: list[Any] = [[one] for one in lab.pieces(tiny, 2064, seed, range(12, 36))]
    how = plan_of({"fresh": True, "steps": 100, "batch_size": 24, "rate": 4e-3})
    share = Lab(lab.small(tiny.vocab_size, width=48, mlp=96), pieces[64:], pieces[:64], how)
    one, other = (
        objective(name).scores(ended(share, Arm(name), seed), share.held)
        for name in ("impossible:kind=local", "impossible:kind=reversed")
    )
    return one, other


@claim("yao2022", "made", seeds=TRAINED)
def yao2022(model: Model, seed: int) -> Claim:
    """Confirmed if, after a little text, names that return cost less in a network that read repeating strings before than in one that read tokens which
    follow from nothing, by more than half a nat; rows of tokens are drawn anew between. The paper's source is the language of playing agents."""
    one, other = _transferred(seed)
    text = (
        f"in networks of one layer with new rows of tokens, a name that returns costs {float(other.mean()):.2f} nats after strings that repeat and {float(one.mean()):.2f} after tokens "
        "that follow from nothing"
    )
    return Claim(text, *difference(one, other), 0.5, "nats")


@functools.cache
def _transferred(seed: int) -> tuple[Tensor, Tensor]:
    import torch

    from patchbay.tiny import lab
    from patchbay.train._plan import Arm

    held = [one for one in lab.mentions(96, seed + 1000) if one[1]][:48]

    def returning(tuned: Model) -> Tensor:
        said = torch.log_softmax(pb.run(tuned, [ids for ids, _ in held]).logits.cpu().double(), -1)
        return torch.stack(
            [
                -torch.stack([row[at - 1, ids[at]] for at in places]).mean()
                for row, (ids, places) in zip(said, held, strict=True)
            ]
        )

    network = pb.load(pb.blocks.build(lab.small(64, layers=1, mlp=64, positions=64).hf, convolution=3))
    arms = [Arm(f"transfer:source={source},steps=250,vocab=64,length=32") for source in ("independent", "repeats")]
    texts = [ids for ids, _ in lab.mentions(256, seed)]
    return pair(network, texts, returning, seed, (arms[0], arms[1]), steps=60, batch_size=16, rate=4e-3, redraw=True)
