"""Channel: does the model use what one component of a head tells one reader, and how many components is the message?

A head writes z W_O = sum_i c_i v_i over the singular components of its W_OV. For a channel such as L0.H1.C3>L1.H2.k:

    removed    = score(model) - score(model without the component), for all who read it
    edge       = score(model) - score(model in which the reader's q, k or v alone is what it is without the component)
    restored   = score(head writes the component alone) - score(head writes nothing)
    at[c]      = score when the coordinate is c everywhere: its mean and up to 4 standard deviations to either side
    effect[k]  = what is lost without the k components of highest composition score with the reader ("top"), of lowest
                 ("bottom"), and without k random ones: the rank curve, which measures how low the rank is

turned round for rank and kl, where more is worse. The composition score is |v_i W_out| / |W_out|, from weights alone; of
rotary models the root mean square over `OFFSETS`. For the edge, everything between writer and reader keeps what it wrote, so
that the reader hears the change by the stream alone. By "zero" the coordinate is 0, as if the weights lacked the component; by
"mean" it is its mean over the task. Controls are as many random other components of the same head (where it has too few, random
directions among all that it can write): p = (1 + controls whose effect is as large or larger, in size) / (1 + controls), with
20 controls at least 0.048. `proved` is 1 only where removed and edge both have p <= 0.05, intervals beyond the controls' mean
and one sign. Intervals are 95 % bootstraps over prompts. Cost: about (sizes + 3) * (1 + draws) forward passes, and two or three
for each condition of the edge.

Merullo, Eickhoff and Pavlick 2024, "Talking Heads"; the paths as in Goldowsky-Dill et al. 2023. It shows that the model needs the
component on these prompts, and that this reader is one who needs it; not what it says (`find.channel_content`), nor that a
random component is a fair rival: one of many needed components may be real and not stand out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from patchbay import maths
from patchbay.errors import one_of
from patchbay.model.model import Model
from patchbay.model.rotary import turns
from patchbay.prove._cells import check_draws, ends, intervals, listed
from patchbay.prove._components import Answers, Change, Reader, Writer, answers, natural
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.channel import READS, Channel
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.task import Task
from patchbay.wiring.components import check_channel, components, folded_heads, weighed
from patchbay.wiring.wiring import readers

By = Literal["zero", "mean"]
OFFSETS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # as find.channels has them
SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
GRID = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)  # standard deviations from the mean
LIMIT = 0.05
SHARE = "share of prompts"


@method(paper="merullo2024")
def channel(
    model: Model,
    task: Task,
    channel: Channel,
    *,
    n_components: int = 1,
    by: By = "zero",
    sizes: list[int] | None = None,
    draws: int = 20,
    batch_size: int = 64,
    seed: int = 0,
) -> Result:
    """The causal gate of one channel, as "L0.H1.C3>L1.H2.k": a head (or its component), and who reads it as what.

    `n_components`: take so many as the channel: the named component (if any), then those of highest composition score with the
    reader. `sizes`: numbers of components of the rank curve; all sizes up to the head's by default, in growing steps. Main variable
    `effect` [condition, n_parts] with `low` and `high`; `accuracy` likewise; `gap` (top - bottom), `accuracy_gap`, `random` [draw,
    n_parts], `p_top`; `removed`, `edge`, `restored`, each with ends, `_difference` (from its controls) with ends, `_random`
    [draw] and `p_...`; `at` [strength]; `proved`.

    `channel`: a head or its component, who reads it, and as what: "L0.H1.C3>L1.H2.k". `by`: what the coordinate
    becomes: "zero", or its "mean" over the task. `draws`: random other components, as the control.
    """
    writer, scores, reader = _checked(model, task, channel, n_components, by, sizes, draws)
    order = scores.argsort(descending=True, stable=True).tolist()
    chosen = _chosen(channel, order, n_components)
    mean, spread = natural(model, task, writer, batch_size)
    at = mean if by == "mean" else None
    plan = _plan(writer, order, chosen, _sizes(writer.n, sizes), draws, at, mean, spread, seed)
    everywhere = answers(model, task, writer, plan.changes, batch_size)
    heard = answers(model, task, writer, [writer.as_it_is(), *plan.removals], batch_size, reader)
    seen = _Seen(task, plan, everywhere, heard)
    return _result(model, task, channel, scores, chosen, plan, seen, mean, spread, by)


# --- the channel --------------------------------------------------------------------------------------


def _checked(
    model: Model, task: Task, channel: Channel, n: int, by: str, sizes: list[int] | None, draws: int
) -> tuple[Writer, Tensor, Reader]:
    """The writer, the composition score of each of its components with the reader, and where the reader hears."""
    if channel.writer.kind != "head" or channel.reader is None:
        raise PatchbayError(
            f"{channel}: a head as writer and a reader are needed, such as L0.H1.C3>L1.H2.k, L0.H1>L1.mlp or L2.H0.C1>unembed"
        )
    if not any("attn.z" in model.signals(layer) for layer in range(model.n_layers)):
        model.require(Port("attn.z", 0))  # raises: no layer has it
    if model.n_layers == 1 and channel.reader.kind == "head":
        raise PatchbayError(f"{channel}: the model has one layer, so that no head reads what another writes")
    check_channel(channel, model)
    task.check(model.vocab_size)
    one_of("by", by, ("zero", "mean"))
    check_draws(draws)
    writer = Writer.of(model, channel.writer)
    if isinstance(channel.component, int) and channel.component >= writer.n:
        raise PatchbayError(
            f"{channel}: {channel.writer} is of rank {writer.n}: component {channel.component} writes nothing"
        )
    if not 1 <= n <= writer.n:
        raise PatchbayError(f"n_components={n}: {channel.writer} has {writer.n}")
    if sizes is not None and (not sizes or not all(1 <= size <= writer.n for size in sizes)):
        raise PatchbayError(f"sizes={sizes}: numbers of components, each 1 to {writer.n}")
    return writer, composition(model, channel)[: writer.n], _reader(model, channel)


def _reader(model: Model, channel: Channel) -> Reader:
    """Where the reader hears: its own q, k or v, its input, or the logits."""
    reader, kind = channel.reader, str(channel.kind)
    assert reader is not None
    if kind == "unembed":
        return Reader(Port("logits"))
    if kind == "mlp" and reader.kind == "mlp":
        return Reader(Port("mlp.in", reader.layer))
    if reader.kind != "head":
        raise PatchbayError(f"{channel}: readers that can be proved are a head's q, k or v, a whole MLP and unembed")
    return Reader(model.port(f"{reader}.{READS[kind]}"), reader)


def composition(model: Model, channel: Channel) -> Tensor:
    """|v_i W_out| / |W_out| of each component of the writer with the reader, [component]."""
    assert channel.reader is not None
    layer, kind = channel.reader.layer, str(channel.kind)
    heads = folded_heads(model, layer) if layer is not None and channel.reader.kind == "head" else None
    turn = None
    if heads is not None and kind in ("query", "key"):
        longest = model.max_positions or OFFSETS[-1] + 1
        turn = turns(model, [offset for offset in OFFSETS if offset < longest], {int(layer or 0): heads})[
            int(layer or 0)
        ]
    found = readers(model, layer, kind, turn=turn, heads=heads)
    place = (channel.reader, kind)
    if found is None or place not in found.names:
        raise PatchbayError(f"{channel}: this {model.family.name} model has no reader {channel.target}")
    i, v = found.names.index(place), components(model, channel.writer).v
    return (found.factors.squares(v)[:, i].double() / found.factors.traces()[i, 0]).clamp_min(0.0).sqrt().cpu()


def _chosen(channel: Channel, order: list[int], n: int) -> list[int]:
    """The components that are the channel: the named one first, then those of highest score."""
    first = [channel.component] if isinstance(channel.component, int) else []
    return [*first, *(i for i in order if i not in first)][:n]


def _sizes(n: int, sizes: list[int] | None) -> list[int]:
    return sorted(set(sizes)) if sizes is not None else [*(k for k in SIZES if k < n), n]


# --- what is run --------------------------------------------------------------------------------------


@dataclass
class Plan:
    """Every change to run, and where each stands in `changes`."""

    changes: list[Change]
    removals: list[Change]  # the channel's removal, then its controls': also run as the reader alone hears them
    sizes: list[int]
    removed: slice
    silent: int
    restored: slice
    top: slice
    bottom: slice
    drawn: slice  # draw by draw, size by size
    grid: slice
    directions: bool  # whether controls are random directions, for want of other components


def _plan(
    writer: Writer,
    order: list[int],
    chosen: list[int],
    sizes: list[int],
    draws: int,
    at: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    seed: int,
) -> Plan:
    rng = random.Random(f"channel-{seed}")
    sets = _other_sets(writer.n, chosen, draws, rng)
    controls = [(writer, at, which) for which in sets]
    if len(sets) < draws:
        controls += [_rotated(writer, at, len(chosen), draw, seed) for draw in range(draws - len(sets))]
    removals = [writer.without(chosen, at), *(w.without(which, a) for w, a, which in controls)]
    restored = [writer.only(chosen, at), *(w.only(which, a) for w, a, which in controls)]
    orders = [rng.sample(range(writer.n), writer.n) for _ in range(draws)]
    coordinate = [mean[chosen[0]] + step * spread[chosen[0]] for step in GRID]
    grid = [writer.without(chosen[:1], torch.full((writer.n,), float(c))) for c in coordinate]
    pieces = [
        [writer.as_it_is()],
        removals,
        [writer.only([], at)],
        restored,
        [writer.without(order[:k], at) for k in sizes],
        [writer.without(order[-k:], at) for k in sizes],
        [writer.without(row[:k], at) for row in orders for k in sizes],
        grid,
    ]
    places, start = [], 0
    for piece in pieces:
        places.append(slice(start, start + len(piece)))
        start += len(piece)
    changes = [change for piece in pieces for change in piece]
    _, removed, silent, back, top, bottom, drawn, on_grid = places
    return Plan(changes, removals, sizes, removed, silent.start, back, top, bottom, drawn, on_grid, len(sets) < draws)


def _other_sets(n: int, chosen: list[int], draws: int, rng: random.Random) -> list[tuple[int, ...]]:
    """Up to `draws` different sets of as many other components (of any, where too few are left)."""
    k = len(chosen)
    pool = [i for i in range(n) if i not in chosen]
    pool = pool if len(pool) >= k else list(range(n))
    found: dict[tuple[int, ...], None] = {}
    for _ in range(20 * draws):
        one = tuple(sorted(rng.sample(pool, k)))
        if set(one) != set(chosen):
            found[one] = None
        if len(found) == draws:
            break
    return list(found)


def _rotated(
    writer: Writer, at: Tensor | None, k: int, draw: int, seed: int
) -> tuple[Writer, Tensor | None, tuple[int, ...]]:
    """The same head in random other orthonormal directions of what it writes; the first k of them."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + draw)
    turn = torch.linalg.qr(torch.randn(writer.n, writer.n, generator=generator, dtype=torch.float64)).Q.T
    read, write = (turn @ side.double() for side in (writer.read, writer.write))
    made = Writer(writer.part, read.to(writer.read), write.to(writer.write))
    return made, None if at is None else turn @ at.double(), tuple(range(k))


