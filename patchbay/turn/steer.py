"""Steer: a knob that adds the direction by which contrast pairs differ.

    v = the difference of the means of positive and negative streams at the last token (way "mean"), or a unit direction w times
    the gap of these means along w: w the first component of the paired differences ("pca"), or the normal of a logistic
    probe ("probe"); the knob adds strength x v to the stream that leaves one layer

so that strength 1 takes the negative group's mean to the positive one's, along the direction. Pairs are a task's prompts
(positive) and their corrupted twins (negative). The layer is chosen on one half of the pairs, the direction is fitted
there, and its evidence `steering` is of the other half, layer by layer: `auc`, the share of positive streams that project
above negative ones (0.5: nothing there), with a bootstrap over pairs; the same with the two of each pair swapped at random, in
both halves (`null_mean`, `null_high`: the 95th percentile, `p`); and `effect`, what v added to the twins
does to their score for the positive prompt's right answer, beside random directions of the same length (`random`). Cost: two
passes over the pairs, and 1 + `draws` over the twins for each layer.

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
from patchbay.turn._places import Place, places

SHUFFLES = {"mean": 100, "pca": 100, "probe": 40}  # a probe is fitted anew in each
DRAWS = 3  # random directions, which show where chance lies: no p comes of them
LEAST = 2  # pairs in a half


@method(paper="rimsky2024")
def steer(
    model: Model,
    task: Task,
    *,
    way: Way = "mean",
    layers: list[int] | None = None,
    choose: Literal["effect", "separation"] = "effect",
    positions: Place = "all",
    batch_size: int = 32,
    seed: int = 0,
) -> Knob:
    """A knob that adds the direction from a task's corrupted twins to its prompts, at the layer that does most on a dev half.

    `layers`: those to choose from, all without. `positions`: where to add it, as in "last", "generated", "all". Evidence `steering` [layer]: `effect`, `auc` with ends
    and controls, on the other half.

    `way`: the direction: the difference of "mean"s, the first component ("pca"), or a "probe"'s normal. `choose`: take
    the layer of most "effect" on the score, or of best "separation" of the groups.
    """
    tried, at = _checked(model, task, way, layers, choose), places(positions)
    ports = [Port("resid_out", layer) for layer in tried]
    dev, test = task.split(0.5, seed)
    fit, held = (
        _groups(model, half, ports, batch_size) for half in (dev, test)
    )  # (positive, negative) [port, pair, d]
    vectors = torch.stack([direction(p, n, way) for p, n in zip(*fit, strict=True)])  # [port, d_model]
    auc_dev = _folded(*fit, way)
    effect_dev = _effects(model, dev, ports, vectors, at, batch_size)
    best = int((effect_dev.mean(1) if choose == "effect" else auc_dev).argmax())
    auc, null = _separation(*held, vectors), _null(*fit, *held, way, seed)
    effect = _effects(model, test, ports, vectors, at, batch_size)  # [port, prompt]
    random = _random(model, test, ports, vectors, at, batch_size, seed)
    evidence = _evidence(model, test, tried, best, auc, null, effect, random, auc_dev, effect_dev)
    name = f"steer {task.name} ({way}) at L{tried[best]}"
    return Knob(
        name, [edit.add(ports[best], vectors[best].float(), positions=at)], 1.0, evidence={"steering": evidence}
    )


# --- the pairs ----------------------------------------------------------------------------------------


def _checked(model: Model, task: Task, way: str, layers: list[int] | None, choose: str) -> list[int]:
    if way not in WAYS or choose not in ("effect", "separation"):
        raise PatchbayError(
            f"way={way!r}, choose={choose!r}; ways are {', '.join(WAYS)}, and a layer is chosen by effect or separation"
        )
    task.check(model.vocab_size)
    if task.corrupted is None:
        raise PatchbayError(
            f"task {task.name} has no corrupted twins: contrast pairs are prompts (positive) and twins (negative)"
        )
    if len(task) < 2 * LEAST:
        raise PatchbayError(
            f"task {task.name} has {len(task)} pairs: {LEAST} to fit on and {LEAST} to hold out are needed"
        )
    tried = list(range(model.n_layers)) if layers is None else sorted(set(layers))
    if not tried or not 0 <= tried[0] <= tried[-1] < model.n_layers:
        raise PatchbayError(f"layers={layers}: possible are 0 to {model.n_layers - 1}")
    return tried


def _groups(model: Model, task: Task, ports: list[Port], batch_size: int) -> tuple[Tensor, Tensor]:
    """Streams of the prompts and of their twins, [port, pair, d_model] each."""
    twins = [list(ids) for ids in task.corrupted or ()]
    positive = streams(model, [list(ids) for ids in task.clean], ports, batch_size)
    return positive, streams(model, twins, ports, batch_size)


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


def _separation(positive: Tensor, negative: Tensor, vectors: Tensor, n: int = 500) -> tuple[Tensor, Tensor, Tensor]:
    """Held-out area under the curve [port] with the ends of a bootstrap over pairs."""
    a, b = _project(positive, vectors), _project(negative, vectors)  # [port, pair]
    count = a.shape[1]
    drawn = torch.randint(count, (n, count), generator=torch.Generator().manual_seed(0))
    means = torch.stack([apart(a[:, some], b[:, some]) for some in drawn])  # [draw, port]
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return apart(a, b), low, high


def _null(
    fit_positive: Tensor, fit_negative: Tensor, positive: Tensor, negative: Tensor, way: str, seed: int
) -> Tensor:
    """Held-out areas [shuffle, port] with the two of each pair swapped at random, in both halves: what chance gives."""
    generator = torch.Generator().manual_seed(seed)

    def swapped(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        swap = torch.randint(2, (one.shape[1],), generator=generator).bool()[None, :, None]
        return torch.where(swap, other, one), torch.where(swap, one, other)

    found = []
    for _ in range(SHUFFLES[way]):
        pairs = zip(*swapped(fit_positive, fit_negative), strict=True)
        vectors = torch.stack([direction(p, n, way) for p, n in pairs])
        a, b = swapped(positive, negative)
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


def _evidence(
    model: Model,
    test: Task,
    tried: list[int],
    best: int,
    auc: tuple[Tensor, Tensor, Tensor],
    null: Tensor,
    effect: Tensor,
    random: Tensor,
    auc_dev: Tensor,
    effect_dev: Tensor,
) -> Result:
    """The curves over layers, of the held-out half; NaN at layers that were not tried."""
    unit = test.unit if test.metric != "kl" else "nats"
    mean, low, high = maths.intervals(effect.T)
    p = (1 + (null >= auc[0] - 1e-9).sum(0)) / (1 + len(null))
    strongest = random.abs().max(0).values
    columns = {
        "effect": (mean, unit),
        "low": (low, unit),
        "high": (high, unit),
        "random": (strongest, unit),
        "effect_dev": (effect_dev.mean(1), unit),
        "auc": (auc[0], "share"),
        "auc_low": (auc[1], "share"),
        "auc_high": (auc[2], "share"),
        "auc_dev": (auc_dev, "share"),
        "null_mean": (null.mean(0), "share"),
        "null_high": (null.quantile(0.95, dim=0), "share"),
        "p": (p, "probability"),
    }
    values = {}
    for name, (column, its_unit) in columns.items():
        whole = torch.full((model.n_layers,), torch.nan, dtype=torch.float64)
        whole[tried] = column.double()
        values[name] = (whole, ("layer",), its_unit)
    tells, moves = float(p[best]) <= 0.05, float(low[best]) > float(strongest[best])
    said = [
        f"layer {tried[best]}, chosen on the other half: it {'tells' if tells else 'does NOT tell'} the held-out groups apart "
        f"(auc {float(auc[0][best]):.2f}, swapped pairs up to {float(null.quantile(0.95, dim=0)[best]):.2f})",
        f"added to the twins it {'moves' if moves else 'does NOT move'} the score by more than random directions: "
        f"{float(mean[best]):+.3g} ({float(low[best]):.3g} to {float(high[best]):.3g}), random up to "
        f"{float(strongest[best]):.3g}",
    ]
    provenance = {"method": "turn.steer", "task": test.to_json()}
    return Result(values, highlights=[f"L{tried[best]}"], notes=said, provenance=provenance)
