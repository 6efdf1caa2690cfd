"""Loading, running, tapping, memory and generation, against plain Hugging Face.

Every row names what both sides did; weights, prompts and the kernel are the same on both. "run" is `pb.run` without taps
against the model's own forward, and its logits must be equal bit for bit. "streams" taps every residual stream, every head's z
and every MLP out. "patterns" taps every attention pattern of a model that runs SDPA, against the same weights loaded with eager
attention and run with output_attentions. "generate" is 32 greedy tokens under one `add` edit against plain generate.
The trained checkpoints are so small that a pass takes a few milliseconds: there Patchbay's fixed cost, 0.1 ms a run and
0.03 ms a tap, is what their ratios show.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import patchbay as pb
from bench import memory
from bench.clock import compare
from bench.report import Row, timed
from bench.shapes import SIZES, checkpoints, prompts, save_shapes

PARTS = ("load", "run", "streams", "patterns", "generate", "memory")
TARGETS = {"load": 1.05, "run": 1.02, "streams": 1.10, "patterns": 1.00, "generate": 1.05, "memory": 1.05}
NEW_TOKENS = 32
METHOD = (
    __doc__.split("\n\n", 1)[1].replace("\n", " ").strip()
    + " "
    + (
        '"load" is `pb.load` of a folder against `from_pretrained` of it, and "load to first logits" adds the first run of 16 tokens to both. '
        '"memory" is the growth of the peak that taps cause, over the bytes that they captured, each peak from a process of its own '
        "(see bench/memory.py)."
    )
)


def rows(folder: Path, parts: tuple[str, ...], device: str, dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    """The section's rows, one at a time, each about `seconds` long."""
    saved = save_shapes(folder, dtype)
    if "load" in parts:
        for name, path in (saved | checkpoints()).items():
            yield from _load(name, path, device, dtype, seconds)
    for name, path in (saved | checkpoints()).items():
        if {"run", "streams", "patterns", "generate"} & set(parts):
            pair = Pair(name, path, device, dtype, seconds)
            for size in SIZES:
                if size[1] + NEW_TOKENS <= (pair.model.max_positions or size[1] + NEW_TOKENS):
                    yield from pair.rows(size, parts)
            del pair
        if "memory" in parts and name in saved:
            yield from _memory(name, path, device, dtype)


def _hf(path: Path, device: str, dtype: torch.dtype, **options: Any) -> Any:
    return (
        AutoModelForCausalLM.from_pretrained(str(path), use_safetensors=True, dtype=dtype, **options).eval().to(device)
    )


@torch.no_grad()
def _forward(hf: Any, ids: torch.Tensor, **options: Any) -> Any:
    return hf(input_ids=ids, use_cache=False, **options)


