"""Persona vector: a knob that adds the mean state of answers that have a trait, less that of answers without it.

    v(layer) = mean over `positive` prompts of the mean of resid_out over their answer's tokens  -  the same of `negative` prompts

An answer is what the model says, greedily. Its trait is judged by tokens, not by a model: `expressed` is the mean over the answer's tokens of the probability
of the class `trait` where each was chosen. The layer is that at which v, added where answers are said, raises it most in one half of the
negative prompts; the rest is of the other half. Evidence `persona`:

    expressed [condition]   negative prompts as they are and with v added, positive prompts as they are and with v taken away, with ends
    random, shuffled [draw] negative prompts with a random direction as long as v; with the difference after the prompts' labels were dealt anew, as long as v
    p, p_shuffled           of the gain under v among the gains of these
    monitor [layer]         correlation, over all prompts, of the projection on v of the state BEFORE the answer with what the answer expresses; beside it
                            the same of 100 dealings of the labels (`monitor_null_high`, `monitor_p`)

Monitoring counts prompts of both kinds, so that it can be no more than telling the kinds apart. To keep tuning from bringing the trait, train under the knob and
score without it: `train.tune_parts(..., under=knob)`. Cost: two passes over the prompts with their answers, and 4 + 2 `draws` over one half's.

Chen, Arditi, Sleight, Evans and Lindsey 2025, "Persona Vectors: Monitoring and Controlling Character Traits in Language Models", where a language
model judges traits and filters answers; here all answers count. With answers of one token v is the direction of `turn.steer` at that token. That v moves the
class's tokens does not show a trait of character: it is as wide as the class.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from patchbay import maths
from patchbay.edits import edit
from patchbay.edits.edit import Edit
from patchbay.knobs.knob import Knob
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port
from patchbay.turn._pairs import Groups, groups_of

DEALINGS = 100  # of the labels, beside the monitor
UNIT = "probability"


class Answers(NamedTuple):
    """Mean states of answers and states before them, float64 [port, prompt, d_model]; what they express [prompt]."""

    states: Tensor
    before: Tensor
    expressed: Tensor


@method(paper="chen2025")
def persona_vector(
    model: Model,
    positive: list[str] | list[list[int]],
    negative: list[str] | list[list[int]],
    trait: list[str] | list[int],
    *,
    max_new_tokens: int = 8,
    layers: list[int] | None = None,
    draws: int = 10,
    batch_size: int = 32,
    seed: int = 0,
) -> Knob:
    """A knob that adds, where answers are said, the direction from answers of `negative` prompts to those of `positive` ones.

    `positive`: prompts that bring the trait. `negative`: prompts that do not, such as the same questions without the instruction. `trait`: the tokens that show
    it, as text or ids. Evidence `persona`: `expressed` [condition], `random` and `shuffled` [draw], `p`, `monitor` [layer].

    `max_new_tokens`: of an answer. `layers`: those to choose from, all without. `draws`: random directions, and dealings of the labels, that are added as v is.
    """
    tried = list(range(model.n_layers)) if layers is None else sorted(set(layers))
    if not tried or not 0 <= tried[0] <= tried[-1] < model.n_layers or max_new_tokens < 1 or draws < 1:
        raise PatchbayError(
            f"layers={layers}, max_new_tokens={max_new_tokens}, draws={draws}: layers are 0 to {model.n_layers - 1}, and a token and a draw or more"
        )
    ids = _trait(model, trait)
    groups = groups_of(model, None, positive, negative, "mean")
    dev, test = groups.split(seed)
    ports = [Port("resid_out", layer) for layer in tried]
    read = [_answers(model, side, ports, ids, max_new_tokens, batch_size) for side in (dev.positive, dev.negative)]
    vectors = read[0].states.mean(1) - read[1].states.mean(1)  # [port, d_model]

    def under(side: list[list[int]], at: int, vector: Tensor) -> Tensor:
        return _answers(model, side, [], ids, max_new_tokens, batch_size, [_added(ports[at], vector)]).expressed

    gains = [float((under(dev.negative, at, v) - read[1].expressed).mean()) for at, v in enumerate(vectors)]
    best = max(range(len(tried)), key=lambda at: gains[at])
    told = [_answers(model, side, ports, ids, max_new_tokens, batch_size) for side in (test.positive, test.negative)]
    own, controls = vectors[best], _controls(read, vectors, best, draws, seed)
    moved = [under(test.negative, best, own), under(test.positive, best, -own)]
    drawn = [torch.stack([under(test.negative, best, one) for one in some]) for some in controls]  # [draw, prompt] each
    watched = _watched(read, told, vectors, seed)
    evidence = _evidence(model, test, tried, best, (told, moved, drawn, watched))
    made = {"fitted": [*dev.positive, *dev.negative]}
    return Knob(
        f"persona vector at L{tried[best]}",
        [_added(ports[best], own)],
        1.0,
        provenance=made,
        evidence={"persona": evidence},
    )


def _trait(model: Model, trait: list[str] | list[int]) -> Tensor:
    ids = [model.token_id(one) if isinstance(one, str) else int(one) for one in trait]
    if not ids or min(ids) < 0 or max(ids) >= model.vocab_size or len(set(ids)) == model.vocab_size:
        raise PatchbayError(
            f"trait={str(trait)[:60]}: one token or more of the model's {model.vocab_size}, and not all of them"
        )
    return torch.tensor(sorted(set(ids)))


def _added(port: Port, vector: Tensor) -> Edit:
    """Where a token of an answer is said."""
    return edit.add(port, vector.float(), positions="predicting")


def _answers(
    model: Model,
    prompts: list[list[int]],
    ports: list[Port],
    trait: Tensor,
    n: int,
    batch_size: int,
    edits: list[Edit] | None = None,
) -> Answers:
    """What the model says to each prompt, by itself or under edits."""
    states = torch.zeros(2, len(ports), len(prompts), model.d_model, dtype=torch.float64)  # of the answer, before it
    expressed = torch.zeros(len(prompts), dtype=torch.float64)
    for begin in range(0, len(prompts), batch_size):
        trace = run(model, prompts[begin : begin + batch_size], taps=ports, edits=edits or [], max_new_tokens=n)
        ends = zip(trace.prompt_lengths.tolist(), trace.lengths.tolist(), strict=True)
        for row, (first, end) in enumerate(ends):
            law = trace.logits[row, first - 1 : end - 1].double().softmax(-1)  # [answer, vocab]
            expressed[begin + row] = law[:, trait.to(law.device)].sum(-1).mean().cpu()
            for at, port in enumerate(ports):
                stream = trace[port][row].double().cpu()
                states[0, at, begin + row] = stream[first:end].mean(0)
                states[1, at, begin + row] = stream[first - 1]
    return Answers(states[0], states[1], expressed)


# --- controls -------------------------------------------------------------------------------------------


def _dealt(read: list[Answers], generator: torch.Generator) -> Tensor:
    """The difference of the means after the labels were dealt anew, [port, d_model]."""
    pooled = torch.cat([side.states for side in read], 1)
    order = torch.randperm(pooled.shape[1], generator=generator)
    n = read[0].states.shape[1]
    return pooled[:, order[:n]].mean(1) - pooled[:, order[n:]].mean(1)


def _controls(read: list[Answers], vectors: Tensor, best: int, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random directions and differences of dealt labels, [draw, d_model] each, as long as the vector of the chosen layer."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(draws, vectors.shape[-1], generator=generator).double()
    dealt = torch.stack([_dealt(read, generator)[best] for _ in range(draws)])
    size = vectors[best].norm()
    return tuple(one / one.norm(dim=-1, keepdim=True).clamp_min(1e-12) * size for one in (random, dealt))  # type: ignore[return-value]


def _watched(read: list[Answers], told: list[Answers], vectors: Tensor, seed: int) -> dict[str, Tensor]:
    """How the state before an answer tells what it will express, on held-out prompts [port], with ends and dealt labels."""
    generator = torch.Generator().manual_seed(seed)
    before = torch.cat([side.before for side in told], 1)  # [port, prompt, d_model]
    said = torch.cat([side.expressed for side in told])  # [prompt]

    def along(direction: Tensor) -> Tensor:
        return (before @ direction[:, :, None])[..., 0]  # [port, prompt]

    own = along(vectors)
    value = _correlation(own, said)
    null = torch.stack([_correlation(along(_dealt(read, generator)), said) for _ in range(DEALINGS)])  # [dealing, port]
    rows = torch.randint(len(said), (500, len(said)), generator=generator)
    again = torch.stack([_correlation(own[:, some], said[some]) for some in rows])
    low, high = torch.nanquantile(again, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    p = (1 + (null >= value - 1e-9).sum(0)) / (1 + DEALINGS)
    return {
        "monitor": value, "monitor_low": low, "monitor_high": high, "monitor_null_high": null.nan_to_num().quantile(0.95, dim=0),
        "monitor_p": torch.where(value.isfinite(), p.double(), torch.nan),
    }  # fmt: skip


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of each row of a [port, prompt] with b; NaN where one is constant."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean()
    scale = a.norm(dim=-1) * b.norm()
    return (a @ b) / torch.where(scale > 0, scale, torch.nan)


# --- what is known of it --------------------------------------------------------------------------------


def _evidence(
    model: Model,
    test: Groups,
    tried: list[int],
    best: int,
    found: tuple[list[Answers], list[Tensor], list[Tensor], dict[str, Tensor]],
) -> Result:
    """The other half: what answers express as they are and under v, and under what is not v."""
    told, moved, drawn, watched = found
    plain = told[1].expressed
    ends = [maths.bootstrap_interval(one) for one in (plain, moved[0], told[0].expressed, moved[1])]
    gain, others = moved[0].mean() - plain.mean(), [(one - plain).mean(1) for one in drawn]  # [draw] each
    p, p_shuffled = (maths.draws_p(float(gain), some) for some in others)
    values = {
        "expressed": ([one.mean for one in ends], ("condition",), UNIT),
        "low": ([one.low for one in ends], ("condition",), UNIT),
        "high": ([one.high for one in ends], ("condition",), UNIT),
        "random": (drawn[0].mean(1), ("draw",), UNIT),
        "shuffled": (drawn[1].mean(1), ("draw",), UNIT),
        "p": (p, (), "p value"),
        "p_shuffled": (p_shuffled, (), "p value"),
    }
    for name, column in watched.items():
        whole = torch.full((model.n_layers,), torch.nan, dtype=torch.float64)
        whole[tried] = column
        values[name] = (whole, ("layer",), "p value" if name == "monitor_p" else "correlation")
    at = {name: float(column[best]) for name, column in watched.items()}
    said = [
        f"layer {tried[best]}, chosen on the other half: {len(plain)} held-out prompts without the trait express it by {ends[0].mean:.3g}, with the vector by "
        f"{ends[1].mean:.3g}, with random ones by {float(drawn[0].mean()):.3g} (p = {p:.2g}), after labels were dealt anew by "
        f"{float(drawn[1].mean()):.3g} (p = {p_shuffled:.2g}); prompts with it by {ends[2].mean:.3g}, and without the vector by {ends[3].mean:.3g}",
        f"before an answer is said its projection {'tells' if at['monitor_p'] <= 0.05 else 'does NOT tell'} what it will express: correlation "
        f"{at['monitor']:.2f}{maths.between(at['monitor_low'], at['monitor_high'], '.2f')}, dealt labels up to {at['monitor_null_high']:.2f}",
    ]
    return Result(
        values,
        coords={"condition": ["negative", "negative with v", "positive", "positive without v"]},
        highlights=[f"L{tried[best]}"],
        notes=said,
        provenance={"method": "turn.persona_vector", "task": {"prompts": [test.positive, test.negative]}},
    )
