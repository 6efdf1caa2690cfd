"""Which hook on which module gives which signal."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from patchbay.jacks import attention
from patchbay.jacks.arguments import named
from patchbay.jacks.hooks import before, instead
from patchbay.jacks.operators import Operators, RouterLogits
from patchbay.jacks.sums import Sums, first, hidden, with_first, with_hidden
from patchbay.signal.port import PatchbayError

ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.pattern")
FUSED = {
    "NewGELUActivation": partial(F.gelu, approximate="tanh")
}  # written out in transformers as eight passes over memory


class Jacks(Sums):
    """Signals of a model's modules, each attached by itself."""

    def _attach_whole(self, signal: str) -> None:
        if signal == "embed":
            self._input(self.model.modules[0].layer, "embed", None)
        elif signal == "final_norm":
            if getattr(self.model.__dict__.get("check"), "norm_calls", 1) > 1:
                self._final_norm()
            else:
                self._output(self.model.final_norm_module, "final_norm", None)
        else:
            self._after(self.model.hf, self._logits)

    def _final_norm(self) -> None:
        """The norm after the last layer, of a model that calls the same module before the first one too."""
        self._after(self.model.modules[-1].layer, lambda *_: self.here.stash.update({("last", 0): True}))

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            if not self.here.stash.pop(("last", 0), False):
                return None
            shaped = self._by_prompt(output)
            new = self.site("final_norm", None, shaped)
            return None if new is shaped and not self.grad else new.reshape(output.shape)

        self._after(self.model.final_norm_module, hook)

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
            if at.beside:
                self._sum_beside(layer)
            else:
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

    def _attach_attention(self, layer: int) -> None:
        module = self.model.modules[layer].attn
        assert module is not None
        if self.model.family.attention == "operators":
            n_heads = self.model.n_heads(layer)

            def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                self.check_placed()
                with Operators(self, layer, n_heads, module):
                    return inner(*args, **kwargs)

            self.on_forward(module, forward)
            return
        self.on_attention(layer, self._in_a_run(partial(attention.attend, self, layer)))

    def on_attention(self, layer: int, function: Callable[..., Any]) -> None:
        """Let `function` compute a layer's attention, called as `attention.attend` is after its first two arguments."""
        module = self.model.modules[layer].attn
        assert module is not None
        self._undo.append(attention.listen(self.scope, function, layer, module))
        for config in {id(c): c for c in (self.model.hf.config, module.config)}.values():
            self._undo.append(attention.wrap(config))

    def on_forward(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """Let `function(inner, *args)` run in place of a module's forward, which is `inner`."""
        self._undo.append(instead(self.scope, module, function))

    def fuse_activations(self) -> None:
        """Let activations that transformers writes out step by step run as torch's one kernel: the same function, rounded otherwise."""
        for at in self.model.modules:
            for module in at.layer.modules():
                if type(module).__name__ in FUSED:
                    fused = FUSED[type(module).__name__]
                    self.on_forward(module, lambda inner, x, fused=fused: fused(x))

    def _attach_router(self, layer: int) -> None:
        module = self.model.modules[layer].router
        assert module is not None
        n_experts = self.model.n_experts(layer)

        def change(logits: Tensor) -> Tensor:
            self.check_placed()
            return self.site("router.logits", layer, self._by_prompt(logits)).reshape(logits.shape)

        def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with RouterLogits(n_experts, change):
                return inner(*args, **kwargs)

        self.on_forward(module, forward)

    def on_call(self, module: nn.Module, note: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> None:
        """Tell `note` the arguments with which a module is called, for the length of the session."""

        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            note(args, dict(kwargs))

        self._undo.append(before(self.scope, module, hook))

    def on_return(self, module: nn.Module, note: Callable[[Tensor], Any]) -> None:
        """Tell `note` what a module returns, first of several, for the length of the session."""

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            note(first(output).detach())

        self._after(module, hook)

    # ---- hooks by kind ----

    def _input(self, module: nn.Module | None, signal: str, layer: int | None) -> None:
        assert module is not None

        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            x = hidden(args, kwargs)
            shaped = self._by_prompt(
                x.view_as(x) if self.grad else x
            )  # others may read x: their gradient is not this one's
            new = self.site(signal, layer, shaped)
            unchanged = new is shaped and not self.grad
            return None if unchanged else with_hidden(args, kwargs, new.reshape(x.shape))

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
        given = named(module.forward, args, kwargs)
        logits, put = _logits_of(output)
        counted = any(e.positions is not None or e.spread for _, e in self.wants[("logits", None)].edits)
        if counted and isinstance(given.get("logits_to_keep"), Tensor):
            raise PatchbayError(
                "logits_to_keep as a tensor under an edit of the logits at positions: which of them are kept is not looked at; leave "
                "it out, or give the number of last ones"
            )
        new = self.site("logits", None, logits)
        if new is logits:
            return output
        lost = given.get("labels") if isinstance(output, tuple) else getattr(output, "loss", None)
        if lost is not None and self.wants[("logits", None)].edits:
            raise PatchbayError(
                "labels under an edit of the logits: the model computes its loss before that edit; "
                "leave labels out and compute the loss from .logits"
            )
        return put(new)


def _logits_of(output: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The logits that a model returned, by name or in a tuple (`return_dict=False`: the first tensor [prompt, position, vocab],
    after losses), and how to put others in their place."""
    if hasattr(output, "logits"):

        def by_name(new: Tensor) -> Any:
            output.logits = new
            return output

        return output.logits, by_name
    places = (
        [i for i, x in enumerate(output) if isinstance(x, Tensor) and x.ndim == 3] if isinstance(output, tuple) else []
    )
    if not places:
        raise PatchbayError(
            f"the model returned {type(output).__name__} without .logits, so that its logits cannot be tapped or edited; "
            "call it with return_dict=True"
        )
    at = places[0]
    return output[at], lambda new: (*output[:at], new, *output[at + 1 :])
