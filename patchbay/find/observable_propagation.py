"""Observable propagation: which directions in the stream carry a difference of logits, and which heads write it.

An observable is a vector n over the vocabulary (" she" minus " he"; right minus wrong). Its feature vector before a
part is n carried back through the path from that part to the logits, attention patterns held:

    unembedding   y = W_U^T n
    norm          exact: y <- (c(gain y) - x^ <x^, gain y> / d) / s, the gradient at x;   scale: y <- c(gain y) / s
    head          y <- sum over queries q of A[q, p] W_V W_O y_q        (through a norm after attention, if there is one)
    MLP           y <- d (y . MLP(x)) / d x at the prompt's own x

    score[layer, head]  = mean over prompts of z_h . (y at z_h): what the head writes, read by the feature of `path`
    vector              = y before the head, summed over positions, mean over prompts: what adding a small vector to
                          everything the head reads would do to the observable through it
    effect              = what the observable really loses when what the head writes is taken out along that path alone
    coupling            = y1 . y2 / |y1|^2, y1 the feature of the head with the largest |score|: how much x . y2 is
                          expected to rise with x . y1 when the rest of x is isotropic

`spearman` is the agreement of |score| with |effect| over heads, with its bootstrap interval, p and the 95th
percentile of random orders; below 0.5 a note warns. p flips signs prompt by prompt. `angle` is that between exact and
scale at the final norm, against its bound `angle_bound` = 2 arccos sqrt(1 - 1 / (d - 1)) for random n. Debiasing: the
feature of that head is projected out of the stream entering its layer, everywhere: `before`, `projected`,
`projected_random` (a random direction), and the rise of the prompts' own next-token loss. One forward pass, then
linear algebra.

Dunefsky and Cohan 2023, "Observable Propagation: A Data-Efficient Approach to Uncover Feature Vectors in Transformers".

First order along one path: with `exact` the scores do not sum to the logits (a norm's gradient is blind to the length
of the stream); with `scale` and no path they are direct logit attribution. What queries and keys do is not seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.errors import one_of
from patchbay.find._chance import rank_agreement, standard_error
from patchbay.find._direct import grid, head_layers, precise
from patchbay.find._importance import losses
from patchbay.find._propagation import WHAT, Field
from patchbay.model.given import by_length
from patchbay.model.model import Model
from patchbay.model.run import Trace, run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError, Port
from patchbay.tasks.task import Task

NormMode = Literal["exact", "scale"]
Observable = Mapping[str | int, float]


@method(paper="dunefsky2023", unit="logits")
def observable_propagation(
    model: Model,
    task: Task,
    *,
    observable: Observable | None = None,
    path: list[Part] | None = None,
    norm: NormMode = "exact",
    include_bias: bool = True,
    batch_size: int = 8,
    seed: int = 0,
) -> Result:
    """What each head writes towards an observable through `path`, and the feature vector that it reads for it, mean over prompts.

    `observable`: token (or its id) -> weight; without, each prompt's right answer minus the mean of its wrong ones.
    `path`: heads and MLPs from the output backwards ("L2.mlp,L1.H3"); without, straight to the logits.
    `include_bias`: count the value biases.

    `norm`: carry the observable back by a norm's "exact" gradient, or by its frozen "scale" alone.
    """
    one_of("norm", norm, ("exact", "scale"))
    layers, chosen = head_layers(model, WHAT), list(path or [])
    heard = _heard(model, layers, chosen)
    weights, tokens = _observed(model, task, observable)
    pieces = [
        _piece(
            Field(model, _trace(model, task, some), norm == "exact", weights[some], tokens), heard, chosen, include_bias
        )
        for some in by_length(task.clean, batch_size)
    ]
    order = torch.tensor([i for some in by_length(task.clean, batch_size) for i in some]).argsort()
    score, effect, angle, feature = (torch.cat([piece[k] for piece in pieces])[order] for k in range(4))
    p, axes, mean = maths.sign_flip_p(score, floor=1e-6), ("layer", "head"), score.mean(0)
    y = feature.mean(0)  # [layer, head, d_model]
    top = divmod(int(mean.abs().nan_to_num(-1.0).argmax()), mean.shape[1])
    agree = rank_agreement(score.flatten(1), effect.flatten(1), sizes=True, seed=seed)
    bound = 2 * math.acos(math.sqrt(1 - 1 / (model.d_model - 1)))
    scalars = _debias(model, task, weights, tokens, top[0], y[top], batch_size, seed)
    return Result(
        {
            "score": (mean, axes, "logits"),
            "standard_error": (standard_error(score), axes, "logits"),
            "effect": (effect.mean(0), axes, "logits"),
            "coupling": (y @ y[top] / (y[top] @ y[top]), axes, ""),
            "p": (p, axes, "probability"),
            "p_adjusted": (maths.benjamini_hochberg(p), axes, "probability"),
            "vector": (y, ("layer", "head", "d_model"), "logits"),
            "spearman": (agree["rho"], (), "correlation"),
            **{f"spearman_{name}": (agree[name], (), "correlation") for name in ("low", "high", "null_high")},
            "spearman_p": (agree["p"], (), "probability"),
            "angle": (angle.mean(), (), "radians"),
            "angle_bound": (bound, (), "radians"),
            **{name: (value, (), "nats" if "loss" in name else "logits") for name, value in scalars.items()},
        },
        notes=_notes(agree, chosen, Part(top[0], "head", top[1]), scalars),
    )


def _notes(agree: dict[str, float], path: list[Part], top: Part, scalars: dict[str, float]) -> list[str]:
    through = " through " + ", ".join(map(str, path)) if path else ""
    notes = [
        f"agreement of |score| with the exact effect{through}: Spearman {agree['rho']:.2f}"
        f"{maths.between(agree['low'], agree['high'], '.2f')} (p {agree['p']:.2g}; random order {agree['null_high']:.2f} at its 95th percentile)",
        f"feature of {top} projected out of L{top.layer}.resid_in: observable {scalars['before']:.3g} -> "
        f"{scalars['projected']:.3g} (random direction {scalars['projected_random']:.3g}), loss "
        f"{scalars['loss_rise']:+.3g} (random {scalars['loss_rise_random']:+.3g})",
    ]
    if not agree["rho"] >= 0.5:
        notes.append("warning: below 0.5 the first order does not say what these heads really do; trust `effect`")
    return notes


# --- what is asked ------------------------------------------------------------------------------------


def _heard(model: Model, layers: list[int], path: list[Part]) -> list[tuple[int, bool]]:
    """(layer, whether its heads come before the path) for all layers with heads."""
    before: tuple[float, str] = (math.inf, "the logits")
    for part in path:
        if part.kind not in ("head", "mlp"):
            raise PatchbayError(f"{part}: a path is made of heads and MLPs, such as L2.mlp, L1.H3")
        model.require(part.port("z" if part.kind == "head" else "out"))
        place = _reads(model, part)
        if (part.layer or 0) + (0.75 if part.kind == "mlp" else 0.25) > before[0]:
            raise PatchbayError(
                f"path: {part} does not come before {before[1]}; give the parts from the output backwards, such as L2.mlp, L1.H3"
            )
        before = (place, str(part))
    heard = [(layer, layer + 0.25 < before[0]) for layer in layers]
    if not any(yes for _, yes in heard):
        raise PatchbayError(f"path: no head comes before {before[1]}, so none can write to what it reads")
    return heard


def _reads(model: Model, part: Part) -> float:
    """Where in the order of writes a part reads: an MLP after its layer's heads, but for parallel blocks."""
    after_attention = part.kind == "mlp" and model.modules[part.layer or 0].mid is not None
    return (part.layer or 0) + (0.5 if after_attention else 0.0)


