"""Fit mechanisms: how far place, key and pointer explain, as one mixture, what an interchange makes a model answer.

After `prove.interchange` put the twin's stream at one token (the last) into the clean run, the candidates a = 0..P-1 have a
distribution. For a twin whose place is p, key k and answer i (`positional`, `lexical`, `reflexive`), the causal model
says

    logits(a) = w exp(-(a - p)^2 / (2 sigma(p)^2)) + g_k[k] 1{a = k} + g_i[i] 1{a = i},   sigma(p) quadratic in p / P

so a place may be blurred, more in the middle than at the ends, while key and pointer are exact; w and the tables g are
free. Prompts of one (p, k, i) are averaged to a cell; 70 % of the cells train (Adam 5e-2 on the Jensen-Shannon
divergence, base 2), 15 % stop the training, and the last 15 % are reported:

    jss = 1 - JSD in bits, 1 where the distributions are equal        kl, kl_reverse in nats

for the full model, without each term, with each term alone, and for none of them ("uniform"). What a term is worth is
what the model loses without it (`lost`), cell by cell. Controls: the same fits with the places of the cells shuffled
(`shuffled`), which come down to "uniform", and `p`, that a fit predicts no better than uniform on held-out cells.

Gur-Arieh, Geva and Geiger 2025, "Mixing Mechanisms". The formula has no term for the clean answer: at depths where the
patch does nothing it can still fit far above "uniform", since it learns, with terms below 0, that the clean answer is none of
p, k and i: with 5 candidates that leaves 2 (a trained model gave 0.986 there). So `unmoved` says how much probability the
clean answer keeps; where that is half or more the fit is no evidence of a mechanism, and the notes do not name one; nor do they
name a term whose fitted strength is below 0. A good fit says that these three explain the answers, not how they are computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchbay.model.model import Model
from patchbay.prove import _mixture
from patchbay.prove._cells import intervals, p_values
from patchbay.prove._interchanged import MECHANISMS, candidates, depths_of, distributions, twin_streams
from patchbay.prove._mixture import TERMS, Mixture
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

N_HYPOTHESES = len(TERMS)
UNMOVED = 0.5  # probability left with the clean answer from which on a patch is said to do little


@method(paper="gurarieh2025")
def fit_mechanisms(
    model: Model,
    task: Task,
    *,
    layers: list[int] | None = None,
    patched: Result | None = None,
    steps: int = 2000,
    draws: int = 3,
    batch_size: int = 32,
    seed: int = 0,
) -> Result:
    """The mixture of positional, lexical and reflexive terms that fits the patched answers best, at each depth.

    `patched`: the Result of `prove.interchange` on the same task (for another token than the last: with its `at`), of which
    nothing is run again; its `distribution` is all that is used. Main variable `jss` [layer, condition] on held-out cells with `low` and `high`; `kl`,
    `kl_reverse`, `lost` (against the full model) and its ends, `p`, `p_adjusted`; `shuffled` [layer, draw]; `unmoved`
    [layer], the probability left with the clean answer; the full model's `weight`, and `sigma`, `lexical`, `reflexive` by
    place [layer, token].

    `layers`: depths to fit; without, all. `steps`: the most updates of each fit. `draws`: fits with the places
    shuffled, as the control: they show what shuffling leaves and enter no p, which is of held-out cells.
    """
    if steps < 1 or draws < 1:
        raise PatchbayError(f"steps={steps}, draws={draws}: at least 1 of each")
    found = candidates(model, task)
    if patched is None:
        depths = depths_of(model, layers)
        streams = twin_streams(model, task, depths, batch_size)
        observed = distributions(model, task, found, depths, streams, batch_size)
    else:
        depths, observed = _given(patched, layers, tuple(found.ids.shape))
    labels = torch.stack([found.places[name] for name in MECHANISMS], -1)  # [prompt, 3]
    cells, mean = _cells(labels, observed)
    parts = _split(len(cells), seed)
    mixture, log_q, made = _fit(mean, cells, parts, steps, draws, seed)
    unmoved = observed.gather(-1, found.places["asked"].expand(len(depths), -1)[..., None])[..., 0].mean(1)  # [depth]
    return _result(depths, mean, cells, parts, mixture, log_q, made, unmoved)


def _given(patched: Result, layers: list[int] | None, shape: tuple[int, ...]) -> tuple[list[int], Tensor]:
    """Depths and distributions of an interchange that was already made."""
    if "distribution" not in patched or patched.axes_of("distribution") != ("layer", "prompt", "token"):
        raise PatchbayError(
            "patched needs a variable `distribution` [layer, prompt, token], as prove.interchange gives; this Result has "
            + ", ".join(patched.variables)
        )
    observed = patched["distribution"].double()
    if tuple(observed.shape[1:]) != shape:
        raise PatchbayError(
            f"patched holds {observed.shape[1]} prompts of {observed.shape[2]} candidates, the task {shape[0]} of {shape[1]}"
        )
    total = observed.sum(-1)
    if not bool(((total - 1).abs() < 1e-4).all()) or bool((observed < 0).any()):
        raise PatchbayError("patched: every row of `distribution` must be a distribution (not negative, sum 1)")
    known = [int(label) for label in patched.labels_of("layer")]
    wanted = known if layers is None else sorted(set(layers))
    if not wanted or any(layer not in known for layer in wanted):
        raise PatchbayError(f"layers={layers}: patched holds {known}")
    return wanted, observed[[known.index(layer) for layer in wanted]]


def _cells(labels: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """Each (p, k, i) once [cell, 3], and the mean distribution of its prompts [depth, cell, token]."""
    cells, place = torch.unique(labels, dim=0, return_inverse=True)
    sums = torch.zeros(len(observed), len(cells), observed.shape[-1], dtype=torch.float64)
    return cells, sums.index_add(1, place, observed) / torch.bincount(place)[None, :, None]


def _split(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cells to train on, to stop by and to report: 70, 15 and 15 %, two or more of the last for an interval."""
    if n < 4:
        raise PatchbayError(
            f"the task has {n} different triples of places (positional, lexical, reflexive): a fit needs 4 or more, "
            "to train, to stop and to report; give more prompts"
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    n_valid, n_test = max(1, round(0.15 * n)), max(2, round(0.15 * n))
    n_train = n - n_valid - n_test
    return order[:n_train], order[n_train : n_train + n_valid], order[n_train + n_valid :]


def _fit(
    mean: Tensor, cells: Tensor, parts: tuple[Tensor, ...], steps: int, draws: int, seed: int
) -> tuple[Mixture, Tensor, int]:
    """All fits at once: every depth with every hypothesis and every shuffle. log_q [depth, fit of a depth, cell, token]."""
    generator = torch.Generator().manual_seed(seed + 1)
    shuffled = [cells[torch.randperm(len(cells), generator=generator)] for _ in range(draws)]
    labels = torch.stack([cells] * N_HYPOTHESES + shuffled)  # [fit, cell, 3]
    terms = torch.tensor([*TERMS.values(), *[TERMS["full"]] * draws])  # [fit, 3]
    n_depths, n_fits = len(mean), len(labels)
    observed = mean[:, None].expand(-1, n_fits, -1, -1).flatten(0, 1)  # [depth * fit, cell, token]
    labels, terms = labels.repeat(n_depths, 1, 1), terms.repeat(n_depths, 1)
    mixture, made = _mixture.fit(observed, labels, terms, parts[0], parts[1], steps)
    with torch.no_grad():
        log_q = _mixture.log_predicted(mixture, labels, terms)
    return mixture, log_q.unflatten(0, (n_depths, n_fits)), made


def _result(
    depths: list[int],
    mean: Tensor,
    cells: Tensor,
    parts: tuple[Tensor, ...],
    mixture: Mixture,
    log_q: Tensor,
    made: int,
    unmoved: Tensor,
) -> Result:
    test = parts[2]
    observed, log_q = mean[:, None, test], log_q[:, :, test]
    each = 1.0 - _mixture.jensen_shannon(observed, log_q)  # [depth, fit, cell]
    forward, backward = _mixture.kullback_leibler(observed, log_q)
    named = each[:, :N_HYPOTHESES].movedim(-1, 0)  # [cell, depth, condition]
    jss, low, high = intervals(named)
    lost, lost_low, lost_high = intervals(named[..., :1] - named)
    p, adjusted = torch.full_like(jss, torch.nan), torch.full_like(jss, torch.nan)
    p[:, :-1], adjusted[:, :-1] = p_values((named - named[..., -1:])[..., :-1], 1e-9)
    first = [depth * log_q.shape[1] for depth in range(len(depths))]  # the full model of each depth
    full = Mixture(*(tensor[first] for tensor in mixture))
    spread = _mixture.sigma(full, torch.arange(mean.shape[-1]).expand(len(depths), -1)).abs()
    grid, table = ("layer", "condition"), ("layer", "token")
    unit, shuffled = "1 - JSD in bits", each[:, N_HYPOTHESES:].mean(-1)
    return Result(
        {
            "jss": (jss, grid, unit),
            "low": (low, grid, unit),
            "high": (high, grid, unit),
            "kl": (forward[:, :N_HYPOTHESES].mean(-1), grid, "nats"),
            "kl_reverse": (backward[:, :N_HYPOTHESES].mean(-1), grid, "nats"),
            "lost": (lost, grid, unit),
            "lost_low": (lost_low, grid, unit),
            "lost_high": (lost_high, grid, unit),
            "p": (p, grid, "probability"),
            "p_adjusted": (adjusted, grid, "probability"),
            "shuffled": (shuffled, ("layer", "draw"), unit),
            "unmoved": (unmoved, ("layer",), "probability"),
            "weight": (full.weight, ("layer",), "logits"),
            "sigma": (spread, table, "places"),
            "lexical": (full.lexical, table, "logits"),
            "reflexive": (full.reflexive, table, "logits"),
        },
        coords={"layer": depths, "condition": list(TERMS)},
        notes=_notes(depths, jss, adjusted, lost, lost_low, shuffled, cells, parts, made, unmoved, full),
    )


def _notes(
    depths: list[int],
    jss: Tensor,
    adjusted: Tensor,
    lost: Tensor,
    lost_low: Tensor,
    shuffled: Tensor,
    cells: Tensor,
    parts: tuple[Tensor, ...],
    made: int,
    unmoved: Tensor,
    full: Mixture,
) -> list[str]:
    moved, still = ([i for i in range(len(depths)) if (float(unmoved[i]) < UNMOVED) == kind] for kind in (True, False))
    size = f"{len(cells)} cells (p, k, i): {len(parts[0])} to train, {len(parts[1])} to stop, {len(parts[2])} reported; {made} steps"
    idle = [
        f"at {', '.join(str(depths[i]) for i in still)} the clean answer keeps {UNMOVED:.0%} or more of the probability: the patch "
        "does little there, and the fit names no mechanism"
    ] * bool(still)
    if not moved:
        return [*idle, size]
    best = max(moved, key=lambda i: float(jss[i, 0] - jss[i, -1]))
    strength = (full.weight[best], full.lexical[best].mean(), full.reflexive[best].mean())
    needed = [
        f"{name} {lost[best, 1 + m]:.3f}"
        for m, name in enumerate(MECHANISMS)
        if lost_low[best, 1 + m] > 0.0 and strength[m] > 0
    ]
    return [
        f"furthest above uniform at {depths[best]}: jss {jss[best, 0]:.4f} against {jss[best, -1]:.4f} uniform and "
        f"{shuffled[best].mean():.4f} with shuffled places (p_adjusted {adjusted[best, 0]:.3g}); lost without "
        + (", ".join(needed) or "any one term: nothing clear of 0"),
        *idle,
        size,
    ]
