"""Corpus transfer: strings that repeat plant a head of induction, which survives new tokens and serves a text in which names return.

A small network is trained on strings that mean nothing; the rows of its tokens are drawn anew, and it is trained on a little text of another language: words that follow
one another by chance, among them names of two tokens that were drawn for this text alone and return. Arms by what was read before: strings that repeat, brackets that
close, and, the null, tokens that follow from nothing; the twin has read nothing. All begin with the same rows of tokens. Measured is what the second token of a name costs when
the name returns, and the loss of the rest; then heads are cut in the child, and the tap by which a key knows the token before it.

Yao et al. 2022, "Linking Emergent and Natural Languages via Corpus Transfer", whose source is the language of playing agents; Papadimitriou and Jurafsky 2020.

What it does not show: how large models gain from such languages. Queries, keys and values are convolved here (`blocks.convolved`), so that induction is learned in seconds.
"""

from __future__ import annotations

import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import patchbay as pb
from patchbay.blocks import convolved
from patchbay.draw import screen
from patchbay.draw.report import Picture, Section, Table
from patchbay.edits import edit
from patchbay.model.load import load
from patchbay.model.model import Model
from patchbay.signal.port import Port
from patchbay.stories import _lab
from patchbay.stories._lab import Story, Telling
from patchbay.tiny import lab
from patchbay.train._plan import Arm, plan_of
from patchbay.train._runs import Lab

VOCAB, LENGTH = 64, 32
BEFORE, STEPS, RATE, BATCH, EVERY = 250, 80, 4e-3, 16, 16
TEXTS, HELD, WATCHED = 256, 64, 24
ARMS = {"repeats": "repeats", "brackets": "nested", "nothing follows": "independent", "nothing before": None}
Text = tuple[list[int], list[int]]  # tokens, and the places of second tokens of names that return


def form() -> Model:
    """The network that is trained where no other is given: one layer, its queries, keys and values convolved."""
    return load(pb.blocks.build(lab.small(VOCAB, layers=1, mlp=64, positions=2 * LENGTH).hf, convolution=3))


