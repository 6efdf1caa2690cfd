"""Sinks: heads of the softmax come to rest on the first token when they have nothing to copy, and heads of the sigmoid do not.

Networks of one attention layer read strings in which a trigger is followed by the token before it, and every other token by one that chance draws
(bigram-backcopy); all begin with the same token. A head that copies has work at triggers alone. Arms: softmax; sigmoid with a bias of -log(length); softmax1,
which may attend to nothing; and a learned key of value 0 (K bias). Read is the attention that the start receives from ordinary tokens less what it
receives from triggers, of the head that was chosen on other strings; even attention has none. It is read in the course of training, since softmax1 sinks first and
then lets go. Then the head's output is set to 0, and the loss at triggers and at other tokens is taken apart.

Gu et al. 2024, "When Attention Sink Emerges in Language Models: An Empirical View".

What it does not show: that a sink does harm, or what large models have it for. Where rows do not sum to 1, read `mass` beside attention.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import patchbay as pb
from patchbay.draw import screen
from patchbay.draw.report import Picture, Section, Table
from patchbay.edits import edit
from patchbay.model.model import Model
from patchbay.signal.port import Port
from patchbay.stories import _lab
from patchbay.stories._lab import Story, Telling
from patchbay.tiny import lab
from patchbay.train._plan import Arm, plan_of
from patchbay.train._runs import Lab

VOCAB, LENGTH, TRIGGERS = 64, 32, 3
STEPS, RATE, BATCH, STRINGS, EVERY = 480, 3e-3, 16, 4096, 60
HELD, WATCHED = 64, 16
KINDS = {
    "softmax": None,
    "sigmoid": {"kind": "sigmoid", "bias": -math.log(LENGTH)},
    "softmax1": "softmax1",
    "K bias": "k_bias",
}


def form() -> Model:
    """The network that is trained where no other is given."""
    return lab.small(VOCAB, layers=1, heads=2, mlp=1, positions=2 * LENGTH)


def tell(
    model: Model, *, seed: int = 0, report: str | Path, quiet: bool = False, n: int | None = None, folder: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Run the story on networks of this model's form; `n`: held-out strings. Writes the page, returns the numbers."""
    story = Story("sinks", "Attention that rests", "When do heads rest on the first token, and which kinds of attention need not?", VOCAB, _arms,
                  (_resting, _by_step, _removing), "gu2024")  # fmt: skip
    return _lab.tell(story, model, seed=seed, report=report, quiet=quiet, n=n, folder=folder, dry_run=dry_run)


def _arms(telling: Telling) -> _lab.Arms:
    held = [
        text
        for text in lab.backcopies(4 * (telling.n or HELD), telling.seed + 1, length=LENGTH)
        if triggers([text]).sum() > 1
    ]
    held = telling.found["held"] = held[: telling.n or HELD]
    train: list[Any] = [[text] for text in lab.backcopies(STRINGS, telling.seed, length=LENGTH)]
    plan = plan_of({"steps": STEPS, "rate": RATE, "batch_size": BATCH, "fresh": True, "length": LENGTH})
    few = held[:WATCHED]
    shared = Lab(
        telling.model, train, [[text] for text in held], plan, watch=(EVERY, lambda model: list(highest(model, few)))
    )
    blocks = {arm: "" if kind is None else json.dumps({"attention": kind}) for arm, kind in KINDS.items()}
    return {arm: (shared, Arm(blocks=asked)) for arm, asked in blocks.items()}


def triggers(texts: list[list[int]]) -> Tensor:
    """Where a trigger is read, behind the second token: bool [text, position]."""
    ids = torch.tensor(texts)
    return (ids >= 1) & (ids <= TRIGGERS) & (torch.arange(ids.shape[1]) > 1)


