"""`python -m bench [SECTION ...]`: run sections of benchmarks, print their rows as they come, and write RESULTS.md."""

from __future__ import annotations

import argparse
import os
import tempfile
from importlib import import_module
from pathlib import Path

SECTIONS = (
    "foundation",
    "sweeps",
    "finders",
    "knobs",
    "neurons",
    "channels",
    "decode",
    "meters",
    "volume",
    "serve",
    "app",
    "blocks",
    "lab",
    "features",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)} (default: all)")
    parser.add_argument(
        "--only", action="append", metavar="PART", help="run only this part of a section, and do not write RESULTS.md"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu, with --threads 1, on a busy machine"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seconds", type=float, default=8.0, help="about how long each row runs")
    given = parser.parse_args()
    if unknown := set(given.sections) - set(SECTIONS):
        parser.error(f"{', '.join(sorted(unknown))}: the sections are {', '.join(SECTIONS)}")

    os.environ["OMP_NUM_THREADS"] = str(given.threads)  # before torch starts its threads
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers

    from bench import clock
    from bench.report import COLUMNS, describe, write_section

    torch.set_num_threads(given.threads)
    clock.use(given.clock)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dtype = getattr(torch, given.dtype)
    for name in given.sections or SECTIONS:
        section = import_module(f"bench.{name}")
        if unknown := set(given.only or ()) - set(section.PARTS):
            parser.error(f"{', '.join(sorted(unknown))}: the parts of {name} are {', '.join(section.PARTS)}")
        before, rows = os.getloadavg()[0], []
        print(f"| {' | '.join(COLUMNS)} |", flush=True)
        with tempfile.TemporaryDirectory(prefix="patchbay-bench-") as folder:
            for row in section.rows(
                Path(folder), tuple(given.only or section.PARTS), given.device, dtype, given.seconds
            ):
                rows.append(row)
                print(row, flush=True)
        setting = describe(given.device, dtype, given.clock, before)
        print(setting)
        if not given.only:
            heading = name if given.device == "cpu" else f"{name} on {given.device} in {given.dtype}"
            write_section(heading, section.METHOD, setting, rows)


if __name__ == "__main__":
    main()
