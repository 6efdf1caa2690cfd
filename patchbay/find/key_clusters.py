"""Key clusters: how much the tokens just below the top of a prediction crowd around the top ones in the unembedding.

The unembedding's rows are keys, the final state is the query. k-means cuts the rows into clusters; of each prompt's prediction

    share[ranks] = share of the tokens at these ranks whose key is in a cluster with one of the `top` most likely tokens
    null[prompt] = (size of these clusters together - top) / (vocabulary - top), what tokens in random order would have

`null_mean` is its mean over prompts, low and high a 95 % bootstrap over prompts, p by sign flips of share - null,
Benjamini-Hochberg over the bins. A share above the null means that being near an answer in key space, not being right, lifts a token. With
`answers` (each prompt's right tokens) `right_same` and `right_other` are the shares of right tokens among those ranks inside and
outside the top's clusters. One forward pass, and k-means (k-means++ start, at most `STEPS` rounds) over the vocabulary.

Peng, An and Shang 2024, "Correlation and Navigation in the Vocabulary Key Representation Space of Language Models", with 1,024 clusters,
the top 10 and ranks 11 to 100 of models with 128,000 tokens.

Similar words have similar keys AND fit similar contexts: a high share is no error in itself; `right_same` below
`right_other` is. Clusters depend on the seed, and on k most of all: at `n_clusters` near 1 or near the vocabulary the share is
1 or 0 for every model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.find._states import token_ids
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

STEPS = 50
BINS = 9  # ranks top + 1 .. upto, in this many bins


@method(paper="peng2024", unit="share of tokens")
def key_clusters(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    *,
    n_clusters: int | None = None,
    top: int = 10,
    upto: int = 100,
    answers: Sequence[Sequence[Any]] | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """Share of the tokens ranked top + 1 to upto that lie in a cluster of the unembedding with a top token, by rank.

    `n_clusters`: 1,024, or an eighth of a smaller vocabulary. `answers`: for each prompt all tokens that would be right.
    Beside `share`: `cluster` [vocab], every token's cluster, and the table `clusters` with the largest ones.

    `top`: how many of the likeliest tokens are the top ones. `upto`: the last rank that is asked about.
    """
    encoded, n_vocab = model.encode(prompts), model.vocab_size
    count = min(1024, max(2, n_vocab // 8)) if n_clusters is None else n_clusters
    if not (1 <= count <= n_vocab and 1 <= top < upto <= n_vocab):
        raise PatchbayError(
            f"n_clusters={count}, top={top}, upto={upto}: 1 <= n_clusters and 1 <= top < upto, all up to the vocabulary's {n_vocab}"
        )
    right = _right(model, answers, len(encoded))
    cluster = _k_means(model.unembed.weight.detach().float().cpu(), count, seed)  # [vocab]
    size = torch.bincount(cluster, minlength=count).double()
    same, null, hits = [], [], []
    for start in range(0, len(encoded), batch_size):
        logits = run(model, encoded[start : start + batch_size], logits="last").last_logits.float().cpu()
        order = logits.argsort(dim=-1, descending=True, stable=True)[:, :upto]  # [prompt, rank]
        for n, tokens in enumerate(order, start=start):
            main = torch.zeros(count, dtype=torch.bool)
            main[cluster[tokens[:top]]] = True
            same.append(main[cluster[tokens[top:]]])
            null.append((size[main].sum() - top) / (n_vocab - top))
            if right is not None:
                hits.append(torch.isin(tokens[top:], right[n]))
    inside, expected = torch.stack(same), torch.stack(null)  # [prompt, rank], [prompt]
    variables, labels = _by_rank(inside.double(), expected, top, upto)
    notes = [_said(inside.double().mean(1), expected)]
    if right is not None:
        more, note = _rightness(inside, torch.stack(hits))
        variables |= more
        notes.append(note)
    variables["cluster"] = (cluster, ("vocab",), "cluster")
    largest = size.argsort(descending=True, stable=True)[:10].tolist()
    rows = [{"cluster": i, "size": int(size[i]), "tokens": _shown(model, cluster, i)} for i in largest]
    return Result(variables, coords={"token": labels}, tables={"clusters": rows}, notes=notes)


def _right(model: Model, answers: Sequence[Sequence[Any]] | None, n_prompts: int) -> list[Tensor] | None:
    if answers is None:
        return None
    if len(answers) != n_prompts:
        raise PatchbayError(f"answers: {len(answers)} lists for {n_prompts} prompts; one for each")
    return [torch.tensor(token_ids(model, row, f"answers of prompt {i}")) for i, row in enumerate(answers)]


def _by_rank(inside: Tensor, expected: Tensor, top: int, upto: int) -> tuple[dict[str, Any], list[str]]:
    """Share, interval, null and p of each bin of ranks (and the labels of the bins): inside [prompt, rank]."""
    bins = [piece for piece in torch.arange(upto - top).tensor_split(min(BINS, upto - top)) if len(piece)]
    labels = [f"{top + 1 + int(b[0])}-{top + 1 + int(b[-1])}" for b in bins]
    shares = [inside[:, piece].mean(1) for piece in bins]  # each [prompt]
    intervals = torch.tensor([maths.bootstrap_interval(share) for share in shares], dtype=torch.float64)
    p = torch.tensor([maths.permutation_p(share, expected, n=2000) for share in shares])
    unit = "share of tokens"
    mean, low, high = intervals.unbind(1)
    ends = {"low": (low, ("token",), unit), "high": (high, ("token",), unit)} if len(inside) > 1 else {}
    return {
        "share": (mean, ("token",), unit),
        **ends,
        "null_mean": (expected.mean().expand(len(bins)), ("token",), unit),
        "p": (maths.benjamini_hochberg(p), ("token",), "p value"),
    }, labels


def _said(share: Tensor, expected: Tensor) -> str:
    gap = maths.paired_interval(share, expected)
    return (
        f"all ranks: share {share.mean():.3f}, null {expected.mean():.3f}, difference "
        f"{gap.mean:+.3f}{maths.between(gap.low, gap.high, '+.3f', '')}"
    )


def _rightness(inside: Tensor, hits: Tensor) -> tuple[dict[str, Any], str]:
    """Shares of right tokens inside and outside the top's clusters; prompts that have both count in the comparison."""
    rates = [(hits & side).sum(1).double() / side.sum(1) for side in (inside, ~inside)]  # NaN where a side is empty
    both = rates[0].isfinite() & rates[1].isfinite()
    unit = "share of tokens"
    named = zip(("right_same", "right_other"), (inside, ~inside), strict=True)
    found = {name: ((hits & side).sum() / side.sum(), (), unit) for name, side in named if bool(side.any())}
    if not bool(both.any()):
        return found, "no prompt has middle ranks both inside and outside the top's clusters"
    gap = maths.paired_interval(rates[0][both], rates[1][both])
    p = maths.permutation_p(rates[0][both], rates[1][both], n=2000)
    said = f"right tokens, same cluster minus other, over {int(both.sum())} prompts: {gap.mean:+.4f}"
    return found, said + maths.between(gap.low, gap.high, "+.4f", "") + (f", p {p:.3g}" if p == p else "")


