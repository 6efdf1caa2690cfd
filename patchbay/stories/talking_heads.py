"""Talking heads: which channel tells the movers what is done with, is it used, and does turning it mend long lists?

After Merullo, Eickhoff and Pavlick 2024, "Talking Heads", on any model: a list of N objects is read (3 to 20, as far as the
model can read), all but one are done with, and the one that is left is asked for. Mover heads are found by what they carry from
the object's place to the answer; inhibition heads by what they do to the movers' queries; channels between them from
the weights. The gate takes a channel's component away, and changes what the mover alone hears of it. Then every candidate is
turned at the last position, by strengths and by coordinates; the best on the prompts that choose is judged on others: right
answers by N and by the place of the missing object, against rivals that were chosen as hard from random components, with the
harm on unrelated text. Prompts and settings are this project's own: those of the paper are not known to it.

What it does not show: that a model inhibits what it has seen. One that adds up the first list and subtracts the second needs
no inhibition; where the movers look at done objects as much as at the missing one, that is said.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import patchbay as pb
from patchbay import maths
from patchbay.draw import report, screen
from patchbay.draw.report import Picture, Section, Table, check_place
from patchbay.find.channels import channels
from patchbay.find.inhibition_heads import inhibition_heads
from patchbay.find.name_mover_heads import name_mover_heads
from patchbay.model.model import Model
from patchbay.results.printed import model_details
from patchbay.signal.channel import Channel
from patchbay.signal.port import PatchbayError
from patchbay.stories import _figures
from patchbay.stories._demo_task import ends, percent, span
from patchbay.stories._judging import counts, harm
from patchbay.stories._lists import ask, by_label, known, looks, rightness
from patchbay.stories._told import Told
from patchbay.stories._turns import search
from patchbay.wiring.components import n_components

N_MOVERS, N_CANDIDATES, N_FOUND, N_GATE = 3, 12, 60, 32
GATE_SIZES = [1, 2, 4, 8, 12]
LEAST_SHARE = 0.5  # of the prompts of some length: below, the model does not do the task


def tell(
    model: Model, *, seed: int = 0, report: str | Path, quiet: bool = False, n: int | None = None
) -> dict[str, Any]:
    """Run the story, printing each step as it ends; write the page and, where turning works, the knob. Returns the numbers."""
    began = time.perf_counter()
    path = Path(report)
    _check(model, path)
    with screen.working("writing lists", quiet=quiet):
        told = Told(model, ask(model, n=n or _prompts_for(model)[0], seed=seed), seed, N_FOUND)
    sections: list[Section] = []
    for step in (_lists, _heads, _wires, _turning, _gate, counts, harm):
        sections.append(step(told, quiet))
        if not quiet:
            screen.say(*screen.sections(sections[-1], len(sections)))
    sections.append(_ending(told, path, time.perf_counter() - began))
    _write_page(told, sections, path)
    if not quiet:
        screen.say(*screen.sections(sections[-1], len(sections)))
    return {key: value for section in sections for key, value in section.data.items()}


def _check(model: Model, path: Path) -> None:
    """Raise before anything runs where the story cannot be told of this model, or the page not be written."""
    check_place(path)
    layers = [i for i in range(model.n_layers) if "attn.z" in model.signals(i)]
    if len(layers) < 2:
        found = f"attention heads in {len(layers)} layers" if layers else "no layer with attention heads"
        raise PatchbayError(
            f"talking heads need two layers with attention heads; this {model.family.name} model has {found}"
        )


def _prompts_for(model: Model) -> tuple[int, int]:
    """Prompts of each length, and random components to turn: fewer for larger models."""
    size = sum(p.numel() for p in model.hf.parameters())
    return (24, 48) if size < 5e6 else (18, 24) if size < 5e7 else (12, 16)


# --- the steps ----------------------------------------------------------------------------------------


def _lists(told: Told, quiet: bool) -> Section:
    """How often the missing object is named, by the number of objects."""
    lists = told.lists
    with screen.working("asking", quiet=quiet):
        told.dev_right, told.test_right = (rightness(told.model, task) for task in (lists.dev, lists.test))
    rows = [[n, count, percent(found[0].mean), span(found[0]), percent(1 / n)]
            for n, count, found in by_label(lists.test, "n_objects", told.test_right)]  # fmt: skip
    best = max(found[0].mean for _, _, found in by_label(lists.dev, "n_objects", told.dev_right))
    text = [
        f"Lists of {lists.sizes[0]} to {lists.sizes[-1]} objects, all but one of them done with: which is left? "
        f"{len(lists.dev)} prompts choose, {len(lists.test)} others judge. Named are **{percent(float(told.test_right.mean()))}** "
        "of all (the likeliest token of the whole vocabulary).",
        f"For example: {lists.test.texts[0]} ->" if lists.test.texts else "",
        lists.missing,
    ]
    if best < LEAST_SHARE:
        text.append(
            f"**The model does not do this task**: at no length does it name {percent(LEAST_SHARE)}. What follows is of what it does."
        )
    data = {"lists": {"sizes": lists.sizes, "dev": len(lists.dev), "test": len(lists.test), "left_out": lists.missing,
            "accuracy": {n: ends(found[0]) for n, _, found in by_label(lists.test, "n_objects", told.test_right)}}}  # fmt: skip
    table = Table(("objects", "prompts", "named", "95 % interval", "guessing"), rows, on_screen=20)
    return Section("The lists", [line for line in text if line], [table], data=data)


def _heads(told: Told, quiet: bool) -> Section:
    """Movers, and the heads that turn their queries."""
    model, task = told.model, known(told.lists.dev, told.dev_right, told.n_found)
    with screen.working("movers and inhibition heads", quiet=quiet):
        found = name_mover_heads(model, task)
        told.results["movers"] = found
        clear = [
            row for row in found.table() if row["value"] > 0 and row["p_adjusted"] <= 0.05 and row["part"].layer > 0
        ]
        told.movers = [row["part"] for row in clear[:N_MOVERS]] or [p for p in found.top(12) if p.layer][:1]
        text = [_movers_text(told, task, bool(clear))]
        try:
            inhibits = inhibition_heads(model, task, movers=told.movers, seed=told.seed)
        except PatchbayError as error:
            inhibits = None
            text.append(f"Inhibition heads could not be measured: {error}")
    tables = [Table(("head", "moves, logits", "attention to it", "p adjusted"),
                    [[str(r["part"]), r["value"], r["attention"], r["p_adjusted"]] for r in found.table(8)], "movers")]  # fmt: skip
    if inhibits is not None:
        told.results["inhibition"] = inhibits
        rows = inhibits.table()
        told.inhibiting = [r["part"] for r in rows if r["value"] > max(0.0, r["random"]) and r["p_adjusted"] <= 0.05]
        names = ", ".join(map(str, told.inhibiting))
        text.append(
            f"Inhibition heads (what they say at the last position turns the movers' queries from done objects to the missing one): "
            f"**{names}**." if names else "**No head inhibits**: none turns the movers' queries to the missing object beyond a random push."
        )  # fmt: skip
        tables.append(Table(("head", "turns, attention", "random push", "looks at done", "p adjusted"),
                            [[str(r["part"]), r["value"], r["random"], r["looks_at_wrong"], r["p_adjusted"]] for r in rows[:8]],
                            "inhibition heads"))  # fmt: skip
    data = {
        "heads": {
            "movers": list(map(str, told.movers)),
            "movers_clear": bool(clear),
            "inhibition": list(map(str, told.inhibiting)),
        }
    }
    return Section("The heads: movers, and who inhibits them", text, tables, data=data)


def _movers_text(told: Told, task: pb.Task, clear: bool) -> str:
    """Who moves the answer, and whether the movers look at the missing object more than at others."""
    seen = looks(told.model, task, told.movers)
    gap = maths.paired_interval(seen["missing"].mean(0), seen["listed"].mean(0))
    names = ", ".join(map(str, told.movers))
    who = f"Movers: **{names}**." if clear else f"**No head moves the answer** beyond chance; {names} comes nearest."
    means = {name: float(value.mean()) for name, value in seen.items()}
    how = (
        f" From the last position they pay {means['missing']:.3f} to the missing object, {means['listed']:.3f} to each other listed one and "
        f"{means['done']:.3f} to each when it is done (difference of the first two {gap.mean:+.3f}, {gap.low:+.3f} to {gap.high:+.3f})."
    )
    if not (gap.low > 0 and gap.mean > 0.5 * means["listed"]):
        how += (
            " They do not single it out: that is what a model does which adds the first list and subtracts the second, "
            "and needs no inhibition."
        )
    return who + how


def _wires(told: Told, quiet: bool) -> Section:
    """Channels into the movers' queries, from weights."""
    model = told.model
    with screen.working("channels from the weights", quiet=quiet):
        found = channels(model, writers=["head"], readers=[str(part) for part in told.movers], kinds=["query"])
    told.results["channels"] = found
    rows = [row for row in found.table() if isinstance(row["part"], Channel) and isinstance(row["part"].component, int)]
    passed = [row for row in rows if row["p_adjusted"] <= 0.05]
    sources: dict[str, Channel] = {}
    for row in sorted(passed or rows, key=lambda row: (row["part"].writer not in told.inhibiting, -row["z"])):
        sources.setdefault(row["part"].source, row["part"])
    told.candidates = list(sources.values())[:N_CANDIDATES]
    if not told.candidates:
        raise PatchbayError(
            f"no head writes before the movers {', '.join(map(str, told.movers))} read: there is no channel to turn"
        )
    text = [
        f"Components of earlier heads against the movers' queries, each score against random rotations of its own spectra: {len(passed)} listed "
        f"channels pass at an adjusted p of 0.05"
        + (". The candidates, of inhibition heads first:" if told.inhibiting else ". The candidates:"),
    ]
    if not passed:
        text[0] = (
            "**No channel into the movers' queries stands out from random rotations**; those of highest score are tried."
        )
    by_name = {str(row["part"]): row for row in rows}
    shown = [[str(c), by_name[str(c)]["value"], by_name[str(c)]["z"], by_name[str(c)]["p_adjusted"],
              "yes" if c.writer in told.inhibiting else ""] for c in told.candidates]  # fmt: skip
    table = Table(("channel", "composition", "z", "p adjusted", "inhibition head"), shown, on_screen=N_CANDIDATES)
    data = {
        "channels": {
            "passed": len(passed),
            "candidates": [dict(zip(("channel", "score", "z", "p"), row, strict=False)) for row in shown],
        }
    }
    return Section("The wires: channels into the movers' queries", text, [table], data=data)


