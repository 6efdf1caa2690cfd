"""Variant: train a model another way and its twin the plain way, on the same batches, and compare what came of them.

    by_run[seed] = held-out loss of the variant - held-out loss of its twin, nats per token

What differs is an objective, an optimiser, or blocks. For every seed three copies are trained: the variant; the twin, by next-token
prediction with AdamW, or by what the objective names as itself without its claim where documents are read in parts (questions and labels); and a
null arm, which is what the objective names as its own (for a permutation of units the reversal of tokens), or else the twin on other
batches: what the seed alone does. Variant and twin of a seed start from the same weights wherever shapes agree,
and see the same documents in the same order. Training runs on Hugging Face's Trainer (accelerate). The lent model is not touched.

A variant of another size has a twin of other means: with `plan={"equal": 1}` a fourth arm, `equal`, is the plain network of as many weights (its MLPs wider or
narrower), or where weights are as many the plain twin for as many more steps as the variant's operations ask. What differs inside is in the table `panel`: `pb.panel` of
every run on held-out documents, the variant less the twin and the arms that are null, by seed.

Differences are told by `_paired`: their mean over seeds with a bootstrap interval over held-out documents, each seed's own, and the exact
two-sided p of signs over seeds. Three seeds cannot go below p = .25, five not below .0625. A table of runs says which they were, with digests
of every run's start and end. In `folder` each run is a checkpoint that `patchbay.load` opens, and a call that was cut off, or killed, goes
on bit for bit from its last checkpoint.

The papers behind the objectives stand in their files; the exchange of blocks and the pairing are this project's own. Training objectives:
Guo et al. 2024 and others. A lower loss shows no mechanism: look inside both folders with the finders.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.sweeps.settings import in_turn
from patchbay.train._documents import digest_of, read_whose
from patchbay.train._kept import Kept
from patchbay.train._objectives import objective as read_objective
from patchbay.train._objectives._objective import Objective
from patchbay.train._optimizers import form_of, sparse_of
from patchbay.train._padded import refuse_padding
from patchbay.train._paired import paired
from patchbay.train._panels import compared
from patchbay.train._plan import Arm, plan_of, split
from patchbay.train._runs import PROBED, Lab, Run, cost, curves, equal, run_of

NULLS = ("null", "equal")
PANEL = 16  # held-out documents that the panel reads where the plan does not say


@method(paper="guo2024")
def variant(
    model: Model,
    data: str | list[str] | list[list[int]] | list[list[list[int]]] | list[list[str]],
    *,
    objective: str = "ntp",
    blocks: dict[str, Any] | None = None,
    optimizer: str = "adamw",
    seeds: int = 5,
    folder: str | None = None,
    plan: dict[str, float] | None = None,
) -> Result:
    """Held-out loss of the variant, its twin and the null arm, by seed, and what the variant differs by.

    Main variable `effect` [condition], of variant - twin, null - twin and variant - null, with ends `low` and `high`, `p` and the counts `above`
    and `below`; `by_run` [condition, run] with ends. Tables: `panel`, what the instruments show by reading and condition; `arms` with mean losses, `runs` with digests and folders, `steps` with losses, and with a plan's `curve` what the panel and the held-out loss were on the way, by step (`curves`). With
    `plan={"dry_run": 1}` nothing is trained: main variable `seconds` in all, with `flops`, `bytes` of checkpoints, `memory` and in it the optimizer's `state` [condition], from a few steps.

    `data`: documents: texts, token ids, or lists of units (texts or ids) for objectives that order units; or a file of them, `.txt` by lines or
    `.jsonl` with `text`,
    or `units` where documents have parts. `objective`: what is minimised, `NAME` or `NAME:key=value`, such as `spt` or `impossible:kind=local`: bico,
    cloned, fine-grained, impossible, infill, inverse-rl, label-supervision, langsamp, multi-exit, ntp, pinto, sami, self-evolution, spt, supernet, transfer, translico. `blocks`: what
    `patchbay.blocks.build` puts into the model, as `{"attention": "sigmoid"}`; none as it is. `optimizer`: what moves the weights: adamw; muon or cosmos (as `cosmos:rank=16,ratio=0.2`: so many leading
    directions of a matrix by Adam), which step by the matrices of linear maps, all else by Adam; sparse (as
    `sparse:keep=0.1,over=100`: each matrix keeps its largest entries), lora or lora-sb, as `lora-sb:rank=8`; a run of these two has a LoRA for PEFT beside it, `FOLDER/RUN.adapter`; low-ranks, of a model that was cut (`patchbay.blocks.welore`): its matrices of less than half of their rank alone. `seeds`: how many pairs are trained. `folder`: where checkpoints are
    written and a cut-off call goes on; without, nowhere. `plan`: steps, rate, decay, batch_size, length, held, every, fresh, redraw, panel, curve, equal, window, seed, dry_run.
    """
    given = {"panel": PANEL, **(plan or {})}
    dry = bool(given.pop("dry_run", False))
    how, wanted = plan_of(given), read_objective(objective)
    form_of(optimizer)
    _check(model, seeds)
    sparse = sparse_of(optimizer)
    if sparse is not None and not dry and 0 < how.steps <= sparse.over:
        raise PatchbayError(
            f"optimizer {optimizer!r} keeps more than it should for {sparse.over} steps, and steps={how.steps}: give over= a smaller number"
        )
    documents, whose = read_whose(model, data, how.length)
    train, held = split(len(documents), how.held, whose)
    refuse_padding(model, (sum(map(len, one)) for one in documents))
    arms = {
        "variant": Arm(objective, json.dumps(blocks, sort_keys=True) if blocks else "", optimizer),
        "twin": Arm(wanted.twin),
        "null": Arm(wanted.twin, other_batches=True) if wanted.null is None else Arm(wanted.null),
    }
    of = [whose[i] for i in held] if len(set(whose)) < len(whose) else None  # long texts were cut
    lab = Lab(
        model, [documents[i] for i in train], [documents[i] for i in held], how, whose=of, alone=len(set(whose)) == 1
    )
    same = equal(lab, arms["variant"], arms["twin"]) if how.equal else None
    if same is not None:
        arms["equal"] = same
    if dry:
        return _estimate(lab, arms, seeds)
    with tempfile.TemporaryDirectory() as nowhere:
        request = {"model": model.fingerprint, "data": digest_of(documents, whose), "plan": asdict(how)}
        seeds_of = range(how.seed, how.seed + seeds)
        asked = [(name, seed) for seed in seeds_of for name in arms]
        with Kept(None if folder is None else Path(folder), Path(nowhere), request).alone() as kept:
            runs = {(name, seed): run_of(lab, name, arms[name], seed, kept) for name, seed in in_turn(asked)}
    return _told(lab, wanted, arms, runs, seeds_of)


def _check(model: Model, seeds: int) -> None:
    if seeds < 1:
        raise PatchbayError(f"seeds={seeds}: one pair of runs or more")
    if model._session is not None:
        raise PatchbayError(
            "training inside model.edited(...): the copies would be trained under those edits; leave the block"
        )


def _told(lab: Lab, wanted: Objective, arms: dict[str, Arm], runs: dict[tuple[str, int], Run], seeds: range) -> Result:
    """The contrasts of all pairs, every run, what the panel showed, and what an arm was."""
    scores = {name: torch.stack([runs[name, seed].scores for seed in seeds]) for name in arms}
    nulls = [name for name in NULLS if name in arms]
    found = paired(scores, twin="twin", unit=wanted.unit, nulls=nulls, seeds=list(seeds))
    table = [runs[name, seed].row(name, seed) for name in arms for seed in seeds]
    steps = [{"arm": name, "seed": seed, "step": i, "loss": loss} for name in arms for seed in seeds
             for i, loss in enumerate(runs[name, seed].losses)]  # fmt: skip
    nonzero = {name: runs[name, seeds[0]].nonzero for name in arms}
    said = ", ".join(f"{name} {part:.3g}" for name, part in nonzero.items())
    panels = {name: [runs[name, seed].panel for seed in seeds] for name in arms}
    rows, seen = compared(panels, twin="twin", nulls=nulls, seeds=seeds) if lab.plan.panel else ([], [])
    return Result(
        {name: (found[name], found.axes_of(name), found.units[name]) for name in found.variables},
        coords=found.coords,
        tables={
            **found.tables,
            **({"panel": rows} if rows else {}),
            "runs": table,
            "steps": steps,
            **curves(lab, runs),
        },
        shown=["panel"] if rows else [],
        notes=[
            *found.notes,
            *seen,
            *[
                f"{name}: {_said(arm)}, {runs[name, seeds[0]].weights:,} weights, {runs[name, seeds[0]].state:,} bytes of the optimizer's state"
                for name, arm in arms.items()
            ],
            *_nothing(runs, seeds),
            *[f"of the entries of matrices are not 0: {said}"] * (min(nonzero.values()) < 0.99),
            *_sizes(lab, {name: runs[name, seeds[0]].weights for name in arms}),
            f"trained on {_read(lab)}, scored on {_scored(lab)}; {lab.plan.steps} steps of {lab.plan.batch_size} rows",
        ],
        provenance={"checkpoints": {row["run"]: row["folder"] for row in table}},
    )


def _scored(lab: Lab) -> str:
    """What of the documents is scored, and whether it was learned."""
    if not lab.plan.held:
        return f"{len(lab.held):,} documents, the same: what is scored was learned"
    if lab.whose is None:
        return f"{len(lab.held):,} others"
    of = (
        "the one document, which was cut"
        if lab.alone
        else f"{len(set(lab.whose)):,} documents of which none was trained on"
    )
    return f"{len(lab.held):,} rows of {of}"


def _nothing(runs: dict[tuple[str, int], Run], seeds: range) -> list[str]:
    """That what was asked changed nothing: as units permuted in documents that are one unit each."""
    if any(runs["variant", seed].end != runs["twin", seed].end for seed in seeds):
        return []
    return ["variant and twin end with the same weights: what was asked changes nothing on these documents"]


def _sizes(lab: Lab, weights: dict[str, int]) -> list[str]:
    """What is to be known of arms that are not of one size, or that are by themselves."""
    if lab.plan.equal:
        return [] if "equal" in weights else ["equal: the twin has as many weights and operations as the variant"]
    if weights["variant"] == weights["twin"]:
        return []
    return [
        f"variant and twin differ in size: {weights['variant']:,} weights and {weights['twin']:,}; plan={{'equal': 1, 'fresh': 1}} trains a plain one of as many beside them"
    ]


def _read(lab: Lab) -> str:
    """How much of the documents a run reads."""
    rows, n = lab.plan.steps * lab.plan.batch_size, len(lab.train)
    what = "documents" if lab.whose is None else "rows of documents"
    return f"{rows:,} of {n:,} {what}, each once" if rows < n else f"{n:,} {what}, each read {rows / n:.3g} times"


def _said(arm: Arm) -> str:
    other = ", on other batches" if arm.other_batches else ""
    size = f", MLPs of width {arm.mlp}" if arm.mlp else ""
    more = f", {arm.longer:.3g} times the steps" if arm.longer != 1.0 else ""
    return f"{arm.objective} with {arm.optimizer}{', blocks ' + arm.blocks if arm.blocks else ''}{other}{size}{more}"


def _estimate(lab: Lab, arms: dict[str, Arm], seeds: int) -> Result:
    """What training would cost, from a few steps of each arm."""
    found = {name: cost(lab, arm) for name, arm in arms.items()}
    each = {key: [seeds * found[name][key] for name in arms] for key in ("seconds", "flops", "bytes")}
    return Result(
        {
            "seconds": (sum(each["seconds"]), (), "s"),
            "by_arm": (each["seconds"], ("condition",), "s"),
            "flops": (sum(each["flops"]), (), "operations"),
            "bytes": (sum(each["bytes"]), (), "bytes"),
            "state": ([found[name]["state"] for name in arms], ("condition",), "bytes"),
            "memory": (max(found[name]["memory"] for name in arms), (), "bytes"),
        },
        coords={"condition": list(arms)},
        notes=[
            f"nothing was trained: {seeds} seeds of {len(arms)} arms, {lab.plan.steps} steps each, from the seconds of {PROBED} steps of each; "
            "operations are 6 for each weight and token; bytes are of the checkpoints that stay",
            *[f"{name}: {_said(arm)}, {found[name]['weights']:,.0f} weights" for name, arm in arms.items()],
        ],
    )
