"""Word odds: which words stand in texts of one group rather than of another, with the texts themselves as the units.

    OR(w) = (a / b) / (c / d),    a, c how often w occurs in the texts of each group, b, d all other words there, each + 0.5

Whole words in lower case. Words that occur fewer than `least` times in either group are left out, as are those of `drop` (pronouns, names, words of the
prompts). `value`: the mean of |ln OR| over the words, its `null` and p by dealing the texts to the groups at random, `draws` times; each word's p
from the same draws, adjusted over the words (Benjamini-Hochberg): words within a text go together, so that texts and not words are dealt. The
texts are given, or the model writes `per_prompt` after each prompt.

Wan et al. 2023, "'Kelly is a Warm Person, Joseph is a Role Model': Gender Biases in LLM-Generated Reference Letters". Neither way is better. Words
that only name the group find themselves: see that none of them is left in.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.measure._items import resolved, rows_of, texts_only
from patchbay.measure._samples import samples, texts_of
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError


@method(paper="wan2023")
def word_odds(
    model: Model,
    items: str | list[dict[str, Any]],
    *,
    drop: list[str] | tuple[str, ...] = (),
    least: int = 10,
    draws: int = 10_000,
    per_prompt: int = 20,
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """How unlike the words of two groups of texts are, with a test that deals the texts anew; each word's odds ratio in table `words`.

    `log_odds` [token], ln OR of the first group against the second, `p` and `p_adjusted` by word.

    `items`: rows with the fields text and group (two groups), or prompt and group, after which the model writes. `drop`: words that are left out. `least`: how
    often a word occurs in each group at least. `draws`: random deals of the texts; with fewer than 10,000 few words can pass the
    adjustment. `per_prompt`: texts of 40 tokens that the model writes after each prompt.
    """
    rows, said = rows_of(resolved(model, items), ("group",), ("text", "prompt"))
    texts, groups = _texts(model, rows, per_prompt, seed, batch_size)
    names = list(dict.fromkeys(groups))
    if len(names) != 2 or min(groups.count(name) for name in names) < 2 or draws < 1 or least < 1:
        raise PatchbayError(
            f"two groups of two texts or more, got {', '.join(f'{name} ({groups.count(name)})' for name in names)}; draws={draws} and least={least} are 1 or more"
        )
    counts, words = counted(texts, [word.lower() for word in drop])  # [text, word]
    total = counts.sum(1)
    first = torch.tensor([group == names[0] for group in groups])
    kept = (counts[first].sum(0) >= least) & (counts[~first].sum(0) >= least)
    if not bool(kept.any()):
        raise PatchbayError(f"no word occurs {least} times in both groups: give more texts, or a lower least")
    counts, words = counts[:, kept], [word for word, one in zip(words, kept.tolist(), strict=True) if one]
    seen = log_odds(counts, total, first[None].double())[0]
    drawn = _dealt(counts, total, first, draws, seed)  # [draw, word]
    p = (1.0 + (drawn.abs() >= seen.abs() - 1e-9).sum(0)) / (1.0 + draws)
    q = maths.benjamini_hochberg(p)
    table = [{"word": word, "odds": float(seen[i].exp()), names[0]: int(counts[first][:, i].sum()), names[1]: int(counts[~first][:, i].sum()), "p": float(p[i]), "q": float(q[i])} for i, word in enumerate(words)]  # fmt: skip
    means = drawn.abs().mean(1)
    number = {
        "value": seen.abs().mean(),
        "null": means.mean(),
        "p": torch.tensor(maths.draws_p(float(seen.abs().mean()), means)),
    }
    return Result(
        {name: (x, (), "probability" if name == "p" else "log odds") for name, x in number.items()}
        | {
            "log_odds": (seen, ("token",), "log odds"),
            "p_word": (p, ("token",), "probability"),
            "p_adjusted": (q, ("token",), "adjusted p"),
        },
        coords={"token": words},
        tables={"words": sorted(table, key=lambda row: (row["q"], -abs(row["odds"] - 1)))},
        notes=["better: neither", *said, f"odds above 1: more in {names[0]}; " + maths.clear(q, "words")],
    )


def _texts(model: Model, rows: Sequence[Any], n: int, seed: int, batch_size: int) -> tuple[list[str], list[str]]:
    """Texts and their groups: those given, or those that the model writes."""
    given = ["text" in row.values for row in rows]
    if all(given):
        texts_only(rows, ("text",))
        return [str(row.values["text"]) for row in rows], [str(row.values["group"]) for row in rows]
    lacking = next((row for row in rows if "prompt" not in row.values or "text" in row.values), None)
    if lacking is not None:
        raise PatchbayError(
            f"{lacking.where}: every row has a text, or every row a prompt after which the model writes"
        )
    drawn = samples(model, [row.values["prompt"] for row in rows], n, top_p=0.9, seed=seed, batch_size=batch_size)
    texts = [texts_of(model, each) for each in drawn]
    return [text for each in texts for text in each], [str(row.values["group"]) for row in rows for _ in range(n)]


def counted(texts: Sequence[str], drop: Sequence[str]) -> tuple[Tensor, list[str]]:
    """How often each word stands in each text, [text, word], and the words."""
    bags = [Counter(re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", text.lower())) for text in texts]
    words = sorted({word for bag in bags for word in bag} - set(drop))
    if not words:
        raise PatchbayError("the texts hold no words")
    return torch.tensor([[float(bag[word]) for word in words] for bag in bags], dtype=torch.float64), words


def log_odds(counts: Tensor, total: Tensor, first: Tensor) -> Tensor:
    """ln OR [deal, word] of counts [text, word] with texts of `total` words, under each deal `first` [deal, text] of texts to the first group."""
    a, n_a = first @ counts, first @ total
    c, n_c = counts.sum(0) - a, total.sum() - n_a
    return ((a + 0.5) / (n_a[:, None] - a + 0.5)).log() - ((c + 0.5) / (n_c[:, None] - c + 0.5)).log()


def _dealt(counts: Tensor, total: Tensor, first: Tensor, draws: int, seed: int) -> Tensor:
    """ln OR of random deals of the texts, group sizes kept."""
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for start in range(0, draws, 500):
        order = torch.rand(min(500, draws - start), len(first), generator=generator).argsort(1)
        pieces.append(log_odds(counts, total, first[order].double()))
    return torch.cat(pieces)
