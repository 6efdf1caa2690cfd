"""Trans-tokens: a model under another vocabulary, whose rows start from those of the old tokens that they are aligned with; the body is kept.

    E_new[i] = sum_j C_ij E_old[j],   C the counts of alignments, each row over its sum;   the unembedding alike

A token that nothing is aligned with gets the mean of all old rows, not zeros. Tied tables stay one. `aligned` counts by IBM's model 1, expectation-maximisation over
pairs of texts that say the same in both vocabularies:

    t(old | new) in proportion to  sum over pairs and old tokens there of  t(old | new) / sum over the pair's new tokens of t(old | .)

What begins, ends and pads a text is mapped by `specials`; an id of the config that is not mapped is taken away, since it would mean another token.

Remy et al. 2024, "Trans-Tokenization and Cross-lingual Vocabulary Transfers: Language Adaptation of LLMs for Low-Resource NLP", who align words by fast_align and
split their counts over tokens. Whatever reads the stream and not the tokens is as it was; that the rows are good is for the loss to say.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay.errors import PatchbayError
from patchbay.model.load import load
from patchbay.model.model import Model
from patchbay.model.source import quietly

Counts = Mapping[tuple[int, int], float]  # (new token, old token) -> how often they were aligned
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def aligned(pairs: Iterable[tuple[Sequence[int], Sequence[int]]], *, rounds: int = 5) -> dict[tuple[int, int], float]:
    """Expected counts of (new, old) over pairs of texts (new ids, old ids) that say the same."""
    texts = [(list(new), list(old)) for new, old in pairs if len(new) and len(old)]
    if not texts or rounds < 1:
        raise PatchbayError(f"{len(texts)} pairs of texts that are not empty, rounds={rounds}: one or more of each")
    chance: dict[tuple[int, int], float] = {}
    for _ in range(rounds):
        counts: dict[tuple[int, int], float] = defaultdict(float)
        for new, old in texts:
            for o in old:
                weights = [chance.get((n, o), 0.0) if chance else 1.0 for n in new]
                total = sum(weights)
                for n, weight in zip(new, weights, strict=True):
                    counts[n, o] += weight / total
        sums: dict[int, float] = defaultdict(float)
        for (n, _), count in counts.items():
            sums[n] += count
        chance = {pair: count / sums[pair[0]] for pair, count in counts.items()}
    return dict(counts)


def matrix(counts: Counts, new: int, old: int) -> Tensor:
    """C as a sparse matrix [new, old] in float64, whose rows sum to 1; a row of a token that nothing is aligned with is even over all."""
    wrong = next((pair for pair in counts if not (0 <= pair[0] < new and 0 <= pair[1] < old)), None)
    if wrong is not None:
        raise PatchbayError(f"tokens {wrong[0]} and {wrong[1]} are aligned; there are {new} new and {old} old ones")
    if any(not 0 <= count < float("inf") for count in counts.values()):
        raise PatchbayError("a count of alignments is below 0 or no number")
    held = {pair: count for pair, count in counts.items() if count > 0}
    places = torch.tensor(list(held), dtype=torch.long).reshape(-1, 2)
    values = torch.tensor(list(held.values()), dtype=torch.float64)
    sums = torch.zeros(new, dtype=torch.float64).index_add_(0, places[:, 0], values)
    return torch.sparse_coo_tensor(places.T, values / sums[places[:, 0]], (new, old), check_invariants=True).coalesce()


def transferred(
    model: Model, counts: Counts, vocab: int, *, specials: Mapping[int, int] | None = None, tokenizer: Any = None
) -> Model:
    """A copy of the model under a vocabulary of `vocab` tokens; the lent model is not touched.

    `counts`: of alignments, as `aligned` gives them. `specials`: new id -> old id of tokens that are the same whatever was aligned. `tokenizer`: of the new vocabulary.
    """
    if vocab < 1 or not counts:
        raise PatchbayError(f"{vocab} tokens, {len(counts)} alignments: one or more of each")
    old = model.hf.get_input_embeddings().weight.shape[0]
    same = dict(specials or {})
    own = {pair: count for pair, count in counts.items() if pair[0] not in same} | dict.fromkeys(same.items(), 1.0)
    C = matrix(own, vocab, old)
    lacking = torch.ones(vocab, dtype=torch.bool)
    lacking[C.indices()[0]] = False
    hf = copy.deepcopy(model.hf)
    tables = [
        (table.weight.detach(), getattr(table, "bias", None))
        for table in (model.hf.get_input_embeddings(), model.hf.get_output_embeddings())
    ]
    for weight, _ in tables:
        if not weight.is_floating_point() or weight.ndim != 2 or weight.shape[0] != old:
            raise PatchbayError(
                f"a table of {weight.dtype} {tuple(weight.shape)}: rows of {old} tokens, floating-point, are what is carried over"
            )
    with quietly():
        hf.resize_token_embeddings(vocab, mean_resizing=False)
    with torch.no_grad():
        for table, (weight, bias) in zip((hf.get_input_embeddings(), hf.get_output_embeddings()), tables, strict=True):
            table.weight.copy_(_rows(C, lacking, weight))
            if bias is not None:
                table.bias.copy_(_rows(C, lacking, bias.detach()[:, None])[:, 0])
    _renamed(hf, {o: n for n, o in same.items()})
    return load(hf.eval(), tokenizer)


def _rows(C: Tensor, lacking: Tensor, old: Tensor) -> Tensor:
    """C old, and the mean row where nothing is aligned; [new, d] in the dtype of `old`."""
    found = torch.sparse.mm(C, old.double().cpu())
    found[lacking] = old.double().cpu().mean(0)
    return found.to(old.dtype).to(old.device)


def _renamed(hf: Any, new_of: Mapping[int, int]) -> None:
    """Special ids of the configs under their new numbers; those that have none are taken away."""
    for config in (hf.config, getattr(hf, "generation_config", None)):
        for name in SPECIAL:
            value = getattr(config, name, None)
            if value is not None:
                kept = [new_of[one] for one in (value if isinstance(value, list) else [value]) if one in new_of]
                setattr(config, name, kept if isinstance(value, list) and kept else kept[0] if kept else None)
