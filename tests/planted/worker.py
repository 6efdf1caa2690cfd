"""One process that runs tests in a copy of the tree, again and again: what all tests import is imported once, and every run is a fork.

It reads a JSON list of tests a line, and answers each with a line: pytest's exit code and the first test that failed. A run that
hangs is ended, and counts as failed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

LONGEST = 600  # seconds
WARM = ["torch", "transformers", "numpy", "xarray", "pandas", "matplotlib.pyplot", "scipy.stats", "click", "rich"]
WARM += ["jaxtyping", "safetensors.torch", "pytest", "rich.table", "rich.progress", "unittest.mock", "torch.func"]
WARM += [
    f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "llama", "gemma2", "phi", "mixtral", "bloom")
]
WARM += [
    f"transformers.models.{name}.modeling_{name}"
    for name in ("gpt_neo", "mamba2", "qwen3_moe", "deepseek_v3", "granite")
]


class FirstFailure:
    """A pytest plugin that remembers which test failed first."""

    name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid


def run(tree: Path, tests: list[str]) -> dict[str, Any]:
    """Exit code and first failure of these tests, in a fork."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 3
        try:
            os.close(read)
            signal.alarm(LONGEST)
            code = _child(tree, tests, write)
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as answer:
        name = answer.read()
    status = os.waitpid(child, 0)[1]
    return {"code": 1 if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), "failed": name}


def _child(tree: Path, tests: list[str], write: int) -> int:
    import pytest

    for name in [name for name in sys.modules if name.partition(".")[0] in ("patchbay", "tests")]:
        del sys.modules[name]
    os.chdir(tree)
    sys.path[:] = [str(tree), *(place for place in sys.path if place and not (Path(place) / "patchbay").is_dir())]
    os.environ["PYTHONPATH"] = str(tree)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    first = FirstFailure()
    options = [
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-W",
        "ignore::pytest.PytestAssertRewriteWarning",
    ]
    code = int(pytest.main([*options, *tests], plugins=[first]))
    os.write(write, first.name.encode())
    return code


def main(tree: Path) -> None:
    sys.dont_write_bytecode = True
    for name in WARM if (tree / "patchbay" / "model").is_dir() else ():  # a small tree of a test needs none of them
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(run(tree, json.loads(line))), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
