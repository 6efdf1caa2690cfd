"""The turn that was chosen, judged on prompts that chose nothing: right answers, rivals, and harm on unrelated text."""

from __future__ import annotations

from functools import partial
from typing import Any

import patchbay as pb
from patchbay import maths
from patchbay.draw import screen
from patchbay.draw.report import Picture, Section, Table
from patchbay.model.source import built_in_names
from patchbay.stories import _figures
from patchbay.stories._demo_task import _samples, _stories, ends, percent
from patchbay.stories._lists import by_label, known, looks, rightness
from patchbay.stories._told import Told


def counts(told: Told, quiet: bool) -> Section:
    """Right answers on the judging prompts, before and after, by N and by place."""
    assert told.search is not None
    model, test, found = told.model, told.lists.test, told.search
    with screen.working("judging", quiet=quiet):
        after = rightness(model, test, [told.turn.knob(model)])
        always = rightness(model, test, [told.turn.knob(model, None)])
        drawn = {i: rightness(model, test, [found.turns[i].knob(model)]) for i in sorted(set(found.rivals))}
        looked = [
            looks(model, known(test, told.test_right, told.n_found), told.movers, e)
            for e in ([], [told.turn.knob(model)])
        ]
    before = told.test_right
    gain = maths.paired_interval(after, before)
    p = maths.permutation_p(after, before)
    rivals = [float((drawn[i] - before).mean()) for i in found.rivals]
    p_rivals = (1 + sum(rival >= gain.mean - 1e-12 for rival in rivals)) / (1 + len(rivals))
    told.works = gain.low > 0 and p_rivals <= 0.05
    told.knob = told.turn.knob(model)
    by_size = by_label(test, "n_objects", before, after, after - before, always)
    by_place = by_label(test, "missing_index", before, after, after - before)
    inhibition = [float((seen["missing"] - seen["listed"]).mean()) for seen in looked]
    text = _judged(told, gain, p, p_rivals, rivals, by_size, float(always.mean()), inhibition, found.n_random)
    random_by_size = [by_label(test, "n_objects", drawn[i]) for i in found.rivals]
    ranges = [[rows[k][2][0].mean for rows in random_by_size] for k in range(len(by_size))]
    tables = [
        Table(("objects", "prompts", "before", "after", "gain, points", "95 % interval", "rivals", "at every position"),
              [[n, count, percent(b.mean), percent(a.mean), f"{100 * g.mean:+.1f}", _points(g), f"{100 * min(r):.0f} - {percent(max(r))}", percent(w.mean)]
               for (n, count, (b, a, g, w)), r in zip(by_size, ranges, strict=True)], "by number of objects", on_screen=20),
        Table(("place", "prompts", "before", "after", "gain, points", "95 % interval"),
              [[i + 1, count, percent(b.mean), percent(a.mean), f"{100 * g.mean:+.1f}", _points(g)] for i, count, (b, a, g) in by_place],
              "by the place of the missing object in the list", on_screen=20),
    ]  # fmt: skip
    data = {"judged": {"before": ends(maths.bootstrap_interval(before)), "after": ends(maths.bootstrap_interval(after)), "gain": ends(gain), "p": p,
            "rivals": rivals, "p_rivals": p_rivals, "every_position": float(always.mean()), "works": told.works, "mover_preference": inhibition,
            "by_objects": {n: {"before": ends(b), "after": ends(a), "gain": ends(g), "every_position": w.mean} for n, _, (b, a, g, w) in by_size},
            "by_place": {i + 1: {"prompts": count, "before": ends(b), "after": ends(a)} for i, count, (b, a, _) in by_place}}}  # fmt: skip
    pictures = [Picture(partial(_figures.before_after, by_size, ranges, "objects in the list"), "Missing object named, by the number of objects; grey: the rivals' range."),
                Picture(partial(_figures.before_after, by_place, None, "place of the missing object"), "The same by its place in the list.")]  # fmt: skip
    return Section(
        "Judged: before and after, on prompts that chose nothing", text, tables, pictures, data, verdict=told.works
    )


def _judged(
    told: Told, gain: maths.Interval, p: float, p_rivals: float, rivals: list[float], by_size: list[Any], always: float,
    inhibition: list[float], n_random: int,
) -> list[str]:  # fmt: skip
    largest = max(by_size, key=lambda row: row[2][2].mean)
    verdict = (
        "**Turning this channel helps**, beyond what random components give."
        if told.works
        else "**It helps, but no more than the best of random components.**"
        if gain.low > 0
        else "**Turning it harms.**" if gain.high < 0 else "**Turning it changes nothing that can be told from chance.**"
    )  # fmt: skip
    n, _, (before, after, best, _) = largest
    return [
        f"{verdict} {told.turn} at the last position: named {percent(float(told.test_right.mean()))} before, "
        f"{percent(float(told.test_right.mean()) + gain.mean)} after; paired, **{100 * gain.mean:+.1f} points** ({_points(gain)}), p = {p:.2g}. "
        f"{len(rivals)} rivals, each the best of as many of {n_random} random components: {100 * min(rivals):+.1f} to {100 * max(rivals):+.1f} points, p = {p_rivals:.2g}.",
        f"The largest gain of one length is at {n} objects: {percent(before.mean)} to {percent(after.mean)} ({_points(best)} points); it is the "
        f"largest of {len(by_size)}, so read the interval with that in mind. Turned at every position, as a change of weights would: {percent(always)} named in all.",
        f"What the movers look at: missing object less another listed one, {inhibition[0]:+.4f} before, {inhibition[1]:+.4f} after.",
    ]


def harm(told: Told, quiet: bool) -> Section:
    """Loss on unrelated text, the knob turned at every position of it."""
    model = told.model
    built_in = model.source in built_in_names()
    texts = _stories(model, told.seed) if built_in else _samples(model, told.seed + 1)
    name = "stories of the training grammar, held out" if built_in else "the model's own samples"
    knob = told.turn.knob(model, None)
    with screen.working("unrelated text", quiet=quiet):
        found = pb.measure.dose_response(model, told.lists.test[:8], knob, strengths=[knob.strength], neutral=texts)
    told.results["side_effects"] = found
    loss, kl = ([float(found[f"{v}{end}"][0]) for end in ("", "_low", "_high")] for v in ("loss", "kl"))
    plain = float(found["loss_without"])
    text = [
        f"On {len(texts)} texts ({name}), with {told.turn} at every position: **{plain:.3f}** to **{loss[0]:.3f}** nats per token "
        f"({loss[1]:.3f} to {loss[2]:.3f}); divergence from the model as it is {kl[0]:.4f} nats per token ({kl[1]:.4f} to {kl[2]:.4f})."
    ]
    data = {"side_effects": {"texts": len(texts), "what": name, "loss_before": plain, "loss_after": loss, "kl": kl}}
    return Section("Side effects: unrelated text", text, data=data)


def _points(found: maths.Interval) -> str:
    """The interval of a gain in points; of one prompt there is none."""
    return "-" if found.low != found.low else f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
