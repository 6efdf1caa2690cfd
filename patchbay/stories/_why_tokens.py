"""Which tokens matter: what comes next, what is lost when a token is not looked at, and the gradient's word on the same tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.edits.edit import Edit
from patchbay.model.run import run
from patchbay.signal.port import PatchbayError, Port
from patchbay.stories._asked import Asked
from patchbay.stories._why_told import SHOWN, Section, Values, strongest
from patchbay.sweeps.sweep import sweep

NEXT = 8  # next tokens that are listed
CUT_WHOLLY = 32  # tokens that are cut from all later ones
SHUFFLES = 999
AGREES = 0.05  # p up to which cut and gradient are taken to agree


def next_tokens(asked: Asked) -> Section:
    """The most likely next tokens, and where the two answers stand among them."""
    likely = asked.logits.softmax(0)
    places = maths.rank(asked.logits.expand(2, -1), torch.tensor([asked.answer, asked.against])).tolist()
    roles = {asked.answer: "answer", asked.against: "against"}
    listed = list(dict.fromkeys([*asked.logits.topk(min(NEXT, len(likely))).indices.tolist(), *roles]))
    own = dict(zip(roles, places, strict=True))
    rows = [
        {
            "place": own.get(token, i) + 1,
            "token": asked.text(token),
            "id": token,
            "probability": float(likely[token]),
            "logit": float(asked.logits[token]),
            "role": roles.get(token, ""),
        }
        for i, token in enumerate(listed)
    ]
    said = [
        *asked.said,
        f"explained is the logit of {asked.text(asked.answer)} less that of {asked.text(asked.against)}: {asked.difference:.4g} logits",
    ]
    answers = torch.tensor(list(roles))
    values: Values = {
        "next_probability": (likely[answers], ("token",), "probability"),
        "next_logit": (asked.logits[answers], ("token",), "logits"),
    }
    return Section("next tokens", rows, said, values, {"token": [asked.text(token) for token in roles]})


# --- the prompt's tokens ------------------------------------------------------------------------------


def tokens(asked: Asked, seed: int) -> Section:
    """What each token of the prompt does for the answer: by cutting attention to it, exactly, and by gradient x input."""
    last, wholly, why_not = _cut(asked)
    try:
        gradient = _gradient(asked)
    except PatchbayError as error:
        gradient = torch.full_like(last, torch.nan)
        why_not.append(f"no gradient x input: {error}")
    total = torch.where(wholly.isnan(), last, wholly)
    order = strongest(
        torch.where(total.isnan(), torch.full_like(total, -1.0), total.abs())
        if not total.isnan().all()
        else gradient.abs()
    )
    columns = {"cut from all": wholly, "cut from the last": last, "gradient x input": gradient}
    rows = [
        {"position": place, "token": asked.text(asked.ids[place])}
        | {name: None if value[place].isnan() else float(value[place]) for name, value in columns.items()}
        for place in order[:SHOWN]
    ]
    agreement = _agreement(total[:-1], gradient[:-1], seed)
    values: Values = {
        "cut_from_all": (wholly, ("position",), "logits"),
        "cut_from_last": (last, ("position",), "logits"),
        "gradient_x_input": (gradient, ("position",), "logits"),
        "token_agreement": (agreement[0], (), "Spearman's correlation"),
        "token_agreement_p": (agreement[1], (), "probability"),
    }
    return Section(
        "tokens", rows, [*why_not, *_said(asked, total, gradient, agreement)], values, {"position": asked.labels}
    )


def _cut(asked: Asked) -> tuple[Tensor, Tensor, list[str]]:
    """Logits lost without the last position's attention to each token, and without all later positions'; NaN where not cut."""
    n, model = len(asked.ids), asked.model
    last, wholly = torch.full((2, n), torch.nan, dtype=torch.float64)
    layers = [i for i in range(model.n_layers) if "attn.pattern" in model.signals(i)]
    if n == 1:
        return last, wholly, ["not cut: the prompt is one token, which nothing else looks at"]
    if not layers:
        return (
            last,
            wholly,
            [
                f"not cut: no layer of this {model.family.name} model has attention patterns, and what its state carries from a token "
                "cannot be cut token by token; gradient x input stands alone"
            ],
        )
    last[:-1] = _lost(asked, [_blocks(layers, key, [n - 1]) for key in range(n - 1)])
    chosen = sorted(strongest(last[:-1].abs())[:CUT_WHOLLY])
    wholly[chosen] = _lost(asked, [_blocks(layers, key, list(range(key + 1, n))) for key in chosen])
    said = []
    if len(chosen) < n - 1:
        said.append(f"cut from all: the {len(chosen)} tokens of largest effect when cut from the last, of {n - 1}")
    if len(layers) < model.n_layers:
        said.append(
            f"cut in the {len(layers)} of {model.n_layers} layers that have attention; the others still carry what they carry"
        )
    return last, wholly, said


def _blocks(layers: list[int], key: int, queries: list[int]) -> list[Edit]:
    return [edit.block(Port("attn.pattern", layer), query=queries, key=[key]) for layer in layers]


def _lost(asked: Asked, entries: list[list[Edit]]) -> Tensor:
    """What each set of edits takes from the difference of the two logits, [edit]."""
    found = sweep(asked.model, asked.task, entries)
    return (found["base"].double() - found["value"].double())[:, 0]


def _gradient(asked: Asked) -> Tensor:
    """Gradient of the difference . embedding, [position]: what the token gives if the model were linear."""
    embed = Port("embed")
    trace = run(asked.model, [asked.ids], taps=[embed], logits="last", grad=True)
    with torch.enable_grad():
        logits = trace.last_logits[0].float()
        score = logits[asked.answer] - logits[asked.against]
    (gradient,) = trace.gradient(score, embed)
    return (gradient.double() * trace[embed].detach().double()).sum(-1)[0].cpu()


def _agreement(exact: Tensor, estimate: Tensor, seed: int) -> tuple[float, float]:
    """Spearman's correlation of the two over positions, and p: how often as high when positions are shuffled."""
    both = ~(exact.isnan() | estimate.isnan())
    exact, estimate = exact[both], estimate[both]
    if len(exact) < 3:
        return float("nan"), float("nan")
    own, generator = maths.spearman(exact, estimate), torch.Generator().manual_seed(seed)
    deals = torch.stack([torch.randperm(len(exact), generator=generator) for _ in range(SHUFFLES)])
    return own, maths.draws_p(own, maths.spearman_of_deals(estimate, exact, deals)) if own == own else float("nan")


def _said(asked: Asked, total: Tensor, gradient: Tensor, agreement: tuple[float, float]) -> list[str]:
    said = []
    if not total.isnan().all():
        first = int(total.abs().nan_to_num(-1.0).argmax())
        said.append(
            f"logits lost without attention to a token: positive where it speaks for the answer. Without {asked.text(asked.ids[first])} at "
            f"{first} the difference is {asked.difference - float(total[first]):.3g} instead of {asked.difference:.3g}; the median token "
            f"moves it by {float(total[~total.isnan()].abs().median()):.3g}"
        )
        said.append("not cut: the last token, which is the question's own place, and each token's look at itself")
    if agreement[0] == agreement[0]:
        said.append(
            f"agreement of cut and gradient over positions: Spearman {agreement[0]:.2f}, p = {agreement[1]:.3g} against {SHUFFLES} shuffles "
            "of the positions"
            + (
                ""
                if agreement[1] <= AGREES
                else ": they do not agree, and the cuts, which are runs of the model, are what holds"
            )
        )
    if not gradient.isnan().any():
        said.append(
            f"gradient x input sums to {float(gradient.sum()):.3g}, the difference is {asked.difference:.3g}: a first-order estimate"
        )
    return said
