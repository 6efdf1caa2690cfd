"""Attention finders: one streaming run that reads every pattern once, for any number of finders.

A `Finder` says how to read patterns. `prepare(batch)` is called once for a few prompts and returns a function from the
patterns of one layer, [prompt, head, query, key], to numbers [prompt, head, statistic]; `report` makes the finder's Result
of the numbers of all prompts, [prompt, layer, head, statistic]. `together` runs the model once and gives each finder its
Result; a method alone is `together` with one finder. Most finders are `looks(targets)`: where each query should look, and the
mean attention that it pays there.

**Without the first token.** Many heads rest on the first token when they have nothing to do. So every number is given twice:
as it is, and with the first key left out and the rest of each query's attention scaled to 1. A query that leaves the others
less than `FLOOR` then counts as 0.

**Patterns with negative weights** (gated linear attention's, exact all the same) are read as absolute values, and each Result says so.

**Memory.** The patterns of one batch (of no more prompts than `ROOM` bytes hold, at least one) and the numbers of at most
`BLOCKS` rows: of longer corpora, neighbouring prompts are averaged into one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.model.model import Model
from patchbay.model.run import Trace, run
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port

FLOOR = 1e-3
ROOM = 2**28
BLOCKS = 1024
GRID = ("layer", "head")
ATTENTION = "attention"


@dataclass(frozen=True)
class Batch:
    """Some prompts that run together; `start` is the place of the first among all."""

    start: int
    ids: list[list[int]]
    device: torch.device


@dataclass(frozen=True)
class Layer:
    """One layer of a batch: its patterns [prompt, head, query, key] in float32 (NaN in the rows of padding), and the run."""

    index: int
    pattern: Tensor
    trace: Trace


Scores = Callable[[Layer], Tensor]  # -> [prompt, head, statistic]


@dataclass(frozen=True)
class Finder:
    """How one finder reads patterns, and what it reports."""

    prepare: Callable[[Batch], Scores]
    report: Callable[[Tensor], Result]  # [prompt, layer, head, statistic] -> its Result
    taps: tuple[Port, ...] = ()  # signals that it reads beside the patterns


def pattern_layers(model: Model, name: str) -> list[int]:
    """Layers with attention patterns; an error where the model has none."""
    layers = [i for i in range(model.n_layers) if "attn.pattern" in model.signals(i)]
    if not layers:
        raise PatchbayError(
            f"{name} needs attention patterns; no layer of this {model.family.name} model has them "
            "(signal attn.pattern)"
        )
    return layers


def together(model: Model, prompts: Any, finders: Sequence[Finder], *, batch_size: int = 16) -> list[Result]:
    """The Result of every finder, from one run of the prompts."""
    encoded = model.encode(prompts)
    layers = pattern_layers(model, "an attention finder")
    taps = list(dict.fromkeys([Port("attn.pattern", i) for i in layers] + [tap for f in finders for tap in f.taps]))
    kept = [Kept(len(encoded), model.n_layers, max(map(model.n_heads, layers))) for _ in finders]
    signed: set[int] = set()
    for batch in _batches(model, encoded, layers, batch_size):
        ready = [finder.prepare(batch) for finder in finders]
        trace = run(model, batch.ids, taps=taps, logits="last")
        for i in layers:
            pattern = trace[Port("attn.pattern", i)].float()
            if bool((pattern < 0).any()):
                signed.add(i)
            layer = Layer(i, pattern.abs(), trace)
            for scores, store in zip(ready, kept, strict=True):
                store.add(batch.start, i, scores(layer))
    found = [finder.report(store.values()) for finder, store in zip(finders, kept, strict=True)]
    for result in found if signed else ():
        result.notes += (
            f"layers {', '.join(map(str, sorted(signed)))} have negative weights: absolute values are read",
        )
    return found


def _batches(model: Model, encoded: list[list[int]], layers: list[int], batch_size: int) -> Iterator[Batch]:
    """Neighbouring prompts, as many at a time as asked and as ROOM holds patterns of."""
    n_heads = sum(map(model.n_heads, layers))
    start = 0
    while start < len(encoded):
        stop, widest = start + 1, len(encoded[start])
        while stop < len(encoded) and stop - start < batch_size:
            widest = max(widest, len(encoded[stop]))
            if (stop - start + 1) * n_heads * widest**2 * 4 > ROOM:
                break
            stop += 1
        yield Batch(start, encoded[start:stop], model.device)
        start = stop


class Kept:
    """What is kept of the prompts: their numbers, one row each, or one row for several of very many."""

    def __init__(self, n_prompts: int, n_layers: int, n_heads: int) -> None:
        self.n_prompts, self.n_rows = n_prompts, min(n_prompts, BLOCKS)
        self.shape = (self.n_rows, n_layers, n_heads)
        self.total: Tensor | None = None
        self.count: Tensor | None = None

    def add(self, start: int, layer: int, values: Tensor) -> None:
        """Numbers of some prompts at one layer, [prompt, head, statistic]; NaN where a prompt has none."""
        values = values.float().cpu()
        if self.total is None or self.count is None:
            self.total, self.count = (torch.zeros(*self.shape, values.shape[2]) for _ in range(2))
        rows = torch.arange(start, start + len(values)) * self.n_rows // self.n_prompts
        n_heads = values.shape[1]
        self.total[:, layer, :n_heads].index_add_(0, rows, values.nan_to_num(0.0))
        self.count[:, layer, :n_heads].index_add_(0, rows, (~values.isnan()).float())

    def values(self) -> Tensor:
        """[prompt, layer, head, statistic], NaN where a layer has no such head or a prompt no such number."""
        assert self.total is not None
        assert self.count is not None
        return self.total / torch.where(self.count > 0, self.count, torch.nan)


# --- where to look ------------------------------------------------------------------------------------


def looks(targets: Callable[[int, list[int]], Tensor]) -> Callable[[Batch], Scores]:
    """Prepares the mean attention that queries pay to their targets.

    `targets(prompt, ids)` is bool [statistic, query, key]. The numbers are the mean over the queries that have a target of
    the attention paid to their targets, for each statistic; the same without the first token; and what even attention would
    pay, with and without it: `parts_of` takes the four apart. NaN where no query has a target.
    """

    def prepare(batch: Batch) -> Scores:
        pairs = _pairs(batch, targets)
        n_rows = pairs.n_queries.shape[1]  # prompt * statistic
        seen = pairs.query + 1.0  # keys that the query sees
        share, share_of_later = 1.0 / seen, pairs.later / (seen - 1.0).clamp_min(1.0)
        even = torch.stack([_summed(pairs, x, n_rows) for x in (share, share_of_later)])
        even = (even / pairs.n_queries)[:, :, None]  # [with and without, prompt * statistic, 1]

        def scores(layer: Layer) -> Tensor:
            pattern = layer.pattern
            paid = pattern[pairs.prompt, :, pairs.query, pairs.key]  # [pair, head]
            left = pattern.sum(-1) - pattern[..., 0]  # [prompt, head, query]; a row may sum to less or more than 1
            rest = torch.where(left > FLOOR, 1.0 / left, 0.0)[pairs.prompt, :, pairs.query]  # [pair, head]
            both = torch.stack([_summed(pairs, x, n_rows) for x in (paid, paid * rest * pairs.later[:, None])])
            means = both / pairs.n_queries[:, :, None]  # [with and without, prompt * statistic, head]
            every = torch.cat([means, even.expand_as(means)])
            return every.unflatten(1, (len(batch.ids), -1)).permute(1, 3, 0, 2).flatten(2)

        return scores

    return prepare


def parts_of(seen: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention paid, without the first token, and what even attention would pay, with and without: [..., statistic] each."""
    plain, without, even, even_without = seen.chunk(4, -1)
    return plain, without, even, even_without


