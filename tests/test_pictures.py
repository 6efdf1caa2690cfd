"""The HTML forms as a headless Chromium shows them: nothing is wider than a narrow window, and dark is dark. Skipped where there is none."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import patchbay as pb
from patchbay.draw import result_page
from patchbay.results.result import Result

ROOT = Path(__file__).parents[1]
MOST = 60_000  # bytes of a picture in docs/


def hook() -> Any:
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pictures = hook()
needs_chromium = pytest.mark.skipif(pictures.chromium() is None, reason="no Chromium here (apt-get install chromium)")


def page() -> str:
    """A page with long words, a wide table, a map and a figure."""
    model = pb.load("tiny")
    return str(
        result_page.page_of(pb.find.logit_lens(model, "The capital of Lolavia is Grerum. The capital of Lolavia is"))
    )


def notebook() -> str:
    model = pb.load("tiny")
    shown = (
        model,
        model.layers[1].heads[3],
        pb.find.logit_lens(model, "The capital of Lolavia is"),
        model.card("L1.N5"),
    )
    return str(
        pictures.NOTEBOOK.replace("%s", "".join(f'<div class="cell">{one._repr_html_()}</div>' for one in shown))
    )


def width_in(html: str, window: int, folder: Path) -> int:
    """How wide the document is in a window, as its own layout says."""
    path = folder / "page.html"
    asks = f'<iframe id="f" style="border:0" width="{window}" height="900" srcdoc=""></iframe><script>const f=document.getElementById("f");f.onload=()=>{{document.title="W"+f.contentDocument.documentElement.scrollWidth}};f.srcdoc=SRC</script>'
    import json

    path.write_text(
        "<!doctype html><body>" + asks.replace("SRC", json.dumps(html).replace("</", "<\\/")), encoding="utf-8"
    )
    told = subprocess.run(
        [pictures.chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile", "--virtual-time-budget=3000",
         "--dump-dom", path.as_uri()], check=True, capture_output=True, timeout=120, text=True,
    ).stdout  # fmt: skip
    found = re.search(r"<title>W(\d+)</title>", told)
    assert found is not None, told[:300]
    return int(found[1])


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("make", [page, notebook])
def test_nothing_is_wider_than_a_narrow_window(make: Callable[[], str], tmp_path: Path) -> None:
    html = make()
    assert width_in(html, 320, tmp_path) <= 320
    assert width_in(html.replace("</body>", '<div style="width:900px">x</div></body>'), 320, tmp_path) >= 900, (
        "the test sees what is too wide"
    )


@needs_chromium
@pytest.mark.slow
def test_dark_is_dark_and_the_picture_is_cut_below_what_is_shown(tmp_path: Path) -> None:
    from PIL import Image

    html, grounds = result_page.page_of(Result([1.0, 2.0], ("layer",), "logits")), []
    for dark in (False, True):
        image = Image.open(pictures.picture(html, tmp_path / "page.png", width=500, dark=dark)).convert("L")
        grounds.append(image.getpixel((1, 1)))
        assert image.size[0] == 500
        assert 200 < image.size[1] < pictures.TALL
    assert grounds[0] > 230
    assert grounds[1] < 40


def test_the_pictures_of_the_docs_are_small_and_shown_somewhere() -> None:
    files = sorted((ROOT / "docs" / "pictures").glob("*.png"))
    assert {path.stem for path in files} == {*pictures.SHOWN, *pictures.PAGE}
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    for path in files:
        assert path.stat().st_size < MOST, path.name
        assert f"pictures/{path.name}" in text