def _turning(told: Told, quiet: bool) -> Section:
    """Every turn of every candidate on the choosing prompts."""
    n_random = _prompts_for(told.model)[1]
    told.search = search(
        told.model, told.lists.dev, told.dev_right, told.candidates, n_random=n_random, seed=told.seed, quiet=quiet
    )
    found = told.search
    text = [
        f"Each of {found.n_candidates} candidates and {found.n_random} random components of heads in the same layers is turned at the last "
        f"position, by strengths and by coordinates: {len(found.turns)} turns, on the {len(told.lists.dev)} prompts that choose, every length "
        f"counted alike. As it is, {percent(found.base)} are named; with the best turn of a candidate, **{told.turn}**, "
        f"{percent(float(found.share[found.best]))}. That is the number that was chosen, not what it is worth: see the judging prompts.",
    ]
    order = sorted(range(len(found.turns)), key=lambda i: -float(found.share[i]))
    mine = {str(c.source) for c in told.candidates}
    rows = [
        [
            str(found.turns[i]),
            percent(float(found.share[i])),
            "candidate" if found.turns[i].channel.source in mine else "random",
        ]
        for i in order[:10]
    ]
    data = {"turning": {"chosen": str(told.turn), "channel": str(told.turn.channel), "strength": told.turn.strength,
            "coordinate": told.turn.coordinate, "dev": {"before": found.base, "after": float(found.share[found.best])},
            "tried": len(found.turns)}}  # fmt: skip
    return Section("Turning it: which turn helps", text, [Table(("turn", "named", "what it is"), rows, "the ten best turns")],
                   [Picture(partial(_figures.turns, found, told.candidates), "Share named with each candidate turned; the line is the model as it is.")], data)  # fmt: skip


