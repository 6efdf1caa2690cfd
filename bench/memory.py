"""Peak memory of one run, measured in a process of its own.

The child loads the model, runs it once untapped, then once as asked, and reports the peak resident set that the kernel saw
(VmHWM; on a GPU, the allocator's peak). malloc is told to hand freed memory back at once (thresholds of 64 KiB), so that the
peak is what was in use and not what an arena kept. The cost of taps is the difference between a child that taps and one
that does not; both hold the weights, the activations of the pass and the logits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
REPEATS = 3  # the resident set differs by about 1 MB from process to process


def measure(folder: Path, size: tuple[int, int], taps: str, device: str, dtype: torch.dtype) -> tuple[int, int]:
    """(peak bytes, captured bytes) of a fresh process that runs the model of `folder` with these taps; the least of REPEATS."""
    command = [
        sys.executable,
        "-m",
        "bench.memory",
        str(folder),
        *map(str, size),
        taps,
        device,
        str(dtype).removeprefix("torch."),
    ]
    command.append(str(torch.get_num_threads()))
    return min(_child(command) for _ in range(REPEATS))


def _child(command: list[str]) -> tuple[int, int]:
    root, environment = Path(__file__).parents[1], os.environ | MALLOC
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return found["peak"], found["captured"]


def available() -> bool:
    return Path("/proc/self/status").is_file()


def _peak(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def main() -> None:
    import patchbay as pb
    from bench.foundation import taps_of
    from bench.shapes import prompts

    parser = argparse.ArgumentParser()
    for name, kind in (
        ("folder", str),
        ("prompts", int),
        ("positions", int),
        ("taps", str),
        ("device", str),
        ("dtype", str),
        ("threads", int),
    ):
        parser.add_argument(name, type=kind)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = pb.load(given.folder, dtype=getattr(torch, given.dtype), device=given.device)
    ids = prompts(given.prompts, given.positions, model.vocab_size, given.device)
    pb.run(model, ids)
    trace = pb.run(model, ids, taps=taps_of(model, given.taps))
    captured = sum(trace[port].numel() * trace[port].element_size() for port in trace.ports)
    print(json.dumps({"peak": _peak(given.device), "captured": captured}))


if __name__ == "__main__":
    main()
