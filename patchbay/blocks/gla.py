"""Gated linear attention: a recurrence with a decay for every channel of the keys, whose pattern is exact.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T  [d_key, d_value],   o_t = S_t^T q_t,   a_t = sigma(x_t W_1 W_2 + b)^(1/16),  W_1 [d, 16]
    out = W_O (norm_head(o) * swish(x W_R))

Three forms that agree: the recurrence (`recurrent`), the sum over keys (`parallel`), and chunks of C tokens (`chunked`), the recurrence from chunk to chunk and the
sum inside one. With L the running sum of log a, from the start of the text or of the chunk,

    P_ij = sum_c q_ic k_jc exp(L_ic - L_jc),  i >= j,   o = P v
    o_chunk = (q e^L) S_in + P_chunk v,   S_out = e^(L_C) S_in + (k e^(L_C - L))^T v

in T d_key d_value + T C d products. exp(L_ic) and exp(-L_jc) apart overflow where decay is strong (NaN in float32 at T = 256); factors apart are taken
inside one chunk and only where its whole decay leaves them far from overflow; elsewhere a chunk's P is made in pieces of 16 rows against a decay common to the piece, whose factors are at most 1. With a = 1 this is linear attention, with constant a a retentive network.

Yang et al. 2023, "Gated Linear Attention Transformers with Hardware-Efficient Training".

The mixer calls transformers' attention interface with the decay as one keyword more, so that q, k, v, z and the pattern P are ports. P may be negative: finders read |P| and say so. The norm and the
gate come after the port z: what they make is the input of `o_proj`, so that z W_O summed over heads is not what attention adds. No cache: a text runs whole. Windows of the family's attention are not the
recurrence's: it forgets by its decay alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from patchbay.errors import PatchbayError
from patchbay.jacks.patterns import to_heads

CHUNK, PIECE = 64, 16
EXPONENT = 0.45  # of the largest exponent of a dtype: decays within it are taken in factors apart, inside one chunk
TEMPER = 16.0  # the root that is taken of the gate: decays near 1 at the start


def recurrent(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> Tensor:
    """o [prompt, head, position, d_value] token by token: the definition."""
    dtype = torch.promote_types(q.dtype, torch.float32)  # a state that is rounded at every token drifts
    given, (q, k, v, log_a) = q.dtype, (t.to(dtype) for t in (q, k, v, log_a))
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])  # [prompt, head, d_key, d_value]
    out = []
    for t in range(q.shape[2]):
        state = log_a[:, :, t, :, None].exp() * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(out, 2).to(given)


def pattern(q: Tensor, k: Tensor, log_a: Tensor) -> Tensor:
    """P [prompt, head, query, key], 0 above the diagonal: exact, by differences of L, some queries at a time."""
    running = log_a.double().cumsum(2)  # sums of many small numbers
    n = q.shape[2]
    rows = []
    for start in range(0, n, PIECE):
        stop = min(start + PIECE, n)
        apart = (running[:, :, start:stop, None] - running[:, :, None, :stop]).clamp(max=0.0).exp().to(q.dtype)
        row = torch.einsum("bhic,bhjc,bhijc->bhij", q[:, :, start:stop], k[:, :, :stop], apart)
        rows.append(nn.functional.pad(row.tril(start), (0, n - stop)))
    return torch.cat(rows, 2)


def parallel(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> Tensor:
    """o = P v."""
    return pattern(q, k, log_a) @ v


def chunked(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """o in chunks: inside one the sum over keys, between them the state. The last chunk may be ragged."""
    n, d_value = q.shape[2], v.shape[-1]
    chunk = min(chunk, -(-n // PIECE) * PIECE)
    pad = -n % chunk
    if pad:  # keys of 0 and decays of 1 behind the text change nothing
        q, k, v, log_a = (nn.functional.pad(t, (0, 0, 0, pad)) for t in (q, k, v, log_a))
    q, k, v, log_a = (t.unflatten(2, (-1, chunk)) for t in (q, k, v, log_a))  # [prompt, head, chunk, place, d]
    running = log_a.cumsum(3)
    whole = running[..., -1, :, None]  # [prompt, head, chunk, d_key, 1]
    q_begun = q * running.exp().to(q)
    most = EXPONENT * math.log(torch.finfo(q.dtype).max)
    if float(running.detach().min()) > -most:  # k e^(-L) is a number, with room for sums
        k_back = k * (-running).exp().to(k)
        inside = (q_begun @ k_back.transpose(-1, -2)).tril()
        brought = whole.exp().to(v) * (k_back.transpose(-1, -2) @ v)  # [prompt, head, chunk, d_key, d_value]
    else:
        inside = _inside(q, k, running)
        brought = (k * (running[..., -1:, :] - running).exp().to(k)).transpose(-1, -2) @ v
    kept, state, states = whole.exp().to(v), q.new_zeros(*q.shape[:2], q.shape[-1], d_value), []
    for i in range(q.shape[2]):
        states.append(state)
        state = kept[:, :, i] * state + brought[:, :, i]
    return (q_begun @ torch.stack(states, 2) + inside @ v).flatten(2, 3)[:, :, :n]


def _inside(q: Tensor, k: Tensor, running: Tensor) -> Tensor:
    """P inside chunks, [..., place, place]: rows of a piece against keys of earlier pieces by the decay at the piece's start, where each factor is at most 1
    (q e^(L - L_start) and k e^(L_start - L)); against those of the piece itself by differences."""
    n = q.shape[-2]
    rows = []
    for start in range(0, n, PIECE):
        stop = start + PIECE
        mine, keys, decay = q[..., start:stop, :], k[..., start:stop, :], running[..., start:stop, :]
        apart = (decay[..., :, None, :] - decay[..., None, :, :]).clamp(max=0.0).exp().to(q)
        own = torch.einsum("...ic,...jc,...ijc->...ij", mine, keys, apart).tril()
        parts = [own]
        if start:
            begun = running[..., start - 1 : start, :]
            earlier = k[..., :start, :] * (begun - running[..., :start, :]).exp().to(k)
            parts = [(mine * (decay - begun).exp().to(q)) @ earlier.transpose(-1, -2), own]
        rows.append(nn.functional.pad(torch.cat(parts, -1), (0, n - stop)))
    return torch.cat(rows, -2)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    log_decay: Tensor,
    **options: Any,
) -> Tensor:
    """z [prompt, query, head, d], as attention functions give it; under a mask (padding, a block) by the pattern without what is hidden."""
    k, v = (to_heads(t, query.shape[1]) for t in (key, value))
    q = query * options.get("scaling", 1.0)
    if mask is None:
        return chunked(q, k, v, log_decay).transpose(1, 2)
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return ((pattern(q, k, log_decay) * seen) @ v).transpose(1, 2)


def show(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, numbers: Tensor, *, log_decay: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """z and P, without what the mask's numbers hide."""
    weights = pattern(query * options.get("scaling", 1.0), to_heads(key, query.shape[1]), log_decay)
    weights = weights * (numbers > torch.finfo(numbers.dtype).min / 2)
    return (weights @ to_heads(value, query.shape[1])).transpose(1, 2), weights