def _gate(told: Told, quiet: bool) -> Section:
    """The chosen channel through prove.channel, on the judging half."""
    task = known(told.lists.test, told.test_right, N_GATE)
    name = told.turn.channel
    sizes = [k for k in GATE_SIZES if k <= n_components(told.model, name.writer)]
    with screen.working(f"the gate of {name}", quiet=quiet):
        found = pb.prove.channel(told.model, task, name, sizes=sizes, seed=told.seed)
    told.gate = told.results["gate"] = found
    text = [
        f"**{name}** through the gate, on {len(task)} judging prompts of lengths that the model can do. {found.notes[0][0].upper()}{found.notes[0][1:]}.",
        *found.notes[1:],
    ]
    keys = ("removed", "edge", "restored")
    rows = [[key, *(float(found[f"{key}{end}"]) for end in ("", "_low", "_high")), float(found[f"{key}_random"].abs().max()), float(found[f"p_{key}"])]
            for key in keys]  # fmt: skip
    proved = bool(float(found["proved"]))
    data = {"gate": {"channel": str(name), "proved": proved, "prompts": len(task),
            **{key: {"effect": row[1:4], "p": row[5]} for key, row in zip(keys, rows, strict=True)}}}  # fmt: skip
    table = Table(("", found.unit, "low", "high", "largest control", "p"), rows)
    return Section("The gate: is the channel used", text, [table],
                   [Picture(partial(_figures.rank_curve, found), "Right answers without the top, the bottom and random components of the writing head.")],
                   data, verdict=None)  # fmt: skip


