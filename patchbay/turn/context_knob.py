"""Context knob: the one direction at one layer that decides between what the text says and what the model remembers.

Prompts name an intent (answer from the context, or from prior knowledge), their twins the other one. Swapping one number
between a target and a source with the other intent and another question,

    h <- h + w (w . h_source - w . h),    at the last token of the stream that leaves one layer,

should give the TARGET's other answer. Three steps: (1) the layers whose attention carries the intent to the last token, by
patching it from the twin and bisecting both ends, about 2 log2(layers) runs; (2) at the layers where swapping the whole
stream, or the difference of the intents' means, does most, a unit vector w learned with cross-entropy on that answer
(distributed alignment search in one dimension, Adam, from the difference of means); (3) the knob holds w . h at a constant,
the mean of one intent plus one standard deviation (strength 1; 0: untouched). Layer and direction come from one half of the
prompts; `iia`, the share of swaps that make that answer the most likely token of all, is of the other half.

With every knob come its controls: random directions, the difference of means, the whole stream, the same direction at
other layers, and the divergence on unrelated text at the last token. Where the swap fails in half of the held-out pairs, does
no more than random directions, or the model does not answer by the intent to begin with (one that guesses gives "the other
answer" to half of the prompts by itself), there is no knob of this kind, and the Result that says so is returned: a model may
keep the intent where no single stream holds it alone.

Measured, 120 prompts about lands never asked with an intent, in models that a lesson taught the intents (tiny/README.md): one
direction leaving layer 0 of `tiny` flips 0.99 (0.97 to 1.00) of the swaps, random directions 0.00; held, it takes answers to
the text or to memory in all of 200 prompts without any intent word, in the model before the lesson too. In `tiny-llama`,
where the phrase may stand in three places, 0.48 (0.40 to 0.57): no one direction; in one place 0.96 (0.93 to 0.99).

Minder et al. 2024, "Controllable Context Sensitivity and the Knob Behind It" (which decodes with a patched prompt where this
uses the logit lens). A swap shows that w is enough to decide, not that the model decides by nothing else.
"""

from __future__ import annotations

from typing import Any

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
from patchbay.tasks.task import Task
from patchbay.turn._intent import Items, Range, answers, attention_range, clamped, flips, items, last_streams, swapped

FOUND = 0.5  # share of held-out swaps that a knob must flip
GUESS = 0.5  # accuracy of a model that does not know which of the two answers is asked for
TRIED = 3  # layers at which a direction is learned, unless they are named
RANDOM = 5
LEARNING_RATE = 0.03
LEAST = 2  # prompts in a half


@method(paper="minder2024")
def context_knob(
    model: Model,
    task: Task,
    *,
    to: str | None = None,
    neutral: list[str] | list[list[int]] | None = None,
    layers: list[int] | None = None,
    steps: int = 60,
    batch_size: int = 32,
    seed: int = 0,
) -> Knob | Result:
    """The knob that makes the model answer by the intent `to`, or the Result that says "no single-layer knob found".

    `task`: prompts with label `intent` (two values), the right answer under it, first among the wrong ones that of the other
    intent, and a twin with that intent. `to`: without, "context" where there is one, else the first by name. `neutral`:
    unrelated text (without, random tokens). `layers`: where to learn, without those where whole swaps do most. The knob's
    evidence `search`, and the Result: `iia` [layer] with ends and controls.

    `steps`: updates of the direction, at each layer that is tried.
    """
    dev, test, to = _halves(model, task, to, layers, steps, seed)
    ports = [Port("resid_out", layer) for layer in range(model.n_layers)]
    here, there = (last_streams(model, half, ports, batch_size) for half in (dev, test))
    carried = attention_range(model, dev, batch_size)
    tried = sorted(set(layers)) if layers is not None else _screen(model, dev, here, ports, seed, batch_size)
    learned = {at: _learn(model, dev, here[at], ports[at], to, steps, batch_size, seed) for at in tried}
    on_dev = {
        at: float(_swap(model, dev, here[at], ports[at], w, seed, batch_size).mean()) for at, w in learned.items()
    }
    best = max(tried, key=lambda at: on_dev[at])
    measured = _measure(model, test, there, ports, learned, best, _means(dev, here[best], to), seed, batch_size)
    w, constants = learned[best], _constants(dev, here[best] @ learned[best], to)
    steered = _steered(model, test, ports[best], w, constants, to, batch_size)
    kl = _unrelated(model, _edits(ports[best], w, constants[0]), neutral, seed)
    found = _found(measured, best)
    search = _result(model, measured, steered, kl, found, best, carried, constants, to, on_dev, neutral is None)
    if not found:
        return search
    name = f"{task.name}: {to} at L{best}"
    return Knob(name, _edits(ports[best], w, constants[0]), 1.0, evidence={"search": search})


