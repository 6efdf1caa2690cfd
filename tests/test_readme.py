"""The README's example prints what the README says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_example_prints_what_the_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    [expected] = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    out, names = io.StringIO(), {}
    with contextlib.redirect_stdout(out):
        exec(code[0], names)
    assert out.getvalue() == expected
    exec(code[1], names)
    assert names["table"].axes == ("edit", "prompt")


def test_its_picture_and_pages_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert links
    assert not [link for link in links if not (Path(__file__).parents[1] / link).exists()]
