"""What stands between W_Q or W_K and the ports q and k: a norm of queries and keys, and the turn by position.

Both are read off the model itself. One run puts the same random streams into every layer at every position and taps q and k:
the q of position t is then the q of position 0 turned by the family's own rotary code, whatever its layout (halves or
neighbouring pairs), its share of the head (partial rotary; in latent attention its end) or its scaling; layers without rotary positions
do not turn. The turn is found as one angle per pair of head dimensions and must explain every tapped q and k, and W_Q with
the norm's gain must give the direction of every q at position 0; a model of which either is untrue is refused. So what is
said of W_Q and W_K has been checked against what the model computes. Cost: one run of 2 prompts (8 in half precision), as
long as the largest offset.

Row vectors: q_t = q_0 @ R[t]. The score of a query t and a key s turns with their offset alone: R[t] R[s]^T = R[t - s].
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from patchbay.edits import edit
from patchbay.model.proofs import from_zero
from patchbay.model.weights import HeadWeights, latent_weights, norm_gain, query_key_norms
from patchbay.signal.port import PatchbayError, Port

if TYPE_CHECKING:
    from patchbay.model.model import Model

N_PROBES = {torch.float64: 2, torch.float32: 2}  # of other types, 8: their rounding is averaged out
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Turn:
    """Of one layer: `rotation` [offset, d_head, d_head] (None where positions do not turn q and k), and queries' and keys'
    maps [head or group, d_model, d_head] behind the layer's norm, with the gain of their own norm folded in."""

    rotation: Tensor | None
    W_Q: Tensor
    W_K: Tensor


@torch.no_grad()
def turns(model: Model, offsets: Sequence[int], folded: dict[int, HeadWeights]) -> dict[int, Turn]:
    """How queries and keys of each layer in `folded` come about. `folded`: weights with the layer's norm folded in."""
    longest = model.max_positions or max(offsets) + 1
    if not offsets or min(offsets) < 0 or max(offsets) >= longest:
        raise PatchbayError(f"offsets {list(offsets)} were asked; they lie in 0..{longest - 1} in this model")
    stream, seen = _probe(model, max(offsets) + 1, list(folded))
    tolerance = TOLERANCE.get(model.dtype, 6e-2)
    layout: tuple[bool, int, int] | None = None
    out = {}
    for layer, weights in folded.items():
        q, k = seen[Port("attn.q", layer)].double(), seen[Port("attn.k", layer)].double()
        rotation, layout = _rotation(model, layer, q, k, layout, tolerance)
        kept = None if rotation is None else rotation[list(offsets)].to(weights.W_Q)
        maps = _own_norm(model, layer, weights)
        sizes = _check_direction(model, layer, stream, q, k, tolerance)
        if bool((sizes != 1).any()):
            maps = (maps[0] * sizes.to(maps[0]), maps[1] * sizes.to(maps[1]))
        out[layer] = Turn(kept, *maps)
    return out


def last_only(hf: nn.Module) -> dict[str, int]:
    """The option of a forward that spares the logits of all positions but the last, where it has one."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(hf.forward).parameters else {}


def _probe(model: Model, n_positions: int, layers: list[int]) -> tuple[Tensor, dict[Port, Tensor]]:
    """Random streams [probe, d_model] put into every layer at every position, and the q and k that came of them."""
    generator = torch.Generator().manual_seed(0)
    n_probes = N_PROBES.get(model.dtype, 8)
    x = torch.randn(n_probes, 1, model.d_model, generator=generator, dtype=torch.float64).to(model.device, model.dtype)
    same = x.expand(-1, n_positions, -1)  # [probe, position, d_model]
    taps = [Port(signal, layer) for layer in layers for signal in ("attn.q", "attn.k")]
    edits = [edit.replace(Port("resid_in", layer), same) for layer in layers]
    ids = torch.full((n_probes, n_positions), model.vocab_size // 3, device=model.device)
    training = [module for module in model.hf.modules() if module.training]
    model.hf.eval()
    try:
        with model.session(taps, edits) as session:
            places = from_zero(model.hf, n_positions) if model.check.shifted else {}
            model.hf(input_ids=ids, use_cache=False, **last_only(model.hf), **places)
    finally:
        for module in training:
            module.training = True
    return x[:, 0], session.captured


# --- the turn by position -----------------------------------------------------------------------------


def _rotation(
    model: Model, layer: int, q: Tensor, k: Tensor, layout: tuple[bool, int, int] | None, tolerance: float
) -> tuple[Tensor | None, tuple[bool, int, int] | None]:
    """R [position, d_head, d_head] of a layer, None where nothing turns; with its layout, to be tried first on the next."""
    both = torch.cat([q, k], 1)  # [probe, head and group, position, d_head]
    if float((both - both[:, :, :1]).norm() / both.norm()) <= tolerance:
        return None, layout
    d_head = q.shape[3]
    widths = range(d_head - d_head % 2, 0, -2)
    tries = [(pairs, width, 0) for width in widths for pairs in (False, True)]
    tries += [
        (pairs, width, d_head - width) for width in widths for pairs in (False, True)
    ]  # a latent head's end turns
    best = (float("inf"), None, layout)
    few = both[:, :4]
    for candidate in [layout, *tries] if layout else tries:
        rotation = _fit(few, *candidate)
        error = _error(few, rotation)
        if error < best[0]:
            best = (error, rotation, candidate)
        if error <= tolerance:
            break
    error, _, layout = best
    assert layout is not None
    rotation = _fit(both, *layout)
    error = _error(both, rotation)
    if not error <= tolerance:
        raise PatchbayError(
            f"L{layer} of this {model.family.name} model: positions do more to q and k than turn pairs of dimensions (a turn "
            f"leaves {error:.1e} of them unexplained); kinds 'value', 'mlp', 'router' and 'unembed' are possible"
        )
    return rotation, layout


def _fit(x: Tensor, neighbours: bool, width: int, start: int) -> Tensor:
    """R [position, d_head, d_head] that turns pairs among `width` dimensions from `start` on, by least squares over `x`."""
    half = width // 2
    first = start + (torch.arange(half) * 2 if neighbours else torch.arange(half))
    second = first + 1 if neighbours else first + half
    a, b = x[:, :, :1, first], x[:, :, :1, second]  # [probe, head, 1, pair]
    c, d = x[..., first], x[..., second]
    along, across = (a * c + b * d).sum((0, 1)), (a * d - b * c).sum((0, 1))  # [position, pair]
    length = torch.hypot(along, across).clamp_min(1e-300)
    cos, sin = along / length, across / length
    rotation = torch.eye(x.shape[3], dtype=x.dtype, device=x.device).repeat(x.shape[2], 1, 1)
    rotation[:, first, first], rotation[:, second, second] = cos, cos
    rotation[:, first, second], rotation[:, second, first] = sin, -sin
    return rotation


def _error(x: Tensor, rotation: Tensor) -> float:
    """Share of x [probe, head, position, d_head] that the turn of its position 0 does not explain."""
    turned = torch.einsum("phi,tij->phtj", x[:, :, 0], rotation)
    return float((turned - x).norm() / x.norm())


# --- a norm of queries and keys -----------------------------------------------------------------------


def _own_norm(model: Model, layer: int, weights: HeadWeights) -> tuple[Tensor, Tensor]:
    """W_Q and W_K with the gain (and centring) of the norms that follow them; the direction is exact, the size is not:
    such a norm divides every token's query by its own length."""
    found = query_key_norms(model.modules[layer].attn)
    if found is None:
        return weights.W_Q, weights.W_K
    return _behind(weights.W_Q, found[0]), _behind(weights.W_K, found[1])