# --- what came of it ----------------------------------------------------------------------------------


class _Seen:
    """Losses (positive where the answer gets worse) [condition, prompt] and shares of right answers."""

    def __init__(self, task: Task, plan: Plan, everywhere: Answers, heard: Answers) -> None:
        sign = task.sign
        self.score, self.right = everywhere.score, everywhere.right
        self.lost = sign * (everywhere.score[0] - everywhere.score)  # [change, prompt]
        self.heard = sign * (heard.score[0] - heard.score[1:])  # [removal, prompt]
        self.heard_right = heard.right[1:]
        self.gained = self.lost[plan.silent] - self.lost[plan.restored]  # [restoration, prompt]


def _against(name: str, values: Tensor, unit: str) -> dict[str, Any]:
    """The chosen row of values [1 + control, prompt] with its ends, its difference from its controls, and p."""
    own, drawn = values[0], values[1:]
    means = drawn.mean(1)
    found = maths.bootstrap_interval(own)
    apart, p = maths.beyond_draws(own, drawn), maths.draws_p(found.mean, means, two_sided=True)
    out: dict[str, Any] = ends(name, found, unit) | ends(f"{name}_difference", apart, unit)
    return out | {f"{name}_random": (means, ("draw",), unit), f"p_{name}": (p, (), "probability")}


