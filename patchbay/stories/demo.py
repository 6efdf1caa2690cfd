"""The demo: which heads carry the answer, the proof, the sweep that labels every head, one knob, and what else it changes.

Heads are ranked by attribution, proved by ablation against random heads, and labelled by the sweep alone: each head's z is
scaled by -2, 0, 2 and 4, and the shares of the two answers are counted. Head and strength are chosen on one half of the prompts (of
the best, the one that changes unrelated text least) and judged on the other, against random heads at the same strength, with side effects on unrelated text. Every number comes from
the run; where no knob is found, that is what it says. On `tiny`: under a minute of compute.

What it does not show: that the head does this on other wordings, or that nothing else in the model does it too.
"""

from __future__ import annotations

import copy
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import patchbay as pb
from patchbay import maths
from patchbay.draw import plot, report, screen
from patchbay.draw.report import Picture, Section, Table, check_place
from patchbay.model.cards import model_card
from patchbay.model.model import Model
from patchbay.results.printed import model_details
from patchbay.signal.port import PatchbayError
from patchbay.stories._demo_knob import DOSES, dose, generation, sweep
from patchbay.stories._demo_task import Question, Story, answers, ask, ends, heads_of, percent, span
from patchbay.tasks.task import Task

N_PROVED = 3


def tell(
    model: Model, *, seed: int = 0, report: str | Path, quiet: bool = False, n: int | None = None
) -> dict[str, Any]:
    """Run the demo, printing each step as it ends; write the page and, if one is found, the knob. Returns the numbers."""
    began = time.perf_counter()
    check_place(report)
    if not any("attn.z" in model.signals(i) for i in range(model.n_layers)):
        raise PatchbayError(f"the demo turns attention heads, and this {model.family.name} model offers none")
    with screen.working("finding a question that this model can take", quiet=quiet):
        question = ask(model, n=n or _prompts_for(model), seed=seed)
        story = Story(model, question, *question.task.split(0.5, seed), seed)
    told: list[Section] = []
    steps = (_the_model, _attribution, _proof, sweep, dose, generation)
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
    card = model_card(model)
    check = card["check"]
    text = [
        f"{card['source'] or card['model_type']}: family {card['family']}, {card['parameters']:,} parameters, {model.n_layers} "
        f"layers, {len(heads_of(model))} heads. The self-check holds: parts sum to the final stream {_within(check['stream'])}, "
        f"norm and unembedding give the logits {_within(check['logits'])}, heads sum to attention out {_within(check['heads'])}.",
        *question.tried,
        f"The question, on {len(question.task)} prompts ({len(story.dev)} to choose on, {len(story.test)} to judge on): {question.asks}",
    ]
    if plain is not None:
        text.append(f"Without a false statement it completes **{percent(plain.mean)}** of the facts ({span(plain)}).")
    rows = [[name, percent(share.mean), span(share)] for name, share in shares.items()]
    asked = {
        "task": question.task.name,
        "prompts": len(question.task),
        "tried": question.tried,
        "answers": (question.right, question.wrong),
        "shares": {name: ends(share) for name, share in shares.items()},
    }
    table = Table(("it answers", "share", "95 % interval"), rows)
    return Section("The model, and the question", text, [table], data={"model": card, "question": asked})


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
    n = min(N_PROVED, max(1, len(heads_of(model)) // 2))
    parts = story.results["attribution"].top(n)
    with screen.working("ablation against random heads", quiet=quiet):
        found = pb.prove.ablation(model, story.test, parts, by="mean", seed=story.seed)
    story.results["proof"] = found
    joint = (float(found["joint"]), float(found["joint_low"]), float(found["joint_high"]))
    gap = (float(found["difference"]), float(found["difference_low"]), float(found["difference_high"]))
    stronger = int((found["random"] >= joint[0]).sum())
    if gap[1] > 0 and not stronger:
        verdict = "**They carry it**: no draw costs as much"
    elif gap[1] > 0:
        verdict = f"**That is no proof that they alone carry it**: {stronger} draws cost as much"
    else:
        verdict = "**That is no proof that they carry it**"
    together, draws = ", ".join(map(str, parts)), found["random"]
    text = [
        f"{together} are taken away together (each set to its mean), on the half that did not choose them. What is lost "
        f"of the logit difference: **{joint[0]:.2f}** ({joint[1]:.2f} to {joint[2]:.2f}); without as many random heads of the same layers "
        f"{draws.mean():.2f} on average ({draws.min():.2f} to {draws.max():.2f} over {len(draws)} draws). {verdict}. The difference is "
        f"{gap[0]:.2f} ({gap[1]:.2f} to {gap[2]:.2f}), p = {float(found['p']):.2g} (with {len(draws)} draws it cannot be below {1 / (1 + len(draws)):.2g}).",
        *found.notes[1:],
    ]
    rows: list[list[Any]] = [
        ["together", *joint],
        *([str(r["part"]), r["value"], r["low"], r["high"]] for r in found.table()),
    ]
    rows.append(
        [f"{len(draws)} random draws (mean, range)", draws.mean().item(), draws.min().item(), draws.max().item()]
    )
    caption = (
        "What is lost in logits. Bars: the chosen heads, with 95 % intervals. Dots: random heads of the same layers."
    )
    data = {
        "proof": {
            "parts": [str(p) for p in parts],
            "joint": joint,
            "random": draws,
            "difference": gap,
            "p": float(found["p"]),
        }
    }
    return Section("Proof: take them away", text, [Table(("without", "lost", "low", "high"), rows)],
                   [Picture(partial(report.ablation_figure, found), caption)], data)  # fmt: skip


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
            f"The knob is in **{knob}**, with its proof and its curve. Use it: patchbay generate {source} PROMPT --knob {knob}@{story.strength:g}",
        ]
    else:
        text = ["No knob was written, since none was found. Another task or another kind of part may do better."]
    text += [f"The page with all figures is **{path}**.", f"{seconds:.0f} s."]
    if story.knob is not None:
        text.append(
            f"To look closer: patchbay ui {story.model.source or 'MODEL'} --results {path.parent} opens a page; {path.stem}.knob is among its results."
        )
    return Section("What was written", text, data={"written": written, "seconds": seconds})


def _write_page(story: Story, told: list[Section], path: Path) -> None:
    provenance = story.results["attribution"].provenance
    model, versions = provenance["model"], provenance["versions"]
    foot = [
        f"Made by the command patchbay demo, seed {story.seed}, on {provenance['date']}. Model {model['source']} "
        f"({', '.join(model_details(model))}). Versions: {', '.join(f'{k} {v}' for k, v in versions.items())}.",
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
        (_arrow(knob["before"][0], knob["after"][0]), f"{answer} answers, on prompts that chose nothing"),
        (
            f"{100 * min(knob['random']):.0f} - {percent(max(knob['random']))}",
            "the same with random heads, turned as far",
        ),
        (
            f"{float(curve['loss'][at] - curve['loss_without']):+.3f}",
            f"nats per token on {story.question.neutral_name}",
        ),
    ]
    if (plain := seen["dose_response"]["plain"]) is not None:
        tiles.append((_arrow(float(plain[DOSES.index(1.0)]), float(plain[at])), "plain facts completed"))
    return tiles


# --- small things -------------------------------------------------------------------------------------


def _arrow(before: float, after: float) -> str:
    return f"{100 * before:.0f} → {percent(after)}"


def _codes(question: Question) -> dict[str, int]:
    return {question.right: 1, question.wrong: -1, "other": 0}


def _accuracy(model: Model, task: Task) -> maths.Interval:
    logits = pb.run(model, task, logits="last", batch_size=64).last_logits
    return maths.bootstrap_interval(task.with_metric("accuracy").score(logits).float())


def _within(error: float) -> str:
    return f"within {error:.0e}" if error else "exactly"
