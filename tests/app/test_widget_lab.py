"""The view of a Result in a real JupyterLab, in Chromium: the last line of a cell is the same picture as on the page, with the Result's numbers.

`jupyter-lab` is looked for on the path, or where PATCHBAY_JUPYTERLAB says; without it, or without Chromium, the test is skipped. Its kernel
must find torch and anywidget: `python -m venv lab && lab/bin/pip install jupyterlab`, and the site-packages of this environment in a
.pth file of that one. PATCHBAY_SCREENSHOTS names a folder for pictures of what was seen.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import patchbay as pb

LAB = os.environ.get("PATCHBAY_JUPYTERLAB") or shutil.which("jupyter-lab")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here (pip install playwright)")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(LAB is None, reason="no jupyter-lab here (on the path, or by PATCHBAY_JUPYTERLAB)"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)"),
]
TOKEN = "a-token-of-the-tests"
CELL = """import patchbay as pb
model = pb.load("tiny")
found = pb.find.direct_logit_attribution(model, pb.tasks.facts_in_context(model, n=6))
found.view()"""
WAIT = 150_000  # milliseconds, on a machine that does other work


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """A JupyterLab with one notebook of one cell; its address."""
    cell = {"cell_type": "code", "metadata": {}, "source": CELL, "outputs": [], "execution_count": None, "id": "one"}
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    (tmp_path / "n.ipynb").write_text(
        json.dumps({"cells": [cell], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5})
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = {name: str(tmp_path / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
    home["JUPYTER_PATH"] = str(
        Path(sys.prefix) / "share" / "jupyter"
    )  # where this environment has anywidget's half of the page
    env = os.environ | {"PYTHONPATH": str(Path(pb.__file__).parents[1]), "HF_HUB_OFFLINE": "1"} | home
    words = [str(LAB), "--no-browser", f"--port={port}", "--ip=127.0.0.1", f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={tmp_path}", "--allow-root", "--LabApp.news_url="]  # fmt: skip
    run = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while time.monotonic() < until and run.poll() is None:
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.3)
    yield f"http://127.0.0.1:{port}"
    run.terminate()
    run.wait(60)


def test_a_result_in_a_cell_of_jupyterlab_is_the_views_own_picture(lab: str, tmp_path: Path) -> None:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(WAIT)
        asked: list[str] = []
        faults: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(f"{lab}/lab/tree/n.ipynb?token={TOKEN}")
        page.wait_for_selector("text=Python 3 (ipykernel) | Idle")  # what is run before there is a kernel is lost
        page.locator(".jp-Notebook .jp-Cell .cm-content").first.click()
        page.keyboard.press("Control+Enter")
        try:
            page.wait_for_selector(".jp-OutputArea .pb .heat canvas")
        finally:
            _pictured(page, "lab-first")
        model = pb.load("tiny")
        result = pb.find.direct_logit_attribution(model, pb.tasks.facts_in_context(model, n=6))
        page.focus(".pb .heat-scroll")
        page.keyboard.press("ArrowRight")
        told = page.inner_text(".pb .heat .readout").replace("\u2212", "-")
        assert told.startswith(f"{float(result.values[2, 1]):.3f}"[:5]), told
        assert "layer L2 · head H1" in told
        names = [name for name in page.locator(".pb .bar-name").all_inner_texts() if name]  # the axis has none
        strongest = sorted(result.top(24, by="abs"), key=lambda part: -float(result.values[part.layer, part.index]))
        assert names == [str(part) for part in strongest]
        _pictured(page, "lab-light")
        page.evaluate("document.body.dataset.jpThemeLight = 'false'")
        page.wait_for_selector(".pb-cell[data-dark=true]")
        _pictured(page, "lab-dark")
        browser.close()
    assert not [url for url in asked if not re.match(rf"{lab}|ws://127|data:|blob:", url)], "somebody else was asked"
    assert not [fault for fault in faults if "patchbay" in fault.lower() or "preact" in fault.lower()]


def _pictured(page: Any, name: str) -> None:
    if folder := os.environ.get("PATCHBAY_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"))
