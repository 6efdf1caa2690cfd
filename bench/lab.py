"""The lab: a step of training beside a bare loop's on the same batches, and dedup of text on one core.

    python -m bench.lab

Prints the median ratio of a step (a Llama of four layers of width 256, 8 rows of 128 tokens, processor time; the first two steps left out) and megabytes of text a second
through `corpus.dedup.unique` by paragraphs of about 500 letters, a fifth of them copies, with the filter's memory.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch

from patchbay.corpus.dedup import Bloom, unique
from patchbay.tiny import lab
from patchbay.train._objectives._objective import collated, learned
from patchbay.train._plan import Arm, Rows, plan_of
from patchbay.train._trainer import trained

STEPS = 12


def step_ratio() -> tuple[float, float, float]:
    """Processor seconds of a step of the lab's and of a bare loop's, and their ratio: the median step of each."""
    rng = random.Random(0)
    texts = [[[rng.randrange(1000) for _ in range(128)]] for _ in range(64)]
    plan = plan_of({"steps": STEPS, "batch_size": 8, "decay": 0.0})
    rows = Rows(texts, Arm(), plan, 0)
    ends: list[float] = []
    own = rows.objective.loss

    class Timed(type(rows.objective)):  # type: ignore[misc]
        def loss(self, *given: object) -> torch.Tensor:
            ends.append(time.process_time())
            return own(*given)  # type: ignore[arg-type]

    rows.objective = Timed()
    model = lab.small(1000, layers=4, width=256, mlp=1024, heads=8)
    trained(model, rows, Arm(), plan, Path(tempfile.gettempdir()), keep=False)
    mine = statistics.median(b - a for a, b in pairwise(ends[2:]))

    hf = lab.small(1000, layers=4, width=256, mlp=1024, heads=8).hf
    for p in hf.parameters():
        p.requires_grad_()
    fit, ends = torch.optim.AdamW(hf.parameters(), lr=plan.rate, weight_decay=0.0), []
    for step in range(STEPS):
        ends.append(time.process_time())
        batch = collated([rows[step * 8 + i] for i in range(8)])
        logits = hf(input_ids=batch["input_ids"], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        ) / learned(batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
        fit.step()
        fit.zero_grad()
    bare = statistics.median(b - a for a, b in pairwise(ends[2:]))
    return mine, bare, mine / bare


def dedup_speed(megabytes: int = 16) -> tuple[float, float, int]:
    """Megabytes a second of wall time and of processor time, and the filter's bytes."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(5000)]
    paragraphs = [" ".join(rng.choices(words, k=70)) for _ in range(megabytes * 2000)]
    texts = [
        "\n".join(rng.choice(paragraphs) if rng.random() < 0.2 else paragraphs[i + k] for k in range(4))
        for i in range(0, len(paragraphs), 4)
    ]
    size = sum(map(len, texts)) / 1e6
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in unique(texts, unit="paragraph", capacity=1_000_000):
        pass
    return size / (time.perf_counter() - wall), size / (time.process_time() - cpu), Bloom(1_000_000).n_bytes


if __name__ == "__main__":
    mine, bare, ratio = step_ratio()
    print(f"a step {mine * 1e3:.1f} ms, a bare loop's {bare * 1e3:.1f} ms: {ratio:.3f}x")
    speed, alone, n_bytes = dedup_speed()
    print(f"dedup {speed:.0f} MB/s ({alone:.0f} MB/s of processor time), a filter of {n_bytes / 1e6:.1f} MB")
