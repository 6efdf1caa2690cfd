"""Steer: a knob that adds the direction by which contrast pairs differ.

    v = the difference of the means of positive and negative streams at the last token (way "mean"), or a unit direction w times
    the gap of these means along w: w the first component of the paired differences ("pca"), or the normal of a logistic
    probe ("probe"); the knob adds strength x v to the stream that leaves one layer

so that strength 1 takes the negative group's mean to the positive one's, along the direction. The groups are a task's prompts
(positive) and their corrupted twins (negative), or two lists of texts of any lengths. The layer is chosen on one half, the
direction is fitted there, and its evidence `steering` is of the other half, layer by layer: `auc`, the share of positive streams
that project above negative ones (0.5: nothing there), with a bootstrap over pairs, or over each group; the same with the two of
each pair swapped at random, or all prompts dealt out anew, in both halves (`null_mean`, `null_high`: the 95th percentile, `p`); and,
where the task has answers, `effect`, what v added to the twins does to their score for the positive prompt's right answer,
beside random directions of the same length (`random`). Cost: two passes over the prompts, and 1 + `draws` over the twins for each
layer.

Rimsky et al. 2024, "Steering Llama 2 via Contrastive Activation Addition"; components and probes as in Zou et al. 2023,
"Representation Engineering". A direction that tells the groups apart need not be what the model uses: the two curves are
different things, and where `effect` is no larger than `random` there is no knob. Strengths far beyond 1 take the
stream where it never is: `measure.dose_response` shows what else changes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.knobs.knob import Knob
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port
from patchbay.signal.positions import Positions
from patchbay.tasks.task import Task
from patchbay.turn._contrast import WAYS, Way, apart, direction, streams
from patchbay.turn._pairs import Groups, groups_of
from patchbay.turn._places import Place, places

SHUFFLES = {"mean": 100, "pca": 100, "probe": 40}  # a probe is fitted anew in each
DRAWS = 3  # random directions, which show where chance lies: no p comes of them


@method(paper="rimsky2024")
def steer(
    model: Model,
    task: Task | None = None,
    positive: list[str] | list[list[int]] | None = None,
    negative: list[str] | list[list[int]] | None = None,
    *,
    way: Way = "mean",
    layers: list[int] | None = None,
    choose: Literal["effect", "separation"] | None = None,
    positions: Place = "all",
    batch_size: int = 32,
    seed: int = 0,
) -> Knob:
    """A knob that adds the direction from negative prompts to positive ones, at the layer that does most on a dev half.

    `task`: its prompts are positive and its corrupted twins negative. `positive`, `negative`: in its place, two lists of texts
    (a file of prompts on the command line) without answers, of any lengths.
    `layers`: those to choose from, all without. `positions`: where to add it, as in "last", "generated", "all". Evidence `steering`
    [layer]: `effect` (of a task with answers), `auc` with ends and controls, on the other half.

    `way`: the direction: the difference of "mean"s, the first component of pairs ("pca"), or a "probe"'s normal. `choose`: take
    the layer of most "effect" on the score, or of best "separation" of the groups; without, by effect where there are answers.
    """
    tried, at = _checked(model, way, layers, choose), places(positions)
    groups = groups_of(model, task, positive, negative, way)
    by = _choice(groups, choose)
    ports = [Port("resid_out", layer) for layer in tried]
    dev, test = groups.split(seed)
    fit, held = (
        (streams(model, half.positive, ports, batch_size), streams(model, half.negative, ports, batch_size))
        for half in (dev, test)
    )  # (positive, negative) [port, prompt, d]
    vectors = torch.stack([direction(p, n, way) for p, n in zip(*fit, strict=True)])  # [port, d_model]
    columns = _apart(fit, held, vectors, way, seed, groups.paired)
    if test.task is not None and dev.task is not None:
        effect_dev = _effects(model, dev.task, ports, vectors, at, batch_size)
        effect = _effects(model, test.task, ports, vectors, at, batch_size)  # [port, prompt]
        random = _random(model, test.task, ports, vectors, at, batch_size, seed)
        columns = _moved(test.task, effect, effect_dev, random) | columns
    best = int(columns["effect_dev" if by == "effect" else "auc_dev"][0].argmax())
    evidence = _evidence(model, test, tried, best, columns)
    name = f"steer {groups.name} ({way}) at L{tried[best]}"
    adds = [edit.add(ports[best], vectors[best].float(), positions=at)]
    made = {"fitted": [*dev.positive, *dev.negative]}  # who measures the knob leaves these out
    return Knob(name, adds, 1.0, provenance=made, evidence={"steering": evidence})


# --- what is asked ------------------------------------------------------------------------------------


def _checked(model: Model, way: str, layers: list[int] | None, choose: str | None) -> list[int]:
    if way not in WAYS or choose not in (None, "effect", "separation"):
        raise PatchbayError(
            f"way={way!r}, choose={choose!r}; ways are {', '.join(WAYS)}, and a layer is chosen by effect or separation"
        )
    tried = list(range(model.n_layers)) if layers is None else sorted(set(layers))
    if not tried or not 0 <= tried[0] <= tried[-1] < model.n_layers:
        raise PatchbayError(f"layers={layers}: possible are 0 to {model.n_layers - 1}")
    return tried


def _choice(groups: Groups, choose: str | None) -> str:
    if choose == "effect" and groups.task is None:
        raise PatchbayError(
            "choose='effect' needs answers whose score can move, and these prompts have none; possible: 'separation'"
        )
    return choose or ("separation" if groups.task is None else "effect")


# --- separation ---------------------------------------------------------------------------------------


def _project(group: Tensor, vectors: Tensor) -> Tensor:
    """Projections on the unit directions, [port, pair]."""
    unit = vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return (group @ unit[:, :, None])[..., 0]


def _folded(positive: Tensor, negative: Tensor, way: str) -> Tensor:
    """Separation inside the dev half [port]: fitted on every other pair and read on those between, both ways."""
    found = []
    for fit, read in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        vectors = torch.stack([direction(p[fit], n[fit], way) for p, n in zip(positive, negative, strict=True)])
        found.append(apart(_project(positive[:, read], vectors), _project(negative[:, read], vectors)))
    return torch.stack(found).mean(0)


def _apart(
    fit: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], vectors: Tensor, way: str, seed: int, paired: bool
) -> dict[str, tuple[Tensor, str]]:
    """How far the directions tell the groups apart [port], with ends and what chance gives."""
    (area, low, high), null = _separation(*held, vectors, paired), _null(fit, held, way, seed, paired)
    found = {"auc": area, "auc_low": low, "auc_high": high, "auc_dev": _folded(*fit, way)}
    found |= {"null_mean": null.mean(0), "null_high": null.quantile(0.95, dim=0)}
    p = (1 + (null >= area - 1e-9).sum(0)) / (1 + len(null))
    return {name: (column, "share") for name, column in found.items()} | {"p": (p, "probability")}


def _separation(
    positive: Tensor, negative: Tensor, vectors: Tensor, paired: bool, n: int = 500
) -> tuple[Tensor, Tensor, Tensor]:
    """Held-out area under the curve [port] with the ends of a bootstrap over pairs, or over each group by itself."""
    a, b = _project(positive, vectors), _project(negative, vectors)  # [port, prompt]
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(a.shape[1], (n, a.shape[1]), generator=generator)
    others = some if paired else torch.randint(b.shape[1], (n, b.shape[1]), generator=generator)
    means = torch.stack([apart(a[:, i], b[:, j]) for i, j in zip(some, others, strict=True)])  # [draw, port]
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return apart(a, b), low, high


def _null(fit: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], way: str, seed: int, paired: bool) -> Tensor:
    """Held-out areas [shuffle, port] with the two of each pair swapped at random, or all prompts dealt out anew, in both halves."""
    generator = torch.Generator().manual_seed(seed)

    def mixed(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        if paired:
            swap = torch.randint(2, (one.shape[1],), generator=generator).bool()[None, :, None]
            return torch.where(swap, other, one), torch.where(swap, one, other)
        both = torch.cat([one, other], 1)[:, torch.randperm(one.shape[1] + other.shape[1], generator=generator)]
        return both[:, : one.shape[1]], both[:, one.shape[1] :]

    found = []
    for _ in range(SHUFFLES[way]):
        vectors = torch.stack([direction(p, n, way) for p, n in zip(*mixed(*fit), strict=True)])
        a, b = mixed(*held)
        found.append(apart(_project(a, vectors), _project(b, vectors)))
    return torch.stack(found)


# --- effect -------------------------------------------------------------------------------------------


def _effects(model: Model, task: Task, ports: list[Port], vectors: Tensor, at: Positions, batch_size: int) -> Tensor:
    """Score of the twins for the positive prompts' answers with the vector, minus without, [port, prompt]; up is towards them."""
    task = task if task.metric != "kl" else task.with_metric("log_probability")
    sign = task.sign

    def score(edits: list[edit.Edit]) -> Tensor:
        twins = [list(ids) for ids in task.corrupted or ()]
        pieces = [
            run(model, twins[i : i + batch_size], edits=edits, logits="last").last_logits
            for i in range(0, len(twins), batch_size)
        ]
        return sign * task.score(torch.cat(pieces)).double().cpu()

    plain = score([])
    return torch.stack(
        [score([edit.add(p, v.float(), positions=at)]) - plain for p, v in zip(ports, vectors, strict=True)]
    )


