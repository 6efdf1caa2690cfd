"""Blocks: what a variant costs beside its twin.

"gla" is gated linear attention in chunks over 1,024 tokens of 4 heads of 64 channels, values alone, against its recurrent form and against SDPA of the same q, k and v: the targets are a fifth of the first and
twice the second. "kinds" is one training step (forward, backward, AdamW) of a two-layer Llama of width 64 on 8 texts of 64 tokens with each attention kind, against the plain twin's (SDPA) step on the same texts.
"convolution" is the same step with convolved queries, keys and values. "kernel", on a GPU where flash-linear-attention is installed, holds the chunks against its kernel, after both agreed. Hugging Face's
column is the form that it is held against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import patchbay as pb
from bench.clock import compare
from bench.report import Row, timed
from patchbay.blocks import gla, kinds

PARTS = ("gla", "kinds", "convolution", "kernel")
AGREE = 1e-2  # relative to the largest value: on tensor cores a kernel's products are rounded to 10 bits
T, HEADS, WIDTH = 1024, 4, 64
METHOD = __doc__.split("\n\n", 1)[1].replace("\n", " ").strip()


def rows(folder: Path, parts: tuple[str, ...], device: str, dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    """The section's rows."""
    if "gla" in parts:
        yield from _gla(device, dtype, seconds)
    if "kernel" in parts and device != "cpu":
        yield from _kernel(device, dtype, seconds)
    for name, blocks in (
        ("kinds", [{"attention": kind} for kind in kinds.KINDS]),
        ("convolution", [{"convolution": 3}]),
    ):
        for asked in blocks if name in parts else []:
            plain, ours = _step(None, device, dtype), _step(asked, device, dtype)
            found = compare(plain, ours, seconds=seconds, least=5, warm=2)
            yield timed(
                f"training step, {' '.join(map(str, next(iter(asked.items()))))}",
                "llama 2 x 64",
                "8 x 64",
                found,
                1.3 if name == "kinds" else 1.4,
            )


def _inputs(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the log of the decay, each [1, head, position, channel], always the same."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, T, WIDTH, generator=generator).to(device, dtype) for _ in range(3))
    gate = torch.nn.functional.logsigmoid(torch.randn(1, HEADS, T, WIDTH, generator=generator)).to(device)
    return q, k, v, gate / gla.TEMPER


@torch.no_grad()
def _gla(device: str, dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    q, k, v, gate = _inputs(device, dtype)

    def chunked() -> Tensor:
        return gla.chunked(q, k, v, gate)

    def sdpa() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    for name, base, target in (("recurrent", lambda: gla.recurrent(q, k, v, gate), 0.2), ("SDPA", sdpa, 2.0)):
        found = compare(base, chunked, seconds=seconds, least=5, warm=1)
        yield timed(
            f"gated linear attention in chunks, against {name}", f"{HEADS} heads of {WIDTH}", f"1 x {T}", found, target
        )


@torch.no_grad()
def _kernel(device: str, dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    """The chunks against flash-linear-attention's kernel, which takes [prompt, position, head, channel]."""
    try:
        from fla.ops.gla import chunk_gla
    except ImportError as why:
        return print(f"left out: the kernel of flash-linear-attention ({why})")
    q, k, v, gate = _inputs(device, dtype)
    theirs = [t.transpose(1, 2).contiguous() for t in (q, k, v, gate)]

    def kernel() -> Tensor:
        out: Tensor = chunk_gla(*theirs, scale=1.0)[0]
        return out

    def chunked() -> Tensor:
        return gla.chunked(q, k, v, gate)

    apart = (kernel().transpose(1, 2) - chunked()).abs().max() / chunked().abs().max()
    if not apart < AGREE:
        raise SystemExit(
            f"the kernel and the chunks are {float(apart):.3g} of the largest value apart: nothing is timed"
        )
    found = compare(kernel, chunked, seconds=seconds, least=5, warm=3)
    what = "gated linear attention in chunks, against flash-linear-attention's kernel"
    yield timed(what, f"{HEADS} heads of {WIDTH}", f"1 x {T}", found, None)


def _step(blocks: dict[str, Any] | None, device: str, dtype: torch.dtype) -> Callable[[], Any]:
    """One training step of a model with these blocks, always on the same texts."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=256,
    )
    hf: Any = LlamaForCausalLM(config) if blocks is None else pb.blocks.build(config, **blocks)
    hf = hf.to(device, dtype).train()
    ids = torch.randint(0, 256, (8, 64), device=device)
    optimizer = torch.optim.AdamW(hf.parameters(), lr=1e-4)

    def step() -> Any:
        optimizer.zero_grad()
        hf(ids, labels=ids, use_cache=False).loss.backward()
        return optimizer.step()

    return step
