"""Impossible languages: the same stretches of text in orders that no people speak; how well they are learned, and what heads then look at.

Small networks read stretches of stories as they stand (control), backwards, with windows of three tokens shuffled, shuffled whole in an order that is fixed for each length,
or in an order that is new each time (random). All are next-token prediction on the same tokens. The null is control on other batches. What is learned
is held to what counting pairs of tokens gives, since a shuffled text may be no harder but less determined. Then the same on stretches of three lengths alone, where a
shuffle is three orders and not two dozen: that tells the disorder from the number of orders. Of each network the panel is read on its own language.

Kallini et al. 2024, "Mission: Impossible Language Models", whose order by loss is of GPT-2; languages whose verbs hop are not here.

What it does not show: that people or large models find the same hard. Stories of a small grammar have few orders of words.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from patchbay.corpus.languages import ngram_loss
from patchbay.draw import screen
from patchbay.draw.report import Section, Table
from patchbay.model.load import load
from patchbay.model.model import Model
from patchbay.stories import _lab
from patchbay.stories._lab import Story, Telling
from patchbay.tiny import lab
from patchbay.train._objectives import objective
from patchbay.train._panels import compared
from patchbay.train._plan import Arm, plan_of
from patchbay.train._runs import Lab

LEAST, MOST, FEW = 12, 35, (12, 20, 28)
STEPS, RATE, BATCH, PIECES, HELD, PANEL = 120, 4e-3, 24, 2400, 96, 16
NULL = "control again"
ARMS = ("control", NULL, "reversed", "local", "shuffled", "random")
FEWER = ("control, three lengths", "shuffled, three lengths")
READ = {
    "previous_token_highest": "attention to the token before, highest head",
    "previous_token_mean": "attention to the token before, mean of heads",
    "alpha_highest": "attention to the first token, highest head",
    "kl_mean": "logit lens from the last layer, nats",
    "isotropy_mean": "isotropy, 1 - cosine",
}


def form() -> Model:
    """The network that is trained where no other is given: a small one with the tokens of the built-in model."""
    tiny = load("tiny")
    return load(lab.small(tiny.vocab_size, width=48, mlp=96).hf, tiny.tokenizer)


def tell(
    model: Model, *, seed: int = 0, report: str | Path, quiet: bool = False, n: int | None = None, folder: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Run the story on networks of this model's form and tokens; `n`: held-out stretches. Writes the page, returns the numbers."""
    story = Story("impossible-languages", "Languages that nobody speaks", "Are they learned, and by which heads?", 1, _arms,
                  (_learned, _few, _panel), "kallini2024")  # fmt: skip
    return _lab.tell(story, model, seed=seed, report=report, quiet=quiet, n=n, folder=folder, dry_run=dry_run)


def _arms(telling: Telling) -> _lab.Arms:
    plan = {"steps": STEPS, "rate": RATE, "batch_size": BATCH, "fresh": True, "length": MOST}
    labs = []
    for lengths, looked in ((tuple(range(LEAST, MOST + 1)), PANEL), (FEW, 0)):
        held = telling.n or HELD
        pieces: list[Any] = [[one] for one in lab.pieces(telling.model, PIECES + held, telling.seed, lengths)]
        labs.append(Lab(telling.model, pieces[held:], pieces[:held], plan_of({**plan, "panel": looked})))
    made = {arm: (labs[0], Arm(_said(arm))) for arm in ARMS if arm != NULL}
    made[NULL] = (labs[0], Arm(_said("control"), other_batches=True))
    made |= {arm: (labs[1], Arm(_said(arm.partition(",")[0]))) for arm in FEWER}
    telling.found["labs"] = {arm: shared for arm, (shared, _) in made.items()}
    return {arm: made[arm] for arm in (*ARMS, *FEWER)}


def _said(kind: str) -> str:
    return f"impossible:kind={kind}"


def _learned(telling: Telling, quiet: bool) -> Section:
    telling.found["runs"] = runs = telling.trained(_arms(telling), quiet)
    values = {arm: [run.scores for run in runs[arm]] for arm in ARMS}
    told = _lab.arms_section("What is learned", [], values, "nats per token", "control", "learned")
    with screen.working("counting pairs of tokens", quiet=quiet):
        rows, beyond = _beyond_pairs(telling, (*ARMS, *FEWER))
    told.tables.append(
        Table(("language", "loss", "pairs of tokens alone", "gained beyond them"), rows, "nats per token")
    )
    data = told.data["learned"]
    means = {arm: sum(row["by_seed"]) / telling.seeds for arm, row in data.items()}
    told.text = [
        "Held-out loss in the language itself: "
        + ", ".join(f"{arm} **{value:.2f}**" for arm, value in means.items())
        + f" nats per token. {telling.seeds} seeds, {STEPS} steps of {BATCH} stretches.",
        f"Beyond counting pairs of tokens a network gains {beyond['control']:.2f} nats in the control, {beyond['local']:.2f} where windows are shuffled and {beyond['shuffled']:.2f} where whole "
        "stretches are.",
    ]
    steps = list(zip(("reversed", "local"), ("local", "shuffled"), strict=True))
    gaps = [torch.stack(values[b]).mean(1) - torch.stack(values[a]).mean(1) for a, b in steps]
    far = abs(data["reversed"]["difference"][0]) < data["local"]["difference"][0] / 2
    _lab.judged(
        told,
        bool(all(float(gap.min()) > 0 for gap in gaps) and far),
        "shuffled windows cost more than the same stretches backwards, and whole shuffles more than shuffled windows, in every seed; and that backwards is less than half as far from the control as shuffled windows are",
    )
    told.data |= {"beyond_pairs": beyond}
    return told


