"""Next vector: codes and their chances as loops, gradients of the chain rule, and two sentences that may follow, which squared error takes for one between."""

from __future__ import annotations

import pytest
import torch

from patchbay.blocks.next_vector import Books, CodeHead, fitted
from patchbay.errors import PatchbayError
from tests.tolerance import close


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_reference_codes_refine_what_is_left() -> None:
    books, vectors = Books(drawn(3, 4, 5)), drawn(6, 5, seed=1)
    codes = books.codes(vectors)
    for vector, row in zip(vectors, codes.tolist(), strict=True):
        left = vector
        for level, code in enumerate(row):
            far = [float((left - other).square().sum()) for other in books.rows[level]]
            assert code == far.index(min(far))
            left = left - books.rows[level, code]
    assert close(books.made(codes)[2], sum(books.rows[k, codes[2, k]] for k in range(3)))
    assert torch.equal(books.made(codes[:, :0]), torch.zeros(6, 5))


def test_reference_the_loss_and_its_gradient_by_loops() -> None:
    """- log p of a code is softmax's; its slope by a map is (p - one where the code is) times what the map reads."""
    books, states, vectors = Books(drawn(2, 3, 4)), drawn(5, 6, seed=1), drawn(5, 4, seed=2)
    torch.manual_seed(0)
    head = CodeHead(books, 6)
    with torch.enable_grad():
        loss = head.loss(states, vectors)
        slopes = torch.autograd.grad(loss, [one.weight for one in head.maps])
    codes, total = books.codes(vectors), 0.0
    expected = [torch.zeros_like(one.weight) for one in head.maps]
    for row in range(5):
        made = torch.zeros(4)
        for level, one in enumerate(head.maps):
            read = torch.cat([states[row], made])
            p = torch.softmax(one.weight.detach() @ read + one.bias.detach(), 0)
            code = int(codes[row, level])
            total -= float(p[code].log()) / 5
            expected[level] += torch.outer(p - torch.eye(3)[code], read) / 5
            made = made + books.rows[level, code]
    assert close(float(loss.detach()), total, of=10.0, dtype=torch.float32)
    for slope, by in zip(slopes, expected, strict=True):
        assert close(slope, by, of=1.0)


def test_planted_books_are_the_sentences() -> None:
    """Vectors on four points and small steps of four kinds from each: the first book is the points, the second the steps."""
    points, steps = 10 * torch.eye(4), torch.roll(torch.eye(4), 1, 0)
    vectors = (points[:, None] + steps[None]).reshape(-1, 4).repeat(3, 1)
    books = fitted(vectors, 2, 4)
    assert close(books.made(books.codes(vectors)), vectors, of=10.0)
    with pytest.raises(PatchbayError, match="2 levels of 5 codes from 4 vectors"):
        fitted(points, 2, 5)


def test_planted_two_sentences_may_follow_and_null_one() -> None:
    """Squared error's best is the mean, which is neither; drawn codes are each of the two in half of the draws. Where one follows both say it."""
    one, two = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    for share in (0.5, 1.0):
        vectors = torch.where(torch.arange(400)[:, None] < 400 * share, one, two)
        states, head = torch.ones(400, 1), CodeHead(fitted(vectors, 1, 2), 1)
        with torch.enable_grad():
            fit = torch.optim.Adam(head.maps.parameters(), lr=0.3)
            for _ in range(60):
                fit.zero_grad()
                head.loss(states, vectors).backward()
                fit.step()
        said = head.drawn(torch.ones(4000, 1), torch.Generator().manual_seed(0))
        ones = float((said - one).norm(dim=1).lt(0.1).double().mean())
        assert abs(ones - share) < 0.02 + 2 * (share * (1 - share) / 4000) ** 0.5
        assert bool(torch.minimum((said - one).norm(dim=1), (said - two).norm(dim=1)).lt(0.1).double().mean() > 0.98)
        between = vectors.mean(0)
        assert close(between, share * one + (1 - share) * two, of=3.0)
