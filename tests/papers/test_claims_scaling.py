"""Claims of laws: planted laws are told apart at sizes that they did not see, rows hold what their share says, networks of a size read alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from patchbay.corpus import mixture_law
from patchbay.papers.claims import scaling
from patchbay.tiny import clones, lab
from tests.tolerance import close

SIZES = [900.0, 1500.0, 2100.0, 3500.0, 5000.0]
PLANTED: dict[scaling.Moves, tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]] = {
    "factor": ((0.8, 0.8, 0.8), (300.0, 500.0, 900.0), (0.8, 0.8, 0.8)),
    "constant": ((0.8, 0.8, 0.8), (300.0, 300.0, 300.0), (0.8, 0.9, 1.2)),
    "exponent": ((0.8, 0.7, 0.6), (300.0, 300.0, 300.0), (0.8, 0.8, 0.8)),
}


def planted(moves: scaling.Moves, noise: float = 0.0) -> Tensor:
    """Losses [share, size] of a law of which one number moves with the share."""
    rows = [[b * n**-a + c for n in SIZES] for a, b, c in zip(*PLANTED[moves], strict=True)]
    draw = torch.Generator().manual_seed(0)
    return torch.tensor(rows, dtype=torch.float64) + noise * torch.randn(3, 5, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("moves", scaling.MOVES)
def test_a_planted_law_says_the_sizes_that_were_left_out(moves: scaling.Moves) -> None:
    losses = planted(moves)
    missed = {name: float(scaling.left_out(losses, SIZES, name).max()) for name in scaling.MOVES}
    assert missed[moves] < 1e-4
    assert all(one > 0.02 for name, one in missed.items() if name != moves)


def test_a_size_that_is_left_out_is_not_seen() -> None:
    """Whatever its loss is, the law of the others says the same of it."""
    losses = planted("factor")
    other = losses.clone()
    other[1, 2] += 5.0
    found, moved = (scaling.left_out(one, SIZES, "factor").view(3, 5) for one in (losses, other))
    assert abs(float(moved[1, 2]) - 5.0) < 1e-4
    assert float(found[1, 2]) < 1e-4
    assert close(moved[0, 2], found[0, 2], of=10.0)


def test_the_law_whose_factor_moves_is_the_corpus_tools() -> None:
    losses = planted("factor", noise=0.01)
    known = mixture_law.fit(dict(zip(scaling.SHARES, losses.tolist(), strict=True)), SIZES, draws=1)
    exponents, values = scaling.fitted(losses, SIZES, "factor")
    assert abs(float(exponents[0]) / known.a - 1.0) < 1e-3
    assert abs(float(values[-1]) / known.c - 1.0) < 1e-3
    assert all(abs(float(b) / known.b[p] - 1.0) < 1e-2 for p, b in zip(scaling.SHARES, values, strict=False))


@pytest.mark.parametrize(
    ("moves", "verdict"), [("factor", "confirmed"), ("constant", "not confirmed"), ("exponent", "not confirmed")]
)
def test_the_better_of_the_other_laws_is_what_counts(
    monkeypatch: pytest.MonkeyPatch, moves: scaling.Moves, verdict: str
) -> None:
    losses = planted(moves, noise=0.003)
    monkeypatch.setattr(scaling, "_sized", lambda seed: (losses, SIZES))
    claim = scaling.fernandes2023(None, 0)  # type: ignore[arg-type]
    assert claim.verdict == verdict
    if moves == "factor":
        missed = {name: float(scaling.left_out(losses, SIZES, name).mean()) for name in scaling.MOVES}
        assert close(claim.value, min(missed["constant"], missed["exponent"]) - missed["factor"], of=10.0)
        assert "a share of 0.5 is worth 0." in claim.text


def test_losses_that_do_not_fall_have_no_law_to_tell_of() -> None:
    assert "do not fall with size" in scaling._worth(planted("factor").flip(1), SIZES, 0)


def test_rows_are_of_the_language_that_they_name_by_its_share() -> None:
    """The chains of all shares are the same, and a larger share takes nothing from the first language."""
    by_share = {share: scaling.spoken(400, share, 3, 1) for share in scaling.SHARES}
    name = clones.vocabulary(2) - 1
    for share, rows in by_share.items():
        first = [ids[0] == name for ids in rows]
        assert abs(sum(first) / 400 - share) < 0.08
        for ids, own in zip(rows, first, strict=True):
            assert not set(ids[1:]) & set(clones.own(int(own)))
            assert any(token in clones.own(int(not own)) for token in ids[1:])
    followers = clones.law(1)
    for rows in zip(*by_share.values(), strict=True):
        said = [[token - 56 * (token >= 80) for token in ids[1:]] for ids in rows]  # words again, of either language
        assert said[0] == said[1] == said[2]
        assert all(b in followers[a] for a, b in zip(said[0], said[0][1:], strict=False))
        firsts = [ids[0] == name for ids in rows]
        assert firsts == sorted(firsts, reverse=True)


def test_every_size_and_share_is_trained_alike_and_scored_on_other_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "ROWS", 100)
    monkeypatch.setattr(scaling, "HELD", 20)
    read: list[tuple[int, Any, int, dict[str, Any]]] = []
    learned = scaling.spoken(100, 1.0, 4, 4)

    def grown(network: Any, texts: Any, blocks: Any, seed: int, **plan: Any) -> Any:
        read.append((network.d_model, texts, seed, plan))
        return network.hf

    def said(hf: Any, texts: Any) -> Tensor:
        assert all(ids[0] == clones.vocabulary(2) - 1 for ids in texts)
        assert not any(ids in learned for ids in texts)
        logits = torch.zeros(len(texts), scaling.WORDS + 1, clones.vocabulary(2) + 1)
        logits[:, 0, 0] = 50.0  # certain of a first word: nothing tells it, so that it does not count
        return logits

    monkeypatch.setattr(scaling, "grown", grown)
    monkeypatch.setattr(scaling, "said", said)
    losses, sizes = scaling._sized.__wrapped__(4)
    assert [width for width, *_ in read[::3]] == list(scaling.WIDTHS)
    assert all(read[i][1:] == read[i % 3][1:] for i in range(len(read)))
    assert len({str(texts) for _, texts, *_ in read[:3]}) == 3
    assert {seed for _, _, seed, _ in read} == {4}
    even = torch.full((3, 5), float(torch.tensor(clones.vocabulary(2) + 1.0).double().log()), dtype=torch.float64)
    assert close(losses, even)
    made = lab.small(clones.vocabulary(2) + 1, layers=1, width=8, heads=1, mlp=16, positions=21, tied=True)
    assert sizes[2] == sum(one.numel() for one in made.hf.parameters())