def _beyond_pairs(telling: Telling, arms: tuple[str, ...]) -> tuple[list[list[Any]], dict[str, float]]:
    """For each language the networks' loss, that of counted pairs of tokens in the same text, and what is between."""
    rows, beyond = [], {}
    for arm in arms:
        shared = telling.found["labs"][arm]
        aim = objective(_said("control" if arm == NULL else arm.partition(",")[0]))
        draw = random.Random("told")
        train = [aim.row(one, draw)[0] for one in shared.train]
        counted = ngram_loss(train, [aim.told(one) for one in shared.held], telling.model.vocab_size, 2)
        own = sum(float(run.scores.mean()) for run in telling.found["runs"][arm]) / telling.seeds
        pairs = sum(counted) / len(counted)
        beyond[arm] = pairs - own
        rows.append([arm, own, pairs, pairs - own])
    return rows, beyond


def _few(telling: Telling, quiet: bool) -> Section:
    values = {arm: [run.scores for run in telling.found["runs"][arm]] for arm in FEWER}
    told = _lab.arms_section("Of three lengths", [], values, "nats per token", FEWER[0], "few_lengths")
    gap = told.data["few_lengths"][FEWER[1]]["difference"]
    many = [telling.found["runs"][arm] for arm in ("shuffled", "control")]
    wide = sum(float(a.scores.mean() - b.scores.mean()) for a, b in zip(*many, strict=True)) / telling.seeds
    said = (
        "what is hard is how many orders there are, more than that words are out of place"
        if gap[0] < wide / 2
        else "few orders are as hard as many after so few steps: it is the disorder, and not the number of orders"
    )
    told.text = [
        f"Where stretches have {len(FEW)} lengths, for each of which there is one order, shuffles cost **{gap[0]:+.2f}** nats over the control ({gap[1]:+.2f} to {gap[2]:+.2f}); "
        f"they cost {wide:+.2f} with {MOST - LEAST + 1} lengths: {said}."
    ]
    return told


def _panel(telling: Telling, quiet: bool) -> Section:
    """What heads look at in each language, less what they do in the control, by seed."""
    panels = {arm: [run.panel for run in telling.found["runs"][arm]] for arm in ARMS}
    rows, _ = compared(panels, twin="control", nulls=[NULL], seeds=telling.of_seeds)
    shown, data = list[list[Any]](), dict[str, dict[str, Any]]()
    for row in rows:
        arm = row["condition"].removesuffix(" - control")
        if row["reading"] not in READ or not row["condition"].endswith(" - control"):
            continue
        data.setdefault(row["reading"], {})[arm] = {
            key: row[key] for key in ("effect", "low", "high", "above", "below", "p")
        }
        ends = f"{row['low']:+.3f} to {row['high']:+.3f}"
        shown.append(
            [
                READ[row["reading"]],
                arm,
                f"{row['effect']:+.3f}",
                ends,
                f"{row['above']} above, {row['below']} below",
            ]
        )
    looks = data.get("previous_token_highest", {})
    means = {arm: _mean(panels[arm], "previous_token_highest") for arm in ARMS}
    text = [
        "The head that looks most at the token just before: "
        + ", ".join(f"{arm} {one:.2f}" for arm, one in means.items())
        + ", each network on its own language.",
        *(
            [
                f"Shuffled windows move it by **{looks['local']['effect']:+.2f}**, whole shuffles by **{looks['shuffled']['effect']:+.2f}**, control on other batches by {looks[NULL]['effect']:+.2f}."
            ]
            if looks
            else []
        ),
    ]
    table = Table(
        ("reading", "language", "less control", "95 %", "seeds"),
        shown,
        "the panel of each language less the control's, by seed",
        40,
    )
    return Section("What heads look at", text, [table], data={"panel": data, "previous_token": means})


def _mean(panels: list[dict[str, list[float]]], name: str) -> float:
    values = torch.tensor([one.get(name, [torch.nan]) for one in panels], dtype=torch.float64)
    return float(values.mean())
