"""A real notebook in a fresh kernel: the figure of a cell's last line shows, progress comes after two seconds, an error is two lines.

`jupyter-nbconvert` is looked for on the path, or where PATCHBAY_JUPYTER says; without it the test is skipped. Its kernel must find torch:
`python -m venv jup && jup/bin/pip install nbconvert ipykernel`, and the site-packages of this environment in a .pth file of that one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import patchbay as pb

NBCONVERT = os.environ.get("PATCHBAY_JUPYTER") or shutil.which("jupyter-nbconvert")
CELLS = {
    "figure": 'import patchbay as pb\nmodel = pb.load("tiny")\ntask = pb.tasks.facts_in_context(model, n=6)\n'
    "found = pb.find.direct_logit_attribution(model, task)\nfound.plot()",
    "views": "found",
    "trace": 'pb.run(model, "The capital of", taps=["L1.attn.pattern"]).show("L1.H3.pattern")',
    "progress": "import time\ndef slow(logits, prompts):\n    time.sleep(0.3)\n    return logits[:, 0]\n"
    "edits = [pb.zero(head.z) for layer in model.layers for head in layer.heads]\n"
    "table = pb.sweep(model, task[:2], edits, slow, memory=25_250_000)",
    "quick": "quick = pb.sweep(model, task[:2], edits[:2], lambda logits, prompts: logits[:, 0])",
    "error": 'pb.run(model, "The capital", taps=["L9.attn.pattern"])',
}  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each cell put out."""
    folder = tmp_path_factory.mktemp("notebook")
    cells = [
        {"cell_type": "code", "metadata": {}, "source": source, "outputs": [], "execution_count": None, "id": name}
        for name, source in CELLS.items()
    ]
    (folder / "n.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    env = os.environ | {
        "PYTHONPATH": str(Path(pb.__file__).parents[1]),
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(folder),
    }
    asked = [
        str(NBCONVERT),
        "--to",
        "notebook",
        "--execute",
        "--allow-errors",
        "--output",
        "ran.ipynb",
        str(folder / "n.ipynb"),
    ]
    subprocess.run(asked, check=True, capture_output=True, timeout=600, env=env)
    held = json.loads((folder / "ran.ipynb").read_text())["cells"]
    return {name: cell["outputs"] for name, cell in zip(CELLS, held, strict=True)}


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NBCONVERT is None, reason="no jupyter-nbconvert here (on the path, or by PATCHBAY_JUPYTER)"),
]


def test_the_figure_of_the_last_line_is_shown(ran: dict[str, list[dict[str, Any]]]) -> None:
    (shown,) = [one for one in ran["figure"] if one["output_type"] == "execute_result"]
    assert len(shown["data"]["image/png"]) > 5000


def test_results_and_traces_show_as_tables(ran: dict[str, list[dict[str, Any]]]) -> None:
    for name in ("views", "trace"):
        assert "<table" in "".join(ran[name][-1]["data"]["text/html"])


def test_progress_comes_after_two_seconds_and_not_before(ran: dict[str, list[dict[str, Any]]]) -> None:
    said = "".join("".join(one.get("text", "")) for one in ran["progress"])
    assert "sweep: " in said
    assert re.search(r"of \d+ cells, \d+ s, about", said)
    assert ran["quick"] == []


def test_an_error_is_two_lines(ran: dict[str, list[dict[str, Any]]]) -> None:
    (error,) = [one for one in ran["error"] if one["output_type"] == "error"]
    assert error["ename"] == "PatchbayError"
    assert len(error["traceback"]) == 2
    assert "the model has layers 0..2" in error["traceback"][1]
