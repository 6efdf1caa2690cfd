"""The demo: which heads carry the answer, the proof, the sweep that labels every head, one knob, and what else it changes.

Heads are ranked by attribution, proved by ablation against random heads, and labelled by the sweep alone: each head's z is
scaled by -2, 0, 2 and 4, and the shares of the two answers are counted. Head and strength are chosen on one half of the prompts and
judged on the other, against random heads at the same strength, with side effects on unrelated text. Every number comes from
the run; where no knob is found, that is what it says. On `tiny`: under a minute of compute.

What it does not show: that the head does this on other wordings, or that nothing else in the model does it too.
"""

from __future__ import annotations

import copy
import random
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import patchbay as pb
from patchbay import maths, plot, report, screen
from patchbay.demo_task import Question, answers, ask
from patchbay.knob import Knob
from patchbay.model import Model
from patchbay.port import Part, PatchbayError
from patchbay.report import BAD, FAINT, GOOD, Curve, Picture, Section, Table
from patchbay.result import Result
from patchbay.task import Task

SWEPT = (-2.0, 0.0, 2.0, 4.0)
DOSES = (-2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
N_PROVED, N_CONTROLS = 3, 5
BUDGET = 4e12  # floating-point operations that the sweep may take; beyond, fewer heads are swept
CLOSE = 0.05  # of the share that the strongest turn reaches: the mildest turn within it is chosen
ROOM = 0.8  # where the first answer has more than this share, the knob is to move answers to the second


@dataclass
class Story:
    """What is known so far."""

    model: Model
    question: Question
    dev: Task
    test: Task
    seed: int
    results: dict[str, Result] = field(default_factory=dict)
    head: Part | None = None
    strength: float = 1.0
    goal: int = 1  # 1: the right answer is to become more frequent, -1: the wrong one
    knob: Knob | None = None

    def name(self, answer: int) -> str:
        return self.question.right if answer > 0 else self.question.wrong


def tell(model: Model, *, seed: int = 0, report: str | Path, quiet: bool = False, n: int | None = None) -> dict[str, Any]:
    """Run the demo, printing each step as it ends; write the page and, if one is found, the knob. Returns the numbers."""
    began = time.perf_counter()
    if not any("attn.z" in model.signals(i) for i in range(model.n_layers)):
        raise PatchbayError(f"the demo turns attention heads, and this {model.family.name} model offers none")
    with screen.working("finding a question that this model can take", quiet=quiet):
        question = ask(model, n=n or _prompts_for(model), seed=seed)
        story = Story(model, question, *question.task.split(0.5, seed), seed)
    told: list[Section] = []
    steps = (_the_model, _attribution, _proof, _sweep, _dose, _generation)
    for step in steps:
        told.append(step(story, quiet))
        if not quiet:
            screen.say(*screen.sections(told[-1], len(told)))
    told.append(_ending(story, Path(report), time.perf_counter() - began))
    _write_page(story, told, Path(report))
    if not quiet:
        screen.say(*screen.sections(told[-1], len(told)))
    return {key: value for section in told for key, value in section.data.items()}


def _prompts_for(model: Model) -> int:
    """Fewer prompts for larger models."""
    size = sum(p.numel() for p in model.hf.parameters())
    return 200 if size < 5e6 else 100 if size < 5e7 else 40


# --- the steps ----------------------------------------------------------------------------------------


def _the_model(story: Story, quiet: bool) -> Section:
    model, question = story.model, story.question
    got = pb.run(model, question.task, logits="last", batch_size=64).last_logits
    codes = answers(question.task)(got, torch.arange(len(question.task)))
    shares = {name: maths.bootstrap_interval((codes == code).float()) for name, code in _codes(question).items()}
    plain = None if question.plain is None else _accuracy(model, question.plain)
    card = screen.model_card(model)
    check = card["check"]
    text = [
        f"{card['source'] or card['model_type']}: family {card['family']}, {card['parameters']:,} parameters, {model.n_layers} "
        f"layers, {len(_heads(model))} heads. The self-check holds: parts sum to the final stream within {check['stream']:.0e}, "
        f"norm and unembedding give the logits {_within(check['logits'])}, heads sum to attention out within {check['heads']:.0e}.",
        *question.tried,
        f"The question, on {len(question.task)} prompts ({len(story.dev)} to choose on, {len(story.test)} to judge on): {question.asks}",
    ]
    if plain is not None:
        text.append(f"Without a false statement it completes **{_percent(plain.mean)}** of the facts ({_range(plain)}).")
    rows = [[name, _percent(share.mean), _range(share)] for name, share in shares.items()]
    data = {"model": card, "question": {"task": question.task.name, "prompts": len(question.task), "tried": question.tried,
            "shares": {name: _interval(share) for name, share in shares.items()}}}  # fmt: skip
    return Section("The model, and the question", text, [Table(("it answers", "share", "95 % interval"), rows)], data=data)


def _attribution(story: Story, quiet: bool) -> Section:
    with screen.working("direct logit attribution", quiet=quiet):
        found = pb.find.direct_logit_attribution(story.model, story.dev)
    story.results["attribution"] = found
    top = found.table(6)
    words = f"towards **{story.question.right}**, away from {story.question.wrong}"
    text = [
        f"Direct logit attribution: what each head writes {words}, at the last position, with the final norm frozen. "
        f"Heads, MLPs, embedding and biases sum to the logit difference of {float(found['total']):.2f} within "
        f"{float(found['sum_error']):.0e}. This ranks direct effects; it does not say what a head does.",
    ]
    rows = [[row["rank"], str(row["part"]), row["value"], row["standard_error"]] for row in top]
    shown = copy.copy(found)
    shown.highlights = tuple(found.top(N_PROVED))
    caption = "Logits that each head adds to the difference of the two answers; the framed heads are tried in step 3."
    data = {"attribution": [{"part": str(row["part"]), "logits": row["value"]} for row in found.table()]}
    return Section("Which heads write the answer", text, [Table(("rank", "head", "logits", "standard error"), rows)],
                   [Picture(partial(plot.figure, shown), caption)], data)  # fmt: skip


def _proof(story: Story, quiet: bool) -> Section:
    model = story.model
    n = min(N_PROVED, max(1, len(_heads(model)) // 2))
    parts = story.results["attribution"].top(n)
    with screen.working("ablation against random heads", quiet=quiet):
        found = pb.prove.ablation(model, story.test, parts, by="mean", seed=story.seed)
    story.results["proof"] = found
    joint = (float(found["joint"]), float(found["joint_low"]), float(found["joint_high"]))
    gap = (float(found["difference"]), float(found["difference_low"]), float(found["difference_high"]))
    verdict = "**They carry it**" if gap[1] > 0 else "**That is no proof that they carry it**"
    together, draws = ", ".join(map(str, parts)), found["random"]
    text = [
        f"{together} are taken away together (each set to its mean), on the half that did not choose them. The logit difference "
        f"falls by **{joint[0]:.2f}** ({joint[1]:.2f} to {joint[2]:.2f}); without as many random heads of the same layers, by "
        f"{draws.mean():.2f} on average ({draws.min():.2f} to {draws.max():.2f} over {len(draws)} draws). {verdict}: the difference is "
        f"{gap[0]:.2f} ({gap[1]:.2f} to {gap[2]:.2f}), p = {float(found['p']):.3f}.",
        *[note for note in found.notes if note.startswith(("only", "some"))],
    ]
    rows: list[list[Any]] = [["together", *joint], *([str(r["part"]), r["value"], r["low"], r["high"]] for r in found.table())]
    rows.append([f"{len(draws)} random draws (mean, range)", draws.mean().item(), draws.min().item(), draws.max().item()])
    caption = "What is lost in logits. Bars: the chosen heads, with 95 % intervals. Dots: random heads of the same layers."
    data = {"proof": {"parts": [str(p) for p in parts], "joint": joint, "random": draws, "difference": gap, "p": float(found["p"])}}
    return Section("Proof: take them away", text, [Table(("without", "lost", "low", "high"), rows)],
                   [Picture(partial(report.ablation_figure, found), caption)], data)  # fmt: skip


def _sweep(story: Story, quiet: bool) -> Section:
    """Scale every head, label it by what happens, and choose head and strength on the first half of the prompts."""
    heads, left_out = _candidates(story)
    edits = [pb.scale(head.port(), strength) for head in heads for strength in SWEPT]
    with screen.progress(f"turning {len(heads)} heads to {len(SWEPT)} strengths", quiet=quiet) as bar:
        swept = pb.sweep(story.model, story.dev, edits, answers(story.dev), progress=bar)
    codes = swept["value"].reshape(len(heads), len(SWEPT), -1)  # [head, strength, prompt]
    base = swept["base"]  # [prompt]
    story.goal = 1 if float((base == 1).float().mean()) <= ROOM else -1
    goal = (codes == story.goal).float().mean(-1)  # [head, strength]
    story.head, story.strength = _mildest(heads, goal)
    labels = [_label(story, codes[i], len(heads)) for i in range(len(heads))]
    moved = codes[:, -1].mean(-1) - codes[:, 0].mean(-1)  # [head]
    story.results["sweep"] = Result(
        {"share": (goal, ("part", "strength"), "share of prompts"), "moved": (moved, ("part",), "share of prompts")},
        parts=heads, coords={"strength": list(SWEPT)}, highlights=[story.head], provenance=swept.provenance,
    )  # fmt: skip
    ranked = sorted(range(len(heads)), key=lambda i: -abs(float(moved[i])))
    return _sweep_section(story, heads, goal, [(i, labels[i]) for i in ranked], float((base == story.goal).float().mean()), left_out)


def _mildest(heads: list[Part], goal: Tensor) -> tuple[Part, float]:
    """The head that reaches the highest share, at the mildest strength on that side of 1 that comes within `CLOSE` of it."""
    best = int(goal.max(1).values.argmax())
    shares = dict(zip(SWEPT, goal[best].tolist(), strict=True))
    furthest = max(SWEPT, key=lambda s: (shares[s], -abs(s - 1)))
    near = [s for s in SWEPT if (s > 1) == (furthest > 1) and shares[s] >= shares[furthest] - CLOSE]
    return heads[best], min(near, key=lambda s: abs(s - 1))


def _sweep_section(
    story: Story, heads: list[Part], goal: Tensor, ranked: list[tuple[int, str]], base: float, left_out: int
) -> Section:
    counts = [f"{sum(label == name for _, label in ranked)} {name} heads" for name in (story.question.right, story.question.wrong)]
    first = story.results["attribution"].top(1)[0]
    text = [
        f"Every head's z is scaled by {', '.join(f'{s:g}' for s in SWEPT)} and the answers are counted; a head is named after the answer "
        f"that grows with its strength (95 % over all {len(heads)} heads together). Found: {', '.join(counts)}.",
        f"Untouched, the model answers {story.name(story.goal)} on {_percent(base)} of these prompts. **{story.head}** moves that most, and "
        f"**{story.strength:g}** is its mildest strength within {100 * CLOSE:.0f} points of the most: the two to judge on the other half. "
        f"Attribution had {first} first"
        + ("." if first == story.head else ": a rank by attribution is no label."),
    ]
    if left_out:
        text.append(f"{left_out} heads with smaller attributions were not swept: this model is too large to turn every head in a minute.")
    columns = ("head", *(f"x{s:g}" for s in SWEPT), "label", "attribution")
    written = {str(row["part"]): row["value"] for row in story.results["attribution"].table()}
    rows = [[str(heads[i]), *(_percent(v) for v in goal[i].tolist()), label or "-", written[str(heads[i])]] for i, label in ranked]
    shown = Table(columns, rows, f"share of {story.name(story.goal)} answers, by the head that is scaled; untouched {_percent(base)}", on_screen=8)
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


def _dose(story: Story, quiet: bool) -> Section:
    """Turn the chosen head, and random ones, through all strengths on the half that chose nothing."""
    assert story.head is not None
    model, question = story.model, story.question
    story.knob = pb.turn.scale([story.head], story.strength, model=model, name=f"{story.name(story.goal)} by {story.head}")
    others = [head for head in _heads(model) if head != story.head]
    random_heads = random.Random(f"demo-controls-{story.seed}").sample(others, min(N_CONTROLS, len(others)))
    measure = partial(pb.measure.dose_response, model, strengths=DOSES)
    with screen.progress("dose and response", quiet=quiet) as bar:
        curve = measure(story.test, story.knob, neutral=question.neutral)
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
        "before": _interval(maths.bootstrap_interval(base, seed=story.seed)),
        "after": _interval(maths.bootstrap_interval(hits[0], seed=story.seed)),
        "gain": _interval(gain),
        "against_random": _interval(against),
        "random": hits[1:].mean(-1).tolist(),
        "found": bool(gain.low > 0 and against.low > 0),
    }


def _dose_text(
    story: Story, curve: Result, plain: Result | None, judged: dict[str, Any], random_heads: list[Part], at: int
) -> list[str]:
    answer, question = story.name(story.goal), story.question
    before, after, gain = judged["before"], judged["after"], judged["gain"]
    verdict = "**A knob is found.**" if judged["found"] else "**No knob is found**: the change does not stand apart from none, or from random heads."
    low, high = min(judged["random"]), max(judged["random"])
    text = [
        f"{verdict} On {len(story.test)} prompts that chose nothing, {story.head} scaled by {story.strength:g} moves {answer} answers from "
        f"{_percent(before[0])} ({_percent(before[1])} to {_percent(before[2])}) to **{_percent(after[0])}** "
        f"({_percent(after[1])} to {_percent(after[2])}); paired, {100 * gain[0]:+.0f} points ({100 * gain[1]:+.0f} to {100 * gain[2]:+.0f}). "
        f"{len(random_heads)} random heads at the same strength: {_percent(low)} to {_percent(high)}.",
    ]
    rank = maths.spearman(torch.tensor(DOSES), curve["right"])
    kl, loss = curve["kl"][at], (float(curve["loss_without"]), float(curve["loss"][at]))
    side = (
        f"Side effects at {story.strength:g}: loss on {question.neutral_name} {loss[0]:.3f} to **{loss[1]:.3f}** nats per token, "
        f"divergence {float(kl):.3f} nats per token"
    )
    if plain is not None:
        untouched = float(plain["right"][DOSES.index(1.0)])
        side += f"; plain facts completed {_percent(untouched)} to **{_percent(float(plain['right'][at]))}**"
    text.append(f"{side}. Rank correlation of strength and {question.right} answers: {rank:.2f}.")
    return text


def _dose_table(story: Story, curve: Result, plain: Result | None, spread: Tensor) -> Table:
    question = story.question
    columns = ["strength", question.right, question.wrong, "other", f"{story.name(story.goal)}, random heads", "loss", "KL"]
    columns += ["plain facts"] if plain is not None else []
    rows = []
    for i, strength in enumerate(DOSES):
        shares = [_percent(float(curve[name][i])) for name in ("right", "wrong", "other")]
        low, high = float(spread[:, i].min()), float(spread[:, i].max())
        row = [f"**{strength:g}**" if strength == story.strength else f"{strength:g}", *shares, f"{_percent(low)} to {_percent(high)}"]
        row += [float(curve["loss"][i]), float(curve["kl"][i])]
        rows.append(row + ([_percent(float(plain["right"][i]))] if plain is not None else []))
    return Table(columns, rows, f"{story.head} scaled; loss and KL in nats per token on {question.neutral_name}")


def _dose_pictures(story: Story, curve: Result, plain: Result | None, spread: Tensor) -> list[Picture]:
    def line(result: Result, name: str, label: str, colour: str, dashed: bool = False) -> Curve:
        columns = [result[v].tolist() for v in (name, f"{name}_low", f"{name}_high")]
        return Curve(label, DOSES, *columns, colour=colour, dashed=dashed)

    question = story.question
    shares = [line(curve, "right", question.right, GOOD), line(curve, "wrong", question.wrong, BAD), line(curve, "other", "other", FAINT)]
    which = "right" if story.goal > 0 else "wrong"
    against = [
        line(curve, which, str(story.head), GOOD if story.goal > 0 else BAD),
        Curve("random heads", DOSES, spread.mean(0).tolist(), spread.amin(0).tolist(), spread.amax(0).tolist(), colour="#52606d"),
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


def _generation(story: Story, quiet: bool) -> Section:
    """What the model writes with and without the knob, on test prompts and on one unrelated text."""
    assert story.head is not None
    edits = [pb.scale(story.head.port(), story.strength)]
    prompts = [list(ids) for ids in story.test.clean]
    swept = pb.sweep(story.model, story.test, edits, answers(story.test))
    moved = ((swept["value"][0] == story.goal) & (swept["base"] != story.goal)).nonzero()[:, 0].tolist()
    shown = [prompts[i] for i in (moved or range(len(prompts)))[:3]] + [story.question.neutral[0][:12]]
    rows = []
    with screen.working("generating", quiet=quiet):
        for ids in shown:
            before, after = (story.model.generate([ids], 8, edits=made)[0][len(ids) :] for made in ([], edits))
            rows.append([_written(story.model, ids), _written(story.model, before), _written(story.model, after)])
    kinds = f"{len(shown) - 1} prompts that the knob moves" if moved else "No prompt is moved by it; the first of the test half"
    text = [f"{kinds}, and the beginning of an unrelated text. Greedy, 8 tokens, {story.head} at 1 and at {story.strength:g}."]
    columns = ("prompt", "before", f"{story.head} x {story.strength:g}")
    data = {"generations": [dict(zip(("prompt", "before", "after"), row, strict=True)) for row in rows]}
    return Section("Before and after", text, [Table(columns, [[a, b, f"**{c}**"] for a, b, c in rows])], data=data)


def _ending(story: Story, path: Path, seconds: float) -> Section:
    """Save the knob with its evidence; say what was written."""
    written = {"report": str(path)}
    if story.knob is not None:
        knob = path.with_suffix(".knob")
        knob.parent.mkdir(parents=True, exist_ok=True)
        evidence = {name: story.results[name] for name in ("proof", "dose_response")}
        story.knob.with_evidence(**evidence).save(knob, overwrite=True)
        written["knob"] = str(knob)
        source = story.model.source or "MODEL"
        text = [
            f"The knob is in **{knob}**, with its proof and its curve. Use it: patchbay generate {source} PROMPT --knob {knob}@2",
        ]
    else:
        text = ["No knob was written, since none was found. Another task or another kind of part may do better."]
    text += [f"The page with all figures is **{path}**.", f"{seconds:.0f} s."]
    return Section("What was written", text, data={"written": written, "seconds": seconds})


def _write_page(story: Story, told: list[Section], path: Path) -> None:
    provenance = story.results["attribution"].provenance
    model, versions = provenance["model"], provenance["versions"]
    foot = [
        f"Made by the command patchbay demo, seed {story.seed}, on {provenance['date']}. Model {model['source']} ({model['family']}, "
        f"{model['dtype']}, weights {model['fingerprint']}). Versions: {', '.join(f'{k} {v}' for k, v in versions.items())}.",
        f"Task: {story.question.task!r}",
        "Every number and figure is of this run. Intervals are 95 % bootstraps over prompts.",
    ]
    title = f"What carries the answer in {Path(story.model.source).name or story.model.config.model_type}, and how to turn it"
    lead = f"The question: {story.question.asks}"
    report.write(path, report.page(title, lead, told, tiles=_tiles(story, told), foot=foot))


def _tiles(story: Story, told: list[Section]) -> list[tuple[str, str]]:
    """The numbers to see first."""
    seen = {key: value for section in told for key, value in section.data.items()}
    knob, curve, answer = seen["knob"], story.results["dose_response"], story.name(story.goal)
    at = DOSES.index(story.strength)
    tiles = [
        (f"{story.head} x {story.strength:g}", "the knob" if knob["found"] else "the best try: no knob was found"),
        (f"{_percent(knob['before'][0])} to {_percent(knob['after'][0])}", f"{answer} answers, on prompts that chose nothing"),
        (f"{_percent(min(knob['random']))} to {_percent(max(knob['random']))}", "the same with random heads, turned as far"),
        (f"{float(curve['loss'][at] - curve['loss_without']):+.3f}", f"nats per token on {story.question.neutral_name}"),
    ]
    if (plain := seen["dose_response"]["plain"]) is not None:
        tiles.append((f"{_percent(float(plain[DOSES.index(1.0)]))} to {_percent(float(plain[at]))}", "plain facts completed"))
    return tiles


# --- small things -------------------------------------------------------------------------------------


def _heads(model: Model) -> list[Part]:
    return [Part(i, "head", h) for i in range(model.n_layers) for h in range(model.n_heads(i)) if "attn.z" in model.signals(i)]


def _candidates(story: Story) -> tuple[list[Part], int]:
    """The heads to sweep: all of them, or those of largest attribution where all would take too long; and how many are left."""
    heads = _heads(story.model)
    layers = sum(p.numel() for at in story.model.modules for p in at.layer.parameters())
    each = 2.0 * layers * sum(map(len, story.dev.clean)) * len(SWEPT)
    room = max(4, int(BUDGET / each))
    if room >= len(heads):
        return heads, 0
    return sorted(story.results["attribution"].top(room, by="abs")), len(heads) - room


def _codes(question: Question) -> dict[str, int]:
    return {question.right: 1, question.wrong: -1, "other": 0}


def _accuracy(model: Model, task: Task) -> maths.Interval:
    logits = pb.run(model, task, logits="last", batch_size=64).last_logits
    return maths.bootstrap_interval(task.with_metric("accuracy").score(logits).float())


def _within(error: float) -> str:
    return f"within {error:.0e}" if error else "exactly"


def _interval(found: maths.Interval) -> tuple[float, float, float]:
    return found.mean, found.low, found.high


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _range(found: maths.Interval) -> str:
    return f"{_percent(found.low)} to {_percent(found.high)}"


def _written(model: Model, ids: list[int]) -> str:
    ends = model.config.eos_token_id
    ids = ids[: ids.index(ends)] if ends in ids[1:] else ids
    return model.decode(ids).strip() if model.tokenizer is not None else " ".join(map(str, ids))
