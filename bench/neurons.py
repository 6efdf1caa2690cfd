"""Neuron vocabulary of a GPT-2-small shape, against the plain way: whole rows of scores, then torch.topk.

`base` multiplies 512 neurons' reading directions at a time by the whole unembedding and takes torch.topk of each row of scores; ten
such tiles are run, one of a layer, and their time is scaled to all neurons. Patchbay runs `pb.find.neuron_vocabulary` with its
defaults: both norms folded in, 10 tokens, and 2,000 turned directions for the null. The tokens and scores of the tiles that both ran
are compared. The memory row is the peak resident set of a process of its own that loads the model and makes the call,
with the weights, PyTorch and transformers in it; its "Hugging Face" column is the peak before the call.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import patchbay as pb
from bench.memory import MALLOC, _peak, available
from bench.report import Row
from bench.shapes import save_shapes

PARTS = ("vocabulary", "memory")
SECONDS, GIGABYTES = 30.0, 1.5
TILE, TOP, N_TILES = 512, 10, 10
METHOD = (__doc__ or "").split("\n\n", 1)[1].replace("\n", " ").strip()


def rows(folder: Path, parts: tuple[str, ...], device: str, dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    """The section's rows."""
    path = save_shapes(folder, dtype)["gpt2-small"]
    if "vocabulary" in parts:
        yield _time_row(pb.load(path, device=device, dtype=dtype))
    if "memory" in parts and available():
        yield _memory_row(path, device, dtype)


def _size(model: pb.Model) -> str:
    n_neurons = sum(model.n_neurons(i) for i in range(model.n_layers))
    return f"{n_neurons:,} neurons x {model.vocab_size:,} tokens"


def _time_row(model: pb.Model) -> Row:
    ours = []
    for _ in range(3):
        began = time.perf_counter()
        result = pb.find.neuron_vocabulary(model)
        ours.append(time.perf_counter() - began)
    base, same, gap = _plain(model, result)
    faster = base / min(ours)
    return Row(
        f"every neuron's first {TOP} tokens",
        "gpt2-small",
        _size(model),
        f"{base:.1f} s",
        f"{min(ours):.1f} s",
        f"{faster:.2f}x",
        " ".join(f"{one:.1f}" for one in sorted(ours)) + " s",
        "3",
        f"{SECONDS:.0f} s",
        f"{'met' if min(ours) < SECONDS else 'missed'}; {same:.2%} of tokens the same, scores within {gap:.0e}",
    )


@torch.no_grad()
def _plain(model: pb.Model, result: Any) -> tuple[float, float, float]:
    """Seconds of the plain way, the share of its tokens that are the same, and the largest difference of scores."""
    gain = model.final_norm_module.weight.float()
    w_u = model.unembed.weight.float() * gain
    w_u = w_u - w_u.mean(1, keepdim=True)
    spent, same, total, gap = 0.0, 0, 0, 0.0
    for layer in range(min(N_TILES, model.n_layers)):
        w = model.layers[layer].mlp.weights(fold_norm=True).W_in.T.float()
        w = w / w.norm(dim=1, keepdim=True)
        here = slice(layer * TILE % len(w), layer * TILE % len(w) + TILE)
        began = time.perf_counter()
        found = (w[here] @ w_u.T).topk(TOP)
        spent += time.perf_counter() - began
        ours = result["tokens"][layer, here]
        same += int((found.indices.cpu() == ours).sum())
        total += ours.numel()
        gap = max(gap, float((found.values.cpu() - result["scores"][layer, here]).abs().max()))
    n_neurons = sum(model.n_neurons(i) for i in range(model.n_layers))
    return spent * n_neurons / (total / TOP), same / total, gap


def _memory_row(path: Path, device: str, dtype: torch.dtype) -> Row:
    command = [sys.executable, "-m", "bench.neurons", str(path), device, str(dtype).removeprefix("torch.")]
    command.append(str(torch.get_num_threads()))
    root, environment = Path(__file__).parents[1], os.environ | MALLOC
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    before, peak = found["before"] / 1e9, found["peak"] / 1e9
    return Row(
        "memory of it",
        "gpt2-small",
        found["size"],
        f"peak {before:.2f} GB",
        f"peak {peak:.2f} GB",
        "",
        "",
        "1",
        f"{GIGABYTES} GB",
        "met" if peak < GIGABYTES else "missed",
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, kind in (("folder", str), ("device", str), ("dtype", str), ("threads", int)):
        parser.add_argument(name, type=kind)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = pb.load(given.folder, dtype=getattr(torch, given.dtype), device=given.device)
    before = _peak(given.device)
    pb.find.neuron_vocabulary(model)
    print(json.dumps({"before": before, "peak": _peak(given.device), "size": _size(model)}))


if __name__ == "__main__":
    main()
