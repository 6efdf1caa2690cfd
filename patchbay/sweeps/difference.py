"""The difference in bfloat16: linear maps of restarted rows computed as the base run's exact output plus a map of what changed.

    W x + b  =  (W x_base + b)  +  W (x - x_base)        the second product in bfloat16

A restarted row differs from the base run by less than the run itself, so that rounding the difference costs less than rounding
the whole. Norms, activations, attention and experts stay as they are, and so does all of a model whose
layers are called whole. Holds the inputs and outputs of the layers' linear maps
on the base prompts and a bfloat16 copy of their weights: about half of the model's own size. The error has no bound: a sweep
measures it on a sample of its cells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchbay.jacks.session import Session
from patchbay.model.linear import is_plain
from patchbay.sweeps.calls import Base

LINEAR = ("Linear", "Conv1D")


class Difference:
    """What the layers' linear maps saw and gave in the base run, and their weights in bfloat16."""

    def __init__(self, base: Base) -> None:
        self.held: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # [token, d_in] and [token, d_out] of the base run
        self.weights: dict[nn.Module, Tensor] = {}
        self.base = base
        modules = [
            m for at in base.model.modules for m in at.layer.modules() if type(m).__name__ in LINEAR and is_plain(m)
        ]

        def note(module: nn.Module) -> Callable[[tuple[Any, ...], dict[str, Any]], None]:
            def keep(args: tuple[Any, ...], _: dict[str, Any]) -> None:
                if args and args[0].numel() == base.ids.numel() * args[0].shape[-1]:  # not an expert's share of tokens
                    x = args[0].flatten(0, -2)
                    self.held[module] = (x, module.forward(x))

            return keep

        with Session(base.model) as session:
            for module in modules:
                session.on_call(module, note(module))
            base.model.hf(input_ids=base.ids, use_cache=False)
        for module in self.held:
            weight = module.weight if type(module).__name__ == "Linear" else module.weight.T
            assert isinstance(weight, Tensor)
            self.weights[module] = weight.to(torch.bfloat16)

    def attach(self, session: Session) -> None:
        for module in self.held:
            session.on_forward(module, lambda inner, x, module=module: self.forward(module, inner, x))

    def forward(self, module: nn.Module, inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The linear map on the tokens that `base.where` names; exact where it names others."""
        where = self.base.where
        if where is None or x.numel() != len(where) * x.shape[-1]:
            return inner(x)
        before, after = self.held[module]
        change = (x.flatten(0, -2) - before[where]).to(torch.bfloat16)
        out = after[where] + F.linear(change, self.weights[module])  # added in the stream's own precision
        return out.view(*x.shape[:-1], -1)
