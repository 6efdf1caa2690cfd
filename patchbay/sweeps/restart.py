"""Restarting: one run of some prompts with all that is needed to call their layers again on other streams, from any position on.

A row that differs from the base run from layer l and position p on is computed from there alone: its stream goes through the
layers' own modules at positions p.. , with what each layer was called with in the base run narrowed to these positions, and its
queries see the base run's keys and values left of p. Three ways, the fastest that holds for the model: attention on the tokens
of rows of many starts at once, where transformers' attention interface tells the rows apart only when queries meet keys;
attention and MLP called apart, start by start; whole layers. A way is believed only after it reproduced the base run.
The first way is narrow, too, where it then still reproduces the base run: it asks the model for queries, keys and values only of
the tokens whose stream changed, takes the base run's for all others, and projects back only the tokens that are read later.
Models whose layers carry a state instead of keys and values, or hold their attention within a gate, cannot restart: `Base.refusal` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from patchbay.errors import PatchbayError
from patchbay.jacks.arguments import with_cache
from patchbay.jacks.session import Session
from patchbay.model.model import Model
from patchbay.signal.port import Port
from patchbay.sweeps.calls import Base, Call, Piece
from patchbay.sweeps.layers import attention_flat, attention_half, mlp_half, whole_layer


@torch.no_grad()
def base_run(model: Model, ids: Tensor, signals: Sequence[Port]) -> Base:
    """Run the base prompts, keeping streams, calls, keys and values, and the signals that edits start from."""
    model.check_mode()
    lacking = [i for i, at in enumerate(model.modules) if at.attn is None]
    if lacking or not model.causal:
        why = "tokens see those after them"
        if lacking:
            why = f"layers {lacking[:6]} carry a state, or hold their attention within another map, and have no keys and values to start from"
        return Base(model, ids, [], [], [], {}, [], [], refusal=why)
    base = _recorded(model, ids, signals)
    if base.refusal is None:
        key = (len(ids) == 1, base.n_positions, base.resid[0].dtype, model.hf.config._attn_implementation)
        known = _CALLABLE.setdefault(model, {})
        if key not in known:
            known[key] = _how_called(base)
        base.narrow, base.flat, base.halves, base.refusal = known[key]
    return base


def _recorded(model: Model, ids: Tensor, signals: Sequence[Port]) -> Base:
    """The run itself: what the layers were called with, and what the cache then holds."""
    n = model.n_layers
    calls: dict[tuple[str, int], Call] = {}
    ports = [*(Port("resid_in", i) for i in range(n)), Port("resid_out", n - 1), *signals]
    ports += [Port("attn.out", i) for i in range(n)]
    ports += [Port("resid_mid", i) for i in range(n) if "resid_mid" in model.signals(i)]
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
            # nobody reads these logits, and its weights are many
            session.on_forward(unembed, lambda inner, x: x[..., :1])
        model.hf(input_ids=ids, **with_cache(model.hf, cache), use_cache=True)
    written = [getattr(layer, "keys", None) for layer in cache.layers]
    if len(written) < n or any(keys is None or keys.shape[-2] != ids.shape[1] for keys in written):
        reason = "its forward writes no keys and values of every token into the cache that it is given"
        return Base(model, ids, [], [], [], {}, [], [], refusal=reason)
    return Base(
        model,
        ids,
        layer_calls=[calls["layer", i] for i in range(n)],
        attn_calls=[calls["attn", i] for i in range(n)],
        resid=[session.captured[port] for port in ports[: n + 1]],
        taps=session.captured,
        keys=[cache.layers[i].keys for i in range(n)],
        values=[cache.layers[i].values for i in range(n)],
        heads=[heads[i] for i in range(n)] if len(heads) == n else [],
    )


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
