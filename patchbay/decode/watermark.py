"""Watermark: text in which a hash of each token favours a part of the vocabulary, and how surely a detector tells it from text without.

    logits of the green tokens + bias,   green: `ratio` of the vocabulary, dealt anew by a hash of the last token and the key
    z = (green tokens - ratio n) / sqrt(n ratio (1 - ratio))

Processor and detector are transformers' own. Each prompt is continued twice by the same chance: draft 0 with the mark, draft 1 without, which
is the detector's null on text of this model: `rate` [draft] is the share with z above 3, where chance would be .0013, and `null_mean`
and `null_spread` are 0 and 1 where the detector's p is right. Text that repeats itself counts the same pair of tokens again and again;
`z_once` counts each pair once. `logq` is under the law that was drawn from.

Under a knob around the call both texts are the knob's: whether it takes the mark away is `gap`, z with the mark less z without, prompt by prompt.

Kirchenbauer et al. 2023, "A Watermark for Large Language Models". One pass for a token, of twice the prompts.

It does not show that the mark survives another's rewriting, nor what it costs a reader; `logp` says what it costs the model.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers.generation.watermarking import WatermarkDetector

from patchbay import maths
from patchbay.decode._drawn import drawn
from patchbay.decode._loop import Call, asked
from patchbay.decode._published import published
from patchbay.decode._result import Draft, as_result
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

THRESHOLD = 3.0


def decode(
    call: Call, *, ratio: float = 0.25, bias: float = 2.0, key: int = 15485863, seed: int = 0
) -> list[list[Draft]]:
    """The loop: drafts [prompt][with the mark, without it] of a call."""
    if not 0.0 < ratio < 1.0:
        raise PatchbayError(f"ratio={ratio}: the share of green tokens, between 0 and 1")
    if not math.isfinite(bias):
        raise PatchbayError(f"bias={bias}: a finite number, which is added to the logits of green tokens")
    if int(ratio * vocabulary(call.model)) < 1:
        raise PatchbayError(f"ratio={ratio}: no token of {vocabulary(call.model)} is green")
    marked = drawn(call, [f"watermark({ratio!r}, {bias!r}, {key!r})"], 1, seed)
    plain = drawn(call, [], 1, seed)
    once, often = (_detector(call.model, ratio, key, alone) for alone in (True, False))
    found = []
    for ids, with_it, without in zip(call.prompts, marked, plain, strict=True):
        for one in (*with_it, *without):
            scored = torch.tensor([[ids[-1], *one.tokens]], device=call.model.device)
            told = often(scored, return_dict=True)
            one.whole["z"], one.whole["green"] = float(told.z_score[0]), float(told.green_fraction[0])
            one.whole["z_once"] = float(once(scored, return_dict=True).z_score[0])
        found.append([*with_it, *without])
    return found


def vocabulary(model: Model) -> int:
    """The size of the vocabulary as transformers' detector reads it."""
    return int(model.hf.config.get_text_config().vocab_size)


def _detector(model: Model, ratio: float, key: int, once: bool) -> Any:
    """transformers' detector; no token is taken for a beginning, since what it scores begins inside a text."""
    settings = {
        "greenlist_ratio": ratio,
        "hashing_key": key,
        "bias": 0.0,
        "seeding_scheme": "lefthash",
        "context_width": 1,
    }
    made = WatermarkDetector(
        model.hf.config.get_text_config(), str(model.device), settings, ignore_repeated_ngrams=once
    )
    made.bos_token_id = -1
    return made


@method(paper="kirchenbauer2023")
def watermark(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    *,
    ratio: float = 0.25,
    bias: float = 2.0,
    key: int = 15485863,
    seed: int = 0,
    max_new_tokens: int = 20,
    batch_size: int = 16,
) -> Result:
    """Each prompt continued with the mark and without it, with `z`, `z_once` and the share `green` [prompt, draft] of each text.

    `rate` [draft] found at z above 3; `gap` with its interval; `null_mean` and `null_spread` of z without the mark. `score` is the sum of
    `logq` in nats. Texts end where the model's generation config says.

    `ratio`: the share of the vocabulary that is green. `bias`: what is added to its logits. `key`: of the hash, a secret.
    """
    call = asked(model, prompts, max_new_tokens, None, batch_size)
    found = decode(call, ratio=ratio, bias=bias, key=key, seed=seed)
    z = torch.tensor([[one.whole["z"] for one in pair] for pair in found], dtype=torch.float64)  # [prompt, draft]
    gap = maths.paired_interval(z[:, 0], z[:, 1], seed=seed)
    spread = float(z[:, 1].std()) if len(z) > 1 else float("nan")
    scalars: dict[str, Any] = {
        "rate": ((z > THRESHOLD).double().mean(0), ("draft",), "share of texts"),
        "null_mean": (float(z[:, 1].mean()), (), "z"),
        "null_spread": (spread, (), "z"),
        "gap": (gap.mean, (), "z"),
        "gap_low": (gap.low, (), "z"),
        "gap_high": (gap.high, (), "z"),
    }
    notes = [
        f"without the mark z is {float(z[:, 1].mean()):.2f} with a spread of {spread:.2f}; 0 and 1 where the detector's p is right"
    ]
    return as_result(
        call, found, units={"z": "z", "z_once": "z", "green": "share of tokens"}, scalars=scalars, notes=notes
    )


published(watermark, decode)
