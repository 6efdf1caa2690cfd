"""The notebooks of docs/ run from top to bottom in an empty folder, and make what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tolerance import close

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def run(name: str) -> dict[str, Any]:
        names: dict[str, Any] = {}
        cells = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
        for cell in cells:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
        return names

    return run


def test_patching_map(told, tmp_path: Path) -> None:
    names = told("patching-map")
    assert abs(float(names["last"]) - 1) < 0.1
    assert names["found"].values[0, names["found"].coords["position"].index("last")] < 0.1
    assert (tmp_path / "patching-map.png").stat().st_size > 1000


def test_lens(told, tmp_path: Path) -> None:
    nats = told("lens")["divergence"]
    assert close(float(nats[-1]), 0.0, of=1.0)
    assert float(nats[0]) > 1
    assert (tmp_path / "lens.png").stat().st_size > 1000


def test_my_own_csv(told, tmp_path: Path) -> None:
    names = told("my-own-csv")
    assert (tmp_path / "mine.csv").read_text().startswith("prompt,right,wrong")
    assert [tuple(ids) for ids in names["task"].clean] == [tuple(ids) for ids in names["made"].clean]
    assert tuple(names["task"].right) == tuple(names["made"].right)
    assert len(names["heads"].top(3)) == 3


def test_two_checkpoints(told) -> None:
    names = told("two-checkpoints")
    first = {str(row["part"]): row["value"] for row in names["first"].table()}
    assert names["off"] == 0
    assert abs(first["L1.H1"]) > 0.01
    assert names["before"].fingerprint != names["after"].fingerprint


def test_steer_measure_ship(told, tmp_path: Path) -> None:
    names = told("steer-measure-ship")
    assert names["effect"][0] == 0
    assert names["effect"][1] != 0
    assert names["difference"] < 1e-3
    assert (tmp_path / "steer.knob").is_file()
    plain = names["pb"].run(names["model"], [names["prompt"]], logits="last").last_logits
    assert float((plain - names["alone"]).abs().max()) > 0.01


def test_every_notebook_is_run_here() -> None:
    tested = {name[5:].replace("_", "-") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in FOLDER.glob("*.ipynb")} <= tested