def _proved(found: dict[str, Any]) -> bool:
    """Removal and edge both stand out from their controls, on the same side."""

    def stands(name: str) -> int:
        low, high = (float(found[f"{name}_difference_{end}"][0]) for end in ("low", "high"))
        mean = float(found[name][0])
        side = 1 if low > 0 and mean > 0 else -1 if high < 0 and mean < 0 else 0
        return side if float(found[f"p_{name}"][0]) <= LIMIT else 0

    return stands("removed") != 0 and stands("removed") == stands("edge")


def _curve(task: Task, plan: Plan, seen: _Seen) -> dict[str, Any]:
    """The rank curve: top, bottom and random, in the task's unit and in right answers."""
    out: dict[str, Any] = {}
    n, grid = len(plan.sizes), ("condition", "n_parts")
    for prefix, values, unit in (("", seen.lost, task.unit), ("accuracy", seen.right, SHARE)):
        drawn = values[plan.drawn].unflatten(0, (-1, n))  # [draw, size, prompt]
        rows = torch.stack([values[plan.top], values[plan.bottom], drawn.mean(0)])  # [condition, size, prompt]
        mean, low, high = intervals(rows.movedim(2, 0))
        gap = intervals((rows[0] - rows[1]).T) if not prefix else intervals((rows[1] - rows[0]).T)
        names = ("effect", "low", "high") if not prefix else (prefix, f"{prefix}_low", f"{prefix}_high")
        out |= {name: (x, grid, unit) for name, x in zip(names, (mean, low, high), strict=True)}
        start = "gap" if not prefix else f"{prefix}_gap"
        out |= {f"{start}{end}": (x, ("n_parts",), unit) for end, x in zip(("", "_low", "_high"), gap, strict=True)}
        if not prefix:
            means = drawn.mean(2)  # [draw, size]
            slack = 1e-9 * means.abs().max()
            p = (1.0 + (means >= mean[0] - slack).sum(0)) / (1.0 + len(means))
            out |= {"random": (means, ("draw", "n_parts"), unit), "p_top": (p, ("n_parts",), "probability")}
    return out


