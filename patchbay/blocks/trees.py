"""Trees from heights and distances, as StructFormer's parser reads them, and from any attention pattern.

Each token i has a height t_i, each gap between tokens j and j + 1 a distance D_j. How far the constituent of i reaches is the least of the gates of the gaps that are crossed,

    g_ij = sigma((t_i - D_j) mu),   reach(l | i) = min_{l <= j < i} g_ij  (1 at l = i),   p(l | i) = reach(l | i) - reach(l - 1 | i)

and to the right likewise. The parent of i is the highest token of its constituent but itself:

    p_D(j | i) = sum_{l, r} p(l | i) p(r | i) softmax_{l..r}(mu2 t)_j,   j = i left out

`splits` makes a binary tree of distances, cut at the largest first; `heights_of` gives back distances of the same order. `of_pattern` reads distances off a pattern of any model: the Hellinger distance between the attention of neighbouring tokens.

Momen, Arps and Kallmeyer 2024, "Increasing the Performance of Cognitively Inspired Data-Efficient Language Models via Implicit Structure Building", after Shen et al. 2021, "StructFormer". The reader alone is here: p_D takes T^4 numbers, so texts of up to 64 tokens.

A tree that is read off attention is one of many: hold its F1 against right-branching and random trees of the same texts.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from patchbay.errors import PatchbayError

LONGEST = 64
Span = tuple[int, int]  # first and last token


def boundaries(heights: Tensor, distances: Tensor, mu: float = 1.0) -> tuple[Tensor, Tensor]:
    """p(l | i) and p(r | i), each [token, token], of heights [token] and distances [token - 1]; rows sum to 1."""
    n = len(heights)
    if len(distances) != n - 1:
        raise PatchbayError(f"{n} heights need {n - 1} distances, one for each gap; got {len(distances)}")
    gates = torch.sigmoid((heights[:, None] - distances[None, :]) * mu)  # [token, gap]
    left, right = heights.new_zeros(n, n), heights.new_zeros(n, n)
    for i in range(n):
        reach = torch.cat(
            [gates[i, :i].flip(0).cummin(0).values.flip(0) if i else gates[i, :0], heights.new_ones(1)]
        )  # to l = 0 .. i
        left[i, : i + 1] = reach - torch.cat([heights.new_zeros(1), reach[:-1]])
        onward = torch.cat(
            [heights.new_ones(1), gates[i, i:].cummin(0).values if i < n - 1 else gates[i, :0]]
        )  # to r = i .. n - 1
        right[i, i:] = onward - torch.cat([onward[1:], heights.new_zeros(1)])
    return left, right


def parents(heights: Tensor, distances: Tensor, mu: float = 1.0, mu2: float = 1.0) -> Tensor:
    """p_D [token, parent]; what the token's own place had is dropped, so that rows sum to less than 1."""
    n = len(heights)
    if n > LONGEST:
        raise PatchbayError(f"{n} tokens: parents take T^4 numbers, up to {LONGEST} tokens are read")
    left, right = boundaries(heights, distances, mu)
    place = torch.arange(n)
    inside = (place >= place[:, None, None]) & (place <= place[None, :, None])  # [l, r, token]
    scores = (heights * mu2).expand(n, n, n).masked_fill(~inside, -torch.inf)
    within = torch.softmax(scores, -1).nan_to_num(0.0)  # none where r < l
    found = torch.einsum("il,ir,lrj->ij", left, right, within)
    return found * ~torch.eye(n, dtype=torch.bool)


def splits(distances: Tensor) -> list[Span]:
    """Spans of the binary tree of distances [token - 1], each cut at its largest gap (the first of equals), outermost first, single tokens left out."""
    found: list[Span] = []
    left = [(0, len(distances))]
    while left:
        first, last = left.pop()
        if first == last:
            continue
        found.append((first, last))
        cut = first + int(distances[first:last].argmax())
        left += [(cut + 1, last), (first, cut)]
    return found


def heights_of(spans: list[Span], n: int) -> Tensor:
    """Distances [token - 1] of a binary tree's spans: how many tokens the smallest span over a gap holds."""
    found = torch.full((n - 1,), float(n))
    for first, last in sorted(spans, key=lambda span: span[0] - span[1]):
        found[first:last] = last - first + 1.0
    return found


def of_pattern(pattern: Tensor) -> Tensor:
    """Distances [..., token - 1] of a pattern [..., query, key]: Hellinger's, in [0, 1], between rows of neighbours; negative weights by their absolute values."""
    rows = pattern.abs()
    rows = (rows / rows.sum(-1, keepdim=True).clamp(min=1e-30)).sqrt()
    return (rows[..., 1:, :] - rows[..., :-1, :]).norm(dim=-1) / 2**0.5


def f1(spans: list[Span], gold: list[Span], n: int) -> float:
    """Unlabelled F1 of two trees over n tokens, the whole text left out."""
    own, right = ({span for span in some if span != (0, n - 1)} for some in (spans, gold))
    return 1.0 if not own and not right else 2 * len(own & right) / max(1, len(own) + len(right))


def right_branching(n: int) -> list[Span]:
    """The tree that cuts off one token after the other."""
    return [(first, n - 1) for first in range(n - 1)]


def random_tree(n: int, seed: int) -> list[Span]:
    """A tree of distances in random order."""
    rng = random.Random(f"tree-{seed}")
    return splits(torch.tensor(rng.sample(range(n), n - 1), dtype=torch.float64))
