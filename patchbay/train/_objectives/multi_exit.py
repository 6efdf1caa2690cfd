"""multi_exit: the next token read after several layers, each through the model's own final norm and unembedding.

    loss = sum_i (i / n) CE(unembed(norm(stream after exit i))),   exits l_1 < ... < l_n, the last of which is the model itself

`exits`: layers after which is read, counted from 1, with + between; without, after every one. It makes the logit lens faithful, at some cost to the last
exit. transformers' last hidden state is normed already, so that the last exit is the model's own logits.

Gurioli et al. 2025, a one-billion-weight encoder whose early exits keep most of its recall.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError
from patchbay.train._objectives._objective import Objective, cross_entropy, output_of, state_after, states_before


@dataclass(frozen=True)
class MultiExit(Objective):
    exits: str = ""

    def layers(self, n_layers: int) -> list[int]:
        """The exits of a model of so many layers."""
        try:
            found = [int(one) for one in self.exits.split("+")] if self.exits else list(range(1, n_layers + 1))
        except ValueError:
            raise PatchbayError(f"multi_exit: exits={self.exits!r} are layers with + between, as 1+2+4") from None
        if found != sorted(set(found)) or found[0] < 1 or found[-1] != n_layers:
            raise PatchbayError(
                f"multi_exit: exits {found} of {n_layers} layers; they rise from 1 on, and the last layer is one"
            )
        return found

    def adapt(self, model: Model) -> None:
        if len(self.layers(model.n_layers)) > 1:
            states_before(model)

    def loss(self, model: Model, hf: nn.Module, batch: dict[str, Tensor], n: Tensor | int) -> Tensor:
        exits = self.layers(model.n_layers)
        if len(exits) == 1:
            return super().loss(model, hf, batch, n)
        output = output_of(hf, batch, output_hidden_states=True)
        read = [model.unembed_logits(model.final_norm_module(state_after(model, output, at))) for at in exits[:-1]]
        read.append(output.logits)
        losses = [cross_entropy(one, batch["labels"]) * (i / len(exits)) for i, one in enumerate(read, 1)]
        return torch.stack(losses).sum() / n


OBJECTIVE = MultiExit
