"""Finders of attention heads: all that read patterns in one run, against the dearest of them alone.

The group is previous_token_heads, induction_heads, duplicate_token_heads, ngram_heads and attention_sinks on the same prompts,
each prompt a random string said twice. On the left the finder that takes longest by itself (named in the row: run, patterns and
its own scoring, to the finished Result), on the right one run of the prompts with all five scorings and five Results. The
five Results are compared with those of each finder alone ("largest difference").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import patchbay as pb
from bench.clock import compare, now
from bench.report import Row, timed
from bench.shapes import SIZES, checkpoints, prompts, save_shapes
from patchbay.find import _attention
from patchbay.find.attention_sinks import finder as attention_sinks
from patchbay.find.duplicate_token_heads import finder as duplicate_token_heads
from patchbay.find.induction_heads import finder as induction_heads
from patchbay.find.ngram_heads import finder as ngram_heads
from patchbay.find.previous_token_heads import finder as previous_token_heads
from patchbay.results.result import largest_difference

PARTS = ("attention",)
TARGET = 1.3
METHOD = __doc__.split("\n\n", 1)[1].replace("\n", " ").strip()
GROUP: dict[str, Callable[..., _attention.Finder]] = {
    "previous_token_heads": previous_token_heads,
    "induction_heads": induction_heads,
    "duplicate_token_heads": duplicate_token_heads,
    "ngram_heads": ngram_heads,
    "attention_sinks": attention_sinks,
}


def rows(folder: Path, parts: tuple[str, ...], device: str, dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    """One row for each model and size."""
    models: dict[str, Any] = {"tiny": "tiny", "tiny-llama": "tiny-llama"} | checkpoints() | save_shapes(folder, dtype)
    for name, path in models.items():
        model = pb.load(path, device=device, dtype=dtype)
        for n_prompts, n_positions in SIZES:
            if n_prompts * n_positions > 16 and n_positions <= (model.max_positions or n_positions):
                yield _row(model, name, (n_prompts, n_positions), seconds)


def _row(model: pb.Model, name: str, size: tuple[int, int], seconds: float) -> Row:
    half = prompts(size[0], size[1] // 2, model.vocab_size, "cpu")
    encoded = torch.cat([half, half], 1).tolist()

    def alone(which: str) -> pb.Result:
        return _attention.together(model, encoded, [GROUP[which](model, encoded)])[0]

    def group() -> list[pb.Result]:
        return _attention.together(model, encoded, [make(model, encoded) for make in GROUP.values()])

    single = {which: alone(which) for which in GROUP}
    apart = max(
        largest_difference(one[variable], both[variable])
        for one, both in zip(single.values(), group(), strict=True)
        for variable in one.variables
    )
    dearest = max(GROUP, key=lambda which: min(_seconds(lambda: alone(which)) for _ in range(3)))
    found = compare(lambda: alone(dearest), group, seconds=seconds)
    note = f"dearest: {dearest}; largest difference {apart:.0e}"
    return timed("five finders, one run", name, f"{size[0]} x {size[1]}", found, TARGET, note)


def _seconds(work: Callable[[], Any]) -> float:
    begin = now()
    work()
    return now() - begin
