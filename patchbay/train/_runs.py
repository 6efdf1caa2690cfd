"""One run of the lab: its start, its training, its held-out scores and what is told of it; and what runs would cost."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchbay.blocks import build
from patchbay.corpus.synthetic import texts
from patchbay.model.load import load
from patchbay.model.model import Model
from patchbay.results.method import seeded
from patchbay.results.untrained import untrained
from patchbay.signal.port import PatchbayError
from patchbay.train import _together
from patchbay.train._copies import copied, write
from patchbay.train._equal import of_width, operations, width
from patchbay.train._kept import CAME, TOLD, Kept
from patchbay.train._low_rank import adapter
from patchbay.train._objectives import objective
from patchbay.train._objectives._objective import Before, Document, Objective
from patchbay.train._optimizers import form_of
from patchbay.train._padded import refuse_padding
from patchbay.train._panels import Readings, means, read
from patchbay.train._plan import Arm, Plan, Rows
from patchbay.train._sparse import nonzero
from patchbay.train._trainer import Watch, memory_named, trained

PROBED = 4  # steps that an estimate is made of, from start to start; the first is left out
TEXTS = 8192  # of a synthetic language; beyond that they are read again


@dataclass(frozen=True)
class Lab:
    """What all runs of a call share."""

    model: Model
    train: list[Document]
    held: list[Document]
    plan: Plan
    parents: dict[Any, dict[str, Tensor]] | None = (
        None  # weights after pre-training, where several runs begin with the same
    )
    watch: Watch | None = None
    whose: list[int] | None = None  # of which document each held-out row is a piece; None: each is one
    alone: bool = False  # whether all rows, those trained on too, are pieces of one document


@dataclass(frozen=True)
class Run:
    """What came of a run; `scores` [document] are nats per token."""

    scores: Tensor
    losses: list[float]
    start: str
    end: str
    folder: str | None
    seen: list[Any] = field(default_factory=list)  # what the lab watched, by step
    panel: Readings = field(default_factory=dict)
    weights: int = 0
    nonzero: float = 1.0  # share of the entries of matrices
    state: int = 0  # bytes of the optimizer's

    def row(self, name: str, seed: int) -> dict[str, Any]:
        return {"run": f"{name}-{seed}", "arm": name, "seed": seed, "loss": float(self.scores.mean()), "start": self.start, "end": self.end,
                "nonzero": self.nonzero, "state_bytes": self.state, "folder": self.folder}  # fmt: skip


def lengthened(plan: Plan, arm: Arm) -> Plan:
    """The plan of an arm: as many steps, or `longer` times as many."""
    return plan if arm.longer == 1.0 else dataclasses.replace(plan, steps=round(plan.steps * arm.longer))


def begun(lab: Lab, arm: Arm, seed: int, *, pretrain: bool = True) -> Model:
    """The weights that a run starts from: the lent ones, or drawn by the seed; the same for all arms of a seed where shapes agree."""
    found = parent_of(lab, arm, seed, pretrain=pretrain)
    if arm.mlp:
        found = of_width(lab.model, arm.mlp, found, seed)
    if lab.plan.redraw:  # to the bit the rows of an arm that reads nothing before its data
        redrawn(found, seed, found if objective(arm.objective).before is None else _start(lab, seed))
    if arm.blocks:
        with seeded(seed):  # of what is new; what has its place still keeps the plain start
            found = load(build(found.hf, **json.loads(arm.blocks)), lab.model.tokenizer)
        refuse_padding(found, (sum(map(len, one)) for one in lab.train))
    return found


def parent_of(lab: Lab, arm: Arm, seed: int, *, pretrain: bool = True) -> Model:
    """The weights before the rows of tokens are drawn anew: lent or drawn, and trained on the language that the objective reads before its data."""
    found = _start(lab, seed)
    aim = objective(arm.objective)
    before = aim.before
    if before is not None and not lab.plan.redraw:
        raise PatchbayError(
            f"{arm.objective} draws the rows of tokens anew: give the plan redraw=1, so that those of the twin are drawn alike"
        )
    if before is not None and before.steps and pretrain:
        aim.adapt(found)
        _pretrained(found, before, lab, seed)
    return found


def _start(lab: Lab, seed: int) -> Model:
    if not lab.plan.fresh:
        return copied(lab.model)
    drawn = untrained(lab.model, seed)
    if isinstance(drawn, str):
        raise PatchbayError(f"no fresh weights of this {lab.model.family.name} model: {drawn}")
    return drawn


def _pretrained(model: Model, before: Before, lab: Lab, seed: int) -> None:
    """Train in place on texts that mean nothing, or put the weights there that another run of the lab began with."""
    plan = dataclasses.replace(lab.plan, steps=before.steps)
    key = (before, seed, plan.rate, plan.decay, plan.batch_size, plan.fresh, lab.model.fingerprint)
    if lab.parents is not None and key in lab.parents:
        model.hf.load_state_dict(lab.parents[key])
    else:
        n = min(before.steps * plan.batch_size, TEXTS)
        said: list[Document] = [
            [text] for text in texts(before.source, n, seed, vocab=before.vocab, length=before.length)
        ]
        nowhere = Path(tempfile.gettempdir())
        trained(model, Rows(said, Arm(), plan, seed), Arm(), plan, nowhere, keep=False)
        if lab.parents is not None:
            lab.parents[key] = {name: value.clone() for name, value in model.hf.state_dict().items()}
    model._fingerprint = None


@torch.no_grad()
def redrawn(model: Model, seed: int, own: Model) -> None:
    """Draw the rows of tokens anew, each table with the mean and deviation that it has in `own`; tied tables stay one."""
    draw = torch.Generator().manual_seed(seed)
    drawn: dict[int, Tensor] = {}
    for table, scale in zip(_tables(model), _tables(own), strict=True):
        if id(table) not in drawn:
            drawn[id(table)] = (
                torch.randn(table.shape, generator=draw) * scale.float().std().cpu() + scale.float().mean().cpu()
            )
    for table in _tables(model):
        table.copy_(drawn[id(table)])
    model._fingerprint = None


def _tables(model: Model) -> list[Tensor]:
    """The embedding's and the unembedding's weights, which may be one."""
    return [table.weight for table in (model.hf.get_input_embeddings(), model.hf.get_output_embeddings())]


def run_of(lab: Lab, name: str, arm: Arm, seed: int, kept: Kept) -> Run:
    """Train and score one arm of one seed, or take what is there of it already."""
    if (same := kept.made.get((arm, seed))) is not None and kept.folder is None:
        return same  # type: ignore[no-any-return]
    called, spec = f"{name}-{seed}", dataclasses.asdict(arm)
    told = kept.finished(called, spec)
    if told is None:
        with memory_named(None if kept.folder is None else kept.at_work(called)):
            told = _made(lab, called, arm, seed, kept)
    kept.end(called)
    folder = None if kept.folder is None else str(kept.folder / called)
    came = {key: told[key] for key in CAME}
    came["scores"] = torch.tensor(came["scores"], dtype=torch.float64)
    found = kept.made[arm, seed] = Run(**came, folder=folder)
    return found


def _made(lab: Lab, called: str, arm: Arm, seed: int, kept: Kept) -> dict[str, Any]:
    """Train, score and write a run; what is told of it is what every later call reads, wherever that opens the weights."""
    model, aim, plan = begun(lab, arm, seed), objective(arm.objective), lengthened(lab.plan, arm)
    told: dict[str, Any] = {"arm": dataclasses.asdict(arm), "start": model.fingerprint}
    aim.adapt(model)
    rows, place, keep = Rows(lab.train, arm, plan, seed), kept.at_work(called), kept.folder is not None
    found = trained(model, rows, arm, plan, place, keep=keep, watch=lab.watch or curve_of(lab, aim))
    told |= found._asdict()
    aim.leave(model)
    model._fingerprint = None
    told |= {"end": model.fingerprint, "weights": sum(p.numel() for p in model.hf.parameters())}
    told |= {"nonzero": nonzero(model.hf), "scores": by_document(lab, aim.scores(model, lab.held)).tolist()}
    told["panel"] = read(model, lab.held, aim, lab.plan.panel) if lab.plan.panel else {}
    if kept.folder is not None and _together.first():
        _adapted(lab, arm, seed, model, kept.folder / f"{called}.adapter")
        write(lab.model, model, kept.folder / called, {TOLD: json.dumps(told)})
    _together.wait()
    return told


def curve_of(lab: Lab, aim: Objective) -> Watch | None:
    """The panel's readings, as means, and the held-out loss, every so many steps of the plan."""
    if not lab.plan.curve:
        return None

    def seen(model: Model) -> dict[str, float]:
        panel = read(model, lab.held, aim, lab.plan.panel) if lab.plan.panel else {}
        return {**means(panel), "loss": float(by_document(lab, aim.scores(model, lab.held)).mean())}

    return lab.plan.curve, seen


