"""Sweeps of patches, against one patched Hugging Face forward per cell.

`base` is the plain way: for every cell a hook is put on the module, the model's own forward runs on the clean prompts, and the
logit difference is read. Patchbay runs all cells through the public `pb.sweep`. Every number of the sweep is compared with the plain way's ("largest difference").
"floor" is the time that the matrix products which the sweep runs, attention's own aside, need at the rate of a large one measured
in the same run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import patchbay as pb
from bench import peers
from bench.report import Row
from bench.shapes import prompts, save_shapes

PARTS = ("A", "B", "C", "long", "many", "own")
WHAT = {
    "A": "residual stream, every layer and position",
    "B": "every head's z, all positions",
    "C": "every head's z at every position",
    "long": "residual stream, every layer, 8 positions of 512",
    "many": "every fourth head's z, all positions",
}
SIZES = {"A": (1, 16), "B": (8, 16), "C": (1, 16), "long": (1, 512), "many": (64, 32)}
TARGETS = {"A": 18.0, "B": 4.0, "C": 24.0}
OWN = 1.15  # times the named metric's time
REPEATS = {"long": 1, "many": 1}
PEER = ("A", "B", "C")
SAMPLE = {"C": 8, "long": 8, "many": 8}  # the plain way runs every n-th cell and its time is multiplied
METHOD = (__doc__ or "").split("\n\n", 1)[1].replace("\n", " ").strip() + (
    " The column best is how many times faster Patchbay is; median is seconds over the floor. In C, long and many the plain way "
    "runs every eighth cell and its time is multiplied by eight. In the rows against TransformerLens its time stands in the place "
    "of Hugging Face's. In the rows of an own metric the named metric's time stands there, and best and median are times it."
)


def rows(folder: Path, parts: tuple[str, ...], device: str, dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    """The section's rows."""
    for name, path in save_shapes(folder, dtype).items():
        model = pb.load(path, device=device, dtype=dtype)
        for part in parts:
            yield from [_own(name, model, device)] if part == "own" else _rows(name, model, part, device, path)
        del model


def _rows(name: str, model: pb.Model, part: str, device: str, path: Path) -> Iterator[Row]:
    n_prompts, n_positions = SIZES[part]
    clean = prompts(n_prompts, n_positions, model.vocab_size, device)
    corrupted = clean.flip(1)
    right, wrong = tuple(range(5, 5 + n_prompts)), tuple((100 + i,) for i in range(n_prompts))
    task = pb.Task(name=part, clean=tuple(map(tuple, clean.tolist())), right=right, wrong=wrong)
    cells = _cells(model, part, corrupted)
    with FlopCounterMode(display=False) as counted:  # warms, too
        pb.sweep(model, task, cells)
    ours = []
    for _ in range(REPEATS.get(part, 3)):
        began = time.perf_counter()
        result = pb.sweep(model, task, cells)
        ours.append(time.perf_counter() - began)
    every = SAMPLE.get(part, 1)
    began = time.perf_counter()
    plain = torch.stack([_one_forward(model, clean, cell, task) for cell in cells[::every]])
    base = (time.perf_counter() - began) * every
    difference = float((plain - result["value"][::every]).abs().max())
    floor = counted.get_total_flops() / _rate(device, model.dtype)
    faster, target = base / min(ours), TARGETS.get(part)
    verdict = "" if target is None else "met" if faster >= target else "missed"
    yield Row(
        f"{part}: {WHAT[part]} ({len(cells):,} cells)",
        name,
        f"{n_prompts}x{n_positions}",
        f"{base:.2f} s",
        f"{min(ours):.2f} s",
        f"{faster:.1f}x",
        f"{min(ours) / floor:.2f}x the floor of {floor:.2f} s",
        str(len(ours)),
        "none" if target is None else f"{target:.0f}x",
        f"{verdict}; largest difference {difference:.0e}".strip("; "),
    )
    if part in PEER and device == "cpu":
        yield _against_peer(name, part, task, corrupted, path, min(ours), len(cells))


