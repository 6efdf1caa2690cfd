"""Spectrum: how many directions a head's circuit really uses, by its singular values, beside random weights of the same shapes.

With s_1 >= s_2 >= ... the singular values of a head's W_V W_O (`circuit` "ov", what it copies) or W_Q W_K^T ("qk", whom it looks at, at rotary offset 0),

    effective rank = exp(-sum_i p_i log p_i),   p_i = s_i^2 / sum_j s_j^2            between 1 and d_head
    lost           = 1 - effective rank / its mean over random circuits

A random circuit is a product of two factors of normal numbers of the same shapes; it may have any norm, since effective rank knows none. p is the rank of
the head's own among `draws` of them, (1 + as low) / (1 + draws): that random weights are of as low a rank. `first` is p_1, the share of the strongest direction, which is near 1
where one outlier makes all else small. The table `matrices` has whole matrices (q, k, v, o, and the MLP's where it has neurons) with the same numbers, and `kept`, the share of
singular values of at least a tenth of the first. Weights alone: no text is read.

Jaiswal et al. 2024, "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients", whose ranks by one threshold are `blocks.welore`; the
entropy of a spectrum as a rank is Roy and Vetterli's (2007). A circuit of low rank is neither important nor idle by that: `patchbay run low-rank` cuts and measures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.wiring.components import weighed

CIRCUITS = ("ov", "qk")
GRID = ("layer", "head")
TENTH = 0.1


@method(paper="jaiswal2024", unit="share of rank")
def spectrum(model: Model, *, circuit: str = "ov", draws: int = 99, seed: int = 0) -> Result:
    """Share of rank that each head's circuit has lost against random weights of its shapes; high: few directions do all.

    Main variable `lost` [layer, head], with `effective` (directions), `null_mean`, `null_low` (the 5 % quantile), `p` and `first`; table `matrices`.

    `circuit`: ov, what a head copies, or qk, whom it looks at. `draws`: random circuits of each shape.
    """
    if circuit not in CIRCUITS:
        raise PatchbayError(f"no circuit {circuit!r}; circuits are {', '.join(CIRCUITS)}")
    if draws < 1:
        raise PatchbayError(f"draws={draws}: at least 1 random circuit is needed for a null")
    layers = [i for i in range(model.n_layers) if model.n_heads(i)]
    if not layers:
        raise PatchbayError(
            f"spectrum needs heads (attn.z), and no layer of this {model.family.name} model offers z; blocks.welore.spectra has whole matrices"
        )
    shape = (model.n_layers, max(model.n_heads(i) for i in layers))
    found = {
        name: torch.full(shape, torch.nan, dtype=torch.float64)
        for name in ("lost", "effective", "null_mean", "null_low", "p", "first")
    }
    nulls: dict[tuple[int, ...], Tensor] = {}
    rows: list[dict[str, Any]] = []
    for i in layers:
        pairs = _factors(model, i, circuit)
        for head, (left, right) in enumerate(pairs):
            key = (*left.shape, *right.shape)
            if key not in nulls:
                nulls[key] = _null(left.shape, right.shape, draws, seed)
            own = values(left, right)
            _put(found, i, head, own, nulls[key])
        rows += _matrices(model, i)
    low = int((found["p"] <= 0.05).sum())
    total = int((~found["p"].isnan()).sum())
    units = {"lost": "share of rank", "p": "p", "first": "share of squares"}
    return Result(
        {name: (value, GRID, units.get(name, "directions")) for name, value in found.items()},
        tables={"matrices": rows},
        notes=[
            f"{low} of {total} heads' {circuit} circuits are of lower effective rank than random weights of their shapes at p <= 0.05, not adjusted",
            *weighed(model, ("query",) if circuit == "qk" else ("value",)),
        ],
    )


@torch.no_grad()
def values(left: Tensor, right: Tensor) -> Tensor:
    """Singular values of left right, [d, r] and [r, d], by those of the r x r product of their triangular factors; float64."""
    upper = torch.linalg.qr(left.double()).R  # [r, r]
    lower = torch.linalg.qr(right.double().T).R  # [r, r]
    return torch.linalg.svdvals(upper @ lower.T)


def effective(s: Tensor) -> Tensor:
    """exp of the entropy of the squares' shares; 0 where all are 0."""
    shares = s.square() / s.square().sum().clamp(min=1e-300)
    return torch.special.entr(shares).sum().exp() * bool(s.any())


def _factors(model: Model, layer: int, circuit: str) -> list[tuple[Tensor, Tensor]]:
    """Each head's two factors, [d_model, d_head] and [d_head, d_model]."""
    weights = model.layers[layer].attn.weights()
    n, groups = len(weights.W_Q), len(weights.W_V)
    if circuit == "ov":
        return [(weights.W_V[h * groups // n], weights.W_O[h]) for h in range(n)]
    return [(weights.W_Q[h], weights.W_K[h * len(weights.W_K) // n].T) for h in range(n)]


def _null(left: tuple[int, ...], right: tuple[int, ...], draws: int, seed: int) -> Tensor:
    """Effective ranks of products of normal factors, [draw]."""
    draw = torch.Generator().manual_seed(seed)
    made = [[torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in (left, right)] for _ in range(draws)]
    return torch.stack([effective(values(*pair)) for pair in made])


def _put(found: dict[str, Tensor], layer: int, head: int, s: Tensor, null: Tensor) -> None:
    own = float(effective(s))
    found["effective"][layer, head] = own
    found["null_mean"][layer, head] = null.mean()
    found["null_low"][layer, head] = null.quantile(0.05)
    found["lost"][layer, head] = 1.0 - own / float(null.mean())
    found["p"][layer, head] = maths.draws_p(-own, -null)
    found["first"][layer, head] = float(s[0].square() / s.square().sum().clamp(min=1e-300))


@torch.no_grad()
def _matrices(model: Model, layer: int) -> list[dict[str, Any]]:
    """A row for each whole matrix of a layer."""
    weights = model.layers[layer].attn.weights()
    wide = {"q": weights.W_Q, "k": weights.W_K, "v": weights.W_V}
    whole = {name: one.movedim(0, 1).flatten(1) for name, one in wide.items()}  # [d_model, heads x d_head]
    whole["o"] = weights.W_O.flatten(0, 1)
    try:
        mlp = model.layers[layer].mlp.weights()
        whole |= {
            name: one for name, one in (("gate", mlp.W_gate), ("up", mlp.W_in), ("down", mlp.W_out)) if one is not None
        }
    except PatchbayError:  # experts, or an MLP without neurons
        pass
    rows = []
    for name, one in whole.items():
        s = torch.linalg.svdvals(one.double())
        kept = float((s >= TENTH * s[0]).double().mean())
        row = {"layer": layer, "matrix": name, "full": len(s), "effective": float(effective(s)), "kept": kept}
        rows.append({**row, "first": float(s[0].square() / s.square().sum().clamp(min=1e-300))})
    return rows
