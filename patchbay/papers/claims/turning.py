"""Claims about knobs: what turning them does."""

from __future__ import annotations

import random
from dataclasses import replace

import patchbay as pb
from patchbay.papers.claims._claim import Claim, claim
from patchbay.papers.claims._shared import N
from patchbay.tasks import words


@claim("yu2023")
def yu2023(model: pb.Model, seed: int) -> Claim:
    head = pb.find.fact_heads(model, pb.tasks.facts_in_context(model, N, seed=seed)).top(1)[0]
    test = pb.tasks.facts_in_context(model, N, seed=seed + 1)
    curve = pb.measure.dose_response(model, test, pb.turn.scale([head], 1.0), strengths=[1.0, 4.0], draws=0)
    value, low, high = (float(curve[name][-1]) for name in ("right", "right_low", "right_high"))
    text = f"the value vectors of {head} times 4 move answers from memory to context"
    return Claim(text, value, low, high, float(curve["right"][0]), "share of prompts")


@claim("mcilroyyoung2024")
def mcilroyyoung2024(model: pb.Model, seed: int) -> Claim:
    drawn = pb.tasks.repeated_tokens(model, 4 * N, seed=seed).clean
    said = [ids for ids in drawn if len(ids) > 7][:N]  # two tokens, options of two, one and two, and what follows
    prompts = [[list(ids[:2]), [list(ids[2:4]), list(ids[4:5]), list(ids[5:7])], list(ids[7:])] for ids in said]
    found = pb.turn.set_prompt(model, prompts, seed=seed)
    spread = float(found["spread"].max())
    text = f"logits after a set prompt do not depend on the order (of plain prompts they do, by {float(found['plain_spread'].mean()):.2g})"
    return Claim(text, spread, spread, spread, 5e-5, "logits", above=False)


@claim("rimsky2024")
def rimsky2024(model: pb.Model, seed: int) -> Claim:
    knob = pb.turn.steer(model, pb.tasks.indirect_object(model, 2 * N, seed=seed), seed=seed)
    found = knob.evidence["steering"]
    at = knob.edits[0].port.layer
    value, low, high = (float(found[name][at]) for name in ("effect", "low", "high"))
    text = f"the mean difference of prompts and their twins, added at layer {at}, moves the answer, on prompts that chose nothing"
    return Claim(text, value, low, high, 0.0, "logits")


@claim("arditi2024")
def arditi2024(model: pb.Model, seed: int) -> Claim:
    """Confirmed if taking one direction out of the stream everywhere, chosen on other prompts, ends more than half of the answers
    in kind, counted above what random directions end.

    The kind is a capital, said where a capital is asked: the small analogue of a refusal, said where harm is asked.
    """
    import torch

    from patchbay import maths

    asked = pb.tasks.facts_in_memory(model, 2 * N, seed=seed)
    plain = pb.tasks.indirect_object(model, 2 * N, seed=seed)
    task = replace(asked, corrupted=plain.clean, metric="log_probability", options={"aligned": False}, marks={})
    dev, test = task.split(seed=seed)
    kind, stream = set(task.right), _stream(model)

    def answered(some: pb.Task, *knobs: pb.Knob) -> torch.Tensor:
        return torch.tensor([token in kind for token in _said(model, some, *knobs)]).double()  # [prompt]

    knobs = [pb.turn.project(stream, pb.turn.steer(model, dev, layers=[i], seed=seed)) for i in range(model.n_layers)]
    kept = [float(answered(dev, knob).mean()) for knob in knobs]
    best = kept.index(min(kept))
    generator = torch.Generator().manual_seed(seed)
    drawn = [pb.turn.project(stream, torch.randn(1, model.d_model, generator=generator)) for _ in range(10)]
    control = torch.stack([answered(test, knob) for knob in drawn]).mean(0)
    value, low, high = map(float, maths.intervals(control - answered(test, knobs[best]), answered(test)))
    right = [
        sum(a == b for a, b in zip(_said(model, plain, *some), plain.right, strict=True)) / len(plain)
        for some in ((), (knobs[best],))
    ]
    text = (
        f"one direction of layer {best}, taken out of the stream everywhere, ends more than half of the answers in kind "
        f"(other prompts are right in {right[0]:.0%}, without it in {right[1]:.0%})"
    )
    return Claim(text, value, low, high, 0.5, "of the answers in kind")


def _stream(model: pb.Model) -> list[pb.Port]:
    """The stream before, inside and after every layer."""
    names = ("resid_in", "resid_mid", "resid_out")
    return [pb.Port(name, i) for i in range(model.n_layers) for name in names if name in model.signals(i)]


def _said(model: pb.Model, task: pb.Task, *knobs: pb.Knob) -> list[int]:
    """The most likely next token of each prompt."""
    with model.edited(*knobs):
        return [int(token) for token in pb.run(model, task, logits="last").last_logits.argmax(-1)]


@claim("jian2025")
def jian2025(model: pb.Model, seed: int) -> Claim:
    """Confirmed if, after six labelled examples, the model names the side of its own largest axis on which a new sentence lies, more
    often than chance and than after examples whose labels were dealt at random."""
    rng = random.Random(f"jian2025-{seed}")
    said = list(dict.fromkeys(words.sentences(rng, 1)[1:] for _ in range(2 * N)))
    knob = pb.turn.neurofeedback(model, said, shots=(2, 6), marks=(" 0", " 1"), seed=seed)
    found = knob.evidence["report"]
    value, low, high = (float(found[name][-1]) for name in ("accuracy", "low", "high"))
    bound = max(0.5, float(found["null_mean"][-1]))
    text = f"after six examples the model reports the side of {knob.name} on which a sentence lies"
    return Claim(text, value, low, high, bound, "share of sentences")
