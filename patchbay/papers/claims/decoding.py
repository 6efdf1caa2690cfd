"""Claims about decoders: what their texts are like beside greedy ones."""

from __future__ import annotations

import patchbay as pb
from patchbay.papers.claims._claim import Claim, claim
from patchbay.papers.claims._shared import N

NEW = 24  # tokens of a continuation


def new_tokens(found: pb.Result) -> list[list[int]]:
    """The first draft of each prompt."""
    return [[token for token in drafts[0] if token >= 0] for drafts in found["tokens"].tolist()]


def repeated(tokens: list[int], n: int = 3) -> float:
    """The share of a text's n-grams that were there before."""
    grams = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
    return 1.0 - len(set(grams)) / max(1, len(grams))


def continued(model: pb.Model, prompts: list[list[int]]) -> list[list[int]]:
    return [list(row) for row in model.generate(prompts, NEW, new_only=True, eos_token_id=None)]


@claim("li2023c", "comparison")
def li2023c(model: pb.Model, seed: int) -> Claim:
    """Confirmed if text repeats itself less than greedy text where the amateur is the same model without its last layer."""
    import torch

    from patchbay import maths

    prompts = [list(ids) for ids in pb.tasks.facts_in_memory(model, N, seed=seed).clean]
    last = model.n_layers - 1
    amateur = pb.turn.scale([f"L{last}.attn", f"L{last}.mlp"], 0.0, model=model)  # type: ignore[list-item]
    found = pb.decode.contrastive_decoding(model, amateur, prompts, max_new_tokens=NEW, ends=[])
    greedy = torch.tensor([repeated(row) for row in continued(model, prompts)], dtype=torch.float64)
    own = torch.tensor([repeated(row) for row in new_tokens(found)], dtype=torch.float64)
    interval = maths.paired_interval(greedy, own)
    text = (
        f"set against itself without its last layer, the model repeats less than greedily ({float(greedy.mean()):.2f} of the "
        f"3-grams there, {float(own.mean()):.2f} here)"
    )
    return Claim(text, *interval[:3], 0.0, "share of 3-grams")


@claim("chuang2024", "comparison")
def chuang2024(model: pb.Model, seed: int) -> Claim:
    """Confirmed if contrasting with an earlier layer completes more facts as they were learned than greedy decoding does."""
    import torch

    from patchbay import maths

    task = pb.tasks.facts_in_memory(model, N, seed=seed)
    prompts, right = [list(ids) for ids in task.clean], torch.tensor(task.right)
    found = pb.decode.dola(model, prompts, max_new_tokens=1, ends=[])
    greedy = torch.tensor(model.generate(prompts, 1, new_only=True, eos_token_id=None))[:, 0]
    own, plain = (found["tokens"][:, 0, 0] == right).double(), (greedy == right).double()
    interval = maths.paired_interval(own, plain)
    text = (
        f"set against an earlier layer, the model completes more facts than greedily ({float(plain.mean()):.0%} greedily, "
        f"{float(own.mean()):.0%} here)"
    )
    return Claim(text, *interval[:3], 0.0, "share of prompts")
