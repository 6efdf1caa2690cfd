"""Where shared checkpoints and data lie; tests that need them are skipped, with the reason, where they are absent."""

import os
from pathlib import Path

SHARED = Path(os.environ.get("PATCHBAY_SHARED", Path(__file__).parents[2] / "shared"))
