"""Restarting: one run of some prompts with all that is needed to call their layers again on other streams, from any position on.

A row that differs from the base run from layer l and position p on is computed from there alone: its stream goes through the
layers' own modules at positions p.. , with what each layer was called with in the base run narrowed to these positions, and its
queries see the base run's keys and values left of p. Three ways, the fastest that holds for the model: attention on the tokens
of rows of many starts at once, where transformers' attention interface tells the rows apart only when queries meet keys;
attention and MLP called apart, start by start; whole layers. A way is believed only after it reproduced the base run.
The first way is narrow, too, where it then still reproduces the base run: it asks the model for queries, keys and values only of
the tokens whose stream changed, takes the base run's for all others, and projects back only the tokens that are read later.
Models whose layers carry a state instead of keys and values cannot restart: `Base.refusal` says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from patchbay.jacks.arguments import is_cache, with_cache
from patchbay.jacks.session import Session
from patchbay.jacks.sums import first
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError, Port


class Past:
    """Keys and values of the base run left of `start`, for the rows of one call; what layers take for a cache."""

    def __init__(self, base: Base, start: int, prompts: Tensor) -> None:
        self.base, self.start, self.prompts = base, start, prompts
        self.is_compileable = False

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.start == 0:
            return key, value
        old_key, old_value = self.base.keys[layer_idx], self.base.values[layer_idx]  # [prompt, group, position, d]
        return self._before(old_key, key), self._before(old_value, value)

    def _before(self, old: Tensor, new: Tensor) -> Tensor:
        left = old[:, :, : self.start]
        left = left.expand(len(new), -1, -1, -1) if len(old) == 1 else left[self.prompts]
        return torch.cat([left, new], 2)

    def get_seq_length(self, *_: Any) -> int:
        return self.start


@dataclass
class Base:
    """One run of prompts of one length, with all that a restarted row needs."""

    model: Model
    ids: Tensor  # [prompt, position]
    layer_calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    attn_calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    resid: list[Tensor]  # n_layers + 1 streams, [prompt, position, d_model]
    taps: dict[Port, Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    heads: list[tuple[Tensor, ...]] = field(default_factory=list)  # q, k, v of layers, [prompt, position, head, d]
    halves: bool = False  # attention and MLP can be called apart
    flat: bool = False  # attention can be called on the tokens of rows of many starts at once
    narrow: bool = False  # and on other tokens than those that it is asked for
    refusal: str | None = None  # why rows of this model cannot restart; None when they can

    masks: dict[Any, Tensor] = field(default_factory=dict)
    where: Tensor | None = None  # prompt * n_positions + position of each token that the running call is about

    @property
    def n_positions(self) -> int:
        return self.ids.shape[1]

    def tokens(self, start: int, prompts: Tensor) -> Tensor:
        """Where the tokens of rows stand in the base run: prompt * n_positions + position, [row, position - start]."""
        return (prompts[:, None] * self.n_positions + torch.arange(start, self.n_positions)[None]).to(self.ids.device)

    def at(self, prompts: Tensor, places: Places) -> Tensor:
        """The same for tokens of rows of these prompts, [token]."""
        return (prompts[places.row] * self.n_positions + places.place).to(self.ids.device)

    def mask(self, layer: int, start: int, query: Tensor, implementation: str) -> Tensor | None:
        """The mask of queries from `start` on, [prompt or 1, 1, query, key]; None where nothing is hidden or causal says all."""
        args, kwargs = self.attn_calls[layer]
        given = kwargs.get("attention_mask", next((a for a in args[1:] if isinstance(a, Tensor) and a.ndim == 4), None))
        if given is not None and given.ndim == 4:
            return given[:, :, start:]
        if implementation == "sdpa" and (start == 0 or query.shape[2] == 1):
            return None  # it is causal by itself, and a last query sees every key
        held = self.masks.get((start, implementation))
        if held is None:
            place = torch.arange(self.n_positions, device=query.device)
            held = (place[None, :] <= place[start:, None])[None, None]
            held = held if implementation == "sdpa" else _numbers(held, query)
            self.masks[start, implementation] = held
        return held


@torch.no_grad()
def base_run(model: Model, ids: Tensor, signals: Sequence[Port]) -> Base:
    """Run the base prompts, keeping streams, calls, keys and values, and the signals that edits start from."""
    model.check_mode()
    lacking = [i for i, at in enumerate(model.modules) if at.attn is None]
    if lacking or not model.causal:
        why = f"layers {lacking[:6]} carry a state, not keys and values" if lacking else "tokens see those after them"
        return Base(model, ids, [], [], [], {}, [], [], refusal=why)
    calls: dict[tuple[str, int], tuple[tuple[Any, ...], dict[str, Any]]] = {}
    ports = [Port("resid_in", i) for i in range(model.n_layers)]
    ports += [Port("resid_out", model.n_layers - 1), *signals]
    ports += [Port("attn.out", i) for i in range(model.n_layers)]
    ports += [Port("resid_mid", i) for i in range(model.n_layers) if "resid_mid" in model.signals(i)]
    cache = DynamicCache()
    heads: dict[int, tuple[Tensor, ...]] = {}
    with Session(model, list(dict.fromkeys(ports))) as session:
        for i, at in enumerate(model.modules):
            for name, module in (("layer", at.layer), ("attn", at.attn)):
                session.on_call(module, _note(calls, (name, i)))
            if model.family.attention == "interface":
                with suppress(PatchbayError):  # somebody else listens there
                    session.on_attention(i, _note_heads(heads, i))
        unembed = model.hf.get_output_embeddings()
        if unembed is not None and model.hf.get_input_embeddings() is not unembed:
            session.on_forward(
                unembed, lambda inner, x: x[..., :1]
            )  # nobody reads these logits, and its weights are many
        model.hf(input_ids=ids, **with_cache(model.hf, cache), use_cache=True)
    seen = session.captured
    n = model.n_layers
    written = [getattr(layer, "keys", None) for layer in cache.layers]
    if len(written) < n or any(keys is None or keys.shape[-2] != ids.shape[1] for keys in written):
        reason = "its forward writes no keys and values of every token into the cache that it is given"
        return Base(model, ids, [], [], [], {}, [], [], refusal=reason)
    base = Base(
        model,
        ids,
        [calls["layer", i] for i in range(n)],
        [calls["attn", i] for i in range(n)],
        [seen[Port("resid_in", i)] for i in range(n)] + [seen[Port("resid_out", n - 1)]],
        seen,
        [cache.layers[i].keys for i in range(n)],
        [cache.layers[i].values for i in range(n)],
        [heads[i] for i in range(n)] if len(heads) == n else [],
    )
    key = (len(ids) == 1, base.n_positions, base.resid[0].dtype, model.hf.config._attn_implementation)
    known = _CALLABLE.setdefault(model, {})
    if key not in known:
        known[key] = _how_called(base)
    base.narrow, base.flat, base.halves, base.refusal = known[key]
    return base


_CALLABLE: WeakKeyDictionary[Model, dict[Any, tuple[bool, bool, bool, str | None]]] = WeakKeyDictionary()


def _how_called(base: Base) -> tuple[bool, bool, bool, str | None]:
    """Whether attention takes rows of many starts at once, and those narrow, whether halves can be called apart, and why rows
    cannot restart: each believed after it reproduced the base run, once for prompts of a length."""
    narrow = bool(base.heads) and _reproduces(base, _narrow_halves(base)) is None
    flat = narrow or (bool(base.heads) and _reproduces(base, _flat_halves(base)) is None)
    halves = flat or _reproduces(base, lambda i, start, x, rows: _halves(base, i, start, x, rows)) is None
    refusal = None if halves else _reproduces(base, lambda i, start, x, rows: whole_layer(base, i, start, x, rows))
    return narrow, flat, halves, refusal


def _note(calls: dict[Any, Any], key: tuple[str, int]) -> Callable[[tuple[Any, ...], dict[str, Any]], None]:
    def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[key] = (args, kwargs)

    return note


def _note_heads(heads: dict[int, tuple[Tensor, ...]], layer: int) -> Callable[..., Any]:
    def note(inner: Any, _: str, module: nn.Module, *given: Any) -> Any:
        *qkv, mask, options = given
        heads[layer] = tuple(t.transpose(1, 2) for t in qkv)
        return inner(module, *qkv, mask, **options)

    return note


def _reproduces(base: Base, call: Callable[[int, int, Tensor, Tensor], Tensor]) -> str | None:
    """None when calling each layer so, from the middle of the first prompt on, gives the base run; else what differs."""
    start, rows = base.n_positions // 2, torch.zeros(1, dtype=torch.long)
    for i in range(base.model.n_layers):
        try:
            out = call(i, start, base.resid[i][:1, start:], rows)
        except (TypeError, RuntimeError, AttributeError, ValueError, IndexError, PatchbayError) as error:
            return f"layer {i} cannot be called on some positions: {error}"
        expected = base.resid[i + 1][:1, start:]
        off = float((out - expected).abs().max() / expected.abs().max())
        if not off <= (1e-4 if expected.dtype == torch.float32 else 5e-2):
            return f"layer {i} called on some positions differs from the whole run by {off:.1e}"
    return None


def _halves(base: Base, layer: int, start: int, x: Tensor, prompts: Tensor) -> Tensor:
    return mlp_half(base, layer, x, attention_half(base, layer, start, x, prompts))


def _flat_halves(base: Base) -> Callable[[int, int, Tensor, Tensor], Tensor]:
    """`_halves` by the flat call, among rows of another prompt and start that must not be mixed up with these."""

    def call(layer: int, start: int, x: Tensor, prompts: Tensor) -> Tensor:
        pieces = [_others(base, layer, start // 2), Piece(start, x, prompts, start)]
        return mlp_half(base, layer, x, _apart(attention_flat(base, layer, pieces), pieces, base.n_positions)[1])

    return call


def _narrow_halves(base: Base) -> Callable[[int, int, Tensor, Tensor], Tensor]:
    """The same for a row of which one token is given and all are asked, and one of which all are given and the last is asked."""

    def call(layer: int, start: int, x: Tensor, prompts: Tensor) -> Tensor:
        last = base.n_positions - 1
        pieces = [
            Piece(start, x[:, :1], prompts, start),
            _others(base, layer, start // 2),
            Piece(start, x, prompts, last),
        ]
        every, _, end = _apart(attention_flat(base, layer, pieces), pieces, base.n_positions)
        return mlp_half(base, layer, x, torch.cat([every[:, :-1], end], 1))

    return call


def _others(base: Base, layer: int, start: int) -> Piece:
    last = torch.full((2,), len(base.ids) - 1)
    return Piece(start, base.resid[layer][last, start:], last, start)


def _apart(added: Tensor, pieces: Sequence[Piece], n_positions: int) -> list[Tensor]:
    """What attention adds, [token, d_model], by piece: [row, position, d_model]."""
    shapes = [(len(piece.x), n_positions - piece.asked) for piece in pieces]
    parts = added.split([rows * positions for rows, positions in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


# ---- calling a layer on rows -----------------------------------------------------------------------------------------


def _for_rows(
    base: Base, module: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], start: int, x: Tensor, prompts: Tensor
) -> dict[str, Any]:
    """The arguments of a recorded call by name, for rows of the given prompts and positions from `start` on."""
    args, kwargs = call
    names = list(inspect.signature(module.forward).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    given.pop(names[0])  # the stream itself
    if "attention_mask" in names:
        given.setdefault("attention_mask", None)
    n, n_prompts = base.n_positions, len(base.ids)

    def narrowed(value: Any, name: str) -> Any:
        if is_cache(value):
            return Past(base, start, prompts)
        if name == "attention_mask":
            if value is None or value.ndim != 4:
                place = torch.arange(n, device=x.device)
                value = (place[None, :] <= place[:, None])[None, None]  # causal
                value = value if base.model.hf.config._attn_implementation == "sdpa" else _numbers(value, x)
            return _some(value, prompts, n_prompts)[:, :, start:]
        if name == "alibi" and isinstance(value, Tensor):
            per_prompt = value.unflatten(0, (n_prompts, -1))[:1]
            return per_prompt.expand(len(x), *per_prompt.shape[1:]).flatten(0, 1)
        if isinstance(value, tuple) and value and all(isinstance(v, Tensor) for v in value):
            return tuple(narrowed(v, name) for v in value)
        if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == n:
            return _some(value, prompts, n_prompts)[:, start:]
        if isinstance(value, Tensor) and n in value.shape:
            raise PatchbayError(f"{name} of shape {tuple(value.shape)} cannot be narrowed to some positions")
        return value

    return {name: narrowed(value, name) for name, value in given.items()}


def _numbers(mask: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(~mask, torch.finfo(like.dtype).min)


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


class Piece(NamedTuple):
    """Rows for a call of attention: their stream at the positions from `start` on that are given, and from where on it is asked
    what attention adds."""

    start: int
    x: Tensor  # [row, position, d_model]
    prompts: Tensor  # [row]
    asked: int


@dataclass(frozen=True)
class Places:
    """Tokens of rows side by side: the row and the position of each, [token]."""

    row: Tensor
    place: Tensor

    @classmethod
    def of(cls, rows: Sequence[int], begins: Sequence[int], ends: Sequence[int]) -> Places:
        """`rows[i]` rows with positions `begins[i]` .. `ends[i]` each."""
        many = torch.tensor(rows)
        begin, width = torch.tensor([begins, [e - b for b, e in zip(begins, ends, strict=True)]]).repeat_interleave(
            many, 1
        )
        row = torch.arange(len(width)).repeat_interleave(width)
        first = width.cumsum(0) - width  # of each row, among the tokens
        return cls(row, torch.arange(len(row)) + (begin - first)[row])

    def of_rows(self, begin: int, end: int) -> tuple[slice, Places]:
        """The tokens of rows `begin` to `end`, and where they are among all: rows lie one after the other."""
        left, right = torch.searchsorted(self.row, torch.tensor([begin, end])).tolist()
        return slice(left, right), Places(self.row[left:right] - begin, self.place[left:right])

    def among(self, first: int, n_positions: int) -> tuple[Tensor, Tensor | None]:
        """Where tokens lie in rows that begin at position `first`, [token], and which of them these are: None for all."""
        at = self.row * (n_positions - first) + self.place - first
        if first == 0 or bool((kept := self.place >= first).all()):
            return at, None
        which = kept.nonzero()[:, 0]
        return at[which], which


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


def _by_token(
    base: Base, module: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], place: Tensor, prompt: Tensor
) -> dict[str, Any]:
    """The arguments of a recorded call by name, for one long sequence of tokens at these places of these prompts."""
    args, kwargs = call
    names = list(inspect.signature(module.forward).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    given.pop(names[0])  # the stream itself
    n = base.n_positions

    def narrowed(value: Any, name: str) -> Any:
        if is_cache(value) or name == "attention_mask":  # `attention_flat` has its own
            return None
        if isinstance(value, tuple) and value and all(isinstance(v, Tensor) for v in value):
            return tuple(narrowed(v, name) for v in value)
        if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == n:
            return (value[0, place] if len(value) == 1 else value[prompt, place])[None]
        if isinstance(value, Tensor) and n in value.shape:
            raise PatchbayError(f"{name} of shape {tuple(value.shape)} cannot be narrowed to some tokens")
        return value

    return {name: narrowed(value, name) for name, value in given.items()}


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
