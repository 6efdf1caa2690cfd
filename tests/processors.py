"""Run the numerical tests as other processors would round: `python -m tests.processors [CAPABILITY:THREADS ...]`.

torch chooses its kernels by what the processor has (ATEN_CPU_CAPABILITY: default, avx2 or avx512), and sums in another order
with each choice and each number of threads. The core's numerical files run whole, of each method its `test_reference`: the paper's
formula beside what the method gives. Without arguments every setting is run; one that this processor does not have is named and
left out. Ends with the seconds of each, on the clock and of the processors, and with 1 where any failed. Processes times threads are
two, since threads that wait for one another on fewer cores than they are never end; PATCHBAY_WORKERS=1 takes one process always.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

NUMERICAL = (
    "tests/test_maths.py",
    "tests/signal",
    "tests/edits",
    "tests/wiring",
    "tests/train",
    "tests/model/test_model.py",
    "tests/model/test_run.py",
    "tests/model/test_latent.py",
    "tests/jacks/test_place.py",
    "tests/jacks/test_touched.py",
    "tests/knobs/test_rows.py",
    "tests/sweeps/test_sweep.py",
    "tests/sweeps/test_ranking.py",
    "tests/sweeps/test_whole_answers.py",
)
METHODS = ("find", "prove", "turn", "measure")
SETTINGS = [f"{capability}:{threads}" for capability in ("default", "avx2", "avx512") for threads in (1, 2)]


def used(environment: dict[str, str]) -> str:
    """What torch runs with when asked for this capability: a lower one where the processor does not have it."""
    told = "import torch; print(torch.backends.cpu.get_cpu_capability().lower())"
    return subprocess.run(
        [sys.executable, "-c", told], env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()


def references() -> list[str]:
    """The tests of each method against its formula."""
    found = []
    for path in (path for room in METHODS for path in sorted((Path(__file__).parent / room).glob("test_*.py"))):
        names = re.findall(r"^def (test_reference\w*)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
        found += [f"tests/{path.parent.name}/{path.name}::{name}" for name in names]
    return found


def main(settings: list[str]) -> int:
    told, failed, tests = [], False, [*NUMERICAL, *references()]
    for setting in settings or SETTINGS:
        capability, _, threads = setting.partition(":")
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": threads or "1"}
        environment |= {"OMP_WAIT_POLICY": "passive"}  # threads that wait leave their core to those that they wait for
        if (got := used(environment)) != capability:
            told.append(f"{setting}: left out, this processor has no {capability} (torch uses {got})")
            continue
        workers = os.environ.get("PATCHBAY_WORKERS") or str(max(1, 2 // int(threads or 1)))
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "pytest", "-q", "-n", workers, *tests]
        code = subprocess.run(command, env=environment, check=False).returncode
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        failed |= code != 0
        told.append(f"{setting}: {'failed' if code else 'passed'} in {seconds:.0f} s, {spent:.0f} s of the processors")
    print(*told, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
