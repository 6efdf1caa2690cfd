"""self_evolution: only the tokens that the model itself finds hardest, with targets softened by its own guess.

    of the tokens of a batch the `share` of largest loss;   target = (1 - soft) onehot + soft p, p without gradient

With `share` 1 and `soft` 0 it is next-token prediction. What cannot be predicted (names) is always hardest: compare words of equal frequency. Its null is
`chosen=random`: as many tokens of the batch, drawn by the batch's own tokens.

Zhong et al. 2022, "Toward Efficient Language Model Pretraining and Downstream Adaptation via Self-Evolution".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError
from patchbay.train._objectives._objective import IGNORED, Objective, logits_of


@dataclass(frozen=True)
class SelfEvolution(Objective):
    alone = "its loss is of all rows of a step together"
    share: float = 0.3
    soft: float = 0.1
    chosen: str = "hardest"

    def check(self) -> None:
        if not (0 < self.share <= 1 and 0 <= self.soft < 1 and self.chosen in ("hardest", "random")):
            raise PatchbayError(
                f"self_evolution: share={self.share}, soft={self.soft}, chosen={self.chosen!r}: above 0 to 1, from 0 to below 1, hardest or random"
            )

    @property
    def null(self) -> str | None:
        if self.chosen == "random":
            return None
        return f"self-evolution:share={self.share},soft={self.soft},chosen=random"

    def loss(self, model: Model, hf: nn.Module, batch: dict[str, Tensor], n: Tensor | int) -> Tensor:
        labels = batch["labels"][:, 1:].flatten()
        real = labels != IGNORED
        logp = torch.log_softmax(logits_of(hf, batch)[:, :-1].float().flatten(0, 1)[real], -1)  # [token, vocab]
        own = -logp.gather(1, labels[real][:, None])[:, 0]
        by = own.detach()
        if self.chosen == "random":
            draw = torch.Generator().manual_seed(int((labels[real].cpu() * torch.arange(1, len(own) + 1)).sum()))
            by = torch.rand(len(own), generator=draw).to(own)
        kept = by.topk(max(1, round(self.share * len(own)))).indices
        soft = -(logp.detach().exp() * logp).sum(1)
        found: Tensor = ((1 - self.soft) * own + self.soft * soft)[kept].mean()
        return found


OBJECTIVE = SelfEvolution