def _observed(model: Model, task: Task, observable: Observable | None) -> tuple[Tensor, Tensor]:
    """The observable of each prompt, [prompt, token], and the tokens that it has."""
    task.check(model.vocab_size)
    if observable is not None:
        ids = [model.token_id(token) if isinstance(token, str) else int(token) for token in observable]
        outside = [token for token in ids if not 0 <= token < model.vocab_size]
        if outside or not ids:
            raise PatchbayError(
                f"observable: {f'token id {outside[0]}' if outside else 'no token'}; ids are 0..{model.vocab_size - 1}"
            )
        row = torch.tensor([float(weight) for weight in observable.values()], dtype=torch.float64)
        return row.expand(len(task), -1).clone(), torch.tensor(ids)
    every = not all(task.wrong)
    tokens = range(model.vocab_size) if every else sorted({*task.right, *(t for ids in task.wrong for t in ids)})
    place = {token: at for at, token in enumerate(tokens)}
    weights = torch.zeros(len(task), len(place), dtype=torch.float64)
    for row, right, wrong in zip(weights, task.right, task.wrong, strict=True):
        others = list(place) if every else wrong
        for token in others:
            row[place[token]] -= 1.0 / len(others)
        row[place[right]] += 1.0
    return weights, torch.tensor(list(place))


