"""Peers in virtual environments of their own, made on first use under build/peers: their pins and ours do not install together.

Each peer is run by a script beside this file, in a process of its own on the same machine with the same threads, and prints one
JSON document.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEERS = {
    "transformer_lens": ("transformer-lens==4.3.0", "torch==2.13.0"),
    "nnsight": ("nnsight==0.8.1", "transformers==5.23.0", "torch==2.13.0"),
}


def run(peer: str, *given: str, script: str = "") -> dict[str, Any]:
    """What bench/peer_<peer>.py, or `script`, prints. Raises RuntimeError with the end of its output when it fails."""
    file = ROOT / "bench" / (script or f"peer_{peer}.py")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([_python(peer), str(file), *given], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{peer} failed: {done.stderr[-800:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _python(peer: str) -> str:
    folder = ROOT / "build" / "peers" / peer
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"installing {', '.join(PEERS[peer])} into {folder}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PEERS[peer]], check=True)
        (folder / "ready").touch()
    return str(python)