class GatedLinearAttention(nn.Module):
    """The mixer in the place of a family's attention, with its maps under the family's names."""

    attention_kind = "gla"
    beside_pattern = "norm"  # between the pattern times the values and the port z

    def __init__(
        self, config: Any, layer_idx: int, n_heads: int, names: tuple[str, ...], *, rank: int = 16, decay: bool = True
    ) -> None:
        super().__init__()
        d = config.hidden_size
        self.config, self.layer_idx, self.n_heads, self.names = config, layer_idx, n_heads, names
        self.seen: list[Tensor] | None = None  # where `half_lives` asks, those of each call
        self.is_causal, self.scaling = True, (d // n_heads) ** -0.5
        for name in names:  # queries, keys, values, output
            setattr(self, name, nn.Linear(d, d, bias=False))
        self.decay = decay
        if decay:
            self.decay_down, self.decay_up = nn.Linear(d, rank, bias=False), nn.Linear(rank, d)
        self.read_gate = nn.Linear(d, d, bias=False)
        self.head_norm = nn.RMSNorm(d // n_heads, eps=1e-6)

    def log_decay(self, x: Tensor) -> Tensor:
        """log a [prompt, head, position, d_key], at most 0; without decay 0, which is linear attention."""
        if not self.decay:
            return x.new_zeros(len(x), self.n_heads, x.shape[1], x.shape[2] // self.n_heads)
        gate = self.decay_up(self.decay_down(x))
        gate = nn.functional.logsigmoid(gate.to(torch.promote_types(x.dtype, torch.float32))) / TEMPER
        return gate.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        x = hidden_states
        q, k, v = (getattr(self, name)(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for name in self.names[:3])
        function = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        log_decay = self.log_decay(x)
        if self.seen is not None:
            self.seen.append(half_life(log_decay))
        # no mask: texts end where padding begins
        z, weights = function(self, q, k, v, None, scaling=self.scaling, log_decay=log_decay)
        gate = nn.functional.silu(self.read_gate(x)).unflatten(-1, (self.n_heads, -1))
        return getattr(self, self.names[3])((self.head_norm(z) * gate).flatten(-2)), weights


def half_life(log_a: Tensor) -> Tensor:
    """Tokens after which half of what a channel holds is gone, ln 2 / (-mean log a), of log a [prompt, head, position, d_key] over prompts and positions: [head, d_key].
    Infinite where nothing decays."""
    return math.log(2.0) / log_a.double().mean((0, 2)).abs()


@torch.no_grad()
def half_lives(model: nn.Module, ids: Tensor) -> Tensor:
    """`half_life` of every layer on a text, [layer, head, d_key]. `model`: a Hugging Face model; layers are those that have this mixer, in their order."""
    mixers, found = [one for one in model.modules() if isinstance(one, GatedLinearAttention)], list[Tensor]()
    if not mixers:
        raise PatchbayError("half_lives: no layer of this model is gated linear attention (mixer='gla')")
    for one in mixers:
        one.seen = found
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for one in mixers:
            one.seen = None
    return torch.stack(found)