def resting(model: Model, texts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Attention to the first token from ordinary tokens and from triggers, each [layer, head, text]: means over positions behind the second."""
    ports = [Port("attn.pattern", i) for i in range(model.n_layers)]
    trace = pb.run(model, texts, taps=ports, logits="last")
    first = torch.stack([trace[port][..., 0].double().cpu() for port in ports])  # [layer, text, head, query]
    at = triggers(texts)
    other = ~at & (torch.arange(at.shape[1]) > 1)
    means = [torch.einsum("lthq,tq->lht", first, chosen.double()) / chosen.sum(1) for chosen in (other, at)]
    return means[0], means[1]


def highest(model: Model, texts: list[list[int]]) -> tuple[float, float, float]:
    """Of the head that rests most on these texts: attention to the start from ordinary tokens and from triggers; and the mean sum of a row."""
    other, at = (one.mean(2) for one in resting(model, texts))
    best = int((other - at).argmax())
    mass = pb.find.attention_sinks(model, texts, length=LENGTH)["mass"]
    return float(other.flatten()[best]), float(at.flatten()[best]), float(mass.mean())


def chosen(model: Model, texts: list[list[int]]) -> tuple[int, int]:
    """The layer and head with the largest difference on the first half of the texts."""
    other, at = (one[..., : len(texts) // 2].mean(2) for one in resting(model, texts))
    layer, head = divmod(int((other - at).argmax()), other.shape[1])
    return layer, head


def even() -> float:
    """What even attention gives the first token, mean over positions behind the second."""
    return sum(1 / i for i in range(3, LENGTH + 1)) / (LENGTH - 2)


def _resting(telling: Telling, quiet: bool) -> Section:
    telling.found["runs"] = runs = telling.trained(_arms(telling), quiet)
    held = telling.found["held"]
    half = len(held) // 2
    values: dict[str, list[Tensor]] = {arm: [] for arm in KINDS}
    rows = []
    for arm in KINDS:
        seen = []
        for seed in telling.of_seeds:
            model = telling.opened(arm, seed)
            layer, head = chosen(model, held)
            other, at = (one[layer, head, half:] for one in resting(model, held))
            values[arm].append(other - at)
            sinks = pb.find.attention_sinks(model, held[half:], length=LENGTH)
            seen.append(
                [
                    float(other.mean()),
                    float(at.mean()),
                    *[float(sinks[name][layer, head]) for name in ("mass", "value_norm")],
                ]
            )
        loss = sum(float(run.scores.mean()) for run in runs[arm]) / telling.seeds
        rows.append([arm, *torch.tensor(seen).mean(0).tolist(), loss])
    told = _lab.arms_section("Resting on the start", [], values, "attention", "softmax", "resting")
    columns = ("arm", "from ordinary tokens", "from triggers", "a row's sum", "value's norm, of others'", "loss, nats")
    told.tables.append(Table(columns, rows, f"the head, means over seeds; even attention gives {even():.3f}"))
    data = told.data["resting"]
    means = {arm: sum(row["by_seed"]) / telling.seeds for arm, row in data.items()}
    told.text = [
        "Attention to the start from ordinary tokens, less that from triggers, of the head that was chosen on the other half of the strings: "
        + ", ".join(f"**{arm} {value:.2f}**" for arm, value in means.items())
        + f"; even attention gives none, and the start {even():.2f}. {telling.seeds} seeds, {STEPS} steps of {BATCH} strings of {LENGTH} tokens.",
    ]
    gap = data["sigmoid"]
    _lab.judged(
        told,
        bool(min(data["softmax"]["by_seed"]) > even() and gap["below"] == telling.seeds and gap["difference"][2] < 0),
        "softmax heads rest on the start by more than even attention gives it, in every seed, and sigmoid heads by less than softmax heads, in every seed",
    )
    told.data |= {"even": even(), "heads": {row[0]: row[1:] for row in rows}}
    return told


def _by_step(telling: Telling, quiet: bool) -> Section:
    """What was watched in the course of training."""
    curves, few = {}, telling.found["held"][:WATCHED]
    for arm, runs in telling.found["runs"].items():
        ends = [highest(telling.opened(arm, seed), few) for seed in telling.of_seeds]
        each = [[*run.seen, end] for run, end in zip(runs, ends, strict=True)]
        seen = torch.tensor(each, dtype=torch.float64).mean(0)  # [step, reading]
        curves[arm] = {
            "step": [min(EVERY * i, STEPS) for i in range(len(seen))],
            "attention": seen[:, 0].tolist(),
            "mass": seen[:, 2].tolist(),
        }
    text = [sentence(arm, row["step"], row["attention"], row["mass"]) for arm, row in curves.items()]
    rows = [
        [step, *[row["attention"][i] for row in curves.values()]] for i, step in enumerate(curves["softmax"]["step"])
    ]
    lines = {arm: (row["step"], row["attention"]) for arm, row in curves.items()}
    return Section(
        "At which step",
        text,
        [
            Table(
                ("step", *curves),
                rows,
                "attention to the start from ordinary tokens, of the head that then rests most; mean over seeds",
            )
        ],
        [Picture(partial(_lab.curves, lines, "step", "attention"), "Attention to the start, mean over seeds.")],
        {"by_step": curves},
    )


def sentence(arm: str, steps: list[int], attention: list[float], mass: list[float]) -> str:
    """When an arm's attention first passed twice what is even, where it was highest, and where it was below half of that again."""
    first = next((step for step, one in zip(steps, attention, strict=True) if one > 2 * even()), None)
    if first is None:
        return f"{arm}: never above twice what even attention gives; a row sums to {mass[-1]:.2f} at step {steps[-1]}."
    top = max(range(len(steps)), key=attention.__getitem__)
    gone = next(
        (step for step, one in list(zip(steps, attention, strict=True))[top:] if one < attention[top] / 2), None
    )
    left = "and stays" if gone is None else f"and below half of it from step {gone} on" if all(
        one < attention[top] / 2 for step, one in zip(steps, attention, strict=True) if step >= gone) else f"below half of it at step {gone}"  # fmt: skip
    return f"{arm}: above twice even attention from step {first}, highest ({attention[top]:.2f}) at step {steps[top]}, {left}; a row sums to {mass[-1]:.2f} at step {steps[-1]}."


def costs(model: Model, texts: list[list[int]], layer: int, head: int) -> tuple[Tensor, Tensor]:
    """What the loss of the next token gains at triggers and at other tokens when the head writes nothing, each [text], nats."""
    ids = torch.tensor(texts)

    def losses(edits: list[Any]) -> Tensor:
        logits = pb.run(model, texts, edits=edits).logits[:, :-1].cpu().double()
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(
            len(ids), -1
        )

    gained = losses([edit.zero(Port("attn.z", layer, head))]) - losses([])
    at = triggers(texts)[:, :-1]
    return (gained * at).sum(1) / at.sum(1).clamp(min=1), (gained * ~at).sum(1) / (~at).sum(1)


def _removing(telling: Telling, quiet: bool) -> Section:
    held = telling.found["held"]
    half = len(held) // 2
    values: dict[str, list[Tensor]] = {"at triggers": [], "at other tokens": []}
    with screen.working("setting heads to 0", quiet=quiet):
        for seed in telling.of_seeds:
            model = telling.opened("softmax", seed)
            found = costs(model, held[half:], *chosen(model, held))
            for name, one in zip(values, found, strict=True):
                values[name].append(one)
    told = _lab.arms_section("Without the head that rests", [], values, "nats", "at other tokens", "removed")
    means = {name: sum(row["by_seed"]) / telling.seeds for name, row in told.data["removed"].items()}
    told.text = [
        f"In the softmax networks, with what the head writes set to 0, the next token costs **{means['at triggers']:+.2f}** nats at triggers and "
        f"**{means['at other tokens']:+.2f}** at other tokens, from where it looks at the start: it rests where it has nothing to do."
        if means["at triggers"] > abs(means["at other tokens"])
        else f"What the head writes is worth {means['at triggers']:+.2f} nats at triggers and {means['at other tokens']:+.2f} at other tokens: "
        "this head does not copy."
    ]
    return told