def _result(
    model: Model,
    task: Task,
    channel: Channel,
    scores: Tensor,
    chosen: list[int],
    plan: Plan,
    seen: _Seen,
    mean: Tensor,
    spread: Tensor,
    by: str,
) -> Result:
    unit = task.unit
    proof = _against("removed", seen.lost[plan.removed], unit) | _against("edge", seen.heard, unit)
    proof |= _against("restored", seen.gained, unit)
    curve = _curve(task, plan, seen)
    at = intervals(seen.score[plan.grid].T)
    first = chosen[0]
    values = curve | proof
    values |= {f"at{end}": (x, ("strength",), unit) for end, x in zip(("", "_low", "_high"), at, strict=True)}
    values["at_accuracy"] = (seen.right[plan.grid].mean(1), ("strength",), SHARE)
    values["coordinate"] = (mean[first] + torch.tensor(GRID) * spread[first], ("strength",), "coordinate")
    values["composition"] = (scores, ("component",), "composition")
    values |= {
        "whole_head": (seen.lost[plan.silent].mean(), (), unit),
        "score": (seen.score[0].mean(), (), unit),
        "accuracy_whole": (seen.right[0].mean(), (), SHARE),
        "accuracy_removed": (seen.right[plan.removed][0].mean(), (), SHARE),
        "accuracy_edge": (seen.heard_right[0].mean(), (), SHARE),
        "proved": (float(_proved(proof)), (), "yes is 1"),
    }
    return Result(
        values,
        coords={"condition": ["top", "bottom", "random"], "n_parts": plan.sizes, "strength": list(GRID)},
        notes=_notes(model, channel, chosen, plan, values, unit, by),
        highlights=[part for part in (channel.writer, channel.reader) if part is not None],
        tables={"components": [{"rank": i, "component": int(c), "composition": float(scores[c]), "chosen": c in chosen}
                               for i, c in enumerate(scores.argsort(descending=True, stable=True).tolist(), 1)]},
    )  # fmt: skip


def _notes(
    model: Model, channel: Channel, chosen: Sequence[int], plan: Plan, values: dict[str, Any], unit: str, by: str
) -> list[str]:
    def told(name: str) -> str:
        one, low, high, p = (float(values[key][0]) for key in (name, f"{name}_low", f"{name}_high", f"p_{name}"))
        drawn = values[f"{name}_random"][0]
        within = "" if low != low else f"{low:.3g} to {high:.3g}; "  # one prompt has no interval
        return f"{one:.3g} ({within}controls {float(drawn.min()):.3g} to {float(drawn.max()):.3g}, p = {p:.2g})"

    names = f"{channel.writer} component{'s' * (len(chosen) > 1)} {listed([f'C{i}' for i in chosen])}"
    verdict = "proved" if float(values["proved"][0]) else "not proved"
    notes = [
        f"{verdict}: without {names} (by {by}) the answer loses {told('removed')} {unit}; without it in {channel.target} alone "
        f"{told('edge')}; put back alone it gives {told('restored')} of {float(values['whole_head'][0]):.3g} that the whole head is worth"
    ]
    accuracy, sizes = values["accuracy"][0], plan.sizes
    widest = int((accuracy[1] - accuracy[0]).argmax())
    notes.append(
        f"rank curve: without the top {sizes[widest]} components {100 * float(accuracy[0, widest]):.0f} % are right, without the "
        f"bottom {sizes[widest]} {100 * float(accuracy[1, widest]):.0f} %, without random ones {100 * float(accuracy[2, widest]):.0f} %"
    )
    n_controls = len(plan.removals) - 1
    if 1 / (1 + n_controls) > LIMIT:
        notes.append(
            f"{n_controls} controls cannot give p <= {LIMIT}: nothing could be proved; ask for 19 draws or more"
        )
    if plan.directions:
        notes.append("the head has too few other components: some controls are random directions of what it writes")
    notes += weighed(model, [str(channel.kind)])
    reader = channel.reader
    if reader is not None and channel.kind in ("key", "value"):
        layer = reader.layer or 0
        if model.n_groups(layer) < model.n_heads(layer):
            notes.append(f"{channel.target} is shared by other query heads; here {reader} alone hears the change")
    return notes
