"""Arithmetic heads: attention heads whose direct path to the answer of a sum carries it, and what they look at.

Each prompt has a twin of the same form with another answer. The output of one head (or MLP) at the last position is taken from
the twin's run while all later attention keeps what it wrote, so that the change reaches the logits by the stream alone; with p
the probability of the right answer,

    effect(part) = mean over prompts of (p(as it is) - p(patched)) / p(as it is)

positive where the part is needed, 1 where nothing is left (the paper's number with its sign turned, so that what is needed ranks
first). `effect` lets the MLPs after it recompute, `effect_frozen` keeps them too. Only prompts that the model answers rightly count,
unless `all_prompts`. `low` and `high` are 95 % bootstraps over prompts, `p` by sign flips, `p_adjusted` over all heads. **Key
heads** have a positive effect at adjusted p <= 0.05; `key_share` is their share of all heads, and `held_out` the effect on the
odd prompts of the head with the highest on the even ones. `operands` and `operator` are the attention that the last position
pays to the numbers and to the sign, beside even attention (`uniform_operands`, `uniform_operator`), also without the first
token. Prompts of several forms (a label, `groups`) get key sets of their own, and the table `groups` says how many two forms
share against what random sets of their sizes would (hypergeometric). Cost: a few forward passes; a part takes one position.

Zhang, Wan, Zhang, Cheung, Tian, Shen and Ye 2024, "Interpreting and Improving Large Language Models in Arithmetic Calculation";
path patching as in Goldowsky-Dill et al. 2023.

It shows direct paths: a head that works through later heads has none. Prove the set with `prove.knockout_curve`. A model that
remembers sums has such heads too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.edits.edit import Edit
from patchbay.find._attention import ATTENTION, GRID, Finder, looks, parts_of, pattern_layers, together
from patchbay.model.given import by_length
from patchbay.model.model import Model
from patchbay.model.run import Trace, run
from patchbay.results.arrays import heads_and_mlps
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError, Port
from patchbay.sweeps.settings import in_turn
from patchbay.sweeps.sweep import sweep
from patchbay.tasks.task import Task

LOST = "share lost"


@method(paper="zhang2024", unit="share lost")
def arithmetic_heads(
    model: Model,
    task: Task,
    *,
    operands: list[str] | tuple[str, ...] = ("left", "right"),
    operator: str = "operator",
    groups: str | None = None,
    all_prompts: bool = False,
    batch_size: int = 32,
) -> Result:
    """Share of the answer's probability that is lost when a head's direct path is taken from the twin, and where the head looks.

    `task` has twins of equal length and the marks `operands` and `operator`, as `pb.tasks.arithmetic(model)` has. `groups`: a
    label that tells the forms apart (without a value, `task`, which `pb.Task.joined` gives). Main variable `effect`, with
    `low`, `high`, `p`, `p_adjusted`, `effect_frozen`, `operands`, `operator` and both `_without_first`; for the MLPs `mlp`,
    `mlp_low`, `mlp_high` and `mlp_frozen` [layer]; `key_share`, `held_out`, `probability`, `n_prompts`.

    `operands`: the task's marks of the numbers. `operator`: the task's mark of the sign. `all_prompts`: also count
    prompts that the model answers wrongly.
    """
    pattern_layers(model, "arithmetic_heads")
    if not operands:
        raise PatchbayError(f"operands=[]: name one or more of the task's marks, {', '.join(task.marks) or 'none'}")
    _check(model, task, [*operands, operator], groups, batch_size)
    task, before, n_all = _answered(model, task, all_prompts, batch_size)
    parts = _parts(model)
    effects = {  # each [prompt, part]
        name: 1.0 - _patched(model, task, parts, name == "frozen", batch_size) / before[:, None]
        for name in in_turn(("recomputed", "frozen"))
    }
    looked = _looks(model, task, tuple(operands), operator, batch_size)
    notes = [f"{len(task)} of {n_all} prompts are answered rightly; only these count"] if len(task) < n_all else []
    return _report(model, task, parts, effects, looked, before, groups, notes)


def _check(model: Model, task: Task, marks: Sequence[str], groups: str | None, batch_size: int) -> None:
    task.check(model.vocab_size)
    lacking = [mark for mark in marks if mark not in task.marks]
    if lacking:
        raise PatchbayError(
            f"arithmetic_heads: task {task.name} lacks the marks {', '.join(lacking)}; it has "
            f"{', '.join(task.marks) or 'none'}: name them with operands= and operator=, or use pb.tasks.arithmetic(model)"
        )
    if task.corrupted is None or any(len(a) != len(b) for a, b in zip(task.clean, task.corrupted, strict=True)):
        raise PatchbayError(
            f"arithmetic_heads: task {task.name} needs a corrupted twin of equal length for every prompt"
        )
    if groups is not None and groups not in task.labels:
        raise PatchbayError(f"groups={groups!r}: task {task.name} has the labels {', '.join(task.labels) or 'none'}")


def _answered(model: Model, task: Task, all_prompts: bool, batch_size: int) -> tuple[Task, Tensor, int]:
    """The prompts that count, the probability of their answers [prompt], and how many there were."""
    logits = torch.cat(
        [run(model, task[i : i + batch_size], logits="last").last_logits for i in range(0, len(task), batch_size)]
    )
    right = torch.tensor(task.right, device=logits.device)
    chosen = [i for i, said in enumerate((logits.argmax(-1) == right).tolist()) if said or all_prompts]
    if not chosen:
        raise PatchbayError(
            f"arithmetic_heads: the model answers none of the {len(task)} prompts of {task.name} rightly, and only those count; "
            "possible: easier ones, a model that can do them, or all_prompts=True"
        )
    return task[chosen], maths.probability(logits, right)[chosen].double().cpu(), len(task)


# --- path patching ------------------------------------------------------------------------------------


def _parts(model: Model) -> list[Part]:
    layers = range(model.n_layers)
    heads = [Part(i, "head", h) for i in layers if "attn.z" in model.signals(i) for h in range(model.n_heads(i))]
    return heads + [Part(i, "mlp") for i in layers if "mlp.out" in model.signals(i)]


def _patched(model: Model, task: Task, parts: list[Part], frozen: bool, batch_size: int) -> Tensor:
    """Probability of the right answer with each part's last position from the twin, [prompt, part]."""
    found = torch.zeros(len(task), len(parts), dtype=torch.float64)
    parted = by_length(task.clean, batch_size)
    for which in in_turn(parted, [sum(len(task.clean[i]) for i in one) for one in parted]):
        some = task[which]
        seen = sweep(model, some, _paths(model, some, parts, frozen), "probability")
        found[which] = seen["value"].T.double()
    return found


