"""The demo's knob: every head turned, one chosen on half of the prompts and texts, and judged on the other half of both."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import torch
from torch import Tensor

import patchbay as pb
from patchbay import maths
from patchbay.draw import plot, report, screen
from patchbay.draw.report import BAD, FAINT, GOOD, Curve, Picture, Section, Table
from patchbay.model.model import Model
from patchbay.results.result import Result
from patchbay.signal.port import Part
from patchbay.stories._demo_task import Story, answers, ends, heads_of, percent

SWEPT = (-2.0, 0.0, 2.0, 4.0)
DOSES = (-2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
N_CONTROLS = 5
BUDGET = 4e12  # floating-point operations that the sweep may take; beyond, fewer heads are swept
CLOSE = 0.05  # of the highest share: of the turns within it, the one that changes unrelated text least is chosen
LEAST_GAIN = 0.2  # of the prompts that a knob must move to be called one
ROOM = 0.8  # where the first answer has more than this share, the knob is to move answers to the second


def sweep(story: Story, quiet: bool) -> Section:
    """Scale every head, label it by what happens, and choose head and strength on the first half of the prompts."""
    heads, left_out = _candidates(story)
    edits = [pb.scale(head.port(), strength) for head in heads for strength in SWEPT]
    with screen.progress(f"turning {len(heads)} heads to {len(SWEPT)} strengths", quiet=quiet) as bar:
        swept = pb.sweep(story.model, story.dev, edits, answers(story.dev), progress=bar)
    codes = swept["value"].reshape(len(heads), len(SWEPT), -1)  # [head, strength, prompt]
    base = swept["base"]  # [prompt]
    story.goal = 1 if float((base == 1).float().mean()) <= ROOM else -1
    goal = (codes == story.goal).float().mean(-1)  # [head, strength]
    near = _near(heads, goal)
    with screen.working("comparing what they do to unrelated text", quiet=quiet):
        story.head, story.strength = min(near, key=lambda turn: _divergence(story, *turn))
    labels = [_label(story, codes[i], len(heads)) for i in range(len(heads))]
    moved = codes[:, -1].mean(-1) - codes[:, 0].mean(-1)  # [head]
    story.results["sweep"] = Result(
        {"share": (goal, ("part", "strength"), "share of prompts"), "moved": (moved, ("part",), "share of prompts")},
        parts=heads, coords={"strength": list(SWEPT)}, highlights=[story.head], provenance=swept.provenance,
    )  # fmt: skip
    ranked = sorted(range(len(heads)), key=lambda i: -abs(float(moved[i])))
    return _sweep_section(
        story, heads, goal, [(i, labels[i]) for i in ranked], float((base == story.goal).float().mean()), left_out
    )


def _near(heads: list[Part], goal: Tensor) -> list[tuple[Part, float]]:
    """Heads and strengths whose share of the wanted answer, [head, strength], comes within `CLOSE` of the highest."""
    places = (goal >= goal.max() - CLOSE - 1e-6).nonzero().tolist()
    return [(heads[i], SWEPT[j]) for i, j in places]


def _turns(heads: list[Part], goal: Tensor) -> str:
    n = len(_near(heads, goal))
    return f"{n} turns come" if n > 1 else "1 turn comes"


@torch.no_grad()
def _divergence(story: Story, head: Part, strength: float) -> float:
    """KL(as it is || turned) of the next token, mean over the positions of half of the unrelated texts, in nats."""
    texts, total, count = story.question.neutral[::2], 0.0, 0
    for start in range(0, len(texts), 8):
        some = texts[start : start + 8]
        plain, turned = (
            pb.run(story.model, some, edits=made).logits for made in ([], [pb.scale(head.port(), strength)])
        )
        for i, ids in enumerate(some):
            total += float(maths.kl(plain[i, : len(ids)], turned[i, : len(ids)]).sum())
            count += len(ids)
    return total / count


def _sweep_section(
    story: Story, heads: list[Part], goal: Tensor, ranked: list[tuple[int, str]], base: float, left_out: int
) -> Section:
    counts = [
        f"{sum(label == name for _, label in ranked)} for {name}"
        for name in (story.question.right, story.question.wrong)
    ]
    first = story.results["attribution"].top(1)[0]
    text = [
        f"Every head's z is scaled by {', '.join(f'{s:g}' for s in SWEPT)} and the answers are counted; a head is named after the answer "
        f"that grows with its strength (95 % over all {len(heads)} heads together). Found: {', '.join(counts)}.",
        f"Untouched, the model answers {story.name(story.goal)} on {percent(base)} of these prompts. {_turns(heads, goal)} within "
        f"{100 * CLOSE:.0f} points of the most that any does; of these, **{story.head}** at **{story.strength:g}** changes unrelated text "
        f"least (half of the texts), and is the one to judge on the other half of both. "
        f"Attribution had {first} first" + ("." if first == story.head else ": a rank by attribution is no label."),
    ]
    if left_out:
        text.append(
            f"{left_out} heads with smaller attributions were not swept: this model is too large to turn every head in a minute."
        )
    columns = ("head", *(f"x{s:g}" for s in SWEPT), "label", "attribution")
    written = {str(row["part"]): row["value"] for row in story.results["attribution"].table()}
    rows = [
        [str(heads[i]), *(percent(v) for v in goal[i].tolist()), label or "-", written[str(heads[i])]]
        for i, label in ranked
    ]
    shown = Table(
        columns,
        rows,
        f"share of {story.name(story.goal)} answers, by the head that is scaled; untouched {percent(base)}",
        on_screen=8,
    )
    swept = Result({"share": (goal, ("part", "strength"), "share of prompts")}, parts=heads, coords={"strength": list(SWEPT)},
                   provenance={"method": f"share of {story.name(story.goal)} answers"})  # fmt: skip
    data = {"sweep": {"strengths": SWEPT, "answer": story.name(story.goal), "untouched": base, "heads":
            [{"part": str(heads[i]), "shares": goal[i], "label": label or None} for i, label in ranked]}}  # fmt: skip
    return Section("The sweep: what each head does when it is turned", text, [shown],
                   [Picture(partial(plot.figure, swept), f"Share of {story.name(story.goal)} answers with one head scaled.")], data)  # fmt: skip


def _label(story: Story, codes: Tensor, n_heads: int) -> str:
    """The answer that becomes more frequent with strength; empty where the interval of its movement holds 0."""
    moved = maths.paired_interval(codes[-1], codes[0], level=1 - 0.05 / n_heads, seed=story.seed)
    return story.question.right if moved.low > 0 else story.question.wrong if moved.high < 0 else ""


def dose(story: Story, quiet: bool) -> Section:
    """Turn the chosen head, and random ones, through all strengths on the half that chose nothing."""
    assert story.head is not None
    model, question = story.model, story.question
    story.knob = pb.turn.scale(
        [story.head], story.strength, model=model, name=f"{story.name(story.goal)} by {story.head}"
    )
    others = [head for head in heads_of(model) if head != story.head]
    random_heads = random.Random(f"demo-controls-{story.seed}").sample(others, min(N_CONTROLS, len(others)))
    measure = partial(pb.measure.dose_response, model, strengths=DOSES, draws=0)  # the same random heads for all, below
    with screen.progress("dose and response", quiet=quiet) as bar:
        curve = measure(story.test, story.knob, neutral=question.neutral[1::2])
        plain = measure(question.plain, story.knob) if question.plain is not None else None
        controls = []
        for i, head in enumerate(random_heads):
            bar(i + 1, len(random_heads) + 1)
            controls.append(measure(story.test, pb.turn.scale([head], story.strength, model=model)))
    story.results["dose_response"] = curve
    judged = _judged(story, random_heads)
    which, at = ("right" if story.goal > 0 else "wrong"), DOSES.index(story.strength)
    spread = torch.stack([control[which] for control in controls])  # [head, strength]
    section = Section("Dose and response: one knob, and what else it changes")
    section.text = _dose_text(story, curve, plain, judged, random_heads, at)
    section.tables = [_dose_table(story, curve, plain, spread)]
    section.pictures = _dose_pictures(story, curve, plain, spread)
    section.verdict = judged["found"]
    section.data = {"knob": {"part": str(story.head), "strength": story.strength, "answer": story.name(story.goal), **judged},
                    "dose_response": {"strengths": DOSES, **{v: curve[v] for v in curve.variables}, "random_heads": random_heads,
                                      "random": spread, "plain": None if plain is None else plain["right"]}}  # fmt: skip
    if not judged["found"]:
        story.knob = None
    return section


def _judged(story: Story, random_heads: list[Part]) -> dict[str, Any]:
    """The chosen knob on the test half, prompt by prompt: against no knob, and against random heads at the same strength."""
    assert story.head is not None
    edits = [pb.scale(head.port(), story.strength) for head in (story.head, *random_heads)]
    swept = pb.sweep(story.model, story.test, edits, answers(story.test))
    hits, base = (swept["value"] == story.goal).float(), (swept["base"] == story.goal).float()
    gain = maths.paired_interval(hits[0], base, seed=story.seed)
    against = maths.paired_interval(hits[0], hits[1:].mean(0), seed=story.seed)
    return {
        "before": ends(maths.bootstrap_interval(base, seed=story.seed)),
        "after": ends(maths.bootstrap_interval(hits[0], seed=story.seed)),
        "gain": ends(gain),
        "against_random": ends(against),
        "random": hits[1:].mean(-1).tolist(),
        "found": bool(gain.low > 0 and against.low > 0 and gain.mean >= LEAST_GAIN),
    }


def _dose_text(
    story: Story, curve: Result, plain: Result | None, judged: dict[str, Any], random_heads: list[Part], at: int
) -> list[str]:
    answer, question = story.name(story.goal), story.question
    before, after, gain = judged["before"], judged["after"], judged["gain"]
    verdict = "**A knob is found.**"
    if not judged["found"]:
        apart = gain[1] > 0 and judged["against_random"][1] > 0
        why = (
            f"fewer than {100 * LEAST_GAIN:.0f} points are moved"
            if apart
            else "the change does not stand apart from random heads"
        )
        verdict = f"**No knob is found**: {why}."
    low, high = min(judged["random"]), max(judged["random"])
    text = [
        f"{verdict} On {len(story.test)} prompts that chose nothing, {story.head} scaled by {story.strength:g} moves {answer} answers from "
        f"{percent(before[0])} ({percent(before[1])} to {percent(before[2])}) to **{percent(after[0])}** "
        f"({percent(after[1])} to {percent(after[2])}); paired, {100 * gain[0]:+.0f} points ({100 * gain[1]:+.0f} to {100 * gain[2]:+.0f}). "
        f"{len(random_heads)} random heads at the same strength: {percent(low)} to {percent(high)}.",
    ]
    rank = maths.spearman(torch.tensor(DOSES), curve["right"])
    kl, loss = curve["kl"][at], (float(curve["loss_without"]), float(curve["loss"][at]))
    side = (
        f"Side effects at {story.strength:g}: loss on {question.neutral_name} {loss[0]:.3f} to **{loss[1]:.3f}** nats per token, "
        f"divergence {float(kl):.3f} nats per token"
    )
    if plain is not None:
        untouched = float(plain["right"][DOSES.index(1.0)])
        side += f"; plain facts completed {percent(untouched)} to **{percent(float(plain['right'][at]))}**"
    text.append(f"{side}. Rank correlation of strength and {question.right} answers: {rank:.2f}.")
    return text


def _dose_table(story: Story, curve: Result, plain: Result | None, spread: Tensor) -> Table:
    question = story.question
    columns = [
        "strength",
        question.right,
        question.wrong,
        "other",
        f"{story.name(story.goal)}, random heads",
        "loss",
        "KL",
    ]
    columns += ["plain facts"] if plain is not None else []
    rows: list[list[Any]] = []
    for i, strength in enumerate(DOSES):
        shares = [percent(float(curve[name][i])) for name in ("right", "wrong", "other")]
        low, high = float(spread[:, i].min()), float(spread[:, i].max())
        row: list[Any] = [
            f"**{strength:g}**" if strength == story.strength else f"{strength:g}",
            *shares,
            f"{percent(low)} to {percent(high)}",
        ]
        row += [float(curve["loss"][i]), float(curve["kl"][i])]
        rows.append(row + ([percent(float(plain["right"][i]))] if plain is not None else []))
    return Table(columns, rows, f"{story.head} scaled; loss and KL in nats per token on {question.neutral_name}")


def _dose_pictures(story: Story, curve: Result, plain: Result | None, spread: Tensor) -> list[Picture]:
    def line(result: Result, name: str, label: str, colour: str, dashed: bool = False) -> Curve:
        y, low, high = (result[v].tolist() for v in (name, f"{name}_low", f"{name}_high"))
        return Curve(label, DOSES, y, low, high, colour=colour, dashed=dashed)

    question = story.question
    shares = [
        line(curve, "right", question.right, GOOD),
        line(curve, "wrong", question.wrong, BAD),
        line(curve, "other", "other", FAINT),
    ]
    which = "right" if story.goal > 0 else "wrong"
    against = [
        line(curve, which, str(story.head), GOOD if story.goal > 0 else BAD),
        Curve(
            "random heads",
            DOSES,
            spread.mean(0).tolist(),
            spread.amin(0).tolist(),
            spread.amax(0).tolist(),
            colour="#52606d",
        ),
    ]
    against += [line(plain, "right", "plain facts completed", "#009e73", dashed=True)] if plain is not None else []
    harm = [line(curve, "loss", "loss", GOOD), line(curve, "kl", "divergence from the model as it is", BAD)]
    draw, chosen = report.curves_figure, story.strength
    return [
        Picture(partial(draw, shares, "share of prompts", chosen=chosen, top=1.02), "Answers as the head is turned; bands are 95 % intervals."),
        Picture(partial(draw, against, "share of prompts", chosen=chosen, top=1.02),
                f"{story.name(story.goal).capitalize()} answers, against random heads (mean and range)."),
        Picture(partial(draw, harm, "nats per token", chosen=chosen), f"Side effects on {question.neutral_name}."),
    ]  # fmt: skip


def generation(story: Story, quiet: bool) -> Section:
    """What the model writes with and without the knob, on test prompts and on one unrelated text."""
    assert story.head is not None
    edits = [pb.scale(story.head.port(), story.strength)]
    prompts = [list(ids) for ids in story.test.clean]
    swept = pb.sweep(story.model, story.test, edits, answers(story.test))
    moved = ((swept["value"][0] == story.goal) & (swept["base"] != story.goal)).nonzero()[:, 0].tolist()
    shown = [prompts[i] for i in (moved or range(len(prompts)))[:3]] + [story.question.neutral[0][:12]]
    rows: list[list[Any]] = []
    with screen.working("generating", quiet=quiet):
        for ids in shown:
            before, after = (story.model.generate([ids], 8, edits=made)[0][len(ids) :] for made in ([], edits))
            rows.append([_written(story.model, ids), _written(story.model, before), _written(story.model, after)])
    kinds = (
        f"{len(shown) - 1} prompts that the knob moves"
        if moved
        else "No prompt is moved by it; the first of the test half"
    )
    text = [
        f"{kinds}, and the beginning of an unrelated text. Greedy, 8 tokens, {story.head} at 1 and at {story.strength:g}."
    ]
    columns = ("prompt", "before", f"{story.head} x {story.strength:g}")
    data = {"generations": [dict(zip(("prompt", "before", "after"), row, strict=True)) for row in rows]}
    return Section("Before and after", text, [Table(columns, [[a, b, f"**{c}**"] for a, b, c in rows])], data=data)


def _candidates(story: Story) -> tuple[list[Part], int]:
    """The heads to sweep: all of them, or those of largest attribution where all would take too long; and how many are left."""
    heads = heads_of(story.model)
    layers = sum(p.numel() for at in story.model.modules for p in at.layer.parameters())
    each = 2.0 * layers * sum(map(len, story.dev.clean)) * len(SWEPT)
    room = max(4, int(BUDGET / each))
    if room >= len(heads):
        return heads, 0
    return sorted(story.results["attribution"].top(room, by="abs")), len(heads) - room


def _written(model: Model, ids: list[int]) -> str:
    ends = model.config.eos_token_id
    ids = ids[: ids.index(ends)] if ends in ids[1:] else ids
    return model.decode(ids).strip() if model.tokenizer is not None else " ".join(map(str, ids))