@dataclass(frozen=True)
class Pairs:
    """Queries and their targets in one list: where each stands, and the row (prompt * statistic) that it counts in."""

    prompt: Tensor
    query: Tensor
    key: Tensor
    row: Tensor
    later: Tensor  # 1 where the key is not the first token, else 0
    n_queries: Tensor  # [with and without the first token, prompt * statistic], NaN for none


def _pairs(batch: Batch, targets: Callable[[int, list[int]], Tensor]) -> Pairs:
    found = [targets(batch.start + n, ids) for n, ids in enumerate(batch.ids)]
    width = max(map(len, batch.ids))
    masks = torch.stack(
        [torch.nn.functional.pad(mask, (0, width - mask.shape[2], 0, width - mask.shape[1])) for mask in found]
    )
    prompt, statistic, query, key = masks.nonzero().T  # in that order; masks: [prompt, statistic, query, key]
    row, later = prompt * masks.shape[1] + statistic, key > 0
    n_rows = masks.shape[0] * masks.shape[1]
    n_queries = torch.stack([_n_queries(row, query, n_rows), _n_queries(row[later], query[later], n_rows)])
    at = batch.device
    return Pairs(prompt.to(at), query.to(at), key.to(at), row.to(at), later.float().to(at), n_queries.to(at))


def _n_queries(row: Tensor, query: Tensor, n_rows: int) -> Tensor:
    """How many queries each row has among its pairs, which are in order; NaN for none."""
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = (row[1:] != row[:-1]) | (query[1:] != query[:-1])
    count = torch.bincount(row[first], minlength=n_rows).float()
    return torch.where(count > 0, count, torch.nan)


