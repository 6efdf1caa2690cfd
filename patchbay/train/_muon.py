"""Muon on the matrices of linear maps, AdamW on the rest: one optimiser, so that one state is saved and goes on.

    B <- .95 B + .05 G;   O = NS5(.05 G + .95 B), which has its singular directions and singular values near 1;   W <- (1 - e decay) W - .2 e sqrt(max(m, n)) O

The step has the size of AdamW's (a root mean square of about .2 e), so that one rate e is for both. Steps are those of torch's own `Muon` and `AdamW`. Embeddings, unembeddings, tables of
positions, vectors, and what is no linear map as a module (fused experts) take AdamW. State: m n numbers of a matrix, 2 m n of the rest.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the size of the step: Liu et al. 2025, "Muon is Scalable for LLM Training".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import AdamW, Muon

from patchbay.errors import PatchbayError
from patchbay.train._states import Resumed


class MuonAdamW(Resumed):
    """Muon on parameters in `among` (their ids), AdamW on all others; weight decay of a group is that of both."""

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.1, *, among: frozenset[int]
    ) -> None:
        given = list(params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        of = [
            [{**group, "params": [p for p in group["params"] if (id(p) in among) == inside]} for group in groups]
            for inside in (True, False)
        ]
        matrices, rest = ([group for group in some if group["params"]] for some in of)
        if not matrices:
            raise PatchbayError(
                "muon: no matrix of a linear map is left as one (weights that are sharded are not): train with adamw"
            )
        both = {"lr": lr, "weight_decay": weight_decay}
        self.parts: list[torch.optim.Optimizer] = [Muon(matrices, **both, adjust_lr_fn="match_rms_adamw")]
        if rest:
            self.parts.append(AdamW(rest, **both))
        super().__init__([group for part in self.parts for group in part.param_groups], both)

    def move(self) -> None:
        at = 0
        for part in self.parts:  # rates and states are this one's, also after they were loaded
            n = len(part.param_groups)
            part.param_groups, part.state, at = self.param_groups[at : at + n], self.state, at + n
            part.step()
