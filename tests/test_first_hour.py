"""docs/first-hour.md runs from top to bottom, its commands too, narrow and without colour."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import patchbay as pb
from patchbay.cli import cli
from tests.tolerance import close

PAGE = (Path(__file__).parents[1] / "docs" / "first-hour.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = re.findall(r"^    (patchbay .*)$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder, names = tmp_path_factory.mktemp("hour"), dict[str, Any]()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for code in BLOCKS:
            exec(code, names)
    return folder, names


def test_each_job_is_of_ten_lines_or_fewer() -> None:
    lines = [[line for line in code.splitlines() if line.strip()] for code in BLOCKS]
    assert len(lines) >= 8
    assert max(map(len, lines)) <= 10


def test_the_jobs_give_what_they_say(ran: tuple[Path, dict[str, Any]]) -> None:
    folder, held = ran
    model, answer = held["model"], held["answer"]
    assert answer.tables["tokens"][0]["token"] in (" Grerum", "' Grerum'", "' is'", "' Lolavia'")
    logits = pb.run(model, held["prompt"]).last_logits[0]
    assert close(held["lens"]["answer_probability"][-1, -1], logits.softmax(-1)[model.token_id(" Budurg")])
    assert (folder / "lens.png").stat().st_size > 1000
    assert "in the weights" in str(held["card"])
    patched = held["patched"]
    assert patched["p"].isnan().all()
    assert "p_adjusted" not in str(patched)
    assert torch.isfinite(patched["effect"]).all()
    whole = pb.run(model, held["mine"], edits=[held["heads"][0]]).last_logits[:, model.token_id(" Budurg")]
    assert close(held["swept"]["value"][0], whole, noise=256)
    assert pb.load_knob(folder / "careful.knob").edits[0].where is not None
    rows = torch.cat(list(pb.load_trace(folder / "traces").shards("L2.resid_out")))
    assert len(rows) == sum(len(ids) for ids in model.encode(held["texts"]))
    changed = pb.diff(held["after"], held["before"])
    assert str(changed.top(1, by="abs")[0]) == "L1.H1"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_run_narrow_and_without_colour(
    command: str, ran: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = ran
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "46")
    told = CliRunner().invoke(cli, shlex.split(command)[1:], prog_name="patchbay")
    assert told.exit_code == 0, told.output
    assert "\x1b[" not in told.output
