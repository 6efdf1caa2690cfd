"""Ranks by one threshold: every matrix of the layers cut to the singular values that are large beside its largest, in all matrices alike.

    rank_l(t) = number of i with s_i / s_1 >= t in matrix l,    t by bisection so that the mean of rank_l / min(m, n) is `keep`

t is the same for all matrices, so that those whose spectrum falls fast give most: no matrix is told its rank. A matrix [m, n] of rank r is stored as two factors where r (m + n) < m n, and
dense, as the product that they make, elsewhere. Ranks below half of the full one are the components that tuning is for (`low`; `train.variant(optimizer="low-ranks")`). The error of a cut is Eckart-Young's, the root of the sum of the squares that were dropped.

    ranks = welore.ranks(hf, keep=0.75)
    cut = pb.blocks.build(hf, ranks=ranks)                                   # saves and loads
    null = pb.blocks.build(hf, ranks=welore.shuffled(hf, ranks, seed=0))     # the same ranks dealt among matrices of the same shape

Jaiswal et al. 2024, "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients": a half cut of LLaMA-2 7B, its low-rank components tuned, beats full tuning.

An outlier s_1 (massive activations) makes all else small beside it: `spectra` gives s_1 / s_2 to look at first. The largest singular value says nothing of what the model does with it: the null is
the same ranks shuffled, and the loss of both is what is to be measured.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from patchbay.errors import PatchbayError
from patchbay.model.families import FAMILIES
from patchbay.model.linear import is_plain
from patchbay.model.placing import follow

LOW = 0.5


def matrices(hf: Any) -> Iterator[tuple[str, nn.Linear]]:
    """The linear maps of the layers by their full names, in order: what may be cut. Embedding and unembedding are not among them."""
    base_type = str(hf.config.model_type).removeprefix("blocks_")
    family = next((row for row in FAMILIES if base_type in row.model_types), None)
    if family is None or follow(hf, family.layers) is None:
        raise PatchbayError(f"ranks need a family that is known by type, whose layers are known; {base_type!r} is none")
    found = [(name, module) for name, module in hf.named_modules() if name.startswith(family.layers + ".")]
    for name, module in found:
        deep = any(one.ndim > 2 for one in module.parameters(recurse=False)) and not isinstance(module, _ConvNd)
        if deep or (isinstance(module, nn.Linear) and not is_plain(module)):
            raise PatchbayError(
                f"{name} ({type(module).__name__}) is no plain matrix (experts in one tensor, or quantised): ranks of the other matrices alone would be no cut of this {base_type}; "
                "possible: llama, mistral, qwen2"
            )
    maps = [(name, module) for name, module in found if isinstance(module, nn.Linear) and is_plain(module)]
    if not maps:
        stored = (
            "as [in, out] (Conv1D)" if any(isinstance(module, Conv1D) for _, module in found) else "in another form"
        )
        raise PatchbayError(
            f"{base_type} stores the maps of its layers {stored}; ranks are of plain linear layers (llama, mistral, qwen2)"
        )
    yield from maps


@torch.no_grad()
def spectra(hf: Any) -> dict[str, Tensor]:
    """Singular values of each matrix, largest first, in float64."""
    return {name: torch.linalg.svdvals(module.weight.double()) for name, module in matrices(hf)}


def ranks(hf: Any, keep: float, *, found: dict[str, Tensor] | None = None) -> dict[str, int]:
    """The rank of each matrix by one threshold, their mean share of the full ranks as near to `keep` as steps of one rank allow, and not below it. `found`: spectra that were taken before."""
    if not 0.0 < keep <= 1.0:
        raise PatchbayError(f"keep={keep}: the share of the full ranks, above 0 and up to 1")
    shares = {name: s / s[0].clamp(min=1e-300) for name, s in (found or spectra(hf)).items()}

    def at(threshold: float) -> dict[str, int]:
        return {name: max(1, int((s >= threshold).sum())) for name, s in shares.items()}

    low, high = 0.0, 1.0  # at `low` the mean share is at least `keep`
    for _ in range(60):
        middle = (low + high) / 2
        mean = sum(r / len(shares[name]) for name, r in at(middle).items()) / len(shares)
        low, high = (middle, high) if mean >= keep else (low, middle)
    return at(low)


def uniform(hf: Any, keep: float) -> dict[str, int]:
    """The same share of the full rank in every matrix: what one threshold is to beat."""
    return {name: max(1, round(keep * min(module.weight.shape))) for name, module in matrices(hf)}


def energy(share: float, found: dict[str, Tensor]) -> dict[str, int]:
    """The least rank of each matrix that keeps this share of the sum of its squared singular values (`found`: `spectra`)."""
    kept = {name: s.square().cumsum(0) / s.square().sum().clamp(min=1e-300) for name, s in found.items()}
    return {name: min(len(one), 1 + int((one < share - 1e-12).sum())) for name, one in kept.items()}


def shuffled(hf: Any, ranks: dict[str, int], seed: int = 0) -> dict[str, int]:
    """The same ranks dealt anew among matrices of the same shape: the null, of equal size."""
    rng = random.Random(f"welore-{seed}")
    shapes = {name: tuple(module.weight.shape) for name, module in matrices(hf)}
    dealt: dict[str, int] = {}
    for shape in dict.fromkeys(shapes.values()):
        names = [name for name in ranks if shapes[name] == shape]
        values = [ranks[name] for name in names]
        rng.shuffle(values)
        dealt |= dict(zip(names, values, strict=True))
    return {name: dealt[name] for name in ranks}


def low(hf: Any, ranks: dict[str, int]) -> list[str]:
    """The matrices of less than half of their full rank, which tuning is for."""
    return [name for name, module in matrices(hf) if name in ranks and ranks[name] < LOW * min(module.weight.shape)]


def pays(shape: tuple[int, ...], rank: int) -> bool:
    """Whether two factors of this rank hold fewer numbers than the matrix."""
    return rank * sum(shape) < shape[0] * shape[1]


@torch.no_grad()
def factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """V [out, rank] and U [rank, in] whose product is nearest to the matrix [out, in] of all of that rank."""
    left, sizes, right = torch.linalg.svd(weight.double(), full_matrices=False)
    root = sizes[:rank].sqrt()
    return (left[:, :rank] * root).to(weight.dtype), (root[:, None] * right[:rank]).to(weight.dtype)
