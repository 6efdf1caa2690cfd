"""Panel: the same instruments on any model, so that a variant and its twin can be read side by side.

    alpha, mass [layer, head]      attention that the first token receives, and what a row of the pattern sums to     (attention_sinks)
    previous_token [layer, head]   attention to the token just before                                                 (previous_token_heads)
    induction [layer, head]        attention to what followed this token the last time, on strings that are drawn
                                   from the stream's own tokens and said twice                                        (induction_heads)
    importance [layer, head]       length of what a head writes                                                       (head_importance)
    kl [layer]                     KL(model || logit lens) after each layer, in nats                                  (logit_lens)
    isotropy [layer]               1 - mean cosine of a text's states                                                 (isotropy)

Each has its null beside it: even attention (`alpha_uniform`, `previous_token_uniform`, `induction_uniform`), the same head with its target moved
(`induction_null`), equal heads (a spread of 0), directions that are independent (an isotropy of 1), a lens that is the model (a KL of 0). The table
`panel` and as many variables [statistic] hold one number for each reading: the mean over heads and the highest head, and `importance_spread`, the standard
deviation of heads' importance over its mean. `pb.diff` of two panels, or train's paired runs over their numbers, say what a variant changed.

Gu et al. 2024, "When Attention Sink Emerges in Language Models", for the sinks; each finder names its own paper.

A highest head is highest by chance too, the more so the more heads there are: compare models of as many. Where rows of a pattern do not sum to 1, read `mass` beside
all that is attention. It says where heads look and what streams are like, not that the model uses any of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from patchbay import find
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

HEADS = ("layer", "head")
READINGS = (  # name, unit, reading of a panel's parts, null
    ("alpha_mean", "attention", "alpha", "mean"),
    ("alpha_highest", "attention", "alpha", "highest"),
    ("mass_mean", "attention", "mass", "mean"),
    ("previous_token_mean", "attention", "previous_token", "mean"),
    ("previous_token_highest", "attention", "previous_token", "highest"),
    ("induction_mean", "attention", "induction", "mean"),
    ("induction_highest", "attention", "induction", "highest"),
    ("importance_spread", "of the mean", "importance", "spread"),
    ("kl_mean", "nats", "kl", "mean"),
    ("isotropy_mean", "1 - cosine", "isotropy", "mean"),
)
NULLS = {"alpha": "alpha_uniform", "previous_token": "previous_token_uniform", "induction": "induction_uniform"}
IDEAL = {"mass": 1.0, "importance": 0.0, "kl": 0.0, "isotropy": 1.0}


@method(paper="gu2024", unit="attention")
def panel(
    model: Model,
    stream: Task | list[str] | list[list[int]] | Any,
    *,
    length: int = 64,
    repeats: int = 16,
    seed: int = 0,
    batch_size: int = 16,
) -> Result:
    """What the instruments show on a stream of texts: sinks, row sums, previous-token and induction heads, the lens, isotropy, importance.

    Main variable `alpha` [layer, head], its null the number `alpha_uniform`; the others as in the list above. What a model does not offer (patterns in
    layers that carry a state) is left out, and a note says why.

    `stream`: texts or token ids of two tokens or more; the first `length` tokens of each are read. `length`: see there. `repeats`: strings said twice, for induction.
    """
    encoded = [ids[:length] for ids in model.encode(stream)]
    if length < 4 or repeats < 1:
        raise PatchbayError(
            f"length={length} and repeats={repeats}: at least 4 tokens of each text, and one string said twice"
        )
    short = next((i for i, ids in enumerate(encoded) if len(ids) < 4), None)
    if short is not None:
        raise PatchbayError(f"panel: prompt {short} has {len(encoded[short])} tokens; each text needs 4 or more")
    values: dict[str, Any] = {}
    notes: list[str] = []
    for read in (_sinks, _previous, _induction, _importance, _lens, _isotropy):
        try:
            found, said = read(model, encoded, repeats=repeats, seed=seed, batch_size=batch_size)
        except PatchbayError as error:
            notes.append(f"{read.__name__.strip('_')} not read: {error}")
            continue
        values |= found
        notes += [note for note in said if note not in notes]
    if "alpha" not in values:
        nothing = torch.full((model.n_layers, 1), torch.nan)
        values = {"alpha": (nothing, HEADS, "attention"), **values}
    rows = _table(values)
    return Result(
        values | {row["reading"]: (torch.tensor(row["value"], dtype=torch.float64), (), row["unit"]) for row in rows},
        tables={"panel": rows},
        shown=["panel"],
        notes=notes,
    )


Found = tuple[dict[str, Any], list[str]]


def _sinks(model: Model, encoded: list[list[int]], *, batch_size: int, **_: Any) -> Found:
    seen = find.attention_sinks(model, encoded, length=max(map(len, encoded)), batch_size=batch_size)
    values = {name: (seen[name], HEADS, "attention") for name in ("alpha", "mass")}
    return values | {"alpha_uniform": (seen["uniform"], (), "attention")}, _of_patterns(seen)


def _previous(model: Model, encoded: list[list[int]], *, batch_size: int, **_: Any) -> Found:
    seen = find.previous_token_heads(model, encoded, batch_size=batch_size)
    values = {"previous_token": (seen.values, HEADS, "attention")}
    return values | {"previous_token_uniform": (seen["uniform"], (), "attention")}, _of_patterns(seen)


def _induction(model: Model, encoded: list[list[int]], *, repeats: int, seed: int, batch_size: int) -> Found:
    seen = find.induction_heads(model, said_twice(encoded, repeats, seed), batch_size=batch_size)
    values = {"induction": (seen.values, HEADS, "attention"), "induction_null": (seen["null_high"], HEADS, "attention")}
    return values | {"induction_uniform": (seen["uniform"], (), "attention")}, _of_patterns(seen)


def _importance(model: Model, encoded: list[list[int]], *, batch_size: int, **_: Any) -> Found:
    seen = find.head_importance(model, encoded, exact=0, batch_size=batch_size)
    return {"importance": (seen["norm"], HEADS, "stream")}, []


def _lens(model: Model, encoded: list[list[int]], *, batch_size: int, **_: Any) -> Found:
    """KL at the positions before each text's last token, whose answer is that token; the embedding's row is left out."""
    task = Task(
        "stream", tuple(tuple(ids[:-1]) for ids in encoded), tuple(ids[-1] for ids in encoded), metric="log_probability"
    )
    seen = find.logit_lens(model, task, positions=min(map(len, encoded)) - 1, batch_size=min(8, batch_size))
    return {"kl": (seen["kl"].mean(1)[1:], ("layer",), "nats")}, []


def _isotropy(model: Model, encoded: list[list[int]], *, batch_size: int, **_: Any) -> Found:
    seen = find.isotropy(model, encoded, draws=1, batch_size=batch_size)
    rows = [seen.labels_of("layer").index(f"L{i}") for i in range(model.n_layers)]
    return {"isotropy": (seen.values[rows], ("layer",), "1 - cosine")}, []


def _of_patterns(seen: Result) -> list[str]:
    return [note for note in seen.notes if "negative weights" in note]


def said_twice(encoded: list[list[int]], n: int, seed: int) -> list[list[int]]:
    """Strings of different tokens of the stream, each after as many others as it likes, and then said again.

    A text's own first token comes first, where all texts share it (a start token). The distance between the copies differs from string to string.
    """
    firsts = {ids[0] for ids in encoded}
    start = list(firsts) if len(firsts) == 1 else []
    pool = sorted({token for ids in encoded for token in ids} - set(start))
    most = max(map(len, encoded)) - len(start)
    longest = min(len(pool), most * 2 // 3, 24)
    if longest < 3:
        raise PatchbayError(
            f"{len(pool)} different tokens in texts of up to {most} make no string that can be said twice; 3 and 5 do"
        )
    rng, rows = random.Random(f"panel-{seed}"), []
    for _ in range(n):
        drawn = rng.sample(pool, longest)
        period = rng.randint((longest + 1) // 2, longest)
        string = drawn[longest - period :]
        rows.append([*start, *drawn, *string][: len(start) + most])
    return rows


def _table(values: dict[str, Any]) -> list[dict[str, Any]]:
    """One number for each reading, and its null."""
    summaries: dict[str, Callable[[Tensor], float]] = {
        "mean": lambda x: float(x.nanmean()),
        "highest": lambda x: float(x.nan_to_num(-torch.inf).max()),
        "spread": lambda x: float(x[~x.isnan()].std(correction=0) / x.nanmean()),
    }
    rows = []
    for reading, unit, name, summary in READINGS:
        if name not in values or bool(values[name][0].isnan().all()):
            continue
        null = float(values[NULLS[name]][0]) if name in NULLS else IDEAL[name]
        value = summaries[summary](torch.as_tensor(values[name][0]).double())
        rows.append({"reading": reading, "value": value, "null": null, "unit": unit})
    return rows