def _random(
    model: Model, task: Task, ports: list[Port], vectors: Tensor, at: Positions, batch_size: int, seed: int
) -> Tensor:
    """Mean effect of random directions of the same length, [draw, port]."""
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(DRAWS):
        drawn = torch.randn(vectors.shape, generator=generator).double()
        drawn = drawn / drawn.norm(dim=-1, keepdim=True) * vectors.norm(dim=-1, keepdim=True)
        found.append(_effects(model, task, ports, drawn, at, batch_size).mean(1))
    return torch.stack(found)


# --- what is known of it ------------------------------------------------------------------------------


def _moved(test: Task, effect: Tensor, effect_dev: Tensor, random: Tensor) -> dict[str, tuple[Tensor, str]]:
    """What the directions do to the score [port], with ends and the largest of random directions."""
    unit = test.unit if test.metric != "kl" else "nats"
    mean, low, high = maths.intervals(effect.T)
    found = {
        "effect": mean,
        "low": low,
        "high": high,
        "random": random.abs().max(0).values,
        "effect_dev": effect_dev.mean(1),
    }
    return {name: (column, unit) for name, column in found.items()}


def _evidence(
    model: Model, test: Groups, tried: list[int], best: int, columns: dict[str, tuple[Tensor, str]]
) -> Result:
    """The curves over layers, of the held-out half; NaN at layers that were not tried."""
    values = {}
    for name, (column, its_unit) in columns.items():
        whole = torch.full((model.n_layers,), torch.nan, dtype=torch.float64)
        whole[tried] = column.double()
        values[name] = (whole, ("layer",), its_unit)
    at = {name: float(column[best]) for name, (column, _) in columns.items()}
    dealt = "swapped pairs" if test.paired else "prompts dealt out anew"
    said = [
        f"layer {tried[best]}, chosen on the other half: it {'tells' if at['p'] <= 0.05 else 'does NOT tell'} the held-out groups "
        f"apart (auc {at['auc']:.2f}, {dealt} up to {at['null_high']:.2f})"
    ]
    if test.task is None:
        said.append("the prompts have no answers: the layer was chosen by how far it tells the groups apart, and what the direction does to an answer was not measured")  # fmt: skip
    else:
        said.append(
            f"added to the twins it {'moves' if at['low'] > at['random'] else 'does NOT move'} the score by more than random "
            f"directions: {at['effect']:+.3g} ({at['low']:.3g} to {at['high']:.3g}), random up to {at['random']:.3g}"
        )
    record = test.task.to_json() if test.task is not None else {"prompts": [test.positive, test.negative]}
    return Result(
        values, highlights=[f"L{tried[best]}"], notes=said, provenance={"method": "turn.steer", "task": record}
    )