def _summed(pairs: Pairs, values: Tensor, n_rows: int) -> Tensor:
    """Values [pair, ...] summed over the pairs of each row."""
    return values.new_zeros(n_rows, *values.shape[1:]).index_add_(0, pairs.row, values)


def earlier(ids: list[int]) -> Tensor:
    """Bool [query, key]: the key holds the query's own token and stands before the query."""
    tokens = torch.tensor(ids)
    return (tokens[:, None] == tokens[None, :]).tril(-1)


def after_earlier(ids: list[int], n: int = 1) -> Tensor:
    """Bool [query, key]: the key stands before the query, just after an earlier occurrence of the query's last `n` tokens."""
    match = earlier(ids).tril(-2)  # [query, where an earlier occurrence ends]: its next token stands before the query
    whole = match.clone()
    for back in range(1, n):
        whole[:back] = whole[:, :back] = False  # too near the start to have `n` tokens
        whole[back:, back:] &= match[: len(ids) - back, : len(ids) - back] if back < len(ids) else False
    return torch.nn.functional.pad(whole[:, :-1], (1, 0))  # one to the right


def repeats(ids: list[int], n: int = 1) -> bool:
    """Whether `after_earlier` has any target."""
    first: dict[tuple[int, ...], int] = {}
    ended = ((tuple(ids[i - n + 1 : i + 1]), i) for i in range(n - 1, len(ids)))
    return any(i - first.setdefault(gram, i) >= 2 for gram, i in ended)


def moved(target: Tensor, most: int) -> Tensor:
    """Targets [query, key] moved by 1 to `most` keys to either side, bool [2 * most, query, key]: the null of a place.

    Only those that fall on a key that its query sees and on no true target.
    """
    n = len(target)
    shifted = torch.nn.functional.pad(target, (most, most)).unfold(1, n, 1).movedim(1, 0)  # [2 * most + 1, query, key]
    shifted = torch.cat([shifted[:most], shifted[most + 1 :]])
    return shifted & ~target & torch.ones_like(target).tril()


# --- what several report ------------------------------------------------------------------------------


def standard_error(values: Tensor) -> Tensor:
    """Standard error over prompts [layer, head] of values [prompt, layer, head]; NaN for one prompt alone."""
    return values.std(0) / len(values) ** 0.5 if len(values) > 1 else torch.full_like(values[0], torch.nan)


def null_of(shifted: Tensor) -> dict[str, tuple[Tensor, tuple[str, ...], str]]:
    """`null_mean` and `null_high` of the scores at moved targets, [prompt, layer, head, move]: means over prompts first."""
    null = shifted.nanmean(0)  # [layer, head, move]
    high = torch.where(null.isnan(), -torch.inf, null).amax(-1)
    return {
        "null_mean": (null.nanmean(-1), GRID, ATTENTION),
        "null_high": (torch.where(high.isfinite(), high, torch.nan), GRID, ATTENTION),
    }


def ends(values: Tensor) -> dict[str, tuple[Tensor, tuple[str, ...], str]]:
    """`low` and `high` of values [prompt, layer, head]: 95 % bootstraps over prompts."""
    _, low, high = maths.intervals(values)
    return {"low": (low, GRID, ATTENTION), "high": (high, GRID, ATTENTION)}


def clear_of(excess: Tensor) -> dict[str, tuple[Tensor, tuple[str, ...], str]]:
    """`p` and `p_adjusted` that the mean of excess [prompt, layer, head] is 0, by sign flips."""
    p = maths.sign_flip_p(excess, floor=1e-6)
    return {
        "p": (p, GRID, "probability"),
        "p_adjusted": (maths.benjamini_hochberg(p), GRID, "probability"),
    }


def held_out(values: Tensor, unit: str = ATTENTION) -> tuple[dict[str, Any], list[str]]:
    """`held_out`: what the head that is highest on the even prompts has on the odd ones, and a note on it.

    values [prompt, layer, head]. A head that is highest of many is so by luck too; its value on other prompts is not.
    """
    chosen_on, other = values[::2].nanmean(0), values[1::2].nanmean(0)
    if not len(values[1::2]) or not bool(chosen_on.isfinite().any()):
        return {"held_out": (torch.nan, (), unit)}, []
    best = int(chosen_on.nan_to_num(-torch.inf).argmax())
    layer, head = divmod(best, values.shape[2])
    found = float(other[layer, head])
    note = f"L{layer}.H{head} is highest on the even prompts; on the odd ones it has {found:.3g} {unit}"
    return {"held_out": (found, (), unit)}, [note]
