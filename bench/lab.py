"""Lab: what a training step of the lab costs beside a bare loop's, and how fast texts go through dedup.

"step" is one step (a Llama of four layers of width 256, 8 rows of 128 tokens: batch, forward, backward, clipping, AdamW) of `train.variant`'s runs on Hugging Face's Trainer against a bare
loop of PyTorch over the same rows, step by step in the same order; the first two are left out. "dedup" is `corpus.dedup.unique` by paragraphs of about 500 letters, a fifth of them copies: megabytes of text a
second on one core, and the filter's memory; the target is 50 MB/s on two. The column of Hugging Face is the bare loop.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch

from bench import clock
from bench.clock import Comparison
from bench.report import Row, timed
from patchbay.corpus.dedup import Bloom, unique
from patchbay.tiny import lab
from patchbay.train._objectives._objective import collated, learned
from patchbay.train._plan import Arm, Rows, plan_of
from patchbay.train._trainer import trained

PARTS = ("step", "dedup")
METHOD = __doc__.split("\n\n", 1)[1].replace("\n", " ").strip()
STEPS, LEFT_OUT = 14, 2
MEGABYTES, CAPACITY, LEAST = 16, 1_000_000, 25.0  # on one core


def rows(folder: Path, parts: tuple[str, ...], device: str, dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    """The section's rows."""
    if "step" in parts:
        given = _rows()
        yield timed("training step", "llama 4 x 256", "8 x 128", Comparison(_bare(given), _lab(given)), 1.05)
    if "dedup" in parts:
        speed = dedup()
        met = "met" if speed >= LEAST else "missed"
        size = f"a filter of {Bloom(CAPACITY).n_bytes / 1e6:.1f} MB"
        yield Row(
            "dedup by paragraphs",
            size,
            f"{MEGABYTES} MB",
            "",
            f"{speed:.0f} MB/s",
            "",
            "",
            "1",
            f"{LEAST:.0f} MB/s a core",
            met,
        )


def _rows() -> Rows:
    rng = random.Random(0)
    texts = [[[rng.randrange(1000) for _ in range(128)]] for _ in range(64)]
    return Rows(texts, Arm(), plan_of({"steps": STEPS, "batch_size": 8, "decay": 0.0}), 0)


def _between(ends: list[float]) -> tuple[float, ...]:
    return tuple(b - a for a, b in pairwise(ends[LEFT_OUT:]))


def _lab(given: Rows) -> tuple[float, ...]:
    """Seconds of each of the lab's steps, from loss to loss."""
    ends: list[float] = []
    own = given.objective.loss

    class Timed(type(given.objective)):  # type: ignore[misc]
        def loss(self, *what: object) -> torch.Tensor:
            ends.append(clock.now())
            return own(*what)  # type: ignore[arg-type]

    given.objective = Timed()
    model = lab.small(1000, layers=4, width=256, mlp=1024, heads=8)
    trained(model, given, Arm(), given.plan, Path(tempfile.gettempdir()), keep=False)
    return _between(ends)


def _bare(given: Rows) -> tuple[float, ...]:
    """Seconds of each step of a loop of our own making over the same rows."""
    hf = lab.small(1000, layers=4, width=256, mlp=1024, heads=8).hf
    for p in hf.parameters():
        p.requires_grad_()
    fit = torch.optim.AdamW(hf.parameters(), lr=given.plan.rate, weight_decay=0.0)
    ends: list[float] = []
    for step in range(STEPS):
        batch = collated([given[step * 8 + i] for i in range(8)])
        ends.append(clock.now())
        logits = hf(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
        (loss / learned(batch["labels"])).backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
        fit.step()
        fit.zero_grad()
    return _between(ends)


def dedup() -> float:
    """Megabytes of text a second."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(5000)]
    paragraphs = [" ".join(rng.choices(words, k=70)) for _ in range(MEGABYTES * 2000)]
    texts = [
        "\n".join(rng.choice(paragraphs) if rng.random() < 0.2 else paragraphs[i + k] for k in range(4))
        for i in range(0, len(paragraphs), 4)
    ]
    size, began = sum(map(len, texts)) / 1e6, clock.now()
    for _ in unique(texts, unit="paragraph", capacity=CAPACITY):
        pass
    return size / (clock.now() - began)
