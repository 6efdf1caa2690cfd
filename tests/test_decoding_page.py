"""docs/decoding.md runs from top to bottom, and its numbers bear out what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = (Path(__file__).parents[1] / "docs" / "decoding.md").read_text(encoding="utf-8")


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(code, names)
    assert "likeness of the references to themselves" in capsys.readouterr().out
    assert torch.equal(names["fast"]["tokens"], names["plain"]["tokens"])
    assert float(names["fast"]["per_pass"].mean()) > 1
    assert len(names["parts"]["loss"]) == 7
    assert (tmp_path / "store" / "trace.json").is_file()
