"""Signals that are sums or slices of what modules pass: heads' outputs, the stream between attention and MLP, routing, experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from patchbay.jacks.features import Features
from patchbay.jacks.hooks import Scope, after, before
from patchbay.jacks.sites import Want


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple | list) else output


def with_first(output: Any, new: Tensor) -> Any:
    return (new, *output[1:]) if isinstance(output, tuple | list) else new


def hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def with_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], new: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})


class Sums(Features):
    """Sites whose signals are parts of a sum; `scope` says in whose calls the hooks act, `_undo` takes them away."""

    scope: Scope
    _undo: list[Callable[[], Any]]

    def _before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._undo.append(before(self.scope, module, self._in_a_run(hook)))

    def _after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._undo.append(after(self.scope, module, self._in_a_run(hook)))

    def _in_a_run(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*call: Any) -> Any:
            self.check_placed()
            return hook(*call)

        return checked

    def _join(self, layer: int) -> None:
        """Keep what the mixers of a layer put out before the last of them, each times its factor."""
        key = ("beside", layer)

        def kept(factor: float, begins: bool) -> Callable[..., None]:
            def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                held = first(output) * factor
                self.here.stash[key] = held if begins else self.here.stash[key] + held

            return hook

        for i, (module, factor) in enumerate(self.model.modules[layer].beside[:-1]):
            self._after(module, kept(factor, i == 0))

    def _sum_beside(self, layer: int) -> None:
        """What mixers side by side add together; an edit of the sum changes what the last of them puts out."""
        self._join(layer)
        module, factor = self.model.modules[layer].beside[-1]

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            x, others = first(output), self.here.stash["beside", layer]
            total = self._by_prompt(others + x * factor)
            new = self.site("attn.out", layer, total)
            if new is total and not self.grad:
                return None
            changed = x + ((new - total) / factor).reshape(x.shape)
            if self.grad:  # through what was captured alone: the layer adds the others once more
                added = (new - new.detach()).reshape(x.shape) - (others - others.detach()).reshape(x.shape)
                changed = changed.detach() + added / factor
            return with_first(output, changed)

        self._after(module, hook)

    def _attach_resid_mid(self, layer: int) -> None:
        at = self.model.modules[layer]
        want, hosts = self.wants.get(("resid_mid", layer), Want()), ("resid_mid", layer) in self.hosts
        if want.edits or self.grad or hosts:  # this stream is a sum inside the layer: change what attention adds to it
            self._before(
                at.layer, lambda _, args, kwargs: self.here.stash.update({("resid_in", layer): hidden(args, kwargs)})
            )

            if at.beside and ("attn.out", layer) not in self.wants:
                self._join(layer)

            def change(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
                resid_in, scale = self.here.stash.pop(("resid_in", layer)), self.model.residual_scale
                if at.beside:  # to the layer's sum they belong as the stream does
                    resid_in, scale = resid_in + self.here.stash["beside", layer].view_as(resid_in), at.beside[-1][1]
                middle = resid_in + first(output).reshape(resid_in.shape) * scale
                self.here.reached.add(("resid_mid", layer))
                self._probe(want, middle)
                edited = self._decoded("resid_mid", layer, self._edited(want.edits, "resid_mid", middle))
                out = first(output)
                new = torch.where(edited == middle, out.reshape(middle.shape), (edited - resid_in) / scale)
                if self.grad or hosts:
                    self._capture(want.taps, "resid_mid", edited)
                if self.grad:  # through what was captured alone: the layer adds resid_in once more
                    new = new.detach() + (edited - edited.detach() - (resid_in - resid_in.detach())) / scale
                return with_first(output, new.reshape(out.shape))

            self._after(at.attn_added, change)
        if (want.taps or (want.probes and not want.edits)) and not self.grad and not hosts:

            def capture(_: nn.Module, args: Any, kwargs: Any) -> None:
                self.here.reached.add(("resid_mid", layer))
                middle = self._by_prompt(hidden(args, kwargs))
                if not want.edits:
                    self._probe(want, middle)
                self._capture(want.taps, "resid_mid", middle)

            self._before(at.mid, capture)

    def _z(self, layer: int) -> Callable[..., Any]:
        n_heads = self.model.n_heads(layer)

        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            x = hidden(args, kwargs)
            z = self._by_prompt(x).unflatten(-1, (n_heads, -1))  # [prompt, position, head, d_head]
            new = self.site("attn.z", layer, z)
            if ("attn.head_out", layer) in self.wants:
                self._head_out(layer, new)
            unchanged = new is z and not self.grad
            return None if unchanged else with_hidden(args, kwargs, new.reshape(x.shape))

        return hook

    def _head_out(self, layer: int, z: Tensor) -> None:
        """What heads write, z @ W_O, for the heads that are asked; kept before and after edits for the projection's sum."""
        want = self.wants[("attn.head_out", layer)]
        self.here.reached.add(("attn.head_out", layer))
        heads = self._asked(want, self.model.n_heads(layer))
        w_o = self.model.W_O(layer)[heads]  # [head, d_head, d_model]
        out = torch.einsum("bphd,hdm->bphm", z[:, :, heads], w_o)
        self._probe(want, out, only=heads)
        new = self._edited(want.edits, "attn.head_out", out, only=heads)
        self._capture(want.taps, "attn.head_out", new, only=heads)
        self.here.stash[("attn.head_out", layer)] = None if new is out and not self.grad else (out, new)

    def _sum_heads(self, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            parts = self.here.stash.pop(("attn.head_out", layer), None)
            if parts is None:
                return None
            bias = getattr(module, "bias", None)
            remade = layer not in self.model.check.rounded and (bias is None or bias.device.type != "meta")
            everything = remade and parts[0].shape[2] == self.model.n_heads(layer)
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
            self.here.reached.add(("experts.out", layer))
            experts = self._asked(want, self.model.n_experts(layer))
            hidden, choice, weights = args[0].reshape(-1, args[0].shape[-1]), args[1], args[2]
            outs = [self._one_expert(module, expert, hidden, choice, weights) for expert in experts]
            out = torch.stack(outs, 1).unflatten(
                0, (-1, self.here.end - self.here.start)
            )  # [prompt, position, expert, d_model]
            self._probe(want, out, only=experts)
            new = self._edited(want.edits, "experts.out", out, only=experts)
            self._capture(want.taps, "experts.out", new, only=experts)
            if new is out and not self.grad:
                return None
            return self._summed(output, out, new, rest=0.0 if len(experts) == self.model.n_experts(layer) else None)

        return hook

    def _asked(self, want: Want, n: int) -> list[int]:
        """The heads or experts that taps and edits name; all when one names none, and all for gradients through them."""
        ports = [*want.taps, *(edit.port for _, edit in want.edits), *(probe.port for probe in want.probes)]
        named = [port.index for port in ports]
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