def curves(lab: Lab, runs: dict[tuple[str, int], Run]) -> dict[str, list[dict[str, Any]]]:
    """What was read of every run on the way, and at its end: a row for each reading."""
    rows = [
        {
            "arm": name,
            "seed": seed,
            "step": min(i * lab.plan.curve, len(run.losses)),
            "reading": reading,
            "value": value,
        }
        for (name, seed), run in runs.items()
        for i, seen in enumerate([*run.seen, {**means(run.panel), "loss": float(run.scores.mean())}])
        for reading, value in seen.items()
    ]
    return {"curves": rows} if lab.plan.curve else {}


def by_document(lab: Lab, scores: Tensor) -> Tensor:
    """Scores of held-out rows [row] as means over the tokens of each document [document]."""
    if lab.whose is None:
        return scores
    of = torch.tensor([sorted(set(lab.whose)).index(one) for one in lab.whose])
    n = torch.tensor([sum(map(len, one)) - 1 for one in lab.held], dtype=torch.float64)
    sums = torch.zeros(2, int(of.max()) + 1, dtype=torch.float64).index_add_(1, of, torch.stack([scores * n, n]))
    return sums[0] / sums[1]


def _adapted(lab: Lab, arm: Arm, seed: int, tuned: Model, folder: Path) -> None:
    """The plain LoRA of a run that was tuned in low rank from weights that lie somewhere."""
    form = form_of(arm.optimizer)
    if form is not None and not (lab.plan.fresh or lab.plan.redraw or arm.blocks):
        adapter(begun(lab, arm, seed), tuned, form.rank, folder)


