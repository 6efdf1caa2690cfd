"""Knobs: as rows of one batch, on one prompt, and turned through nine strengths.

"rows" is 32 greedy tokens for 16 prompts of 16 tokens as one batch, plain Hugging Face against `generate_rows` with a knob of its
own on every prompt: "one layer" adds 16 vectors behind one layer, "mixed" has heads, neurons and vectors of many layers (a target
of 1.176 in time is 0.85 in throughput). "one" is 32 greedy tokens of one prompt, plain against one knob that scales a head, and
one that adds to the stream. "dose" is a curve of nine strengths (score, kinds of answers, loss and divergence on other text) for 2
prompts of 32 tokens and one text of 32: nine separate evaluations, each a plain and an edited run of prompts and texts, against
one `measure.dose_response` without random knobs; the knob is an attention head of the layer that the row names. What the
saving is follows from that layer: all that lies below it runs once, all above it and the unembedding nine times.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import patchbay as pb
from bench.clock import compare
from bench.report import Row, timed
from bench.shapes import prompts, save_shapes
from patchbay import maths
from patchbay.knobs.knob import Knob
from patchbay.knobs.rows import generate_rows

PARTS = ("rows", "one", "dose")
NEW_TOKENS, N_ROWS = 32, 16
STRENGTHS = [-2.0, -1.0, 0.0, 0.5, 1.5, 2.0, 3.0, 4.0, 6.0]
TARGETS = {"rows": 1 / 0.85, "one": 1.05, "dose": 1 / 3}
METHOD = __doc__.split("\n\n", 1)[1].replace("\n", " ").strip()


def rows(folder: Path, parts: tuple[str, ...], device: str, dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    """The section's rows."""
    for name, path in save_shapes(folder, dtype).items():
        model = pb.load(path, device=device, dtype=dtype)
        model.hf.generation_config.eos_token_id = None  # both sides make all the tokens
        for part in parts:
            yield from {"rows": _rows, "one": _one, "dose": _dose}[part](name, model, device, seconds)
        del model


def _plain(model: pb.Model, ids: torch.Tensor) -> Any:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    return model.hf.generate(ids, attention_mask=torch.ones_like(ids), **options)


def _vector(model: pb.Model, seed: int) -> torch.Tensor:
    return torch.randn(model.d_model, generator=torch.Generator().manual_seed(seed))


def _rows(name: str, model: pb.Model, device: str, seconds: float) -> Iterator[Row]:
    ids = prompts(N_ROWS, 16, model.vocab_size, device)
    layers, middle = list(model.layers), model.layers[model.n_layers // 2]
    one_layer = [Knob(str(i), [pb.add(middle.resid_out, _vector(model, i))], 0.5) for i in range(N_ROWS)]
    mixed = []
    for i in range(N_ROWS):
        at = layers[i % len(layers)]
        edit = (
            pb.scale(at.heads[i % 4].z, 1.0),
            pb.add(at.resid_out, _vector(model, i)),
            pb.zero(at.mlp.neurons[i].act),
        )[i % 3]
        mixed.append(Knob(str(i), [edit], 2.0))
    for what, knobs in (("one layer", one_layer), ("mixed", mixed)):
        grown = generate_rows(model, ids, knobs, NEW_TOKENS)
        assert len(grown) == N_ROWS
        assert len(grown[0]) == _plain(model, ids).shape[1]
        found = compare(
            lambda: _plain(model, ids),
            lambda k=knobs: generate_rows(model, ids, k, NEW_TOKENS),
            seconds=seconds,
            least=5,
        )
        note = f"{1 / found.median:.2f} of the throughput"
        yield timed(f"rows: 16 knobs ({what})", name, f"{N_ROWS} x 16", found, TARGETS["rows"], note)


def _one(name: str, model: pb.Model, device: str, seconds: float) -> Iterator[Row]:
    ids, middle = prompts(1, 16, model.vocab_size, device), model.n_layers // 2
    head = pb.turn.scale([f"L{middle}.H3"], 2.0, model=model)  # type: ignore[list-item]
    steer = Knob("steer", [pb.add(model.layers[middle].resid_out, _vector(model, 0))], 0.5, head.provenance)
    for what, knob in (("a head", head), ("the stream", steer)):
        found = compare(
            lambda: _plain(model, ids),
            lambda k=knob: model.generate(ids, NEW_TOKENS, edits=[k]),
            seconds=seconds,
            least=5,
        )
        yield timed(f"one knob ({what})", name, "1 x 16", found, TARGETS["one"])


def _dose(name: str, model: pb.Model, device: str, seconds: float) -> Iterator[Row]:
    clean = prompts(2, 32, model.vocab_size, device)
    texts = prompts(1, 32, model.vocab_size, device).flip(1).tolist()
    right, wrong = tuple(range(5, 7)), tuple((100 + i,) for i in range(2))
    task = pb.Task(name="dose", clean=tuple(map(tuple, clean.tolist())), right=right, wrong=wrong)
    for layer in (model.n_layers // 4, model.n_layers // 2, 3 * model.n_layers // 4):
        knob = pb.turn.scale([f"L{layer}.H3"], 2.0, model=model)  # type: ignore[list-item]

        def ours(k: Knob = knob) -> Any:
            return pb.measure.dose_response(model, task, k, strengths=STRENGTHS, neutral=texts, draws=0)

        curve = ours()
        apart = max(
            abs(float(curve.values[i]) - _evaluate(model, task, texts, knob.at(s))[0]) for i, s in enumerate(STRENGTHS)
        )
        found = compare(
            lambda k=knob: [_evaluate(model, task, texts, k.at(s)) for s in STRENGTHS],
            ours,
            seconds=seconds,
            least=3,
            warm=1,
        )
        yield timed(
            f"dose: 9 strengths (head of L{layer})",
            name,
            "2 x 32 + 1 x 32",
            found,
            TARGETS["dose"],
            f"scores within {apart:.0e}",
        )


@torch.no_grad()
def _evaluate(model: pb.Model, task: pb.Task, texts: list[list[int]], knob: Knob) -> tuple[float, float, float]:
    """One strength by itself: score, loss and divergence, from plain and edited runs of prompts and texts."""
    plain, turned = (pb.run(model, task, edits=e, logits="last").last_logits for e in ([], [knob]))
    score = float(task.score(turned, plain).mean())
    turned.argmax(-1).tolist()
    before, after = (pb.run(model, texts, edits=e).logits for e in ([], [knob]))
    loss, kl = [], []
    for n, ids in enumerate(texts):
        following = torch.tensor(ids[1:], device=after.device)
        loss.append(float(-maths.log_probability(after[n, :-1], following).mean()))
        kl.append(float(maths.kl(before[n, :-1], after[n, :-1]).mean()))
    return score, sum(loss) / len(loss), sum(kl) / len(kl)