def _own(name: str, model: pb.Model, device: str, repeats: int = 5) -> Row:
    """A metric of one's own that names its tokens, against the named metric that it spells: the same sweep, in turns."""
    clean = prompts(1, 16, model.vocab_size, device)
    right, wrong = (5,), ((100,),)
    task = pb.Task(name="own", clean=tuple(map(tuple, clean.tolist())), right=right, wrong=wrong)
    cells = _cells(model, "A", clean.flip(1))

    def difference(logits: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return logits[:, 0] - logits[:, 1]

    difference.tokens = [5, 100]  # type: ignore[attr-defined]
    seconds: dict[str, list[float]] = {"named": [], "own": []}
    values = {}
    for turn in range(repeats + 1):  # the first warms
        for which, metric in (("named", None), ("own", difference)):
            began = time.perf_counter()
            values[which] = pb.sweep(model, task, cells, metric)["value"]
            seconds[which] += [time.perf_counter() - began] if turn else []
    named, own = (seconds[which] for which in ("named", "own"))
    ratio, apart = min(own) / min(named), float((values["own"] - values["named"]).abs().max())
    median = sorted(b / a for a, b in zip(named, own, strict=True))[repeats // 2]
    verdict = f"{'met' if ratio <= OWN else 'missed'}; largest difference {apart:.0e}"
    what = f"own metric with tokens against logit_diff ({len(cells):,} cells)"
    return Row(what, name, "1x16", f"{min(named):.2f} s", f"{min(own):.2f} s", f"{ratio:.2f}", f"{median:.2f}", str(repeats), f"{OWN}", verdict)  # fmt: skip


def _against_peer(
    name: str, part: str, task: pb.Task, corrupted: torch.Tensor, path: Path, ours: float, n_cells: int
) -> Row:
    """The same sweep by TransformerLens's own patching function, in its own environment."""
    given = {"clean": task.clean, "corrupted": corrupted.tolist(), "right": task.right}
    given["wrong"] = [ids[0] for ids in task.wrong]
    prompts_file = path / f"prompts-{part}.json"
    prompts_file.write_text(json.dumps(given))
    theirs = peers.run("transformer_lens", str(path), part, str(prompts_file), str(torch.get_num_threads()))
    assert theirs["cells"] == n_cells, "both sides must run the same cells"
    size = f"{SIZES[part][0]}x{SIZES[part][1]}"
    what, faster = f"{part} against TransformerLens 4.3", theirs["seconds"] / ours
    return Row(what, name, size, f"{theirs['seconds']:.2f} s", f"{ours:.2f} s", f"{faster:.1f}x", "", "1", "none", "")


@torch.no_grad()
def _cells(model: pb.Model, part: str, corrupted: torch.Tensor) -> list[pb.Edit]:
    """Every cell sets a signal to its value in the corrupted run."""
    places = range(0, corrupted.shape[1], 64) if part == "long" else range(corrupted.shape[1])
    if part in ("A", "long"):
        ports = [layer.resid_in for layer in model.layers]
        seen = pb.run(model, corrupted, taps=ports)
        return [pb.replace(port, seen[port][:, p : p + 1], positions=p) for port in ports for p in places]
    heads = [head.z for layer in model.layers for head in list(layer.heads)[:: 4 if part == "many" else 1]]
    seen = pb.run(model, corrupted, taps=[layer.attn.z for layer in model.layers])
    if part == "C":
        return [pb.replace(port, seen[port][:, p : p + 1], positions=p) for port in heads for p in places]
    return [pb.replace(port, seen[port]) for port in heads]


@torch.no_grad()
def _one_forward(model: pb.Model, ids: torch.Tensor, edit: pb.Edit, task: pb.Task) -> torch.Tensor:
    """The plain way: one hook, one forward of the model."""
    assert isinstance(edit.value, torch.Tensor)
    at, value = model.modules[edit.port.layer or 0], edit.value
    place = slice(None) if edit.positions is None else slice(edit.positions, edit.positions + 1)  # type: ignore[operator]

    def residual(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = args[0].clone()
        x[:, place] = value
        return (x, *args[1:])

    def z(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, d, head = args[0].clone(), value.shape[-1], edit.port.index or 0
        x[:, place, head * d : (head + 1) * d] = value
        return (x, *args[1:])

    hook: Callable[..., Any] = residual if edit.port.signal == "resid_in" else z
    module = at.layer if edit.port.signal == "resid_in" else at.attn_proj
    assert module is not None
    handle = module.register_forward_pre_hook(hook)
    try:
        logits = model.hf(input_ids=ids, use_cache=False).logits[:, -1]
    finally:
        handle.remove()
    right, wrong = torch.tensor(task.right), torch.tensor([ids[0] for ids in task.wrong])
    row = torch.arange(len(right))
    return logits[row, right] - logits[row, wrong]


def _rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a 2048 x 768 by 768 x 3072 product, best of many."""
    a, b = torch.randn(2048, 768, device=device, dtype=dtype), torch.randn(768, 3072, device=device, dtype=dtype)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        float((a @ b)[0, 0])
        times.append(time.perf_counter() - began)
    return 2.0 * 2048 * 768 * 3072 / min(times)
