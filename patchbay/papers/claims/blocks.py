"""Claims about blocks: the identities that other architectures stand on. What their papers claim of trained models of 0.3 billion numbers and
more is not testable at this size; `patchbay.blocks` builds the models, and training them in pairs says what it says here."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import patchbay as pb
from patchbay.papers.claims._claim import TRAINED, Claim, claim
from patchbay.papers.claims._grown import nats
from patchbay.papers.claims.training import difference, trained

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from patchbay.model.model import Model

DRAWS = 8
ON = "tiny-llama"


def _within(text: str, errors: list[float], bound: float, unit: str = "relative error") -> Claim:
    """An identity: the mean error over draws, with its interval, below the bound."""
    import torch

    from patchbay import maths

    value, low, high = maths.bootstrap_interval(torch.tensor(errors, dtype=torch.float64))
    return Claim(text, value, low, high, bound, unit, above=False)


def _off(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _draws(seed: int) -> list[torch.Generator]:
    import torch

    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(DRAWS)]


@claim("gu2021", "identity", ON)
def gu2021(model: Model, seed: int) -> Claim:
    """LegS, discretised three ways: the convolution against state after state, float64."""
    import torch

    errors = []
    for generator in _draws(seed):
        A, B = pb.blocks.state_space.hippo(6)
        C, u = (
            torch.randn(2, 6, generator=generator, dtype=torch.float64),
            torch.randn(48, 2, generator=generator, dtype=torch.float64),
        )
        for a in (0.0, 0.5, 1.0):
            Ab, Bb = pb.blocks.state_space.discretised(A, B, 1 / 48, a)
            errors.append(
                _off(
                    pb.blocks.state_space.convolve(pb.blocks.state_space.kernel(Ab, Bb, C, 48), u),
                    pb.blocks.state_space.scan(Ab, Bb, C, u),
                )
            )
    return _within("a linear state-space layer is a recurrence and a convolution", errors, 1e-9)


@claim("barrault2024", "made", seeds=TRAINED)
def barrault2024(model: Model, seed: int) -> Claim:
    """Confirmed if, where one of two sentences may follow, vectors drawn by codes lie nearer to a sentence than the one that squared error fits: a demo of the quantised model's reason. Its
    encoder, and what it says in other languages, are not here."""
    import torch

    from patchbay import maths
    from patchbay.results.method import seeded

    vectors, state, follows = _two_modes(seed)
    with seeded(seed), torch.enable_grad():
        coded, mean = (
            pb.blocks.next_vector.CodeHead(pb.blocks.next_vector.fitted(vectors, 1, 8), 4),
            torch.nn.Linear(4, 8),
        )
        fit = torch.optim.Adam([*coded.maps.parameters(), *mean.parameters()], lr=0.05)
        for _ in range(150):
            fit.zero_grad()
            (coded.loss(state, vectors) + (mean(state) - vectors).square().mean()).backward()
            fit.step()
    drawn = coded.drawn(state, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        far = [torch.cdist(said[:, None], follows).amin((1, 2)).double() for said in (mean(state), drawn)]
    first = (drawn[:, None] - follows).norm(dim=2).argmin(1).eq(0).double()
    text = (
        f"where one of two sentences follows, the vector that squared error fits lies {float(far[0].mean()):.2f} from the nearer of them and one drawn by codes {float(far[1].mean()):.2f}; codes say the first of the two in "
        f"{float(first.mean()):.0%} of the draws"
    )
    return Claim(text, *maths.paired_interval(far[0], far[1])[:3], 0.0, "distance")


def _two_modes(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Next vectors [row, d], which of four states each follows, one-hot, and the two sentences [row, 2, d] that may."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    sentences = torch.randn(4, 2, 8, generator=draw)
    state, which = (torch.randint(n, (400,), generator=draw) for n in (4, 2))
    noise = 0.05 * torch.randn(400, 8, generator=draw)
    return sentences[state, which] + noise, torch.eye(4)[state], sentences[state]


# --- sub-networks -------------------------------------------------------------------------------------

NEAR = 0.05  # nats a token: what a sub-network may cost more than the whole network and still be told as near it
Asked = dict[tuple[int, ...], tuple["Tensor", float]]  # of each choice what it costs, [text], and its size


@claim("sarah2024", "made", seeds=TRAINED)
def sarah2024(model: Model, seed: int) -> Claim:
    """Confirmed if, after as many more steps, sub-networks of a network that was tuned on random ones cost less than the same sub-networks of its plainly tuned twin, and if, of 48 that are asked of the
    former, those that a search by NSGA-II meets leave more area above their front of loss and size than 48 that are drawn, over 20 searches and draws. Told beside it: neurons that are drawn anew at each
    step, and the twin on other batches."""
    import torch

    found = _tuned_for_parts(seed)
    whole = (0,) * len(next(iter(found["twin"])))
    cost = {name: torch.stack([each for one, (each, _) in some.items() if one != whole]).mean(0) for name, some in found.items()}  # fmt: skip
    own = {name: float(some[whole][0].mean()) for name, some in found.items()}
    small = {name: min(size for each, size in some.values() if float(each.mean()) <= own[name] + NEAR) / some[whole][1] for name, some in found.items()}  # fmt: skip
    met, drawn = _areas({one: (float(each.mean()), size) for one, (each, size) in found["supernet"].items()}, seed)
    searched = difference(met, drawn)
    value, low, high = difference(cost["twin"], cost["supernet"])
    low = low if searched[1] > 0 else min(low, 0.0)
    told = {name: float(one.mean()) for name, one in cost.items()}
    text = (
        f"in networks of three layers, sub-networks without some layers' attention or neurons cost {told['supernet']:.2f} nats a token after tuning on random ones, {told['twin']:.2f} after plain tuning ({told['other']:.2f} on other batches) and "
        f"{told['drawn']:.2f} after tuning with neurons drawn anew at each step (the whole networks {own['supernet']:.2f}, {own['twin']:.2f}, {own['other']:.2f} and {own['drawn']:.2f}); the smallest within {NEAR:g} nats of its own whole has "
        f"{small['supernet']:.0%} of the layers' weights, {small['twin']:.0%} after plain tuning and {small['drawn']:.0%} with drawn neurons; 48 that a search meets leave {float(met.mean()):.3f} of the area of loss and size, 48 that are drawn "
        f"{float(drawn.mean()):.3f}"
    )
    return Claim(text, value, low, high, 0.0, "nats per token")


@functools.cache
def _tuned_for_parts(seed: int) -> dict[str, Asked]:
    """What every sub-network costs of a network that was trained plainly and then tuned four ways for as many steps again."""
    from patchbay.tiny import lab
    from patchbay.train._plan import Arm

    texts, held = ([ids for ids, _ in lab.mentions(n, at)] for n, at in ((2048, seed), (24, seed + 1000)))
    arms = {
        "supernet": Arm("supernet"), "twin": Arm(), "other": Arm(other_batches=True), "drawn": Arm("supernet:nested=0"),
    }  # fmt: skip
    plan = {"steps": 250, "batch_size": 16, "rate": 4e-3}
    network = lab.small(64, layers=3, width=48, mlp=96)
    begun = trained(network, texts, lambda tuned: tuned, seed, {"begun": Arm()}, fresh=True, **plan)["begun"]
    return trained(begun, texts, lambda tuned: _every(tuned, held), seed + 1, arms, **plan)


def _every(tuned: Model, held: list[list[int]]) -> Asked:
    """What every sub-network of a model costs on texts, and its size."""
    from patchbay.blocks import subnetworks as sub

    space = sub.Space(tuned)
    return {
        choice: (nats(pb.run(tuned, held, edits=space.edits(choice)).logits.float(), held).mean(1), float(space.size(choice)))
        for choice in sub.every(space.options)
    }  # fmt: skip


def _areas(points: dict[tuple[int, ...], tuple[float, float]], seed: int) -> tuple[Tensor, Tensor]:
    """Of the area of loss and size, what is left above the front of 48 that a search meets, and of 48 that are drawn, each [draw]."""
    import random

    import torch

    from patchbay.blocks import subnetworks as sub

    corner = (max(x for x, _ in points.values()), max(y for _, y in points.values()))
    least = (min(x for x, _ in points.values()), min(y for _, y in points.values()))
    whole = (corner[0] - least[0]) * (corner[1] - least[1])
    options = [1 + max(genes) for genes in zip(*points, strict=True)]
    found, drawn = [], []
    for at in range(20):
        met = sub.search(points.__getitem__, options, evaluations=48, seed=100 * seed + at)
        found.append(sub.hypervolume(list(met.values()), corner) / whole)
        some = random.Random(f"draw {seed} {at}").sample(list(points.values()), 48)
        drawn.append(sub.hypervolume(some, corner) / whole)
    return torch.tensor(found, dtype=torch.float64), torch.tensor(drawn, dtype=torch.float64)
