"""RESULTS.md: one section per file of benchmarks. Writing one section leaves the others as they were."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from bench.clock import Comparison

RESULTS = Path(__file__).parent / "RESULTS.md"
HEAD = """# Benchmarks

Written by `python -m bench`; each section holds its last run. Ratios are Patchbay over Hugging Face for the same work in the same
run. `best` compares the fastest run of each, `median` is over pairs of neighbouring runs (with its quartiles); a verdict is
"unsure" where the two stand on different sides of the target, which is what a busy machine does.
"""
COLUMNS = (
    "what",
    "model",
    "prompts x positions",
    "Hugging Face",
    "Patchbay",
    "best",
    "median (quartiles)",
    "runs",
    "target",
    "verdict",
)


@dataclass(frozen=True)
class Row:
    """One line of the table; every cell is text."""

    what: str
    model: str
    size: str
    base: str
    ours: str
    best: str
    median: str
    runs: str
    target: str
    verdict: str

    def __str__(self) -> str:
        return "| " + " | ".join(vars(self).values()) + " |"


def timed(what: str, model: str, size: str, found: Comparison, target: float | None, note: str = "") -> Row:
    """A row of two timings; without a target it is there to be read."""
    low, high = found.quartiles
    base, ours = (f"{min(seconds) * 1e3:.1f} ms" for seconds in (found.base, found.ours))
    verdict = note if target is None else found.verdict(target) + (f"; {note}" if note else "")
    limit = "none" if target is None else f"{target:.2f}"
    return Row(
        what, model, size, base, ours, f"{found.best:.3f}", f"{found.median:.3f} ({low:.3f} to {high:.3f})",
        str(len(found.base)), limit, verdict,
    )  # fmt: skip


def write_section(name: str, method: str, setting: str, rows: Sequence[Row], path: Path = RESULTS) -> None:
    """Put this section in the file, in place of its former self."""
    head = "| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS)
    put_section(name, "\n".join([setting, "", method, "", head, *map(str, rows)]), path)


def put_section(name: str, body: str, path: Path = RESULTS) -> None:
    """Put a section's text in the file, in place of its former self."""
    sections = {}
    if path.is_file():
        for part in path.read_text().split("\n## ")[1:]:
            sections[part.split("\n", 1)[0].strip()] = "## " + part.strip()
    sections[name] = f"## {name}\n\n{body}"
    partial = path.with_suffix(".partial")
    partial.write_text("\n\n".join([HEAD.strip(), *sections.values()]) + "\n")
    partial.replace(path)


def describe(device: str, dtype: torch.dtype, clock: str, load_before: float) -> str:
    """Date, hardware and versions; the load average says whether the machine was quiet."""
    versions = [f"{name} {version(name)}" for name in ("torch", "transformers")]
    hardware = torch.cuda.get_device_name() if device.startswith("cuda") else f"{_cpu()}, {os.cpu_count()} cores"
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC. {hardware}, {torch.get_num_threads()} threads, {str(dtype).removeprefix('torch.')}, {clock} clock; "
        f"Python {platform.python_version()}, {', '.join(versions)}. "
        f"Load average {load_before:.1f} before, {os.getloadavg()[0]:.1f} after (a quiet machine starts near 0)."
    )


def _cpu() -> str:
    """The processor's name with what identifies it where the name is vague."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {name.strip(): fact.strip() for name, _, fact in (line.partition(":") for line in lines)}
    return (
        f"{facts.get('model name', platform.machine())} (family {facts.get('cpu family')}, model {facts.get('model')})"
    )
