"""Benchmark signal: which benchmarks follow the training of a model at all.

    rho(benchmark) = Spearman's correlation over checkpoints of (tokens seen, score)

The model as it is is the last checkpoint; the earlier ones are loaded by name, `NAME` or `NAME@REVISION`, one after another. A score is the accuracy over the
items of a benchmark (the group of the items), or the mean ln P(right) among the choices. `value`: the mean of rho over benchmarks; `null` is 0. Table `benchmarks`: rho with its p,
exact over all orders of up to 7 checkpoints, adjusted over benchmarks (Benjamini-Hochberg). With 4 checkpoints p cannot be below 1/12. A benchmark whose score never
changes has no rho.

Correa et al. 2024, "Tucano: Advancing Neural Text Generation for Portuguese". Higher is better. A score that rises with training need not rise for what the benchmark is
named after.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

from patchbay import maths
from patchbay.measure._answers import score, spell
from patchbay.measure._asked import asked_of, hit
from patchbay.measure._deals import dealt_p
from patchbay.measure._items import resolved, rows_of
from patchbay.measure._meter import reading
from patchbay.model.load import load
from patchbay.model.model import Model
from patchbay.results.method import RANDOM, method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError


@method(paper="correa2024")
def benchmark_signal(
    model: Model,
    items: str | list[dict[str, Any]],
    checkpoints: list[str] | tuple[str, ...],
    tokens: list[float] | tuple[float, ...],
    *,
    read: Literal["accuracy", "log_probability"] = "accuracy",
    boundary: Literal["refuse", "back_up"] = "refuse",
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """Rank correlation of each benchmark's score with the tokens seen, over checkpoints of one training.

    Table `benchmarks` has rho, p, adjusted p and the first and last score of each.

    `items`: rows with the fields prompt, choices, answer and group (the benchmark). `checkpoints`: earlier states of the model, names, names with @REVISION, or
    folders. `tokens`: what each checkpoint and last the model has seen. `read`: accuracy, or log_probability of the right choice
    among the choices. `boundary`: refuse a choice that the tokenizer joins with its prompt, or back_up to before it for all choices.
    """
    rows, said = rows_of(resolved(model, items), ("prompt", "choices", "answer", "group"), lists=("choices",))
    listed, seen = [checkpoints] if isinstance(checkpoints, str) else list(checkpoints), [float(x) for x in tokens]
    if (
        len(seen) != len(listed) + 1
        or len(set(seen)) < 2
        or not all(map(math.isfinite, seen))
        or read not in ("accuracy", "log_probability")
    ):
        raise PatchbayError(
            f"{len(listed)} checkpoints and {len(seen)} numbers of tokens: one for each and one for the model itself, not all alike; read={read!r}: accuracy or log_probability"
        )
    asked = asked_of([dict(row.values) for row in rows])
    right, where = torch.tensor(asked.right), [row.where for row in rows]
    groups = [str(row.values["group"]) for row in rows]
    names = list(dict.fromkeys(groups))
    member = torch.tensor([[group == name for group in groups] for name in names]).double()  # [benchmark, item]
    found = []
    for name in [*listed, None]:
        one = model if name is None else _loaded(name)
        spelled = spell(one, asked.prompts, asked.choices, where=where, boundary=boundary)
        logp = score(one, spelled, batch_size=batch_size).logp
        own = logp.nan_to_num(nan=-torch.inf).log_softmax(1)[torch.arange(len(right)), right]
        found.append(member @ (hit(logp, right) if read == "accuracy" else own) / member.sum(1))
    scores, at = torch.stack(found, 1), torch.tensor(seen, dtype=torch.float64)  # [benchmark, checkpoint]
    rho = torch.tensor([maths.spearman(each, at) for each in scores], dtype=torch.float64)
    p = torch.tensor([dealt_p(each, at, seed) if x == x else math.nan for each, x in zip(scores, rho.tolist(), strict=True)])  # fmt: skip
    q = maths.benjamini_hochberg(p)
    table = [
        {"benchmark": name, "n": groups.count(name), "rho": float(rho[i]), "p": float(p[i]), "q": float(q[i]), "first": float(scores[i, 0]), "last": float(scores[i, -1])}
        for i, name in enumerate(names)
    ]  # fmt: skip
    flat = [name for name, x in zip(names, rho.tolist(), strict=True) if x != x]
    notes = [f"no score of {', '.join(flat)} changes: no correlation"] if flat else []
    return reading(
        {"per_item": rho},
        "correlation",
        better="higher",
        null=0.0,
        tables={"benchmarks": sorted(table, key=lambda row: (row["q"] != row["q"], row["q"]))},
        notes=[*said, *notes, maths.clear(q, "benchmarks")],
        seed=seed,
    )


def _loaded(name: str) -> Model:
    """A checkpoint by its name, or NAME@REVISION."""
    path, at, revision = name.rpartition("@")
    with RANDOM:  # transformers changes modules of its own while it loads
        return load(path, revision=revision) if at and path else load(name)
