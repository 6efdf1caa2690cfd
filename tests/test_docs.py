"""The site: every method and option has its words, what pages name exists, and built pages take nothing from outside."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import patchbay as pb

ROOT = Path(__file__).parents[1]


def hook():
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_has_a_page_with_a_word_for_every_option() -> None:
    pages = hook()
    made = pages.pages()
    exported = {f"methods/{verb}.{name}.md" for verb in pages.VERBS for name in getattr(pb, verb).__all__}
    assert {path for path in made if path.startswith("methods/")} == {*exported, "methods/index.md"}
    for path in exported:
        options = made[path].split("## Options")[1].split("|---|---|---|")[1].strip().splitlines()
        without = [row for row in options if row.count("| needed |") == 0 and row.rstrip().endswith("|  |")]
        assert options, path
        assert not without, (path, without)


def test_the_api_page_has_every_public_name() -> None:
    text = hook().api_page()
    assert re.findall(r"^## pb\.(\w+)$", text, re.MULTILINE) == pb.__all__


def test_what_the_question_page_names_exists() -> None:
    text = (ROOT / "docs" / "which-tool.md").read_text()
    calls = re.findall(r"`pb\.(find|prove|turn|train|measure)\.(\w+)\(", text)
    typed = re.findall(r"`patchbay (find|prove|turn|train|measure) ([\w-]+)", text)
    known = set(hook().methods())
    assert len(calls) >= 20
    assert [(verb, name.replace("-", "_")) for verb, name in typed] == calls
    assert set(calls) <= known


@pytest.mark.slow
def test_built_pages_take_nothing_from_outside(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is in the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(tmp_path), "-f", str(ROOT / "mkdocs.yml")]
    subprocess.run(command, check=True, timeout=300)
    built = list(tmp_path.rglob("*.html"))
    assert len(built) > 50
    for page in built:
        taken = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=[\"']?([^\"' >]+)", page.read_text())
        assert taken
        assert not [address for address in taken if re.match(r"(?:https?:)?//", address)], page
    for sheet in tmp_path.rglob("*.css"):
        assert not re.findall(r"(?:@import\s+|url\(\s*)[\"']?(?:https?:)?//", sheet.read_text()), sheet
