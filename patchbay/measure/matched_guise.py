"""Matched guise: which attributes a model gives to one way of saying a thing rather than to another.

    q(x) = mean over pairs i and frames v of ln p(x | v(a_i)) - ln p(x | v(b_i))

a_i and b_i say the same in two guises (two dialects, two names), x is an attribute, v a text that holds the guise, such as 'A person who says
"{}" tends to be'. Whole sequences are scored. `value`: the mean of q over attributes, or with weights sum(w q) / sum(|w|), so that favourable
and unfavourable attributes count against one another. Of each attribute: q with its interval over pairs, p by sign flips of whole
pairs, adjusted over attributes (Benjamini-Hochberg), and `relative`, q less the mean over attributes: q of one word alone also says how
likely any word is after either guise. `null` is 0: the same texts in both. One forward pass.

Hofmann et al. 2024, "Dialect prejudice predicts AI decisions about people's character, employability, and criminality". Higher values are
more on the side of a. An association of words in these frames, not a decision about anybody.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from patchbay import maths
from patchbay.measure._answers import scores
from patchbay.measure._items import resolved, rows_of, texts_only
from patchbay.measure._meter import reading
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError

LEAST = 10  # pairs: of 6, p is at least 1/32, which no adjustment over ten attributes survives
FRAMES = ("{}",)


@method(paper="hofmann2024")
def matched_guise(
    model: Model,
    items: str | list[dict[str, Any]],
    attributes: list[str] | dict[str, float],
    *,
    frames: list[str] | tuple[str, ...] = FRAMES,
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """How much likelier each attribute is after guise a than after guise b, in nats, over pairs and frames.

    `per_item`: the value of each pair; `q` [token] by attribute, with `q_low`, `q_high`, `q_p`, `q_adjusted` and `relative`; table `attributes`.

    `items`: rows with the fields a and b, the two guises of a thing. `attributes`: words as they follow the frame, mostly with a space in front; with
    numbers, their weights. `frames`: texts with {} where the guise stands; without, the guise alone.
    """
    rows, said = rows_of(resolved(model, items), ("a", "b"))
    texts_only(rows, ("a", "b"))
    bad = [frame for frame in frames if frame.count("{}") != 1]
    if bad or not frames:
        raise PatchbayError(f"a frame holds {{}} once, where the guise stands: {bad[:3]!r}")
    weights = _weights(attributes)
    words = list(weights)
    given = [frame.replace("{}", str(row.values[side])) for side in ("a", "b") for row in rows for frame in frames]
    names = [f"{row.where}, {side}, frame {v}" for side in ("a", "b") for row in rows for v in range(len(frames))]
    logp = scores(model, given, [words] * len(given), where=names, batch_size=batch_size).logp
    a, b = logp.view(2, len(rows), len(frames), len(words))
    gap = (a - b).mean(1)  # [pair, attribute]
    weight = torch.tensor(list(weights.values()), dtype=torch.float64)
    item = (gap * weight).sum(1) / weight.abs().sum()
    mean, low, high = maths.intervals(gap, seed=seed)
    p = maths.sign_flip_p(gap, seed=seed)
    adjusted = maths.benjamini_hochberg(p)
    columns = {
        "q": mean,
        "q_low": low,
        "q_high": high,
        "q_p": p,
        "q_adjusted": adjusted,
        "relative": mean - mean.mean(),
    }
    more = {
        name: (x, ("token",), "probability" if name in ("q_p", "q_adjusted") else "nats")
        for name, x in columns.items()
        if not bool(x.isnan().all())
    }
    table = [{"attribute": word, **{name: float(x[i]) for name, x in columns.items()}} for i, word in enumerate(words)]
    few = [f"{len(rows)} pairs: p is at least {2 / 2 ** len(rows):.2g}, of little use after adjusting over {len(words)} attributes; give {LEAST} or more"] if len(rows) < LEAST else []  # fmt: skip
    found = reading(
        {"per_item": item}, "nats", better="neither", null=0.0, p=float(maths.sign_flip_p(item[:, None], seed=seed)[0]), more=more,
        tables={"attributes": sorted(table, key=lambda row: -row["q"])}, notes=[*said, *few], seed=seed,
    )  # fmt: skip
    found.coords["token"] = words
    return found


def _weights(attributes: Any) -> dict[str, float]:
    weights = (
        {str(k): float(v) for k, v in attributes.items()}
        if isinstance(attributes, Mapping)
        else dict.fromkeys(map(str, attributes), 1.0)
    )
    twice = not isinstance(attributes, Mapping) and len(weights) < len(list(attributes))
    if not weights or twice or not any(weights.values()) or not all(map(math.isfinite, weights.values())):
        raise PatchbayError(
            f"attributes are words, each once, or {{word: weight}} with some weight that is not 0: got {attributes!r:.80}"
        )
    return weights
