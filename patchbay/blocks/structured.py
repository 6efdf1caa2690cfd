"""Structured feed-forward maps: a matrix [out, in] in factors, with the face of a linear layer.

    low_rank        V U,                       U [r, in], V [out, r]
    block_dense     V blockdiag(B_1 .. B_b),   B_i [r/b, in/b], V [out, r]
    block_shuffle   blockdiag_2 . transpose-shuffle . blockdiag_1, each of b blocks; the shuffle deals what one block makes out to all blocks of the next

`weight` is the dense product, made anew when it is read, so that all that reads weights (neurons, folds, wiring) works; `in_features`, `out_features` and `bias` as everywhere. Factors start so that the
product has the variance asked of a dense layer. r in + out r numbers in place of in out; the product of low rank has rank r, that of block_shuffle full rank at the same count.

Guided training adds the dense map at a share a that falls from 1 to 0 by a cosine over half of the steps (`share`): out = a W x + (1 - a) struct(x), W the dense product at the start, so that nothing
changes at step 0 whatever a is; `train.variant` sets it at each step. It costs a dense map until a is 0, which is to be counted.

Wei et al. 2024, "Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers": steeper scaling in training FLOPs to 1.3B. The public guide of block_shuffle
leaves out the shuffle; here W is the product itself. With a down map of rank r only r directions can be written, however many neurons there are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from patchbay.errors import PatchbayError

FORMS = ("low_rank", "block_dense", "block_shuffle")


class Structured(nn.Module):
    """What the three forms share: the face of a linear layer, and the guide."""

    share: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, guided: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer(
            "share", torch.tensor(1.0 if guided else 0.0)
        )  # of the guide: saved, as what is computed depends on it
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.guide = nn.Parameter(torch.zeros(out_features, in_features)) if guided else None

    @property
    def weight(self) -> Tensor:
        """The dense matrix [out, in] that the module maps with now."""
        made = self.dense()
        return made if self.guide is None else self.share * self.guide + (1.0 - self.share) * made

    def dense(self) -> Tensor:
        """The product of the factors, [out, in]."""
        return self.product(torch.eye(self.in_features, device=self.device, dtype=self.dtype)).T

    def product(self, x: Tensor) -> Tensor:
        """x [..., in] through the factors."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, x: Tensor) -> Tensor:
        out = self.product(x)
        if self.guide is not None and float(self.share):
            out = self.share * nn.functional.linear(x, self.guide) + (1.0 - self.share) * out
        return out if self.bias is None else out + self.bias

    def reset(self, std: float = 0.02) -> None:  # of a new module: what was loaded stays
        """Factors of the variance that a dense layer of this spread has, the bias 0, the guide what the factors make."""
        self.draw(std)
        with torch.no_grad():
            if self.bias is not None:
                self.bias.zero_()
            if self.guide is not None:
                self.guide.copy_(self.dense())

    def draw(self, std: float) -> None:
        """Draw the factors."""
        raise NotImplementedError


class LowRank(Structured):
    """V U."""

    def __init__(self, in_features: int, out_features: int, rank: int, **options: bool) -> None:
        super().__init__(in_features, out_features, **options)
        self.U, self.V = nn.Parameter(torch.empty(rank, in_features)), nn.Parameter(torch.empty(out_features, rank))
        self.reset()

    def product(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.U), self.V)

    @torch.no_grad()
    def draw(self, std: float) -> None:
        _normal((self.U, self.V), std, len(self.U))