# --- the prompts --------------------------------------------------------------------------------------


def _halves(
    model: Model, task: Task, to: str | None, layers: list[int] | None, steps: int, seed: int
) -> tuple[Items, Items, str]:
    task.check(model.vocab_size)
    kinds = sorted(set(items(task).intent))
    if to is not None and to not in kinds:
        raise PatchbayError(f"to={to!r}: the intents of task {task.name} are {' and '.join(kinds)}")
    if len(task) < 2 * LEAST or steps < 1:
        raise PatchbayError(
            f"task {task.name} has {len(task)} prompts, steps={steps}: {2 * LEAST} prompts or more are needed (half to learn on) "
            "and at least 1 step"
        )
    if layers is not None and (not layers or not all(0 <= layer < model.n_layers for layer in layers)):
        raise PatchbayError(f"layers={layers}: possible are 0 to {model.n_layers - 1}")
    dev, test = (items(half) for half in task.split(0.5, seed))
    for half in (dev, test):
        half.sources(seed)  # raises where a target has no source
    return dev, test, to or ("context" if "context" in kinds else kinds[0])


def _of(half: Items, to: str) -> Tensor:
    return torch.tensor([one == to for one in half.intent])


def _means(half: Items, stream: Tensor, to: str) -> Tensor:
    """Unit difference of the mean streams of the two intents, [d_model]."""
    mine = _of(half, to)
    difference = stream[mine].mean(0) - stream[~mine].mean(0)
    return difference / difference.norm().clamp(min=1e-12)


# --- swaps --------------------------------------------------------------------------------------------


def _swap(
    model: Model, half: Items, stream: Tensor, port: Port, w: Tensor | None, seed: int, batch_size: int
) -> Tensor:
    """1.0 where the swap makes the target's other answer the most likely token, [item]; the whole stream without w."""
    value = swapped(stream, stream[half.sources(seed)], w)
    return flips(answers(model, half, [(port, value)], batch_size), half)


def _screen(model: Model, dev: Items, here: Tensor, ports: list[Port], seed: int, batch_size: int) -> list[int]:
    """Layers at which the whole stream or the difference of means, swapped, makes the other answer most probable."""
    worth, sources = [], dev.sources(seed)
    kind = sorted(set(dev.intent))[0]
    for port, stream in zip(ports, here, strict=True):
        best = 0.0
        for w in (None, _means(dev, stream, kind)):
            logits = answers(model, dev, [(port, swapped(stream, stream[sources], w))], batch_size)
            best = max(best, float(logits.double().softmax(-1).gather(1, dev.other[:, None]).mean()))
        worth.append(best)
    return sorted(sorted(range(len(ports)), key=lambda at: -worth[at])[:TRIED])


