"""A Python process for a test, without its start: a fork of this one, which has torch imported, that forgets the package.

    done = python("-m", "patchbay", "new", "find", "stripes", cwd=checkout)

stands for `subprocess.run([sys.executable, *args], capture_output=True, text=True)`: what was written, and the exit code. The package
is imported anew, from `cwd` where it lies there. What asks which modules are imported, or for seconds, needs a real process.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO

CHECKOUT = Path(__file__).parents[1]


def python(*args: str, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ...` or `python -c CODE ...`, to its end."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        status = os.waitpid(start(*args, cwd=cwd, stdout=out, stderr=err, env=env), 0)[1]
        for file in (out, err):
            file.seek(0)
        code = os.waitstatus_to_exitcode(status)
        return subprocess.CompletedProcess(args, code, out.read().decode(), err.read().decode())


def start(
    *args: str, cwd: Path, stdout: int | IO[bytes], stderr: int | IO[bytes], env: Mapping[str, str] | None = None
) -> int:
    """The same, begun: its process id, which is to be waited for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of forks beside threads
        child = os.fork()
    if not child:
        code = 1
        try:
            for stream, to in ((1, stdout), (2, stderr)):
                os.dup2(to if isinstance(to, int) else to.fileno(), stream)
            code = _run(args, cwd, env or {})
        finally:
            os._exit(code)
    return child


def _run(args: tuple[str, ...], cwd: Path, env: Mapping[str, str]) -> int:
    """The exit code of what is asked, in the child."""
    sys.stdout, sys.stderr = (open(at, "w", 1, encoding="utf-8", closefd=False) for at in (1, 2))  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.resetwarnings()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("patchbay", "tests", "__main__")]:
        del sys.modules[name]
    if (
        "transformers.modeling_utils" in sys.modules
    ):  # transformers remembers functions of the package that is forgotten
        named = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS._global_mapping
        for name in [name for name in named if name.startswith("patchbay_")]:
            del named[name]
    os.chdir(cwd)
    os.environ.update(env)
    held = [place for place in sys.path if place and not (Path(place) / "patchbay").is_dir()]
    sys.path[:] = [str(cwd), *([] if (cwd / "patchbay").is_dir() else [str(CHECKOUT)]), *held]
    kind, what, *rest = args
    code: object = 0
    try:
        sys.argv = ["-c" if kind == "-c" else what, *rest]
        if kind == "-c":
            exec(what, {"__name__": "__main__"})
        else:
            runpy.run_module(what, run_name="__main__", alter_sys=True)
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)
