"""Run the numerical tests as other processors would round: `python -m tests.processors [CAPABILITY:THREADS ...]`.

torch chooses its kernels by what the processor has (ATEN_CPU_CAPABILITY: default, avx2 or avx512), and sums in another order
with each choice and each number of threads. Without arguments every setting is run; one that this processor does not have
is named and left out. Ends with the seconds of each, and with 1 where any failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

NUMERICAL = (
    "tests/test_maths.py",
    "tests/signal",
    "tests/edits",
    "tests/wiring",
    "tests/train",
    "tests/model/test_model.py",
    "tests/model/test_run.py",
    "tests/model/test_latent.py",
)
SETTINGS = [f"{capability}:{threads}" for capability in ("default", "avx2", "avx512") for threads in (1, 2)]


def used(environment: dict[str, str]) -> str:
    """What torch runs with when asked for this capability: a lower one where the processor does not have it."""
    told = "import torch; print(torch.backends.cpu.get_cpu_capability().lower())"
    return subprocess.run(
        [sys.executable, "-c", told], env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()


def main(settings: list[str]) -> int:
    told, failed = [], False
    for setting in settings or SETTINGS:
        capability, _, threads = setting.partition(":")
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": threads or "1"}
        if (got := used(environment)) != capability:
            told.append(f"{setting}: left out, this processor has no {capability} (torch uses {got})")
            continue
        start = time.perf_counter()
        code = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-n", "2", *NUMERICAL], env=environment, check=False
        ).returncode
        failed |= code != 0
        told.append(f"{setting}: {'failed' if code else 'passed'} in {time.perf_counter() - start:.0f} s")
    print(*told, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