def _shown(model: Model, cluster: Tensor, which: int) -> str:
    members = (cluster == which).nonzero()[:8, 0].tolist()
    return " ".join(repr(model.decode([i])) if model.tokenizer is not None else str(i) for i in members)


def _k_means(rows: Tensor, count: int, seed: int) -> Tensor:
    """Cluster of each row [row, d]: [row], numbered from 0 by k-means++ start.

    Rows are first put in the order of one random projection, so that the clusters do not depend on how tokens are numbered.
    """
    generator = torch.Generator().manual_seed(seed)
    order = (rows @ torch.randn(rows.shape[1], generator=generator)).argsort(stable=True)
    x = rows[order]  # [row, d]
    centres = _start(x, count, generator)
    found = torch.full((len(x),), -1)
    for _ in range(STEPS):
        nearest = _nearest(x, centres)
        if torch.equal(nearest, found):
            break
        found = nearest
        sizes = torch.bincount(found, minlength=count)
        means = torch.zeros_like(centres).index_add_(0, found, x) / sizes.clamp_min(1)[:, None]
        centres = torch.where(sizes[:, None] > 0, means, centres)  # an empty cluster stays where it was
    out = torch.empty_like(found)
    out[order] = found
    return out


def _start(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centre is a row drawn with chance in proportion to its squared distance from the nearest centre."""
    first = int(torch.randint(len(x), (1,), generator=generator))
    chosen, nearest = [first], (x - x[first]).square().sum(1)
    for _ in range(count - 1):
        total = nearest.double().cumsum(0)
        drawn = float(torch.rand(1, generator=generator, dtype=torch.float64)) * float(total[-1])
        row = min(int(torch.searchsorted(total, drawn, right=True)), len(x) - 1)
        chosen.append(row)
        nearest = torch.minimum(nearest, (x - x[row]).square().sum(1))
    return x[chosen].clone()


def _nearest(x: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre of each row, the first of equals, in blocks."""
    half = centres.square().sum(1) / 2.0
    return torch.cat([(half - block @ centres.T).argmin(1) for block in x.split(8192)])
