"""The core's tests on one end of the declared ranges of torch and transformers: `python tests/versions.py oldest` or `newest`.

Makes `.venv-oldest` or `.venv-newest` beside the code when it is not there, with the releases that pyproject.toml names at that end
and the newest of all else, and runs signals, edits, jacks, models, sweeps and rows of knobs in it. Needs a package index.
PATCHBAY_WORKERS=1 takes one process.
"""

import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = (
    "signal",
    "edits",
    "jacks",
    "model",
    "sweeps",
    "knobs/test_rows.py",
    "knobs/test_knob.py",
    "turn/test_set_prompt.py",
)
OTHERS = ("graph", "test")  # extras that the tests need


def pins(end: str) -> list[str]:
    """`name==version` of what the project declares a whole range of, at one end of it."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ranges = [re.fullmatch(r"([\w-]+)>=([\d.]+),<=([\d.]+)", line) for line in declared]
    return [f"{found[1]}=={found[2 if end == 'oldest' else 3]}" for found in ranges if found]


def main(end: str) -> int:
    place = ROOT / f".venv-{end}"
    python = place / "bin" / "python"
    if not (place / ".ready").exists():
        venv.create(place, with_pip=True, clear=True)
        subprocess.check_call(
            [python, "-m", "pip", "install", "--quiet", *pins(end), "-e", f".[{','.join(OTHERS)}]"], cwd=ROOT
        )
        (place / ".ready").touch()
    print(end, *pins(end), flush=True)
    calm = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    tests = [str(Path("tests", name)) for name in CORE]
    workers = os.environ.get("PATCHBAY_WORKERS", "2")
    return subprocess.call([python, "-m", "pytest", "-q", "-n", workers, *tests], cwd=ROOT, env={**os.environ, **calm})


if __name__ == "__main__":
    if sys.argv[1:] not in (["oldest"], ["newest"]):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