def tell(
    model: Model, *, seed: int = 0, report: str | Path, quiet: bool = False, n: int | None = None, folder: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Run the story on networks of this model's form; `n`: held-out texts. Writes the page, returns the numbers."""
    story = Story("corpus-transfer", "What strings that mean nothing teach", "Does a head of induction survive new tokens, and serve?", VOCAB, _arms,
                  (_served, _by_step, _cut), "yao2022")  # fmt: skip
    return _lab.tell(story, model, seed=seed, report=report, quiet=quiet, n=n, folder=folder, dry_run=dry_run)


def _arms(telling: Telling) -> _lab.Arms:
    held = [
        one for one in lab.mentions(4 * (telling.n or HELD), telling.seed + 1000, vocab=VOCAB, length=LENGTH) if one[1]
    ][: telling.n or HELD]
    telling.found["held"] = held
    train: list[Any] = [[ids] for ids, _ in lab.mentions(TEXTS, telling.seed, vocab=VOCAB, length=LENGTH)]
    plan = plan_of({"steps": STEPS, "rate": RATE, "batch_size": BATCH, "fresh": True, "redraw": True, "length": LENGTH})
    few = held[:WATCHED]
    shared = Lab(
        telling.model,
        train,
        [[ids] for ids, _ in held],
        plan,
        watch=(EVERY, lambda model: float(returning(model, few).mean())),
    )
    before = f"steps={BEFORE},vocab={VOCAB},length={LENGTH}"
    return {arm: (shared, Arm(f"transfer:source={kind},{before}" if kind else "ntp")) for arm, kind in ARMS.items()}


def returning(model: Model, held: list[Text], edits: Any = ()) -> Tensor:
    """Mean - log p of the second tokens of names that return, nats, float64 [text]."""
    logits = pb.run(model, [ids for ids, _ in held], edits=list(edits)).logits.cpu().double()
    said = torch.log_softmax(logits, -1)
    return torch.stack(
        [
            -torch.stack([row[at - 1, ids[at]] for at in places]).mean()
            for row, (ids, places) in zip(said, held, strict=True)
        ]
    )


def others(model: Model, held: list[Text], edits: Any = ()) -> Tensor:
    """The same of all other tokens but the first."""
    logits = pb.run(model, [ids for ids, _ in held], edits=list(edits)).logits.cpu().double()
    said = torch.log_softmax(logits, -1)
    return torch.stack([
        -torch.stack([row[at - 1, ids[at]] for at in range(1, len(ids)) if at not in places]).mean() for row, (ids, places) in zip(said, held, strict=True)
    ])  # fmt: skip


def twice(seed: int) -> list[list[int]]:
    """Strings of different tokens that are said twice, for the finder of induction."""
    rng = random.Random(f"twice {seed}")
    drawn = [rng.sample(range(VOCAB), LENGTH // 2) for _ in range(8)]
    return [one + one for one in drawn]


def _served(telling: Telling, quiet: bool) -> Section:
    telling.found["runs"] = telling.trained(_arms(telling), quiet, "before and after")
    held = telling.found["held"]
    values: dict[str, list[Tensor]] = {arm: [] for arm in ARMS}
    rest: dict[str, list[float]] = {arm: [] for arm in ARMS}
    rows = []
    for arm in ARMS:
        seen = []
        for seed in telling.of_seeds:
            model = telling.opened(arm, seed)
            values[arm].append(returning(model, held))
            looks = pb.find.induction_heads(model, twice(seed))
            rest[arm].append(float(others(model, held).mean()))
            seen.append([rest[arm][-1], float(looks.values.max()), float(looks["uniform"])])
        rows.append([arm, *torch.tensor(seen).mean(0).tolist()])
    told = _lab.arms_section("Names that return", [], values, "nats", "nothing before", "returning")
    told.tables.append(
        Table(
            ("read before", "other tokens, nats", "highest head of induction", "even attention"),
            rows,
            "the children, means over seeds",
        )
    )
    means = {arm: sum(row["by_seed"]) / telling.seeds for arm, row in told.data["returning"].items()}
    told.text = [
        f"After {STEPS} steps on {TEXTS} texts the second token of a name that returns costs "
        + ", ".join(f"**{value:.2f}** ({arm})" for arm, value in means.items())
        + f" nats; a guess among names costs {math.log(VOCAB // 2):.2f}. {telling.seeds} seeds, {BEFORE} steps before, of {BATCH} texts of {LENGTH} tokens.",
        _elsewhere(rest["repeats"], rest["nothing before"]),
    ]
    gap, null = (told.data["returning"][arm] for arm in ("repeats", "nothing follows"))
    _lab.judged(
        told,
        bool(gap["below"] == telling.seeds and gap["difference"][2] < min(0.0, null["difference"][1])),
        "a returning name costs less after strings that repeat than after nothing, in every seed, and by more than after tokens that follow from nothing",
    )
    told.data |= {"others": rest, "children": {row[0]: row[1:] for row in rows}}
    return told


def _elsewhere(after: list[float], before: list[float]) -> str:
    """What the rest of the text costs after repeats and after nothing, by seed."""
    above = sum(one > other for one, other in zip(after, before, strict=True))
    return (
        f"The rest of the text costs **{sum(after) / len(after):.2f}** nats a token after strings that repeat and {sum(before) / len(before):.2f} after nothing: "
        f"more in {above} of {len(after)} seeds."
    )


def _by_step(telling: Telling, quiet: bool) -> Section:
    steps, few = [*range(0, STEPS, EVERY), STEPS], telling.found["held"][:WATCHED]
    curves = {}
    for arm, runs in telling.found["runs"].items():
        ends = [float(returning(telling.opened(arm, seed), few).mean()) for seed in telling.of_seeds]
        seen = [[*run.seen, end] for run, end in zip(runs, ends, strict=True)]
        curves[arm] = torch.tensor(seen, dtype=torch.float64).mean(0).tolist()
    rows = [[step, *[curve[i] for curve in curves.values()]] for i, step in enumerate(steps)]
    picture = Picture(
        partial(_lab.curves, {arm: (steps, curve) for arm, curve in curves.items()}, "step", "nats"),
        "What a returning name costs in the course of training.",
    )
    text = ["Before the first step the rows of tokens are new in all arms; what differs is the body."]
    return Section(
        "In the course of training",
        text,
        [Table(("step", *curves), rows, f"nats, mean over seeds, of {len(few)} of the held-out texts")],
        [picture],
        {"by_step": {"step": steps, **curves}},
    )


def _cut(telling: Telling, quiet: bool) -> Section:
    """The children that read repeats: the head of induction cut, each of the others, and, where keys are convolved, the tap that reads the token before."""
    held = telling.found["held"]
    values: dict[str, list[Tensor]] = {"head of induction": [], "another head": []}
    tapped: list[Tensor] = []
    rest: list[float] = []
    with screen.working("cutting", quiet=quiet):
        for seed in telling.of_seeds:
            model = telling.opened("repeats", seed)
            whole, plain = returning(model, held), others(model, held)
            scores = pb.find.induction_heads(model, twice(seed)).values
            layer, head = divmod(int(scores.argmax()), scores.shape[1])
            heads = [(i, h) for i in range(model.n_layers) for h in range(model.n_heads(i))]
            cost = {one: returning(model, held, [edit.zero(Port("attn.z", *one))]) - whole for one in heads}
            values["head of induction"].append(cost.pop((layer, head)))
            values["another head"].append(torch.stack(list(cost.values())).mean(0))
            if "convolution" in (getattr(model.config, "blocks", None) or {}):
                convolved.cut(model.hf, (1,))
                tapped.append(returning(model, held) - whole)
                rest.append(float((others(model, held) - plain).mean()))
    if tapped:
        values["tap cut"] = tapped
    told = _lab.arms_section("Cutting what serves", [], values, "nats", "another head", "cut")
    means = {name: sum(row["by_seed"]) / telling.seeds for name, row in told.data["cut"].items()}
    alone = told.data["cut"]["head of induction"]["above"] == telling.seeds
    told.text = [
        f"In the children of repeats a returning name costs **{means['head of induction']:+.2f}** nats more without the head that looks most at what followed, and {means['another head']:+.2f} without one of the others: "
        + (
            "that head serves."
            if alone
            else "no head serves alone; they share the work, and the highest look is not the largest part of it."
        ),
        *(
            [
                f"Without the tap by which a key knows the token before it, **{means['tap cut']:+.2f}** nats more, and {sum(rest) / len(rest):+.2f} for other tokens."
            ]
            if tapped
            else []
        ),
    ]
    told.data["cut_elsewhere"] = rest
    return told
