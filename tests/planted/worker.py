"""One process that runs tests in a copy of the tree, again and again: what all tests import is imported once, and every run is a fork.

It reads a line a run, `{"tests": [...], "seconds": N, "all": false}`, and answers each with a line: pytest's exit code, how many
tests passed, and those that failed, each with what it raised. A run that takes more than its seconds of a core, or five times as
long on the clock, is ended: code "time".
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

WARM = ["torch", "transformers", "numpy", "xarray", "pandas", "matplotlib.pyplot", "scipy.stats", "click", "rich"]
WARM += ["hypothesis.strategies", "_hypothesis_pytestplugin"]  # else every run rewrites its asserts anew
WARM += ["jaxtyping", "safetensors.torch", "pytest", "rich.table", "rich.progress", "unittest.mock", "torch.func"]
FAMILIES = ("gpt2", "llama", "gemma2", "phi", "mixtral", "bloom", "gpt_neo", "mamba2", "qwen3_moe", "deepseek_v3")
WARM += [f"transformers.models.{name}.modeling_{name}" for name in (*FAMILIES, "granite")]
OPTIONS = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore::pytest.PytestAssertRewriteWarning"]


class Seen:
    """A pytest plugin that counts what passed and remembers what failed, and how."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed: list[tuple[str, str]] = []

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        import pytest

        if call.excinfo is not None and not issubclass(call.excinfo.type, pytest.skip.Exception):
            self.failed.append((item.nodeid, call.excinfo.type.__name__))
        elif call.when == "call" and call.excinfo is None:
            self.passed += 1


def run(tree: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Exit code, passed and failed tests, in a fork."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 3
        try:
            os.close(read)
            resource.setrlimit(resource.RLIMIT_CPU, (int(asked["seconds"]), int(asked["seconds"]) + 5))
            signal.alarm(5 * int(asked["seconds"]))
            code = _child(tree, asked, write)
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    status = os.waitpid(child, 0)[1]
    found = json.loads(text) if text else {"passed": 0, "failed": []}
    killed = os.WIFSIGNALED(status)
    timed = killed and os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGXCPU)
    return found | {"code": "time" if timed else "killed" if killed else os.WEXITSTATUS(status)}


def _child(tree: Path, asked: dict[str, Any], write: int) -> int:
    import pytest

    for name in [name for name in sys.modules if name.partition(".")[0] in ("patchbay", "tests")]:
        del sys.modules[name]
    os.chdir(tree)
    sys.path[:] = [str(tree), *(place for place in sys.path if place and not (Path(place) / "patchbay").is_dir())]
    os.environ["PYTHONPATH"] = str(tree)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    seen = Seen()
    code = int(pytest.main([*OPTIONS, *([] if asked["all"] else ["-x"]), *asked["tests"]], plugins=[seen]))
    os.write(write, json.dumps({"passed": seen.passed, "failed": seen.failed}).encode())
    return code


def main(tree: Path) -> None:
    sys.dont_write_bytecode = True
    for name in WARM if (tree / "patchbay" / "model").is_dir() else ["pytest"]:  # a small tree of a test needs no more
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(run(tree, json.loads(line))), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
