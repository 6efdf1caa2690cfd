"""What is known of a planted model: closed-form logits, what its parts really do, and the record that is handed out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from patchbay.tiny.planted_canvas import Canvas
from patchbay.tiny.planted_vocabulary import WORDS, ids, tokenizer


@dataclass(frozen=True)
class Planted:
    """A hand-compiled model, its tokenizer, and what was built in (read-only; the keys stand in `planted`)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    truth: Mapping[str, Any]


def record(canvas: Canvas, mechanism: str, **truth: Any) -> Planted:
    """The finished model with its truth."""
    common = {"mechanism": mechanism, "form": canvas.form, "seed": canvas.seed}
    return Planted(canvas.model, tokenizer(), MappingProxyType({**common, **truth}))


def logit(canvas: Canvas, scale: float, strength: float, added: float) -> float:
    """scale * strength * sqrt(d_model / (d_model + added)), where `added` is the square norm of all writes."""
    return scale * strength * math.sqrt(canvas.d_model / (canvas.d_model + added))


def attention(
    canvas: Canvas, prompts: Sequence[str], layer: int, head: int, *, back: int | Sequence[int], first: int = -1
) -> float:
    """Mean attention that the head really pays `back` tokens back (one, or one per prompt), from query `first` on."""
    words, model = tokenizer(), canvas.model
    chosen = model.config._attn_implementation
    model.set_attn_implementation("eager")
    paid = []
    for n, prompt in enumerate(prompts):
        offset = back if isinstance(back, int) else back[n]
        with torch.no_grad():
            patterns = model(torch.tensor([words.encode(prompt)]), output_attentions=True).attentions
        pattern = patterns[layer][0, head]  # [query, key]
        queries = torch.arange(len(pattern))[first:]
        paid.append(pattern[queries, queries - offset].mean())
    model.set_attn_implementation(chosen)
    return torch.stack(paid).mean().item()


def router_weight(canvas: Canvas, layer: int, expert: int, words: Sequence[int]) -> float:
    """Mean weight that the finished model's router gives the expert on these words (0 where it is not chosen)."""
    with torch.no_grad():
        run = canvas.model(torch.tensor(words)[:, None], output_router_logits=True)  # one word per prompt
    top, chosen = run.router_logits[layer].softmax(-1).topk(2)  # [word, rank]
    weight = torch.where(chosen == expert, top / top.sum(-1, keepdim=True), torch.zeros_like(top))
    return weight.sum(-1).mean().item()


def random_words(canvas: Canvas, n: int) -> list[str]:
    """`n` different words, no special ones, drawn from the seed."""
    return [WORDS[3 + i] for i in canvas.choose(n, len(WORDS) - 3)]


def lists_with_one_missing(canvas: Canvas) -> tuple[list[str], list[str], list[str]]:
    """Prompts in which every name (or object) but one is mentioned twice; the one, and one of the others."""
    prompts, answers, wrong = [], [], []
    names, objects = [WORDS[i] for i in ids("name")], [WORDS[i] for i in ids("object")]
    for n in range(8):
        first, second = (names[i] for i in canvas.choose(2, len(names)))
        repeated, single = (first, second) if n % 2 else (second, first)
        prompts.append(f" then{first} and{second} has a. then{repeated} gave to")
        answers.append(single)
        wrong.append(repeated)
    for n in (3, 5, 8):
        listed = [objects[i] for i in canvas.choose(n, len(objects))]
        again = [listed[i] for i in canvas.choose(n, n)]
        prompts.append(f" the{','.join(listed)}. then{','.join(again[1:])}:")
        answers.append(again[0])
        wrong.append(again[1])
    return prompts, answers, wrong
