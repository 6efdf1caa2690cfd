"""A layer called again on rows: with the arguments of its call in the base run, narrowed to the rows' positions.

Three ways: the whole layer; attention and MLP apart, start by start; attention on the tokens of rows of many starts at once, where
transformers' attention interface tells the rows apart only when queries meet keys. `restart.py` says which of them holds for a model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from patchbay.errors import PatchbayError
from patchbay.jacks.arguments import is_cache
from patchbay.jacks.session import Session
from patchbay.jacks.sums import first
from patchbay.sweeps.calls import Base, Call, Past, Piece, Places, numbers


def _narrowed(
    base: Base,
    module: nn.Module,
    call: Call,
    pick: Callable[[Tensor], Tensor],
    cache: Past | None,
    own: dict[str, Callable[[Any], Any]],
) -> dict[str, Any]:
    """The arguments of a recorded call by name, without the stream: of what goes over positions, what `pick` takes; in place of
    a cache `cache`; and what `own` makes of those that it names."""
    args, kwargs = call
    names = list(inspect.signature(module.forward).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    given.pop(names[0])  # the stream itself
    if "attention_mask" in names:
        given.setdefault("attention_mask", None)
    n = base.n_positions

    def narrowed(value: Any, name: str) -> Any:
        if name in own:
            return own[name](value)
        if is_cache(value):
            return cache
        if isinstance(value, tuple) and value and all(isinstance(v, Tensor) for v in value):
            return tuple(narrowed(v, name) for v in value)
        if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == n:
            return pick(value)
        if isinstance(value, Tensor) and n in value.shape:
            raise PatchbayError(f"{name} of shape {tuple(value.shape)} cannot be narrowed to some positions")
        return value

    return {name: narrowed(value, name) for name, value in given.items()}


def _for_rows(base: Base, module: nn.Module, call: Call, start: int, x: Tensor, prompts: Tensor) -> dict[str, Any]:
    """The arguments of a recorded call by name, for rows of the given prompts and positions from `start` on."""
    n, n_prompts = base.n_positions, len(base.ids)

    def mask(value: Any) -> Tensor:
        if value is None or value.ndim != 4:
            place = torch.arange(n, device=x.device)
            value = (place[None, :] <= place[:, None])[None, None]  # causal
            value = value if base.model.hf.config._attn_implementation == "sdpa" else numbers(value, x)
        return _some(value, prompts, n_prompts)[:, :, start:].expand(len(x), -1, -1, -1)  # XGLM asks for a row each

    def alibi(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        per_prompt = value.unflatten(0, (n_prompts, -1))[:1]
        return per_prompt.expand(len(x), *per_prompt.shape[1:]).flatten(0, 1)

    return _narrowed(
        base,
        module,
        call,
        lambda value: _some(value, prompts, n_prompts)[:, start:],
        Past(base, start, prompts),
        {"attention_mask": mask, "alibi": alibi},
    )


def _some(value: Tensor, prompts: Tensor, n_prompts: int) -> Tensor:
    return value if value.shape[0] == 1 or n_prompts == 1 else value[prompts.to(value.device)]


def _call(module: nn.Module, base: Base, call: Any, start: int, x: Tensor, prompts: Tensor) -> Tensor:
    return first(module(x, **_for_rows(base, module, call, start, x, prompts)))


def whole_layer(base: Base, layer: int, start: int, x: Tensor, prompts: Tensor) -> Tensor:
    return _call(base.model.modules[layer].layer, base, base.layer_calls[layer], start, x, prompts)


def attention_half(base: Base, layer: int, start: int, x: Tensor, prompts: Tensor) -> Tensor:
    """What attention adds to the stream x [row, position, d_model]."""
    at, model = base.model.modules[layer], base.model
    normed = x if at.norm_attn is None else at.norm_attn(x)
    assert at.attn is not None
    out = _call(at.attn, base, base.attn_calls[layer], start, normed, prompts)
    return added_by(at.attn_added, (at.attn, at.attn_proj), out, model.residual_scale)


# rows meet their keys in about so many calls at most: in one of them, queries of rows of near starts are padded
CALLS = 8


def attention_flat(base: Base, layer: int, pieces: Sequence[Piece]) -> Tensor:
    """What attention adds where the pieces ask, [token, d_model]: its linear maps run once, on all given tokens as one long
    sequence; the rows are told apart only where queries meet keys. Few large products, where each piece alone is small."""
    at, model, n = base.model.modules[layer], base.model, base.n_positions
    assert at.attn is not None
    assert at.attn_proj is not None
    rows, starts, asks = [len(piece.x) for piece in pieces], [p.start for p in pieces], [p.asked for p in pieces]
    given = Places.of(rows, starts, [piece.start + piece.x.shape[1] for piece in pieces])
    asked = Places.of(rows, asks, [n] * len(pieces))
    x = torch.cat([piece.x.flatten(0, 1) for piece in pieces])[None]  # [1, token, d_model]
    prompts = torch.cat([piece.prompts for piece in pieces])
    same = all(p.start == p.asked and p.start + p.x.shape[1] == n for p in pieces)
    answer: list[Tensor] = []

    def attend(inner: Any, implementation: str, module: nn.Module, *qkv_and: Any) -> tuple[Tensor, None]:
        *qkv, _, options = qkv_and  # the mask of one long sequence is not ours

        def meet(query: Tensor, key: Tensor, value: Tensor, first: int, of: Tensor) -> Tensor:
            mask = base.mask(layer, first, query, implementation)
            mask = mask if mask is None else _some(mask, of, len(base.ids))
            return inner(module, query, key, value, mask, **options)[0]  # [row, query, head, d_head]

        z = _each_row(base, layer, [t[0].transpose(0, 1) for t in qkv], pieces, given, asked, prompts, meet)
        if same:
            return z[None], None
        answer.append(z)
        return z.new_zeros(()).expand(1, len(given.row), *z.shape[1:]), None  # passed on as the input of `project`

    def project(inner: Callable[[Tensor], Tensor], _: Tensor) -> Tensor:
        base.where = base.at(prompts, asked)
        return inner(answer[0].flatten(1)[None])

    with Session(model) as session:
        session.on_attention(layer, attend)
        if not same:
            session.on_forward(at.attn_proj, project)
        base.where = base.at(prompts, given)
        normed = x if at.norm_attn is None else at.norm_attn(x)
        kwargs = _by_token(base, at.attn, base.attn_calls[layer], given.place, prompts[given.row])
        out = first(at.attn(normed, **kwargs))
        return added_by(at.attn_added, (at.attn, at.attn_proj), out, model.residual_scale)[0]


def _of_near_starts(pieces: Sequence[Piece], apart: int) -> list[int]:
    """Bounds of runs of neighbouring rows whose first asked positions lie less than `apart` positions from one another."""
    bounds, low, high, rows = [0], pieces[0].asked, pieces[0].asked, 0
    for piece in pieces:
        low, high = min(low, piece.asked), max(high, piece.asked)
        if high - low >= apart:
            bounds.append(rows)
            low = high = piece.asked
        rows += len(piece.x)
    return [*bounds, rows]


def _each_row(
    base: Base,
    layer: int,
    qkv: Sequence[Tensor],
    pieces: Sequence[Piece],
    given: Places,
    asked: Places,
    prompts: Tensor,
    meet: Callable[..., Tensor],
) -> Tensor:
    """z of the asked tokens, [token, head, d_head]: each row has the base run's queries, keys and values, with those of its
    given tokens, q, k and v [token, head, d], written over them."""
    n, out = base.n_positions, []
    for begin, end in pairwise(_of_near_starts(pieces, max(1, n // CALLS))):
        mine, some = given.of_rows(begin, end)
        _, wanted = asked.of_rows(begin, end)
        first, of = int(wanted.place.min()), prompts[begin:end]
        full = []
        for old, new, left in zip(base.heads[layer], qkv, (first, 0, 0), strict=True):
            at, which = some.among(left, n)
            rows = old[:, left:].repeat(len(of), 1, 1, 1) if len(old) == 1 else old[:, left:].contiguous()[of]
            new = new[mine].to(rows.dtype)
            rows.view(-1, *new.shape[1:])[at] = new if which is None else new.index_select(0, which)
            full.append(rows.transpose(1, 2))  # [row, head, position, d]
        z = meet(*full, first, of).flatten(0, 1)
        at, _ = wanted.among(first, n)
        out.append(z if len(at) == len(z) else z.index_select(0, at))
    return out[0] if len(out) == 1 else torch.cat(out)


def _by_token(base: Base, module: nn.Module, call: Call, place: Tensor, prompt: Tensor) -> dict[str, Any]:
    """The arguments of a recorded call by name, for one long sequence of tokens at these places of these prompts."""

    def pick(value: Tensor) -> Tensor:
        return (value[0, place] if len(value) == 1 else value[prompt, place])[None]

    return _narrowed(base, module, call, pick, None, {"attention_mask": lambda _: None})  # `attention_flat` has its own


def added_by(module: nn.Module | None, inner: tuple[nn.Module | None, ...], out: Tensor, scale: float) -> Tensor:
    """Through the norm after a block, where the family has one, and its residual scale."""
    if module is not None and all(module is not m for m in inner):
        out = module(out)
    return out if scale == 1.0 else out * scale


def mlp_half(base: Base, layer: int, x: Tensor, added: Tensor) -> Tensor:
    """The stream after the layer, from the stream before it and what attention added."""
    at, model = base.model.modules[layer], base.model
    if at.mlp is None or at.mlp_added is at.mlp_proj:
        raise PatchbayError("this layer's MLP is not one module")
    middle = x + added
    source = x if at.mid is None else middle
    out = first(at.mlp(source if at.norm_mlp is None else at.norm_mlp(source)))
    return middle + added_by(at.mlp_added, (at.mlp,), out.reshape(x.shape), model.residual_scale)