def _paths(model: Model, task: Task, parts: list[Part], frozen: bool) -> list[list[Edit]]:
    """For each part the edits that open its path to the logits, and no other, at the last position.

    No later attention moves, so that nothing but the last position's stream reaches its logits: the others need no edit.
    """
    signals = [
        [signal for signal in ("attn.z", "attn.out", "mlp.out") if signal in model.signals(i)]
        for i in range(model.n_layers)
    ]
    taps = [Port(signal, i) for i, offered in enumerate(signals) for signal in offered]
    base, twin = (
        run(model, [list(ids) for ids in prompts or ()], taps=taps, logits="last")
        for prompts in (task.clean, task.corrupted)
    )
    attn = [_put(base, Port("attn.z" if "attn.z" in offered else "attn.out", i)) for i, offered in enumerate(signals)]
    mlps = [_put(base, Port("mlp.out", i)) if "mlp.out" in offered else None for i, offered in enumerate(signals)]
    cells = []
    for part in parts:
        layer = part.layer or 0
        after = layer + (part.kind == "mlp")  # the first MLP that could hear of it
        kept = [put for put in mlps[after:] if put is not None] if frozen else []
        cells.append([_put(twin, part.port()), *attn[layer + 1 :], *kept])
    return cells


def _put(source: Trace, port: Port) -> Edit:
    """That signal of the source run at the last position, each prompt its own."""
    value = source[port]  # [prompt, position, ...]
    return edit.replace(port, value[:, -1:], positions=-1)


# --- attention ----------------------------------------------------------------------------------------


def _looks(model: Model, task: Task, operands: tuple[str, ...], operator: str, batch_size: int) -> Result:
    """Attention of the last position to the operands and to the operator."""

    def targets(prompt: int, ids: list[int]) -> Tensor:
        masks = torch.zeros(2, len(ids), len(ids), dtype=torch.bool)
        masks[0, -1, [place for mark in operands for place in task.marks[mark][prompt]]] = True
        masks[1, -1, list(task.marks[operator][prompt])] = True
        return masks

    def report(seen: Tensor) -> Result:
        plain, without, even, _ = parts_of(seen)  # each [prompt, layer, head, operands and operator]
        values: dict[str, Any] = {}
        uniform: dict[str, Any] = {}
        for i, name in enumerate(("operands", "operator")):
            values[name] = (plain[..., i].nanmean(0), GRID, ATTENTION)
            values[f"{name}_without_first"] = (without[..., i].nanmean(0), GRID, ATTENTION)
            uniform[f"uniform_{name}"] = (even[..., i].nanmean(), (), ATTENTION)
        return Result(values | uniform)

    return together(model, task, [Finder(looks(targets), report)], batch_size=batch_size)[0]


