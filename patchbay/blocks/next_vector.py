"""Next vector: what stands for the next sentence, said as one vector, or as codes of which each refines what those before it make.

    codes of x     c_k = the row of book k that is nearest to x - (what codes 1 .. k-1 make);   what codes make is the sum of their rows
    code head      p(c_k | state, codes before) = softmax(W_k [state, what codes 1 .. k-1 make] + b_k),   loss the sum over k of - log p
    mean head      W state + b, by squared error

Where two sentences may follow, squared error says the vector between them, which no sentence has; codes give each its chance. `fitted` makes the books, level by level, by k-means on
what is left.

Barrault et al. 2024, "Large Concept Models: Language Modeling in a Sentence Representation Space" (the quantised model of three; its vectors are SONAR's, of an encoder that is not here). These are heads on states that
somebody gives; what a language model does with sentences they do not show.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patchbay.errors import PatchbayError

ROUNDS, STARTS = 20, 4  # of k-means: rounds, and starts of which the best is kept


class Books(nn.Module):
    """Rows of each level, [level, code, d]."""

    rows: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)

    def codes(self, vectors: Tensor) -> Tensor:
        """The codes [vector, level] of vectors [vector, d]."""
        left, found = vectors, []
        for book in self.rows:
            found.append(_far(left, book).argmin(1))
            left = left - book[found[-1]]
        return torch.stack(found, 1)

    def made(self, codes: Tensor) -> Tensor:
        """What the first levels' codes [..., level] make, [..., d]; 0 of none."""
        levels = torch.arange(codes.shape[-1], device=codes.device)
        return self.rows[levels, codes].sum(-2)


def fitted(vectors: Tensor, levels: int, codes: int, seed: int = 0) -> Books:
    """Books of so many levels and codes for vectors [vector, d]; a code that no vector is nearest to stays where it was."""
    if levels < 1 or not 1 <= codes <= len(vectors):
        raise PatchbayError(
            f"{levels} levels of {codes} codes from {len(vectors)} vectors: a level or more, and no more codes than vectors"
        )
    draw, left, books = torch.Generator().manual_seed(seed), vectors, []
    for _ in range(levels):
        tried = [_settled(left, _begun(left, codes, draw)) for _ in range(STARTS)]
        book = min(tried, key=lambda one: float(_far(left, one).amin(1).square().sum()))
        books.append(book)
        left = left - book[_far(left, book).argmin(1)]
    return Books(torch.stack(books))


def _far(vectors: Tensor, book: Tensor) -> Tensor:
    """Distances [vector, code], 0 of the same row to the bit."""
    return torch.cdist(vectors, book, compute_mode="donot_use_mm_for_euclid_dist")


def _settled(vectors: Tensor, book: Tensor) -> Tensor:
    """Rounds of k-means."""
    for _ in range(ROUNDS):
        nearest = _far(vectors, book).argmin(1)
        counts = torch.bincount(nearest, minlength=len(book))[:, None]
        sums = torch.zeros_like(book).index_add_(0, nearest, vectors)
        book = torch.where(counts > 0, sums / counts.clamp(min=1), book)
    return book


def _begun(vectors: Tensor, codes: int, draw: torch.Generator) -> Tensor:
    """Vectors to start from: one that is drawn, then each time one by the chance of its squared distance from those there (k-means++)."""
    chosen = [int(torch.randint(len(vectors), (1,), generator=draw))]
    for _ in range(codes - 1):
        far = _far(vectors, vectors[chosen]).amin(1).square().cpu()
        some = far if bool(far.any()) else torch.ones_like(far)
        chosen.append(int(torch.multinomial(some, 1, generator=draw)))
    return vectors[chosen].clone()


class CodeHead(nn.Module):
    """Chances of the codes of the next vector from a state."""

    def __init__(self, books: Books, state: int) -> None:
        super().__init__()
        levels, codes, width = books.rows.shape
        self.books = books
        self.maps = nn.ModuleList(nn.Linear(state + width, codes) for _ in range(levels))

    def logits(self, states: Tensor, codes: Tensor) -> Tensor:
        """[row, level, code] from states [row, d] and the codes [row, level], of which each level reads those before it."""
        before = [self.books.made(codes[:, :k]) for k in range(len(self.maps))]
        return torch.stack([one(torch.cat([states, made], 1)) for one, made in zip(self.maps, before, strict=True)], 1)

    def loss(self, states: Tensor, vectors: Tensor) -> Tensor:
        """Mean over rows of - log p of the codes of the next vectors."""
        codes = self.books.codes(vectors)
        logp = self.logits(states, codes).log_softmax(-1)
        found: Tensor = -logp.gather(2, codes[..., None]).sum((1, 2)).mean()
        return found

    @torch.no_grad()
    def drawn(self, states: Tensor, generator: torch.Generator) -> Tensor:
        """A next vector for each state, its codes drawn level by level."""
        codes = torch.empty(len(states), 0, dtype=torch.long, device=states.device)
        for one in self.maps:
            chance = one(torch.cat([states, self.books.made(codes)], 1)).softmax(-1)
            drawn = torch.multinomial(chance.cpu(), 1, generator=generator).to(states.device)
            codes = torch.cat([codes, drawn], 1)
        return self.books.made(codes)