def _ending(told: Told, path: Path, seconds: float) -> Section:
    written = {"report": str(path)}
    text = []
    if told.works and told.knob is not None:
        place = path.with_suffix(".knob")
        place.parent.mkdir(parents=True, exist_ok=True)
        evidence = {name: told.results[name] for name in ("gate", "side_effects")}
        told.knob.with_evidence(**evidence).save(place, overwrite=True)
        written["knob"] = str(place)
        text.append(
            f"The knob is in **{place}**; it acts at the last position of a prompt. With it are the gate and, as the worst case, the "
            "side effects of turning at every position."
        )
    else:
        text.append("No knob was written: no turn was found that helps beyond what random components give.")
    text += [f"The page with all tables and figures is **{path}**.", f"{seconds:.0f} s."]
    return Section("What was written", text, data={"written": written, "seconds": seconds})


def _write_page(told: Told, sections: list[Section], path: Path) -> None:
    provenance = told.results["gate"].provenance
    model, versions = provenance["model"], provenance["versions"]
    foot = [
        f"Made by the command patchbay run talking-heads, seed {told.seed}, on {provenance['date']}. Model {model['source']} "
        f"({', '.join(model_details(model))}). Versions: {', '.join(f'{k} {v}' for k, v in versions.items())}.",
        "Every number and figure is of this run. Intervals are 95 % bootstraps over prompts.",
    ]
    judged = next(section.data["judged"] for section in sections if "judged" in section.data)
    side = next(section.data["side_effects"] for section in sections if "side_effects" in section.data)
    tiles = [
        (str(told.turn), "the turn that was chosen"),
        (
            f"{100 * judged['before'][0]:.0f} → {percent(judged['after'][0])}",
            "missing object named, on prompts that chose nothing",
        ),
        (
            f"{100 * min(judged['rivals']):+.1f} to {100 * max(judged['rivals']):+.1f}",
            "points, rivals of random components",
        ),
        ("proved" if float(told.results["gate"]["proved"]) else "not proved", "the channel, through the gate"),
        (f"{side['loss_after'][0] - side['loss_before']:+.3f}", "nats per token on unrelated text"),
    ]
    title = f"Talking heads in {Path(told.model.source).name or told.model.config.model_type}"
    report.write(path, report.page(title, "Which channel tells the movers what is done with, is it used, and does turning it mend long lists?",
                                   sections, tiles=tiles, foot=foot))  # fmt: skip