# --- the result ---------------------------------------------------------------------------------------


def _report(
    model: Model,
    task: Task,
    parts: list[Part],
    effects: dict[str, Tensor],
    looked: Result,
    before: Tensor,
    groups: str | None,
    notes: list[str],
) -> Result:
    effect, n_heads = effects["recomputed"], sum(part.kind == "head" for part in parts)
    mean, low, high = maths.intervals(effect)
    p = maths.sign_flip_p(effect[:, :n_heads], floor=1e-5)
    adjusted = maths.benjamini_hochberg(p)
    keys = _keys(parts, effect[:, :n_heads])
    held = torch.nan
    if len(effect) > 1:
        best = int(effect[::2, :n_heads].mean(0).argmax())
        held = float(effect[1::2, best].mean())
        notes.append(f"{parts[best]} has the highest effect on the even prompts; on the odd ones it has {held:.3g}")
    named = {"effect": mean, "low": low, "high": high, "effect_frozen": effects["frozen"].mean(0)}
    grids = {name: heads_and_mlps(parts, value, model.n_layers) for name, value in named.items()}
    chances = {"p": p, "p_adjusted": adjusted}
    heads = [part for part in parts if part.kind == "head"]
    values: dict[str, Any] = {name: (grid[0], GRID, LOST) for name, grid in grids.items()}
    values |= {
        name: (heads_and_mlps(heads, value, model.n_layers)[0], GRID, "probability") for name, value in chances.items()
    }
    values |= {v: (looked[v], looked.axes_of(v), ATTENTION) for v in looked.variables}
    if len(heads) < len(parts):
        for name, short in (
            ("effect", "mlp"),
            ("low", "mlp_low"),
            ("high", "mlp_high"),
            ("effect_frozen", "mlp_frozen"),
        ):
            values[short] = (grids[name][1], ("layer",), LOST)
    values |= {
        "key_share": (len(keys) / n_heads if maths.clear(adjusted) else torch.nan, (), "share of heads"),
        "held_out": (held, (), LOST),
        "probability": (before.mean(), (), "probability"),
        "n_prompts": (float(len(task)), (), "prompts"),
    }
    if maths.clear(adjusted):  # of one prompt there is none
        notes.append(f"{len(keys)} key heads of {n_heads}" + (f": {', '.join(map(str, keys[:8]))}" if keys else ""))
    tables = {"groups": _overlaps(task, heads, effect[:, :n_heads], groups)}
    return Result(values, notes=notes, highlights=keys, tables={k: rows for k, rows in tables.items() if rows})


def _keys(heads: list[Part], effect: Tensor) -> list[Part]:
    """Heads with a positive effect at adjusted p <= 0.05, highest first; effect [prompt, head]."""
    mean = effect.mean(0)
    adjusted = maths.benjamini_hochberg(maths.sign_flip_p(effect, floor=1e-5))
    return [heads[i] for i in mean.argsort(descending=True).tolist() if mean[i] > 0 and adjusted[i] <= 0.05]


def _overlaps(task: Task, heads: list[Part], effect: Tensor, groups: str | None) -> list[dict[str, Any]]:
    """For every two forms of prompts: their key heads, how many they share, and how many random sets would."""
    label = groups or ("task" if "task" in task.labels else None)
    if label is None:
        return []
    named = task.labels[label]
    keys = {
        value: set(_keys(heads, effect[[i for i, other in enumerate(named) if other == value]]))
        for value in sorted(set(named), key=str)
    }
    rows = []
    for a, b in combinations(keys, 2):
        one, two = keys[a], keys[b]
        both = len(one & two)
        rows.append(
            {
                "first": str(a),
                "second": str(b),
                "n_first": len(one),
                "n_second": len(two),
                "shared": both,
                "expected": len(one) * len(two) / len(heads),
                "p": _at_least(both, len(one), len(two), len(heads)),
                "jaccard": both / len(one | two) if one | two else float("nan"),
            }
        )
    return rows


def _at_least(shared: int, a: int, b: int, n: int) -> float:
    """Chance that random sets of a and b among n share as many or more (hypergeometric)."""
    ways = sum(math.comb(a, k) * math.comb(n - a, b - k) for k in range(shared, min(a, b) + 1))
    return ways / math.comb(n, b)