class BlockDense(Structured):
    """V blockdiag(B)."""

    def __init__(self, in_features: int, out_features: int, rank: int, blocks: int, **options: bool) -> None:
        super().__init__(in_features, out_features, **options)
        _divides(blocks, in_features=in_features, rank=rank)
        self.B = nn.Parameter(torch.empty(blocks, rank // blocks, in_features // blocks))
        self.V = nn.Parameter(torch.empty(out_features, rank))
        self.reset()

    def product(self, x: Tensor) -> Tensor:
        return nn.functional.linear(_by_block(x, self.B), self.V)

    @torch.no_grad()
    def draw(self, std: float) -> None:
        _normal((self.B, self.V), std, self.B.shape[1])  # an entry sums over the rows of one block


class BlockShuffle(Structured):
    """blockdiag_2 . transpose-shuffle . blockdiag_1, the middle as wide as the narrower side."""

    def __init__(self, in_features: int, out_features: int, blocks: int, **options: bool) -> None:
        super().__init__(in_features, out_features, **options)
        middle = min(in_features, out_features)
        _divides(blocks, in_features=in_features, out_features=out_features)
        _divides(blocks * blocks, narrower_side=middle)
        self.first = nn.Parameter(torch.empty(blocks, middle // blocks, in_features // blocks))
        self.second = nn.Parameter(torch.empty(blocks, out_features // blocks, middle // blocks))
        self.reset()

    def product(self, x: Tensor) -> Tensor:
        dealt = _by_block(x, self.first).unflatten(-1, (-1, len(self.first))).transpose(-1, -2).flatten(-2)
        return _by_block(dealt, self.second)

    @torch.no_grad()
    def draw(self, std: float) -> None:
        blocks, rows, _ = self.first.shape
        _normal((self.first, self.second), std, rows // blocks)  # as many ways lead from an input to an output


def of(linear: nn.Linear, form: str, *, guided: bool = False, **sizes: int) -> Structured:
    """A structured map of the shape of a linear layer, with its bias or without, as new."""
    options = {"bias": linear.bias is not None, "guided": guided}
    width_in, width_out = linear.in_features, linear.out_features
    takes = {"low_rank": ("rank",), "block_dense": ("rank", "blocks"), "block_shuffle": ("blocks",)}.get(
        form, tuple(sizes)
    )
    for name, size in sizes.items():
        most = min(width_in, width_out) if name == "rank" and form == "low_rank" else math.inf
        if name not in takes:
            raise PatchbayError(f"feed-forward form {form!r} has no {name}; it has {', '.join(takes)} and guided")
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most:
            raise PatchbayError(
                f"feed-forward form {form!r}: {name}={size!r}; a whole number from 1"
                + (f" to {most}" if most < math.inf else "")
            )
    try:
        if form == "low_rank":
            return LowRank(width_in, width_out, sizes["rank"], **options)
        if form == "block_dense":
            return BlockDense(width_in, width_out, sizes["rank"], sizes["blocks"], **options)
        if form == "block_shuffle":
            return BlockShuffle(width_in, width_out, sizes["blocks"], **options)
    except KeyError as error:
        raise PatchbayError(f"feed-forward form {form!r} needs {error.args[0]}=, a number") from None
    raise PatchbayError(f"no feed-forward form {form!r}; forms are {', '.join(FORMS)}")


def guide_share(step: int, steps: int) -> float:
    """The dense map's share at a step: a cosine from 1 at the start to 0 at half of the steps, and 0 from there on."""
    half = max(1, steps // 2)
    return 0.5 * (1.0 + math.cos(math.pi * min(step, half) / half))


def set_share(model: nn.Module, share: float) -> None:
    """The share of every guided map in the model, in place."""
    for module in model.modules():
        if isinstance(module, Structured) and module.guide is not None:
            module.share.fill_(share)


def guided(model: nn.Module) -> list[nn.Module]:
    """The maps whose guide has a share. One that has left stays away: its matrix is not what the factors have become."""
    return [module for module in model.modules() if isinstance(module, Structured) and float(module.share) > 0]


def _by_block(x: Tensor, blocks: Tensor) -> Tensor:
    """x [..., b in] through blocks [b, out, in]: [..., b out]."""
    return torch.einsum("...bi,boi->...bo", x.unflatten(-1, (len(blocks), -1)), blocks).flatten(-2)


def _normal(factors: tuple[Tensor, Tensor], std: float, terms: int) -> None:
    """Two factors whose product, a sum of so many terms, has entries of spread `std`."""
    each = (std / terms**0.5) ** 0.5
    for factor in factors:
        factor.normal_(0.0, each)


def _divides(n: int, **sizes: int) -> None:
    for name, size in sizes.items():
        if n < 1 or size % n:
            raise PatchbayError(f"{name} {size} does not divide into {n} blocks")