def ended(lab: Lab, arm: Arm, seed: int) -> Model:
    """The model that a run ends with; nothing is written."""
    model, aim, plan = begun(lab, arm, seed), objective(arm.objective), lengthened(lab.plan, arm)
    aim.adapt(model)
    trained(model, Rows(lab.train, arm, plan, seed), arm, plan, Path(tempfile.gettempdir()), keep=False)
    aim.leave(model)
    model._fingerprint = None
    return model


def cost(lab: Lab, arm: Arm) -> dict[str, float]:
    """Seconds, operations, bytes of the checkpoint and memory of one run, from a few of its steps on a copy."""
    model, aim = begun(lab, arm, 0, pretrain=False), objective(arm.objective)
    aim.adapt(model)
    n = sum(p.numel() for p in model.hf.parameters())
    rows = Rows(lab.train, arm, dataclasses.replace(lab.plan, steps=PROBED), 0)
    with memory_named(None):
        _, starts, state = trained(
            model,
            rows,
            arm,
            rows.plan,
            Path(tempfile.gettempdir()),
            keep=False,
            watch=(1, lambda _: time.perf_counter()),
        )
    each = (starts[-1] - starts[1]) / (PROBED - 2)
    tokens = sum(len(rows[i][0]) for i in range(len(rows))) / PROBED
    steps = lengthened(lab.plan, arm).steps + (aim.before.steps if aim.before is not None else 0)
    size = next(model.hf.parameters()).element_size()
    return {"seconds": each * steps, "flops": 6.0 * n * tokens * steps, "bytes": float(n * size), "state": float(state),
            "memory": float(2 * n * size + state), "weights": float(n)}  # weights, gradients and the optimizer's state; activations come on top  # fmt: skip


def equal(lab: Lab, arm: Arm, twin: Arm) -> Arm | None:
    """The twin with as many weights as a variant has, else with as many operations; None where it has as many of both."""
    seed = lab.plan.seed
    one, other = (begun(lab, each, seed, pretrain=False) for each in (arm, twin))
    n, plain = (sum(p.numel() for p in model.hf.parameters()) for model in (one, other))
    if n != plain:
        if not lab.plan.fresh:
            raise PatchbayError(
                f"equal: the variant has {n:,} weights and its twin {plain:,}; a plain model of as many has other shapes, and so is drawn anew: plan={{'fresh': 1}}"
            )
        return dataclasses.replace(twin, mlp=width(lab.model, n))
    aim = objective(arm.objective)
    aim.adapt(one)
    rows = [Rows(lab.train, each, lab.plan, seed) for each in (arm, twin)]
    ratio = operations(one, rows[0], arm.objective) / operations(other, rows[1], twin.objective)
    ratio += 0 if aim.before is None else aim.before.steps / max(1, lab.plan.steps)
    return None if abs(ratio - 1.0) < 0.01 else dataclasses.replace(twin, longer=ratio)