def _learn(
    model: Model, dev: Items, stream: Tensor, port: Port, to: str, steps: int, batch_size: int, seed: int
) -> Tensor:
    """The unit vector whose swap gives the targets' other answers, by gradient descent; pointing towards `to`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        free = _means(dev, stream, to).clone().requires_grad_()
        fit = torch.optim.Adam([free], lr=LEARNING_RATE)
        for step in range(steps):
            sources = dev.sources(seed + 1 + step % 8)
            rows = torch.randperm(len(dev), generator=generator)[:batch_size].tolist()
            w = free / free.norm()
            value = swapped(stream[rows], stream[[sources[i] for i in rows]], w)
            put = edit.replace(port, value[:, None].to(model.device), positions="last")
            trace = run(model, [dev.ids[i] for i in rows], edits=[put], logits="last", grad=True)
            loss = torch.nn.functional.cross_entropy(trace.last_logits.float(), dev.other[rows].to(model.device))
            (free.grad,) = torch.autograd.grad(loss, [free])
            fit.step()
            with torch.no_grad():
                free /= free.norm()
    w = free.detach()
    toward = (stream[_of(dev, to)] @ w).mean() - (stream[~_of(dev, to)] @ w).mean()
    return w if toward >= 0 else -w


def _measure(
    model: Model,
    test: Items,
    there: Tensor,
    ports: list[Port],
    learned: dict[int, Tensor],
    best: int,
    means: Tensor,
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """Everything of the held-out half: the learned swaps with their ends, and the controls."""
    n = len(ports)
    out: dict[str, Any] = {
        name: torch.full((n,), torch.nan, dtype=torch.float64)
        for name in ("iia", "low", "high", "elsewhere", "whole", "means", "random")
    }
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(RANDOM, model.d_model, generator=generator)
    drawn = drawn / drawn.norm(dim=1, keepdim=True)

    def swap(at: int, w: Tensor | None) -> Tensor:
        return _swap(model, test, there[at], ports[at], w, seed, batch_size)

    for at in range(n):
        if at in learned:
            hit = swap(at, learned[at])
            out["iia"][at], out["low"][at], out["high"][at] = maths.bootstrap_interval(_by_prompt(hit))
        out["elsewhere"][at] = swap(at, learned[best]).mean()
        out["whole"][at] = swap(at, None).mean()
    chance = torch.stack([_by_prompt(swap(best, w)) for w in drawn])  # [draw, prompt]
    out["random"][best], out["means"][best] = chance.mean(), swap(best, means).mean()
    out["margin"] = maths.beyond_draws(_by_prompt(swap(best, learned[best])), chance)
    plain = answers(model, test, [], batch_size)
    answered = (plain.argmax(-1) == test.own).double()
    out["accuracy"], out["accuracy_low"], _ = maths.bootstrap_interval(_by_prompt(answered))
    out["unpatched"] = flips(plain, test).mean()
    return out


def _by_prompt(values: Tensor) -> Tensor:
    """Items [2 * prompt] as the mean of each prompt and its twin, [prompt]: the two share their words and are drawn together."""
    return values.unflatten(0, (2, -1)).mean(0)


def _found(measured: dict[str, Any], best: int) -> bool:
    """Half of the swaps flip, more than random directions do, in a model that answers by the intent more often than by guessing."""
    flips_half = float(measured["iia"][best]) >= FOUND
    return flips_half and float(measured["margin"][1]) > 0 and float(measured["accuracy_low"]) > GUESS


# --- the knob -----------------------------------------------------------------------------------------


def _constants(dev: Items, along: Tensor, to: str) -> tuple[float, float]:
    """w . h for `to` and for the other intent: each one's mean, one standard deviation further from the other's."""
    mine, other = along[_of(dev, to)], along[~_of(dev, to)]
    return float(mine.mean() + mine.std()), float(other.mean() - other.std())


def _edits(port: Port, w: Tensor, value: float) -> list[Edit]:
    away = torch.eye(len(w), dtype=torch.float64) - torch.outer(w.double(), w.double())
    return [Edit("project", port, away.float(), "last"), edit.add(port, value * w, positions="last")]


def _steered(
    model: Model, test: Items, port: Port, w: Tensor, constants: tuple[float, float], to: str, batch_size: int
) -> dict[str, Tensor]:
    """Shares of held-out prompts, of either intent, that answer as `to` asks: as they are, and with w . h held at each constant."""
    wanted = torch.where(_of(test, to), test.own, test.other)
    unwanted = torch.where(_of(test, to), test.other, test.own)
    turned, back = (clamped(model, test, _edits(port, w, value), batch_size) for value in constants)
    plain = clamped(model, test, [], batch_size)
    return {
        "towards": (turned == wanted).double().mean(),
        "away": (back == unwanted).double().mean(),
        "without": (plain == wanted).double().mean(),
    }


def _unrelated(model: Model, edits: list[Edit], neutral: Any, seed: int) -> Tensor:
    """Divergence of the next-token distributions after unrelated texts, nats, [text]."""
    if neutral is None:
        generator = torch.Generator().manual_seed(seed)
        drawn, pad = torch.randint(model.vocab_size, (16, 12), generator=generator), model.config.pad_token_id
        neutral = torch.where(drawn == (-1 if pad is None else pad), (drawn + 1) % model.vocab_size, drawn).tolist()
    plain, turned = (run(model, neutral, edits=made, logits="last").last_logits.cpu() for made in ([], edits))
    return maths.kl(plain, turned)


def _result(
    model: Model,
    measured: dict[str, Any],
    steered: dict[str, Tensor],
    kl: Tensor,
    found: bool,
    best: int,
    carried: Range,
    constants: tuple[float, float],
    to: str,
    on_dev: dict[int, float],
    made_up: bool,
) -> Result:
    share = "share of held-out swaps"
    names = ("iia", "low", "high", "random", "means", "whole", "elsewhere")
    values: dict[str, Any] = {name: (measured[name], ("layer",), share) for name in names}
    margin = maths.Interval(*measured["margin"])
    divergence = maths.bootstrap_interval(kl)
    scalars = {
        "margin": (margin.mean, share),
        "margin_low": (margin.low, share),
        "margin_high": (margin.high, share),
        "accuracy": (measured["accuracy"], "share of prompts"),
        "unpatched": (measured["unpatched"], "share of prompts"),
        **{name: (value, "share of prompts") for name, value in steered.items()},
        "kl": (divergence.mean, "nats"),
        "kl_low": (divergence.low, "nats"),
        "kl_high": (divergence.high, "nats"),
        "constant": (constants[0], "of the stream"),
        "constant_other": (constants[1], "of the stream"),
    }
    values |= {name: (value, (), unit) for name, (value, unit) in scalars.items()}
    iia, low, high = (float(measured[name][best]) for name in ("iia", "low", "high"))
    what = f"at layer {best} one direction flips {iia:.2f}{maths.between(low, high, '.2f', '')} of the held-out swaps"
    beside = (
        f"random directions {float(measured['random'][best]):.2f}, difference of means {float(measured['means'][best]):.2f}, "
        f"the whole stream {float(measured['whole'][best]):.2f}"
    )
    first = f"knob found: {what}" if found else f"no single-layer knob found: the best, {what}"
    where = ", ".join(map(str, carried.layers)) or "none"
    notes = [
        f"{first}; {beside}",
        f"held at {constants[0]:.3g}, {float(steered['towards']):.2f} of the prompts answer as {to!r} asks "
        f"({float(steered['without']):.2f} without); at {constants[1]:.3g}, {float(steered['away']):.2f} as the other asks",
        f"attention carries the intent to the last token in layers {where} (probability reached {carried.reached:.2f}, "
        f"{carried.runs} runs)",
        f"on {'random tokens' if made_up else 'the neutral texts'} it moves the next token by {divergence.mean:.3g} nats",
    ]
    if float(measured["accuracy"]) < FOUND:
        notes.append(
            f"the model answers only {float(measured['accuracy']):.2f} of the prompts as they ask: little to turn"
        )
    table = [{"layer": at, "iia_dev": on_dev[at]} for at in on_dev]
    return Result(
        values,
        highlights=[f"L{best}"] if found else [],
        notes=notes,
        tables={"tried": table},
        provenance={"method": "turn.context_knob"},
    )
