"""One-layer induction: a convolved key knows its predecessor, so that one layer repeats what it has read, and no previous-token head is there.

Networks of one attention layer (and an MLP of one neuron) read strings of random tokens that repeat with a random period. A plain one cannot repeat them: the
key of a token says nothing of the token before it. With a causal convolution of width 3 on queries, keys and values (Yusuf et al. 2023) it can. Then
the taps that look back are cut in the trained network, and all else stays. Arms: convolved, plain on the same strings from the same start, and the
null, convolved on strings that do not repeat. Read are the share of right tokens from the second period on, and what heads look at.

What it does not show: that language models of several layers want such a convolution.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import patchbay as pb
from patchbay.blocks import convolved
from patchbay.draw import screen
from patchbay.draw.report import Section, Table
from patchbay.model.model import Model
from patchbay.stories import _lab
from patchbay.stories._lab import Story, Telling
from patchbay.tiny import lab
from patchbay.train._plan import Arm, plan_of
from patchbay.train._runs import Lab

VOCAB, LENGTH, WIDTH = 32, 32, 3
STEPS, RATE, BATCH, STRINGS = 400, 4e-3, 24, 4096
HELD = 64
ARMS = ("convolved", "plain", "nothing to repeat")


def form() -> Model:
    """The network that is trained where no other is given."""
    return lab.small(VOCAB, layers=1, mlp=1, positions=2 * LENGTH)


def tell(
    model: Model, *, seed: int = 0, report: str | Path, quiet: bool = False, n: int | None = None, folder: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Run the story on networks of this model's form; `n`: held-out strings. Writes the page, returns the numbers."""
    story = Story("one-layer-induction", "Induction in one layer", "Can one layer repeat what it has read, and through what?", VOCAB, _arms,
                  (_repeating, _looking, _cutting), "yusuf2023")  # fmt: skip
    return _lab.tell(story, model, seed=seed, report=report, quiet=quiet, n=n, folder=folder, dry_run=dry_run)


def _arms(telling: Telling) -> _lab.Arms:
    plan = plan_of({"steps": STEPS, "rate": RATE, "batch_size": BATCH, "fresh": True, "length": LENGTH})
    held = telling.found["held"] = lab.repeats(telling.n or HELD, telling.seed + 1, vocab=VOCAB, length=LENGTH)
    train = [[text] for text in lab.repeats(STRINGS, telling.seed, vocab=VOCAB, length=LENGTH)]
    other = [
        [text] for text in lab.repeats(STRINGS, telling.seed, vocab=VOCAB, length=LENGTH, least=LENGTH, most=LENGTH)
    ]
    blocks = json.dumps({"convolution": WIDTH})
    labs = [Lab(telling.model, list(texts), [[text] for text in held], plan) for texts in (train, train, other)]
    return dict(zip(ARMS, zip(labs, (Arm(blocks=blocks), Arm(), Arm(blocks=blocks)), strict=True), strict=True))


def repeated(model: Model, texts: list[list[int]], most: int = 12) -> Tensor:
    """Of each string the share of tokens from place 2 `most` on that the likeliest token is; there every period was read whole."""
    logits = pb.run(model, texts).logits.cpu()
    said = logits[:, :-1].argmax(-1)
    return (said == torch.tensor(texts)[:, 1:])[:, 2 * most :].double().mean(1)


def _repeating(telling: Telling, quiet: bool) -> Section:
    telling.trained(_arms(telling), quiet)
    held = telling.found["held"]
    values = {arm: [repeated(telling.opened(arm, seed), held) for seed in telling.of_seeds] for arm in ARMS}
    told = _lab.arms_section("Repeating what was read", [], values, "share right", "plain", "repeated")
    data = told.data["repeated"]
    means = {arm: sum(row["by_seed"]) / telling.seeds for arm, row in data.items()}
    told.text = [
        f"Of tokens that the string has said before, the likeliest one is right: **{means['convolved']:.0%}** with convolved queries, keys and values, "
        f"**{means['plain']:.0%}** plain, {means['nothing to repeat']:.0%} convolved and trained on strings that do not repeat; a guess is right in "
        f"{1 / VOCAB:.0%}. {telling.seeds} seeds, {STEPS} steps of {BATCH} strings of {LENGTH} tokens.",
    ]
    gap = data["convolved"]
    _lab.judged(
        told,
        bool(gap["above"] == telling.seeds and gap["difference"][1] > 0.3),
        "convolved networks repeat more than plain ones, in every seed, and by more than 0.3 of the tokens",
    )
    return told


def looking(model: Model, seed: int) -> dict[str, float]:
    """The highest head by induction and by attention to the token before, with what even attention gives."""
    with screen.working("looking", quiet=True):
        panel = pb.panel(model, lab.repeats(8, seed, vocab=VOCAB, length=LENGTH), length=LENGTH, repeats=16)
    return {name: float(panel[name].max() if panel[name].ndim else panel[name])
            for name in ("induction", "induction_uniform", "previous_token", "previous_token_uniform")}  # fmt: skip


def _looking(telling: Telling, quiet: bool) -> Section:
    rows, found = [], {}
    with screen.working("looking at heads", quiet=quiet):
        for arm in ARMS[:2]:
            seen = [looking(telling.opened(arm, seed), telling.seed + 2) for seed in telling.of_seeds]
            found[arm] = {key: sum(one[key] for one in seen) / telling.seeds for key in seen[0]}
            rows.append([arm, *found[arm].values()])
    text = [
        "The highest head, mean over seeds: attention to what followed a token the last time, and to the token just before, beside what even attention "
        "gives. A circuit that needs a head for the token before is not here: the convolution is that head.",
    ]
    columns = ("arm", "induction", "even attention", "token before", "even attention ")
    return Section("What heads look at", text, [Table(columns, rows)], data={"looking": found})


def _cutting(telling: Telling, quiet: bool) -> Section:
    """The trained networks with taps cut: the one behind, both, and none."""
    held, ways = telling.found["held"], {"whole": (), "tap 1 cut": (1,), "taps 1 and 2 cut": (1, 2)}
    values: dict[str, list[Tensor]] = {name: [] for name in ways}
    with screen.working("cutting taps", quiet=quiet):
        for seed in telling.of_seeds:
            for name, taps in ways.items():
                model = telling.opened("convolved", seed)
                if taps:
                    convolved.cut(model.hf, taps)
                values[name].append(repeated(model, held))
    told = _lab.arms_section("Cutting the taps", [], values, "share right", "whole", "cut")
    means = {name: sum(row["by_seed"]) / telling.seeds for name, row in told.data["cut"].items()}
    told.text = [
        f"In the trained networks, with nothing trained again: **{means['whole']:.0%}** right whole, **{means['tap 1 cut']:.0%}** without the tap that reads "
        f"the token before, {means['taps 1 and 2 cut']:.0%} without both taps that look back."
    ]
    return told
