"""Successor heads: heads whose output circuit sends a word to the next one of its class: Monday to Tuesday, 3 to 4.

    answer_h(t)        = argmax over t's class of U . norm gains . OV_h(norm(e(t)))
    score[layer, head] = share of the ordinal words t with a successor for which answer_h(t) is that successor
    copy [layer, head] = share for which answer_h(t) is t itself

e(t) is the word's effective embedding: `raw` (its token embedding), `mlp0` (what the first MLP makes of it) or `sum`.
A head can only read what is there when it reads: "auto" takes raw for the heads of layer 0, which come before that
MLP, and sum later, and the scores of all three stand beside it. Biases behind the head say the same whatever it reads
and are left out. `chance` = mean of 1 / class size. p: the order of every class is drawn anew, `draws` times, and the
share counted with those successors; `null_high` is the 95th percentile; `p_adjusted` over all heads
(Benjamini-Hochberg). Needs no prompts: three runs of single-token prompts. Classes are those of which the tokenizer
has words as single tokens; what it lacks is said.

Gould, Ong, Ogden and Conmy 2023, "Successor Heads: Recurring, Interpretable Attention Heads In The Wild" (e = mlp0;
numbers, number words, ordinals, days, months, prefixes of both, letters).

It shows what the head would say of a word alone, not that it attends to it, nor that the model counts by it: compare
`prove.ablation` on `tasks.successor`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from patchbay import maths
from patchbay.errors import one_of
from patchbay.find._ordinals import WAYS, Classes, OrdinalClass, answers, effective_embeddings, ordinal_classes, say
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError

Embed = Literal["auto", "raw", "mlp0", "sum"]
WHAT = "successor_heads"
SHARE = "share of tokens"


@method(paper="gould2023", unit=SHARE)
def successor_heads(
    model: Model,
    *,
    embed: Embed = "auto",
    classes: Classes | None = None,
    draws: int = 1000,
    batch_size: int = 256,
    seed: int = 0,
) -> Result:
    """Share of ordinal words that each head's OV circuit sends to their successor, within their class.

    `embed`: which effective embedding is ranked. `classes`: name -> words (or token ids) in order; without, numbers
    to 200, number words, ordinals, days, months, their prefixes and letters. The tables `classes` and `dropped` say
    what was used.

    `draws`: random orders of the classes that make the null.
    """
    one_of("embed", embed, ("auto", *WAYS))
    if draws < 1:
        raise PatchbayError(f"draws={draws}: at least 1 random order is needed to compare with")
    used, notes = ordinal_classes(model, WHAT, classes)
    made = effective_embeddings(model, [token for one in used for token in one.ids], batch_size)
    if embed in WAYS and embed not in made:
        raise PatchbayError(
            f"embed={embed!r}: the first layer of this {model.family.name} model has no MLP; possible is raw"
        )
    layers = [i for i in range(model.n_layers) if "attn.head_out" in model.signals(i)]
    said: dict[str, Tensor] = {}
    for way, x in made.items():
        outs = say(model, dict.fromkeys(layers, x), batch_size)
        said[way] = _grid(model, layers, [answers(model, outs[i], used) for i in layers])  # [token, layer, head]
    chosen = _chosen(said, embed)
    after, own = _targets(used)
    scores = {way: _share(value, after, after >= 0) for way, value in said.items()}
    score = _share(chosen, after, after >= 0)
    missing = chosen.isnan().all(0)
    null = torch.stack([_share(chosen, *_shuffled(used, draw, seed)) for draw in range(draws)])  # [draw, layer, head]
    p = ((1 + (null >= score - 1e-9).sum(0)) / (1 + draws)).masked_fill(missing, torch.nan)
    axes = ("layer", "head")
    chance = torch.cat([torch.full((sum(at >= 0 for at in one.after),), 1 / len(one.ids)) for one in used]).mean()
    return Result(
        {
            "score": (score, axes, SHARE),
            "copy": (_share(chosen, own, after >= 0), axes, SHARE),
            **{way: (value, axes, SHARE) for way, value in scores.items()},
            "null_mean": (null.mean(0), axes, SHARE),
            "null_high": (null.nan_to_num(-1).quantile(0.95, 0).masked_fill(missing, torch.nan), axes, SHARE),
            "p": (p, axes, "probability"),
            "p_adjusted": (maths.benjamini_hochberg(p), axes, "probability"),
            "chance": (chance, (), SHARE),
        },
        tables={
            "classes": _by_class(used, chosen, score, after),
            "dropped": [{"class": one.name, "word": word} for one in used for word in one.dropped],
        },
        notes=notes,
    )


def _chosen(said: dict[str, Tensor], embed: Embed) -> Tensor:
    """The answers of the embedding that is ranked, [token, layer, head]."""
    if embed != "auto":
        return said[embed]
    later = said.get("sum", said["raw"])
    return torch.cat([said["raw"][:, :1], later[:, 1:]], 1)


def _targets(classes: list[OrdinalClass]) -> tuple[Tensor, Tensor]:
    """Each token's successor and itself, as places in its class, [token]; -1 without successor."""
    after = torch.tensor([at for one in classes for at in one.after])
    own = torch.tensor([at for one in classes for at in range(len(one.ids))])
    return after, own


def _shuffled(classes: list[OrdinalClass], draw: int, seed: int) -> tuple[Tensor, Tensor]:
    """Successors under a random order of every class, [token], and which tokens count: as many have one as before."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + draw)
    after, counts = [], []
    for one in classes:
        order = torch.randperm(len(one.ids), generator=generator)
        real = torch.tensor(one.after)
        mine = torch.full_like(real, -1)
        mine[order] = torch.where(real >= 0, order[real.clamp_min(0)], -1)
        after.append(mine)
        counts.append(mine >= 0)
    return torch.cat(after), torch.cat(counts)


def _share(said: Tensor, target: Tensor, counts: Tensor) -> Tensor:
    """Share of the tokens that count whose answer is the target, [layer, head]; NaN where there is no such head."""
    hit = (said == target[:, None, None]).double().masked_fill(said.isnan(), torch.nan)
    return hit[counts].mean(0)


def _grid(model: Model, layers: list[int], values: list[Tensor]) -> Tensor:
    """Places [token, head] of each layer as [token, layer, head], NaN where a layer has fewer heads."""
    widest = max(value.shape[1] for value in values)
    out = torch.full((len(values[0]), model.n_layers, widest), torch.nan, dtype=torch.float64)
    for i, value in zip(layers, values, strict=True):
        out[:, i, : value.shape[1]] = value.double()
    return out


def _by_class(classes: list[OrdinalClass], said: Tensor, score: Tensor, after: Tensor) -> list[dict[str, Any]]:
    """What the best head does on each class, and which words it was asked of."""
    layer, head = divmod(int(score.nan_to_num(-1.0).argmax()), score.shape[1])
    rows, start = [], 0
    for one in classes:
        place = slice(start, start + len(one.ids))
        start += len(one.ids)
        counts = after[place] >= 0
        hits = (said[place, layer, head] == after[place])[counts]
        rows.append(
            {
                "class": one.name,
                "head": str(Part(layer, "head", head)),
                "words": len(one.ids),
                "successions": int(counts.sum()),
                "score": float(hits.double().mean()) if len(hits) else float("nan"),
                "chance": 1 / len(one.ids),
                "dropped": len(one.dropped),
            }
        )
    return rows