# --- what is measured -----------------------------------------------------------------------------------


def _trace(model: Model, task: Task, some: list[int]) -> Trace:
    taps = [Port("resid_out", model.n_layers - 1), Port("final_norm")]
    wanted = ("resid_in", "resid_mid", "attn.v", "attn.pattern", "attn.z", "mlp.in", "mlp.out")
    taps += [Port(s, i) for i in range(model.n_layers) for s in wanted if s in model.signals(i)]
    return run(model, [list(task.clean[i]) for i in some], taps=taps, logits="last")


def _piece(
    field: Field, heard: Sequence[tuple[int, bool]], path: list[Part], include_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Score and effect [prompt, layer, head], angle [prompt] and features [prompt, layer, head, d_model]."""
    model, towards = field.model, field.back(path)
    scale, exact = (field.start(exact=which)[:, -1] for which in (False, True))
    base = field.observable(field.trace[Port("resid_out", model.n_layers - 1)][:, -1])
    scores, effects, features = [], [], []
    for layer, before in heard:
        n, blank = model.n_heads(layer), torch.full((len(base), model.n_heads(layer)), torch.nan, dtype=torch.float64)
        if not before:
            scores.append(blank)
            effects.append(blank)
            features.append(torch.full((*blank.shape, model.d_model), torch.nan, dtype=torch.float64))
            continue
        field.check_values(layer)
        at_z, z = field.at_z(layer, towards), precise(field.trace[Port("attn.z", layer)])
        score = (z * at_z).sum((1, 3))
        scores.append(score if include_bias else score - field.value_bias(layer, at_z))
        taken = [torch.where((torch.arange(n) == h)[:, None], z, 0.0) for h in range(n)]
        effects.append(torch.stack([base - field.forward(path, field.writes(layer, one)) for one in taken], 1))
        features.append(torch.stack([field.through_head(layer, h, at_z).sum(1) for h in range(n)], 1))
    layers = [layer for layer, _ in heard]
    feature = torch.full(
        (len(base), model.n_layers, max(f.shape[1] for f in features), model.d_model), torch.nan
    ).double()
    for layer, value in zip(layers, features, strict=True):
        feature[:, layer, : value.shape[1]] = value
    angle = maths.cosine(scale, exact).acos()
    return grid(model, layers, scores), grid(model, layers, effects), angle, feature


def _debias(
    model: Model, task: Task, weights: Tensor, tokens: Tensor, layer: int, feature: Tensor, batch_size: int, seed: int
) -> dict[str, float]:
    """The observable, and the loss on the prompts' own tokens, with the feature (or a random direction) projected out."""
    random = torch.randn(len(feature), generator=torch.Generator().manual_seed(seed))
    ways = {"before": None, "projected": feature.float(), "projected_random": random}
    seen: dict[str, Tensor] = {}
    for name, direction in ways.items():
        edits = [] if direction is None else [edit.project(Port("resid_in", layer), direction[None].to(model.dtype))]
        values = torch.zeros(2, len(task), dtype=torch.float64)
        for some in by_length(task.clean, batch_size):
            trace = run(model, [list(task.clean[i]) for i in some], edits=edits)
            values[0, some] = (weights[some] * precise(trace.last_logits[:, tokens])).sum(1)
            values[1, some] = losses(trace) if trace.ids.shape[1] > 1 else torch.nan
        seen[name] = values
    rise = {name: float((seen[name][1] - seen["before"][1]).nanmean()) for name in ("projected", "projected_random")}
    return {name: float(values[0].mean()) for name, values in seen.items()} | {
        "loss_rise": rise["projected"],
        "loss_rise_random": rise["projected_random"],
    }
