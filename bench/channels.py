"""Channels: composition scores of a whole model, against TransformerLens and against plain products pair by pair.

"heads" is `find.channels` on every head's OV against every later head's query, key and value, from the lent model to the finished
Result (norms folded, rotary turn measured, scores, closed-form null, z, adjusted p), in the place of Hugging Face stands
TransformerLens's `all_composition_scores` for Q, K and V in its own environment, which gives scores alone. "pair by pair" is torch
with two d_model x d_model matrices for each pair, every 1000th pair run and the time multiplied; the scores of these pairs are
compared ("largest difference"). "components" is every component of every head against every later input of heads, MLPs and
unembedding; its target is 5 s. "8B layers" has 32 heads over 8 groups, d_model 4096 (heads alone): whole heads for 2 and 3 layers,
fitted as a per layer and b per pair of layers and carried on to 32. "memory" is how much the peak of a fresh process grows.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import patchbay as pb
from bench import clock, memory, peers
from bench.report import Row
from bench.shapes import save_shapes

PARTS = ("heads", "pairs", "components", "8B", "memory")
METHOD = (__doc__ or "").split("\n\n", 1)[1].replace("\n", " ").strip()
HEADS: dict[str, Any] = {"writers": ["head"], "kinds": ["query", "key", "value"], "components": False, "nulls": 0}
COMPONENTS: dict[str, Any] = {"writers": ["head"], "components": True, "nulls": 0}
RATIO, SECONDS, MEMORY = 1 / 15, 5.0, 1e9  # the targets
SAMPLE = 1000
RUNS = 3


def rows(folder: Path, parts: tuple[str, ...], device: str, dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    """The section's rows."""
    path = save_shapes(folder, dtype)["gpt2-small"]
    model = pb.load(path, device=device, dtype=dtype)
    size = "144 heads, 28,512 pairs"
    ours = _best(lambda: pb.find.channels(model, **HEADS))
    if "heads" in parts:
        yield _against_lens(path, ours, size)
    if "pairs" in parts:
        yield _pair_by_pair(model, ours, size)
    if "components" in parts:
        took = _best(lambda: pb.find.channels(model, **COMPONENTS), 2)
        met = "met" if took <= SECONDS else "missed"
        yield Row("components", "gpt2-small", "9,216 x 445", "", f"{took:.2f} s", "", "", "2", f"{SECONDS:.0f} s", met)
    if "memory" in parts and memory.available():
        for what in ("heads", "components"):
            grown = _memory(path, what)
            met = "met" if grown <= MEMORY else "missed"
            yield Row(f"memory of {what}", "gpt2-small", "", "", f"{grown / 1e6:.0f} MB", "", "", "1", "1000 MB", met)
    del model
    if "8B" in parts:
        yield _large(device, dtype)


def _best(work: Callable[[], Any], n: int = RUNS) -> float:
    """Fastest of `n` runs after one to warm up."""
    times = []
    for _ in range(n + 1):
        began = clock.now()
        work()
        clock.synchronize()
        times.append(clock.now() - began)
    return min(times[1:])


def _against_lens(path: Path, ours: float, size: str) -> Row:
    try:
        lens = _lens(path)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        text = str(error).splitlines()[-1][:80].replace("|", " ")
        return Row(
            "heads", "gpt2-small", size, "", f"{ours:.2f} s", "", "", str(RUNS), f"{RATIO:.3f}", f"not compared: {text}"
        )
    met = "met" if ours / lens <= RATIO else "missed"
    ratio = f"{ours / lens:.3f}"
    return Row(
        "heads, Q K and V",
        "gpt2-small",
        size,
        f"{lens:.2f} s",
        f"{ours:.2f} s",
        ratio,
        "",
        str(RUNS),
        f"{RATIO:.3f}",
        met,
    )


def _lens(path: Path) -> float:
    found = peers.run("transformer_lens", str(path), "composition", "-", str(torch.get_num_threads()))
    return float(found["cpu_seconds" if clock.now is clock.CLOCKS["cpu"] else "seconds"])


def _pair_by_pair(model: pb.Model, ours: float, size: str) -> Row:
    """Two d_model x d_model matrices for each pair, made and multiplied."""
    result = pb.find.channels(model, **HEADS)
    weights = [layer.attn.weights(fold_norm=True) for layer in model.layers]
    n_heads = range(model.n_heads(0))
    pairs = [
        (a, h, b, g, kind)
        for (a, h), (b, g), kind in itertools.product(
            itertools.product(range(model.n_layers), n_heads), itertools.product(range(model.n_layers), n_heads), "qkv"
        )
        if a < b
    ]
    gap, began = 0.0, clock.now()
    with torch.no_grad():
        for a, h, b, g, kind in pairs[::SAMPLE]:
            first = weights[a].W_OV(h)
            second = weights[b].W_OV(g) if kind == "v" else weights[b].W_QK(g)
            second = second.T if kind == "k" else second
            score = float((first @ second).norm() / (first.norm() * second.norm()))
            i, j = result.labels_of("writer").index(f"L{a}.H{h}"), result.labels_of("reader").index(f"L{b}.H{g}.{kind}")
            gap = max(gap, abs(score - float(result["whole"][i, j])))
    plain = (clock.now() - began) * len(pairs) / len(pairs[::SAMPLE])
    note = f"largest difference {gap:.0e}"
    return Row(
        "pair by pair",
        "gpt2-small",
        size,
        f"{plain:.0f} s",
        f"{ours:.2f} s",
        f"{ours / plain:.4f}",
        "",
        "1",
        "none",
        note,
    )


def _large(device: str, dtype: torch.dtype) -> Row:
    """Whole heads of 2 and of 3 layers of an 8B shape, carried on to 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    times = {}
    for n_layers in (2, 3):
        config = LlamaConfig(
            vocab_size=256, hidden_size=4096, intermediate_size=64, num_hidden_layers=n_layers, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, max_position_embeddings=512,
        )  # fmt: skip
        torch.manual_seed(0)
        model = pb.load(LlamaForCausalLM._from_config(config, dtype=dtype).to(device).eval())
        times[n_layers] = _best(lambda model=model: pb.find.channels(model, **HEADS), 1)  # type: ignore[misc]
        del model
    # T(n) = a n + b n (n - 1) / 2
    b = (times[3] - 1.5 * times[2]) / 1.5
    a = (times[2] - b) / 2
    whole = 32 * a + 496 * max(b, 0.0)
    measured = f"{times[2]:.1f} s and {times[3]:.1f} s"
    return Row(
        "8B layers, whole heads",
        "llama 8B shape",
        "2 and 3 layers",
        "",
        measured,
        "",
        "",
        "1",
        "none",
        f"32 layers: about {whole:.0f} s",
    )


def _memory(path: Path, what: str) -> float:
    """Growth of the peak resident set of a fresh process, in bytes."""
    command = [sys.executable, "-m", "bench.channels", str(path), what, str(torch.get_num_threads())]
    environment = os.environ | memory.MALLOC
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1], check=True
    )
    return float(json.loads(done.stdout.splitlines()[-1])["grown"])


def main(path: str, what: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    model = pb.load(path)
    model.fingerprint  # noqa: B018
    pb.find.channels(model, writers=["L0.H0"], readers=["L1.H0"], kinds=["value"], components=False, nulls=0)
    before = memory._peak("cpu")
    pb.find.channels(model, **(HEADS if what == "heads" else COMPONENTS))
    print(json.dumps({"grown": memory._peak("cpu") - before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
