"""What claims about trained blocks share: a network with another block, trained beside its twins, what it says and what that costs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from patchbay.model.model import Model

BATCH = 32


def grown(
    network: Model, texts: list[list[int]], blocks: dict[str, Any], seed: int, *, steps: int, rate: float, mlp: int = 0
) -> Any:
    """A network drawn by the seed, with blocks or MLPs of another width, after so many steps of Adam on batches of texts of one length; every arm of a seed has the same starts
    where shapes agree, and the same batches. The Hugging Face model."""
    import torch

    from patchbay.results.method import seeded
    from patchbay.tiny import lab
    from patchbay.train._plan import Arm, plan_of
    from patchbay.train._runs import Lab, begun

    arm = Arm(blocks=json.dumps(blocks) if blocks else "", mlp=mlp)
    hf = begun(Lab(network, [], [], plan_of({"fresh": True})), arm, seed).hf
    fixed = hf.get_input_embeddings().weight if "lexinvariant" in blocks else None
    learned = [weight for weight in hf.parameters() if weight is not fixed]
    for weight in learned:
        weight.requires_grad_()
    ids = torch.tensor(texts)

    def loss(hf: Any, step: int) -> Tensor:
        at = torch.randint(len(ids), (BATCH,), generator=torch.Generator().manual_seed(1_000_003 * seed + step))
        found: Tensor = hf(input_ids=ids[at], labels=ids[at], use_cache=False).loss
        return found

    with seeded(seed):  # tables of embeddings that a lexinvariant network draws
        lab.steps_of(hf, loss, steps, rate=rate, of=learned)
    return hf


def said(hf: Any, texts: list[list[int]]) -> Tensor:
    """Logits [text, position, token]."""
    import torch

    with torch.no_grad():
        found: Tensor = hf(input_ids=torch.tensor(texts)).logits.float()
    return found


def nats(logits: Tensor, texts: list[list[int]]) -> Tensor:
    """What every token but the first costs, [text, position]."""
    import torch

    ids = torch.tensor(texts)[:, 1:, None]
    return -torch.log_softmax(logits[:, :-1].double(), -1).gather(2, ids)[..., 0]


def nats_by_frequency(texts: Tensor, held: list[list[int]], vocab: int) -> Tensor:
    """What every token but the first of held-out texts of one length costs by how often it comes in `texts`, one added to each count, [text, position]."""
    import torch

    often = torch.bincount(texts.flatten(), minlength=vocab).double() + 1.0
    return nats((often / often.sum()).log().expand(len(held), len(held[0]), -1), held)