def _behind(weight: Tensor, norm: nn.Module) -> Tensor:
    """The map [head, d_model, d_head] followed by a norm, up to the length that the norm divides by."""
    n_heads, _, d_head = weight.shape
    gain, centred = norm_gain(norm, n_heads, d_head)
    if centred:
        weight = weight - weight.mean(-1, keepdim=True)
    return weight * gain.to(weight)[:, None, :]


def rotary_size(made: Tensor, tapped: Tensor) -> float:
    """By how much rotary positions lengthen what they turn: 1 but for some scalings to longer texts (YaRN)."""
    return max(0.0, float((made.double() * tapped.double()).sum() / made.double().pow(2).sum().clamp_min(1e-300)))


def _check_direction(model: Model, layer: int, stream: Tensor, q: Tensor, k: Tensor, tolerance: float) -> Tensor:
    """W_Q x + b_Q, normed by the family's own module, is the tapped q of position 0, up to a factor for each query. Returns what
    rotary positions multiply dimensions by besides turning them, relative to the others: 1 but in part of a latent head."""
    at, plain = model.modules[layer], model.layers[layer].attn.weights()
    x = stream if at.norm_attn is None else at.norm_attn(stream[:, None])[:, 0]
    norms = query_key_norms(model.modules[layer].attn) or (None, None)
    rates, sizes = model.layers[layer].attn.inner_rates(x), torch.ones(q.shape[3], dtype=q.dtype, device=q.device)
    if model.family.qkv == "latent":
        still = len(sizes) - len(latent_weights(model.family, at, model.n_heads(layer)).order)
        made = torch.einsum("pd,hdr->phr", x.double(), plain.W_K.double()[..., still:])
        made = made if plain.b_K is None else made + plain.b_K.double()[..., still:]
        sizes[still:] = rotary_size(made, k[:, :, 0, still:])
    pairs = ((plain.W_Q, plain.b_Q, norms[0], q, "q", rates[0]), (plain.W_K, plain.b_K, norms[1], k, "k", rates[1]))
    for weight, bias, norm, tapped, name, rate in pairs:
        made = torch.einsum("pd,hdr->phr", x.double(), weight.double())
        made = (made if bias is None else made + bias.double()) * (rate if rate.ndim == 1 else rate[:, None]) * sizes
        if norm is not None:
            gain, centred = norm_gain(norm, *made.shape[1:])
            made = (made - made.mean(-1, keepdim=True) if centred else made) * gain.to(made)
            shift = getattr(norm, "bias", None)
            if shift is not None:
                continue  # a norm with a bias moves the direction too: the gain stands, unchecked
        cosine = torch.nn.functional.cosine_similarity(made, tapped[:, :, 0], dim=-1)
        if not bool((cosine > 1 - 10 * tolerance).all()):
            raise PatchbayError(
                f"L{layer} of this {model.family.name} model: W_{name.upper()} does not give the direction of {name} (cosine "
                f"{float(cosine.min()):.3f}): something stands between them that is not known; "
                "kinds 'value', 'mlp', 'router' and 'unembed' are possible"
            )
    return sizes
