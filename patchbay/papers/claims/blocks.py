"""Claims about blocks: the identities that other architectures stand on, and what a cut by one threshold keeps. What their papers claim of trained models of 0.3 billion numbers and
more is not testable at this size; `patchbay.blocks` builds the models, and training them in pairs says what it says here."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import patchbay as pb
from patchbay.papers.claims._claim import Claim, claim

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


def _ids(model: Model, seed: int) -> Tensor:
    import torch

    return torch.randint(3, model.vocab_size - 1, (4, 24), generator=torch.Generator().manual_seed(seed))


@claim("shao2025", "identity", ON)
def shao2025(model: Model, seed: int) -> Claim:
    """The dot product of turned queries and keys against the explicit cosine, float64."""
    import torch

    errors = []
    for generator in _draws(seed):
        q, k, D, b = (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((9, 2, 8), (9, 2, 8), (2, 4), (2, 4))
        )
        made = (pb.blocks.turned.turned(q, D, b) * pb.blocks.turned.turned(k, D, None)).sum(-1)
        z_q, z_k = (torch.complex(*t.chunk(2, -1)) for t in (q, k))
        expected = (z_q.abs() * z_k.abs() * torch.cos(D * (z_q.angle() - z_k.angle()) + b)).sum(-1)
        errors.append(_off(made, expected))
    return _within("attention by angles that heads bend is a dot product of mapped queries and keys", errors, 1e-9)


@claim("parisotto2019", "identity", ON)
def parisotto2019(model: Model, seed: int) -> Claim:
    """A gate of zero weights keeps 1 - sigma(-2) = 0.8808 of the stream, exactly."""
    import torch

    errors = []
    for generator in _draws(seed):
        one, x = pb.blocks.gate.ResidualGate(16), torch.randn(5, 16, generator=generator)
        with torch.no_grad():
            for weight in one.parameters():
                weight.zero_()
            errors.append(_off(x + one(x, x), x / (1 + math.exp(-2.0))))
    return _within("a new gate keeps the stream near what it was", errors, 1e-5)


@claim("wei2024", "identity", ON)
def wei2024(model: Model, seed: int) -> Claim:
    """Each structured map against its dense product, guided at half share too."""
    import torch

    from patchbay.results.method import seeded

    errors = []
    for generator in _draws(seed):
        x = torch.randn(5, 32, generator=generator)
        for form, sizes in (
            ("low_rank", {"rank": 6}),
            ("block_dense", {"rank": 12, "blocks": 4}),
            ("block_shuffle", {"blocks": 4}),
        ):
            with seeded(seed):
                made = pb.blocks.structured.of(torch.nn.Linear(32, 48), form, guided=True, **sizes)
            dense = x @ made.dense().T
            pb.blocks.structured.set_share(made, 0.5)
            errors.append(_off(made(x), dense))
    return _within("structured maps, guided from the start or not, are their dense product", errors, 1e-4)


@claim("jaiswal2024", "comparison", ON)
def jaiswal2024(model: Model, seed: int) -> Claim:
    """What a cut to half of the full ranks costs by one threshold, against the same ranks dealt anew among matrices of one shape."""
    import torch

    from patchbay import maths

    rows = [list(row) for row in pb.tasks.facts_in_context(model, 48, seed=seed).clean]
    ids = torch.tensor([row[: min(map(len, rows))] for row in rows])
    ranks = pb.blocks.welore.ranks(model.hf, 0.5)

    def loss(asked: dict[str, int]) -> float:
        hf: Any = pb.blocks.build(model.hf, ranks=asked)
        with torch.no_grad():
            return float(hf(ids, labels=ids).loss)

    own = loss(ranks)
    lost = [loss(pb.blocks.welore.shuffled(model.hf, ranks, seed + i)) - own for i in range(DRAWS)]
    value, low, high = maths.bootstrap_interval(torch.tensor(lost, dtype=torch.float64))
    return Claim(
        "ranks by one threshold keep more than the same ranks dealt anew", value, low, high, 0.0, "nats per token"
    )


@claim("shah2025", "identity", ON)
def shah2025(model: Model, seed: int) -> Claim:
    """What the last layer, made a meta-layer, adds to texts without the token."""
    last = model.n_layers - 1
    hf = pb.blocks.build(model.hf, meta_tokens={"id": model.vocab_size - 1, "layers": [last]})
    port = pb.Port("attn.out", last)
    added = pb.run(pb.load(hf), _ids(model, seed), taps=[port])[port]
    errors = added.abs().amax((1, 2)).tolist()
    return _within("without its token a meta-layer adds nothing", errors, 1e-6, "largest number added")


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


@claim("gupta2018", "identity", ON)
def gupta2018(model: Model, seed: int) -> Claim:
    """A prefix bag's logits after a permuted prefix, without the language model's state."""
    import torch

    from patchbay.results.method import seeded

    with seeded(seed):
        bag = pb.blocks.prefix_bag.PrefixBag(model.vocab_size, 8)
    errors, ids = [], _ids(model, seed)
    for generator in _draws(seed):
        permuted = ids.clone()
        permuted[:, :12] = ids[:, torch.randperm(12, generator=generator)]
        errors.append(_off(bag(permuted)[:, 12:], bag(ids)[:, 12:]))
    return _within("a bag of the prefix knows no order", errors, 1e-4)
