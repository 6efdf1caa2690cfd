"""A saved file holds everything, fetches nothing, and nothing that a Result says can become script. The built files are those of their sources."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import patchbay as pb
from patchbay.app.document import document
from patchbay.app.saved_page import STATIC, saved_page
from patchbay.errors import PatchbayError
from patchbay.results.result import Result

WEB = Path(__file__).parents[2] / "web"
HOSTILE = "</script><script>alert(1)</script><!-- \u2028 <img src=x onerror=alert(2)>"


def hostile() -> Result:
    return Result(
        {"score": ([1.0, 2.0], ("position",), "logits")},
        coords={"position": [HOSTILE, "b"]},
        tables={HOSTILE: [{HOSTILE: HOSTILE}]},
        notes=[HOSTILE],
        provenance={"method": HOSTILE, "model": {"source": HOSTILE}},
    )


def test_what_a_result_says_cannot_end_the_script() -> None:
    page = saved_page(hostile(), name=HOSTILE)
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    held = re.search(r'<script type="application/json" id="patchbay-data">(.*?)</script>', page, re.DOTALL)
    assert held is not None
    assert json.loads(held[1]) == json.loads(json.dumps(document(hostile(), name=HOSTILE)))


def test_the_policy_lets_in_what_stands_in_the_file_and_nothing_else() -> None:
    page = saved_page(hostile())
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'")
    for tag, rule in (('script type="module"', "script-src"), ("style", "style-src")):
        text = re.search(rf"<{tag}>(.*?)</{tag.split()[0]}>", page, re.DOTALL)
        assert text is not None
        digest = base64.b64encode(hashlib.sha256(text[1].encode()).digest()).decode()
        assert f"{rule} 'sha256-{digest}'" in policy[1]
    assert "unsafe" not in policy[1]


def test_the_front_end_names_no_other_host_and_is_small() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in STATIC.iterdir()}
    assert set(texts) == {"index.html", "patchbay.js", "patchbay.css", "icon.svg", "sources.sha256"}
    for name, text in texts.items():
        hosts = set(re.findall(r"https?://[\w.-]+", text)) - {"http://www.w3.org"}
        assert not hosts, name
        assert "eval(" not in text
        assert "innerHTML =" not in text.replace("dangerouslySetInnerHTML", "") or name == "patchbay.js"
    assert len(gzip.compress((texts["patchbay.js"] + texts["patchbay.css"]).encode())) < 150_000


def test_a_file_is_written_whole_and_replaces_nothing(tmp_path: Path) -> None:
    result = Result([1.0], ("layer",))
    path = result.save_html(tmp_path / "new" / "x.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(PatchbayError, match="already there"):
        result.save_html(path)
    result.save_html(path, overwrite=True)
    with pytest.raises(PatchbayError, match="suffix is .html"):
        result.save_html(tmp_path / "x.txt")


def test_a_notebooks_view_holds_the_document(trained: pb.Model) -> None:
    anywidget = pytest.importorskip("anywidget")
    result = pb.find.logit_lens(trained, "The capital")
    made = result.view()
    assert isinstance(made, anywidget.AnyWidget)
    assert json.loads(made.document) == json.loads(json.dumps(document(result)))


def test_the_built_files_are_those_of_the_sources() -> None:
    """`npm run build` in web/ makes them; the digest stands beside them."""
    made = hashlib.sha256()
    names = [
        "package.json",
        "tsconfig.json",
        "vite.config.ts",
        *sorted(f"src/{path.name}" for path in (WEB / "src").iterdir()),
    ]
    for name in names:
        made.update(f"{name}\n".encode() + (WEB / name).read_bytes())
    assert (STATIC / "sources.sha256").read_text().strip() == made.hexdigest(), "run `npm run build` in web/"


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("npm") is None or not (WEB / "node_modules").is_dir(),
    reason="no npm, or no web/node_modules (npm install)",
)
def test_building_again_gives_the_same_files(tmp_path: Path) -> None:
    subprocess.run(["npm", "run", "check"], cwd=WEB, check=True, capture_output=True)
    subprocess.run(
        ["npx", "vite", "build", "--outDir", str(tmp_path), "--emptyOutDir"], cwd=WEB, check=True, capture_output=True
    )
    for name in ("patchbay.js", "patchbay.css", "sources.sha256"):
        assert (tmp_path / name).read_bytes() == (STATIC / name).read_bytes()
