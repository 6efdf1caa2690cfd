"""Objectives whose documents have parts (a question, an answer, ...): texts run as one batch, and choices among few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from patchbay.train._objectives._objective import collated, output_of


def written(name: str, aim: Any) -> str:
    """An objective with its settings as text, those that are not their defaults."""
    given = [(f.name, getattr(aim, f.name)) for f in fields(aim) if getattr(aim, f.name) != f.default]
    said = ",".join(f"{key}={int(value) if isinstance(value, bool) else value}" for key, value in given)
    return f"{name}:{said}" if said else name


def run_texts(hf: nn.Module, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Logits [text, position, vocab] of texts of any lengths, padded at the right behind a mask, and the lengths [text]."""
    batch = collated([(list(ids), list(ids)) for ids in texts])
    device = next(hf.parameters()).device
    logits: Tensor = output_of(hf, {name: value.to(device) for name, value in batch.items()}).logits
    return logits.float(), batch["attention_mask"].sum(1).to(device)


def at_ends(hf: nn.Module, texts: Sequence[Sequence[int]]) -> Tensor:
    """Logits [text, vocab] at the last token of each text."""
    logits, lengths = run_texts(hf, texts)
    return logits[torch.arange(len(lengths), device=logits.device), lengths - 1]


def among(logits: Tensor, choices: Sequence[int]) -> Tensor:
    """log p [..., choice] of the choices among themselves: the full softmax, renormalised over them."""
    return torch.log_softmax(logits[..., list(choices)].float(), -1)


def of_ends(hf: nn.Module, texts: Sequence[Sequence[int]], ends: Sequence[int]) -> list[Tensor]:
    """log p of the last `ends` tokens of each text."""
    logits, lengths = run_texts(hf, texts)
    found = []
    for row, ids, length, end in zip(torch.log_softmax(logits, -1), texts, lengths.tolist(), ends, strict=True):
        said = torch.tensor(ids[length - end :], device=row.device)
        found.append(row[length - end - 1 : length - 1].gather(1, said[:, None])[:, 0])
    return found
