"""Sessions: the hooks that read and change signals while a model runs. This file and `attention.py` alone touch hooks.

A `Session` is told which ports to tap and which edits to make; it puts hooks only on the modules that these need, and takes
every one of them away again, also after an exception. A signal that nobody asked for costs nothing. Where an edit changes a
signal, the model continues from the changed value; a tap sees the signal after the edits, which is what the model used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from patchbay.edits.apply import apply, row_mask
from patchbay.edits.edit import Edit
from patchbay.jacks import attention
from patchbay.jacks.arguments import cache_among
from patchbay.signal.port import PatchbayError, Port, position_axis
from patchbay.signal.positions import Batch, all_from, chosen

if TYPE_CHECKING:
    from patchbay.jacks.modelled import Modelled as Model

ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.pattern")
FUSED = {
    "NewGELUActivation": partial(F.gelu, approximate="tanh")
}  # written out in transformers as eight passes over memory


@dataclass
class Want:
    """What is asked of one signal of one layer."""

    taps: list[Port] = field(default_factory=list)
    edits: list[tuple[int, Edit]] = field(default_factory=list)  # with their place in the session's list

    @property
    def changes(self) -> list[tuple[int, Edit]]:
        return [(i, edit) for i, edit in self.edits if edit.op != "block"]

    @property
    def looks_only(self) -> bool:
        """Whether the one thing asked is the whole signal as it is."""
        return not self.edits and len(self.taps) == 1 and self.taps[0].index is None and self.taps[0].query is None


class RouterLogits(TorchFunctionMode):
    """Inside a router's forward, the first linear map to one number per expert gives the logits: the family's own
    softmax, top-k and renormalisation follow from what `change` returns."""

    def __init__(self, n_experts: int, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.n_experts, self.change, self.done = n_experts, change, False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear and not self.done and out.shape[-1] == self.n_experts:
            self.done = True
            return self.change(out)
        return out


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple | list) else output


def with_first(output: Any, new: Tensor) -> Any:
    return (new, *output[1:]) if isinstance(output, tuple | list) else new


class Session:
    """Taps and edits attached to one model for the length of a `with` block. `captured` holds what the taps saw."""

    def __init__(
        self,
        model: Model,
        taps: Sequence[Port] = (),
        edits: Sequence[Edit] = (),
        *,
        lengths: Tensor | None = None,
        prompt_length: int | None = None,
        grad: bool = False,
    ) -> None:
        self.model, self.edits, self.grad = model, list(edits), grad
        self.given_lengths, self.prompt_length = lengths, prompt_length
        self.last_cache: Any = None
        self.captured: dict[Port, Tensor] = {}
        self.batch: Batch | None = None
        self.start = self.end = 0
        self._shape = (0, 0)  # prompts and positions of the tokens that run now
        self.wants: dict[tuple[str, int | None], Want] = {}
        self.stash: dict[tuple[str, int], Any] = {}
        self._undo: list[Callable[[], Any]] = []
        for port in taps:
            model.require(port)
            self._want(port).taps.append(
                Port(port.signal, port.layer) if grad else port
            )  # a slice is off the graph's path
        for i, edit in enumerate(self.edits):
            model.require(edit.port)
            self._want(edit.port).edits.append((i, edit))
        self.positioned = any(e.positions is not None or e.keys is not None or e.spread for e in self.edits)

    def _want(self, port: Port) -> Want:
        return self.wants.setdefault((port.signal, port.layer), Want())

    # ---- attaching ----

    def __enter__(self) -> Session:
        try:
            self._attach()
        except BaseException:
            self.detach()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def detach(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _attach(self) -> None:
        if not self.wants:
            return
        self._before(self.model.hf, self._begin)
        asked: dict[int | None, set[str]] = {}
        for signal, layer in self.wants:
            asked.setdefault(layer, set()).add(signal)
        for signal in sorted(asked.get(None, ())):
            self._attach_whole(signal)
        for layer in sorted(layer for layer in asked if layer is not None):
            self._attach_layer(layer, asked[layer])

    def _before(self, module: nn.Module, hook: Callable[..., Any], **more: Any) -> None:
        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True, **more).remove)

    def _after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._undo.append(module.register_forward_hook(hook, with_kwargs=True).remove)

    def _attach_whole(self, signal: str) -> None:
        if signal == "embed":
            self._input(self.model.modules[0].layer, "embed", None)
        elif signal == "final_norm":
            self._output(self.model.final_norm_module, "final_norm", None)
        else:
            self._after(self.model.hf, self._logits)

    def _attach_layer(self, layer: int, signals: set[str]) -> None:
        at = self.model.modules[layer]
        scale = self.model.residual_scale
        if "resid_in" in signals:
            self._input(at.layer, "resid_in", layer)
        if signals & set(ATTENTION):
            self._attach_attention(layer)
        if "attn.z" in signals or "attn.head_out" in signals:
            self._before(at.attn_proj, self._z(layer))
            if "attn.head_out" in signals:
                self._after(at.attn_proj, self._sum_heads(layer))
        if "attn.out" in signals:  # after head_out and before resid_mid: they may hook the same module
            self._output(at.attn_added, "attn.out", layer, scale)
        if "resid_mid" in signals:
            self._attach_resid_mid(layer)
        if "resid_out" in signals:
            self._output(at.layer, "resid_out", layer)
        if "mlp.in" in signals:
            self._input(at.mlp, "mlp.in", layer)
        if "mlp.act" in signals:
            self._input(at.mlp_proj, "mlp.act", layer)
        if "mlp.out" in signals:
            self._output(at.mlp_added, "mlp.out", layer, scale)
        if "router.logits" in signals:
            self._attach_router(layer)
        if signals & {"router.weights", "router.experts"}:
            self._before(at.experts, self._routing(layer))
        if "experts.out" in signals:
            self._after(at.experts, self._experts(layer))

    def _override(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Replace a module's forward on the instance; undone to exactly what was there."""
        had = module.__dict__.get("forward")
        module.forward = forward  # type: ignore[method-assign]
        self._undo.append(lambda: module.__dict__.pop("forward") if had is None else setattr(module, "forward", had))

    def _attach_attention(self, layer: int) -> None:
        module = self.model.modules[layer].attn
        assert module is not None
        if self.model.family.attention == "operators":
            inner, n_heads = module.forward, self.model.n_heads(layer)

            def forward(*args: Any, **kwargs: Any) -> Any:
                with attention.Operators(self, layer, n_heads, module):
                    return inner(*args, **kwargs)

            self._override(module, forward)
            return
        self.on_attention(layer, partial(attention.attend, self, layer))

    def on_attention(self, layer: int, function: Callable[..., Any]) -> None:
        """Let `function` compute a layer's attention, called as `attention.attend` is after its first two arguments."""
        module = self.model.modules[layer].attn
        assert module is not None
        attention.listen(function, layer, module)
        self._undo.append(lambda: attention.unlisten(module))
        for config in {id(c): c for c in (self.model.hf.config, module.config)}.values():
            before = config._attn_implementation_internal
            if before.startswith(attention.PREFIX):
                continue
            config._attn_implementation_internal = attention.use_name(before)
            self._undo.append(partial(setattr, config, "_attn_implementation_internal", before))

    def on_forward(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """Let `function(inner, *args)` run in place of a module's forward, which is `inner`."""
        self._override(module, partial(function, module.forward))

    def fuse_activations(self) -> None:
        """Let activations that transformers writes out step by step run as torch's one kernel: the same function, rounded otherwise."""
        for at in self.model.modules:
            for module in at.layer.modules():
                if type(module).__name__ in FUSED:
                    self._override(module, FUSED[type(module).__name__])

    def _attach_router(self, layer: int) -> None:
        module = self.model.modules[layer].router
        assert module is not None
        inner, n_experts = module.forward, self.model.n_experts(layer)

        def change(logits: Tensor) -> Tensor:
            return self.site("router.logits", layer, self._by_prompt(logits)).reshape(logits.shape)

        def forward(*args: Any, **kwargs: Any) -> Any:
            with RouterLogits(n_experts, change):
                return inner(*args, **kwargs)

        self._override(module, forward)

    def _attach_resid_mid(self, layer: int) -> None:
        at = self.model.modules[layer]
        want = self.wants[("resid_mid", layer)]
        if want.edits or self.grad:  # this stream is a sum inside the layer: change what attention adds to it
            self._before(
                at.layer, lambda _, args, kwargs: self.stash.update({("resid_in", layer): _hidden(args, kwargs)})
            )

            def change(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
                resid_in, scale = self.stash.pop(("resid_in", layer)), self.model.residual_scale
                middle = resid_in + first(output).reshape(resid_in.shape) * scale
                edited = self._edited(want.edits, "resid_mid", middle)
                out = first(output)
                new = torch.where(edited == middle, out.reshape(middle.shape), (edited - resid_in) / scale)
                if self.grad:  # through what was captured alone: the layer adds resid_in once more
                    self._capture(want.taps, "resid_mid", edited)
                    new = new.detach() + (edited - edited.detach() - (resid_in - resid_in.detach())) / scale
                return with_first(output, new.reshape(out.shape))

            self._after(at.attn_added, change)
        if want.taps and not self.grad:

            def capture(_: nn.Module, args: Any, kwargs: Any) -> None:
                self._capture(want.taps, "resid_mid", self._by_prompt(_hidden(args, kwargs)))

            self._before(at.mid, capture)

    def on_call(self, module: nn.Module, note: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> None:
        """Tell `note` the arguments with which a module is called, for the length of the session."""

        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            note(args, dict(kwargs))

        self._before(module, hook)

    def place(self, batch: Batch, start: int, end: int) -> None:
        """Say where the tokens that run now stand: those of `batch` from `start` to `end`."""
        self.batch, self.start, self.end = batch, start, end
        self._shape = (len(batch.ids), end - start)

    # ---- one forward ----

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before the model runs: where this chunk of tokens stands in its sequences."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:  # inputs_embeds: positions are known, tokens are not
            embeds = kwargs["inputs_embeds"]
            ids = torch.full(embeds.shape[:2], -1, device=embeds.device)
        seen = self._seen(cache_among(args, kwargs), ids)
        n_prompts, end = len(ids), seen + ids.shape[1]
        earlier = self.batch if seen and self.batch is not None and len(self.batch.ids) == n_prompts else None
        earlier = earlier if earlier is not None and earlier.ids.shape[1] >= seen else None
        mask = kwargs.get("attention_mask")
        if self.positioned and earlier is None and mask is not None and mask.ndim == 2 and not bool(mask[:, 0].all()):
            raise PatchbayError(
                "edits at positions on a left-padded batch: pass prompts of one length, or let Patchbay group them"
            )
        lengths = torch.full((n_prompts,), end)
        if not seen:
            self.captured.clear()
            lengths = lengths if self.given_lengths is None else self.given_lengths
        if earlier is not None:
            prompts, ids = earlier.prompt_lengths, torch.cat([earlier.ids[:, :seen], ids], 1)
        else:
            prompts = lengths if self.prompt_length is None else lengths.clamp(max=self.prompt_length)
            if seen:  # a cache filled before this session: its tokens are not known
                ids = torch.cat([ids.new_full((n_prompts, seen), -1), ids], 1)
        self.place(Batch(ids, lengths, prompts, self.model.token_id), seen, end)

    def _seen(self, past: Any, ids: Tensor) -> int:
        """Tokens already in the cache. A cache without a length (state space) that is the one used last holds what was run."""
        if past is None:
            self.last_cache = None
            return 0
        same, self.last_cache = past is self.last_cache, past
        try:
            return int(past.get_seq_length())
        except (AttributeError, ValueError, NotImplementedError, IndexError, StopIteration):
            return self.batch.ids.shape[1] if same and self.batch is not None and len(self.batch.ids) == len(ids) else 0

    def _by_prompt(self, x: Tensor) -> Tensor:
        """[prompt * position, ...] -> [prompt, position, ...]; layers that flatten their tokens keep that order."""
        return x if x.ndim > 2 and x.shape[:2] == self._shape else x.reshape(*self._shape, *x.shape[1:])

    def site(
        self, signal: str, layer: int | None, x: Tensor, n_keys: int | None = None, closed: Tensor | None = None
    ) -> Tensor:
        """The signal has the value `x` (in the axes of `SIGNALS`): edit it, capture it, return what the model goes on with.

        `n_keys`: keys in all, for k and v, which reach back into the cache. `closed`: where a pattern must stay 0.
        """
        want = self.wants.get((signal, layer))
        if want is None:
            return x
        if want.looks_only and not self.grad:
            self._store(want.taps[0], x)
            return x
        changes = want.changes
        x = self._edited(changes, signal, x, n_keys)
        x = x.masked_fill(closed, 0.0) if changes and closed is not None else x
        self._capture(want.taps, signal, x)
        return x

    def _edited(
        self,
        edits: Sequence[tuple[int, Edit]],
        signal: str,
        x: Tensor,
        n_keys: int | None = None,
        only: Sequence[int] | None = None,
    ) -> Tensor:
        if not edits:
            return x
        axis = position_axis(signal)
        y = x.movedim(axis, 1)  # [prompt, position, (head | neuron | expert), ...]
        if any(edit.port.index is not None for _, edit in edits):
            y = y.clone()
        for _, edit in edits:
            index = edit.port.index if only is None or edit.port.index is None else list(only).index(edit.port.index)
            part = y if index is None else y[:, :, index].clone() if self.grad else y[:, :, index]
            ordinal, row = self._where(edit, y.shape[1], n_keys)
            new = apply(edit, part, _to(ordinal, y), _to(row, y))
            if index is None:
                y = new.clone() if new._base is not None or len(edits) > 1 else new
            else:
                y[:, :, index] = new
        return y.movedim(1, axis)

    def _where(self, edit: Edit, n_here: int, n_keys: int | None) -> tuple[Tensor | None, Tensor | None]:
        """Ordinals of the edited positions in this chunk, and of the edited rows; None where everything is."""
        assert self.batch is not None
        begin = self.end - (n_keys if n_keys is not None else n_here)  # cached keys reach back before this chunk
        if edit.rows is None and not edit.spread and all_from(begin, edit.positions, self.batch):
            return None, None
        ordinal = chosen(edit.positions, self.batch, what=str(edit))
        if begin < 0:
            raise PatchbayError(
                f"{edit}: the cache holds {n_keys} keys for {self.end} tokens; a cache of fixed size does not say which "
                "positions its keys have: generate with the default (dynamic) cache"
            )
        return ordinal[:, begin : self.end], row_mask(edit, len(ordinal))

    def blocked(self, layer: int, n_heads: int, n_queries: int, n_keys: int) -> Tensor | None:
        """What `block` edits cut at this layer: bool [prompt, head, query, key], or None."""
        want = self.wants.get(("attn.pattern", layer))
        blocks = [edit for _, edit in want.edits if edit.op == "block"] if want else []
        if not blocks:
            return None
        assert self.batch is not None
        n_prompts = len(self.batch.ids)
        cut = torch.zeros(n_prompts, n_heads, n_queries, n_keys, dtype=torch.bool)
        for edit in blocks:
            query = chosen(edit.positions, self.batch, what=str(edit))[:, self.end - n_queries : self.end] >= 0
            key = chosen(edit.keys, self.batch, what=str(edit))[:, self.end - n_keys : self.end] >= 0
            pair = query[:, :, None] & key[:, None, :] & (row_mask(edit, n_prompts) >= 0)[:, None, None]
            heads = slice(None) if edit.port.index is None else slice(edit.port.index, edit.port.index + 1)
            cut[:, heads] |= pair[:, None]
        return cut.to(self.batch.ids.device)

    # ---- capturing ----

    def _capture(self, taps: Iterable[Port], signal: str, x: Tensor, only: Sequence[int] | None = None) -> None:
        if self.grad and x.is_floating_point() and not x.requires_grad:
            x.requires_grad_()  # frozen weights, or an edit that replaced everything: the graph starts here
        whole = any(port.index is None and port.query is None for port in taps)
        for port in taps:
            if port.query is not None:
                self._capture_slice(port, x)
                continue
            if port.index is None:
                value = x
            else:
                axis = Port(port.signal, port.layer, None).index_axis
                place = list(Port(port.signal, port.layer).axes).index(str(axis))
                index = port.index if only is None else list(only).index(port.index)
                value = x.select(place, index)
                value = value if whole else value.clone()  # a view would keep all heads alive
            self._store(port, value)

    def _capture_slice(self, port: Port, pattern: Tensor) -> None:
        """Some query rows of a pattern that was computed whole."""
        rows = self.query_rows([port], pattern.shape[2])
        assert rows is not None
        index = rows[:, None, :, None].to(pattern.device).expand(-1, pattern.shape[1], -1, pattern.shape[3])
        value = pattern.gather(2, index)
        self._store(port, value if port.index is None else value[:, port.index].clone())

    def _store(self, port: Port, value: Tensor) -> None:
        if not self.grad and value.requires_grad:
            value = value.detach()
        self.captured[port] = value

    def query_rows(self, taps: Sequence[Port], n_queries: int) -> Tensor | None:
        """Query rows that the pattern taps need, int64 [prompt, row]; None when one of them needs all."""
        assert self.batch is not None
        rows = attention.pattern_rows(list(taps))
        return None if rows is None else query_rows(rows, self.batch.lengths.clamp(max=n_queries))

    def capture_rows(self, layer: int, pattern: Tensor, rows: Tensor) -> None:
        """Store the computed rows [prompt, head, row, key] for each tap, in the order that it asked them."""
        taps = self.wants[("attn.pattern", layer)].taps
        computed = attention.pattern_rows(taps)
        assert computed is not None
        for port in taps:
            value = pattern[:, :, [computed.index(row) for row in port.query or ()]]
            self._store(port, value if port.index is None else value[:, port.index].clone())

    # ---- hooks by kind ----

    def _input(self, module: nn.Module | None, signal: str, layer: int | None) -> None:
        assert module is not None

        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            x = _hidden(args, kwargs)
            shaped = self._by_prompt(
                x.view_as(x) if self.grad else x
            )  # others may read x: their gradient is not this one's
            new = self.site(signal, layer, shaped)
            unchanged = new is shaped and not self.grad
            return None if unchanged else _with_hidden(args, kwargs, new.reshape(x.shape))

        self._before(module, hook)

    def _output(self, module: nn.Module | None, signal: str, layer: int | None, scale: float = 1.0) -> None:
        assert module is not None
        overwritten = self.model.family.overwrites and signal in ("attn.out", "mlp.out")

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            x = first(output)
            shaped = self._by_prompt(x) if scale == 1.0 else self._by_prompt(x) * scale
            new = self.site(signal, layer, shaped)
            if overwritten:  # Falcon adds in place into what attention and MLP return
                new = new.clone()
            if new is shaped and (shaped is x or not self.grad):
                return None
            return with_first(output, (new if scale == 1.0 else new / scale).reshape(x.shape))

        self._after(module, hook)

    def _logits(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        new = self.site("logits", None, output.logits)
        if new is not output.logits:
            output.logits = new
        return output

    def _z(self, layer: int) -> Callable[..., Any]:
        n_heads = self.model.n_heads(layer)

        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            x = _hidden(args, kwargs)
            z = self._by_prompt(x).unflatten(-1, (n_heads, -1))  # [prompt, position, head, d_head]
            new = self.site("attn.z", layer, z)
            if ("attn.head_out", layer) in self.wants:
                self._head_out(layer, new)
            unchanged = new is z and not self.grad
            return None if unchanged else _with_hidden(args, kwargs, new.reshape(x.shape))

        return hook

    def _head_out(self, layer: int, z: Tensor) -> None:
        """What heads write, z @ W_O, for the heads that are asked; kept before and after edits for the projection's sum."""
        want = self.wants[("attn.head_out", layer)]
        heads = self._asked(want, self.model.n_heads(layer))
        w_o = self.model.W_O(layer)[heads]  # [head, d_head, d_model]
        out = torch.einsum("bphd,hdm->bphm", z[:, :, heads], w_o)
        new = self._edited(want.edits, "attn.head_out", out, only=heads)
        self._capture(want.taps, "attn.head_out", new, only=heads)
        self.stash[("attn.head_out", layer)] = None if new is out and not self.grad else (out, new)

    def _sum_heads(self, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            parts = self.stash.pop(("attn.head_out", layer), None)
            if parts is None:
                return None
            bias = getattr(module, "bias", None)
            everything = parts[0].shape[2] == self.model.n_heads(layer)
            old, new = parts
            return self._summed(output, old, new, (0.0 if bias is None else bias) if everything else None)

        return hook

    def _summed(self, output: Tensor, old: Tensor, new: Tensor, rest: Tensor | float | None) -> Tensor:
        """`output`, a sum of parts, after the parts [prompt, position, part, d_model] went from `old` to `new`.

        With `rest`, these are all parts but that; where one changed the sum is then made anew, so that parts set to 0 leave
        exactly the rest (a norm that follows would show the rounding). Elsewhere `output` stays as it is.
        """
        before = output.reshape(old.shape[0], old.shape[1], -1)
        changed = (new != old).any(2).any(-1, keepdim=True)
        out = torch.where(changed, before + (new - old).sum(2) if rest is None else new.sum(2) + rest, before)
        if self.grad:  # its gradient, through what was captured alone
            out = out.detach() + (new - new.detach()).sum(2)
        return out.to(output.dtype).reshape(output.shape)

    def _routing(self, layer: int) -> Callable[..., Any]:
        """Before the experts run: (tokens, chosen experts, weights) as one dense row of weights per token, and back."""
        n_experts = self.model.n_experts(layer)

        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden, choice, weights = args[0], args[1], args[2]
            dense = weights.new_zeros(*weights.shape[:-1], n_experts).scatter_add(-1, choice, weights)
            shaped = self._by_prompt(dense)  # [prompt, position, expert]
            new = self.site("router.weights", layer, shaped)
            if new is not shaped:
                n_chosen = max(int((new != 0).sum(-1).max()), 1)
                choice = new.abs().topk(n_chosen, dim=-1).indices.reshape(*choice.shape[:-1], -1)
                args = (hidden, choice, new.reshape(dense.shape).gather(-1, choice), *args[3:])
            elif self.grad:
                args = (hidden, choice, new.reshape(dense.shape).gather(-1, choice), *args[3:])
            self.site("router.experts", layer, self._by_prompt(choice))
            return args, kwargs

        return hook

    def _experts(self, layer: int) -> Callable[..., Any]:
        """After the experts ran: what each asked one contributed (its output times its weight)."""

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            want = self.wants[("experts.out", layer)]
            experts = self._asked(want, self.model.n_experts(layer))
            hidden, choice, weights = args[0].reshape(-1, args[0].shape[-1]), args[1], args[2]
            outs = [self._one_expert(module, expert, hidden, choice, weights) for expert in experts]
            out = torch.stack(outs, 1).unflatten(0, (-1, self.end - self.start))  # [prompt, position, expert, d_model]
            new = self._edited(want.edits, "experts.out", out, only=experts)
            self._capture(want.taps, "experts.out", new, only=experts)
            if new is out and not self.grad:
                return None
            return self._summed(output, out, new, rest=0.0 if len(experts) == self.model.n_experts(layer) else None)

        return hook

    def _asked(self, want: Want, n: int) -> list[int]:
        """The heads or experts that taps and edits name; all when one names none, and all for gradients through them."""
        named = [port.index for port in want.taps] + [edit.port.index for _, edit in want.edits]
        everything = self.grad or None in named
        return list(range(n)) if everything else sorted({index for index in named if index is not None})

    @staticmethod
    def _one_expert(module: nn.Module, expert: int, hidden: Tensor, choice: Tensor, weights: Tensor) -> Tensor:
        """The layer's own experts module on the tokens that chose `expert`, with that choice alone."""
        token, slot = (choice.reshape(-1, choice.shape[-1]) == expert).nonzero(as_tuple=True)
        out = torch.zeros_like(hidden)
        if len(token) == 0:
            return out
        only = torch.full((len(token), 1), expert, device=choice.device, dtype=choice.dtype)
        weight = weights.reshape(-1, weights.shape[-1])[token, slot][:, None]
        return out.index_add(0, token, module.forward(hidden[token], only, weight).to(out.dtype))


def query_rows(rows: Sequence[int], lengths: Tensor) -> Tensor:
    """Places of the asked rows in prompts of these lengths, negative ones from the end: int64 [prompt, row]."""
    lengths = lengths.cpu()[:, None]
    asked = torch.tensor(rows)[None]
    out = torch.where(asked < 0, lengths + asked, asked.expand(len(lengths), -1))
    if bool((out < 0).any()) or bool((out >= lengths).any()):
        raise PatchbayError(f"pattern rows {list(rows)} asked, the shortest prompt has {int(lengths.min())} tokens")
    return out


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _with_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], new: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})


def _to(index: Tensor | None, like: Tensor) -> Tensor | None:
    return None if index is None else index.to(like.device)
