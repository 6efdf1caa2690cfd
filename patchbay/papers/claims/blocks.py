"""Claims about blocks: the identities that other architectures stand on. What their papers claim of trained models of 0.3 billion numbers and
more is not testable at this size; `patchbay.blocks` builds the models, and training them in pairs says what it says here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import patchbay as pb
from patchbay.papers.claims._claim import TRAINED, Claim, claim

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


@claim("sarah2024", "comparison", ON)
def sarah2024(model: Model, seed: int) -> Claim:
    """Confirmed if, of 48 sub-networks that were asked, those that a search by NSGA-II met leave more area above their front of loss and size than 48 that were drawn, over 20 searches and draws.
    The model is not tuned on random sub-networks before, as the paper's is."""
    import random

    import torch

    from patchbay import maths
    from patchbay.blocks import subnetworks as sub

    texts = [list(row) for row in pb.tasks.facts_in_context(model, 36, seed=seed).clean]
    space, held = sub.Space(model, texts[:12]), texts[12:]

    def loss(choice: sub.Choice) -> float:
        rows = pb.run(model, held, edits=space.edits(choice)).logits.float()
        return sum(
            float(torch.nn.functional.cross_entropy(row[: len(ids) - 1], torch.tensor(ids[1:], device=row.device)))
            for row, ids in zip(rows, held, strict=True)
        ) / len(held)

    points = {choice: (loss(choice), float(space.size(choice))) for choice in sub.every(space.options)}
    corner = (max(x for x, _ in points.values()), max(y for _, y in points.values()))
    least = (min(x for x, _ in points.values()), min(y for _, y in points.values()))
    whole = (corner[0] - least[0]) * (corner[1] - least[1])

    def area(some: list[sub.Point]) -> float:
        return sub.hypervolume(some, corner) / whole

    found, drawn = [], []
    for at in range(20):
        met = sub.search(points.__getitem__, space.options, evaluations=48, seed=100 * seed + at)
        found.append(area(list(met.values())))
        drawn.append(area(random.Random(f"draw {seed} {at}").sample(list(points.values()), 48)))
    most = area(list(points.values()))
    free = [choice for choice, (x, _) in points.items() if x <= points[(0,) * len(space.options)][0]]
    small = min(space.size(choice) for choice in free) / space.size((0,) * len(space.options))
    text = (
        f"of {len(points)} sub-networks without some layers' attention or neurons, 48 that a search meets leave {sum(found) / 20:.3f} of the area of loss and size, 48 that are drawn {sum(drawn) / 20:.3f}, all {most:.3f}; the smallest "
        f"that costs nothing has {small:.0%} of the layers' weights"
    )
    return Claim(text, *maths.paired_interval(torch.tensor(found), torch.tensor(drawn))[:3], 0.0, "share of the area")