def _load(name: str, path: Path, device: str, dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    ids = prompts(1, 16, AutoConfig.from_pretrained(path).vocab_size, device)
    found = compare(
        lambda: _hf(path, device, dtype), lambda: pb.load(path, device=device, dtype=dtype), seconds=seconds
    )
    yield timed("load", name, "", found, TARGETS["load"])
    found = compare(
        lambda: _forward(_hf(path, device, dtype), ids),
        lambda: pb.run(pb.load(path, device=device, dtype=dtype), ids),
        seconds=seconds,
    )
    yield timed("load to first logits", name, "1 x 16", found, TARGETS["load"])


def taps_of(model: pb.Model, what: str) -> list[pb.Port]:
    """The ports that "streams" or "patterns" tap; none for "nothing"."""
    layers = list(model.layers)
    if what == "streams":
        return [layers[0].resid_in, *(port for at in layers for port in (at.resid_out, at.attn.z, at.mlp.out))]
    return [at.attn.pattern for at in layers] if what == "patterns" else []


class Pair:
    """One model in both worlds: as Hugging Face runs it, with eager attention too, and in Patchbay's view."""

    def __init__(self, name: str, path: Path, device: str, dtype: torch.dtype, seconds: float) -> None:
        self.name, self.device, self.seconds = name, device, seconds
        self.hf = _hf(path, device, dtype)
        self.eager = _hf(path, device, dtype, attn_implementation="eager")
        self.hf.generation_config.eos_token_id = None  # both sides make all the tokens
        self.model = pb.load(self.hf)

    def rows(self, size: tuple[int, int], parts: tuple[str, ...]) -> Iterator[Row]:
        for part in parts:
            if part in ("run", "streams", "patterns", "generate"):
                yield from getattr(self, part)(
                    prompts(*size, self.model.vocab_size, self.device), f"{size[0]} x {size[1]}"
                )

    def _row(self, what: str, size: str, base: Any, ours: Any, note: str = "", least: int = 9) -> Row:
        found = compare(base, ours, seconds=self.seconds, least=least)
        return timed(what, self.name, size, found, TARGETS[what.split()[0]], note)

    def run(self, ids: torch.Tensor, size: str) -> Iterator[Row]:
        same = torch.equal(_forward(self.hf, ids).logits, pb.run(self.model, ids).logits)
        note = "logits bit-equal" if same else "LOGITS DIFFER"
        yield self._row("run", size, lambda: _forward(self.hf, ids), lambda: pb.run(self.model, ids), note)

    def streams(self, ids: torch.Tensor, size: str) -> Iterator[Row]:
        taps = taps_of(self.model, "streams")
        yield self._row("streams", size, lambda: _forward(self.hf, ids), lambda: pb.run(self.model, ids, taps=taps))

    def patterns(self, ids: torch.Tensor, size: str) -> Iterator[Row]:
        taps = taps_of(self.model, "patterns")
        eager = _forward(self.eager, ids, output_attentions=True).attentions
        trace = pb.run(self.model, ids, taps=taps)
        apart = max(float((trace[port] - theirs).abs().max()) for port, theirs in zip(taps, eager, strict=True))
        yield self._row(
            "patterns",
            size,
            lambda: _forward(self.eager, ids, output_attentions=True),
            lambda: pb.run(self.model, ids, taps=taps),
            f"patterns within {apart:.0e}",
        )

    def generate(self, ids: torch.Tensor, size: str) -> Iterator[Row]:
        vector = torch.randn(self.model.d_model, generator=torch.Generator().manual_seed(0))
        port = self.model.layers[self.model.n_layers // 2].resid_out
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}

        def plain() -> Any:
            return self.hf.generate(ids, attention_mask=torch.ones_like(ids), **options)

        for where in (None, "generated"):
            edits = [pb.add(port, vector, positions=where)]
            steered = self.model.generate(ids, NEW_TOKENS, edits=edits)
            assert len(steered[0]) == plain().shape[1], "both sides must make the same number of tokens"
            yield self._row(
                "generate (edit everywhere)" if where is None else "generate (edit at new tokens)",
                size,
                plain,
                lambda edits=edits: self.model.generate(ids, NEW_TOKENS, edits=edits),
                least=5,
            )


def _memory(name: str, path: Path, device: str, dtype: torch.dtype) -> Iterator[Row]:
    if not memory.available():
        print("peak memory needs /proc: these rows are left out")
        return
    for size in (size for size in SIZES if size[0] * size[1] >= 256):  # below that, captures are too small to resolve
        base, _ = memory.measure(path, size, "nothing", device, dtype)
        for what in ("streams", "patterns"):
            peak, captured = memory.measure(path, size, what, device, dtype)
            ratio, target = (peak - base) / captured, TARGETS["memory"]
            yield Row(
                f"memory of {what}",
                name,
                f"{size[0]} x {size[1]}",
                f"peak {base / 1e6:.0f} MB untapped",
                f"peak {peak / 1e6:.0f} MB, captured {captured / 1e6:.1f} MB",
                f"{ratio:.3f}",
                "",
                str(memory.REPEATS),
                f"{target:.2f}",
                "met" if ratio <= target else "missed",
            )
