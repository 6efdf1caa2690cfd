"""docs/features.md runs from top to bottom, and its numbers bear out what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import patchbay as pb

PAGE = (Path(__file__).parents[1] / "docs" / "features.md").read_text(encoding="utf-8")


@pytest.mark.slow  # two trainings
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(code, names)
    assert float(names["trained"]["value"]) < 0.5 < float(names["trained"]["null"])
    assert tuple(names["acts"].shape[2:]) == (128,)
    assert float(names["meter"]["value"]) < 0.3
    assert float(names["exact"]["effect"].mean()) < 0
    assert float(names["proof"]["difference"]) > 0
    assert float(names["less"]) < float(names["plain"])
    with pytest.raises(pb.PatchbayError), names["model"].edited(names["knob"]):
        pb.run(names["model"], names["task"])
    assert float(names["graph"]["sum_error"].max()) < 1e-4
    assert float(names["without"]["p"]) < 0.05
    assert pb.load_result("graph.json").tables["edges"]
