"""N-gram heads: attention heads that look at what followed the last n tokens the last time.

For a query i let M_n(i) be the keys j < i that stand just after an earlier occurrence of x_{i-n+1} .. x_i, that is
x_{j-n} .. x_{j-1} = x_{i-n+1} .. x_i, and

    excess_n[layer, head] = mean over prompts, and over queries with such keys, of sum_{j in M_n(i)} A[i, j] - |M_n(i)| / (i + 1)

A the head's attention pattern: the mass on these keys beyond what even attention over the visible keys would put there. For
n = 1 the first term is the score of `induction_heads`. j < i is strict: the token right after an immediate repeat does not
count. Beside even attention there is a harder null, as for induction heads: the keys moved by up to `SHIFTS` places to
either side (`null_mean`, `null_high`). For n > 1, `shorter` is the attention that the same queries pay to keys that follow
a match of only n - 1 tokens: a head of a lower order pays as much there. `p` by sign flips of the excess over prompts,
`p_adjusted` over all heads. One forward pass with all patterns.

Akyürek, Wang, Kim and Andreas 2024, "In-Context Language Learning: Architectures and Algorithms".

It says where a head looks, not what it writes there, nor that the model uses it: follow with `prove.ablation`. On text in
which every repeated token stands in a repeated phrase, heads of all orders score alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchbay.errors import one_of
from patchbay.find._attention import (
    ATTENTION,
    GRID,
    Finder,
    after_earlier,
    clear_of,
    ends,
    held_out,
    looks,
    moved,
    null_of,
    parts_of,
    pattern_layers,
    repeats,
    together,
)
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

SHIFTS = 3
ORDERS = (1, 2, 3)


@method(paper="akyurek2024", unit="attention")
def ngram_heads(
    model: Model, prompts: Task | list[str] | list[list[int]] | Any, *, order: int = 1, batch_size: int = 16
) -> Result:
    """Attention beyond even to the tokens that followed earlier occurrences of the last `order` tokens (1, 2 or 3), mean over prompts.

    Main variable `excess` for `order`, with `low`, `high`, `p`, `p_adjusted`, `without_first` (the same with the first key left
    out), `null_mean`, `null_high`, and `excess_1`, `excess_2`, `excess_3` where the prompts repeat so much. `n_prompts`: how
    many have such a repeat.

    `order`: how many last tokens must have come before: 1, 2 or 3.
    """
    encoded = model.encode(prompts)
    return together(model, encoded, [finder(model, encoded, order=order)], batch_size=batch_size)[0]


def finder(model: Model, encoded: list[list[int]], *, order: int = 1) -> Finder:
    """The finder for these prompts, for `together`."""
    pattern_layers(model, "ngram_heads")
    one_of("order", order, ORDERS)
    n_with = sum(repeats(ids, order) for ids in encoded)
    if not n_with:
        raise PatchbayError(
            f"ngram_heads: none of the {len(encoded)} prompts says {order} tokens in a row again with a token between; use longer "
            "ones, or ones that repeat, such as pb.tasks.repeated_tokens(model)"
        )

    return Finder(looks(lambda _, ids: _targets(ids, order)), lambda seen: _report(order, n_with, seen))


def _targets(ids: list[int], order: int) -> Tensor:
    """Bool [statistic, query, key]: targets of the three orders, of a shorter match only, and those of `order` moved."""
    whole = [after_earlier(ids, each) for each in ORDERS]
    true = whole[order - 1]
    shorter = whole[order - 2] & ~true & true.any(1, keepdim=True) if order > 1 else torch.zeros_like(true)
    return torch.cat([torch.stack([*whole, shorter]), moved(true, SHIFTS)])


def _report(order: int, n_with: int, seen: Tensor) -> Result:
    plain, without, even, even_without = parts_of(seen)  # each [prompt, layer, head, statistic]
    excess, bare = plain - even, without - even_without
    chosen = excess[..., order - 1]
    best, notes = held_out(chosen)
    beside = {f"excess_{each}": excess[..., each - 1] for each in ORDERS} | {"shorter": plain[..., 3]}
    return Result(
        {
            "excess": (chosen.nanmean(0), GRID, ATTENTION),
            **ends(chosen),
            **clear_of(chosen),
            "without_first": (bare[..., order - 1].nanmean(0), GRID, ATTENTION),
            **null_of(excess[..., 4:]),
            **{name: (x.nanmean(0), GRID, ATTENTION) for name, x in beside.items() if bool(x.isfinite().any())},
            **best,
            "uniform": (even[..., order - 1].nanmean(), (), ATTENTION),
            "n_prompts": (float(n_with), (), "prompts"),
        },
        notes=notes,
    )
