"""docs/training.md names every objective, optimiser and setting as they are, its examples run, and what it names exists."""

from __future__ import annotations

import functools
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

import patchbay as pb
from patchbay.cli import cli
from patchbay.train._objectives import OBJECTIVES
from patchbay.train._optimizers import NAMES, SETTINGS
from patchbay.train._plan import Plan

PAGE = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
OPTIMIZERS = PAGE.partition("| optimizer |")[2].partition("## ")[0]


def rows(text: str) -> dict[str, list[str]]:
    """The cells of a table's rows, by the name that each begins with."""
    found = re.findall(r"^\| `([\w-]+)` \|(.+)\|$", text, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split(" | ")] for name, cells in found}


def test_every_objective_has_a_row_with_all_of_its_settings() -> None:
    table = rows(PAGE.partition("## Objectives")[2].partition("## ")[0])
    assert set(table) == set(OBJECTIVES)
    for name, form in OBJECTIVES.items():
        assert {field.name for field in fields(form)} == set(re.findall(r"`(\w+)`", table[name][1])), name


def test_help_names_every_objective() -> None:
    said = (pb.train.variant.__doc__ or "").partition("`objective`:")[2].partition("`blocks`:")[0]
    assert set(re.findall(r"[\w-]+", said)) >= set(OBJECTIVES)


def test_the_defaults_that_it_says_are_those_of_the_code() -> None:
    """A number behind a setting's name is what the setting is without."""
    table, compared = rows(PAGE), 0
    for name, form in OBJECTIVES.items():
        for field in fields(form):
            said = re.search(rf"`{field.name}`[^`,]*? ([\d./]+)(?=[,)]|$)", table[name][1])
            if said is not None and isinstance(field.default, int | float):
                assert eval(said[1]) == pytest.approx(float(field.default)), (name, field.name)
                compared += 1
    assert compared > 20


def test_every_optimizer_and_every_setting_of_a_plan_has_its_row() -> None:
    table = rows(OPTIMIZERS)
    assert set(table) == set(NAMES)
    for name in NAMES:
        settings = {field.name for field in fields(SETTINGS[name])} if name in SETTINGS else set()
        assert settings == set(re.findall(r"`(\w+)`", table[name][1])), name
    plan = PAGE.partition("## The plan")[2].partition("## ")[0]
    named = [word for row in re.findall(r"^\| (`.+?) \|", plan, re.MULTILINE) for word in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted([*(field.name for field in fields(Plan)), "dry_run"])


def test_what_it_calls_exists() -> None:
    for path in set(re.findall(r"`pb((?:\.\w+)+)", PAGE)):
        assert functools.reduce(getattr, path.strip(".").split("."), pb) is not None, path
    for line in set(re.findall(r"patchbay ((?:corpus|train|run) [\w-]+)", PAGE)):
        group: Any = cli
        for word in line.split():
            group = group.get_command(click.Context(group), word) if isinstance(group, click.Group) else group
            assert group is not None, line


@pytest.mark.slow  # six trainings
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(code, names)
    assert float(names["cost"]["seconds"]) > 0
    told = next(
        row
        for row in names["found"].tables["panel"]
        if (row["reading"], row["condition"]) == ("kl_mean", "variant - twin")
    )
    assert told["high"] < 0
    assert told["below"] == 2
    lenses = names["lenses"]
    assert float(lenses["variant-0"]["kl"].mean()) < float(lenses["twin-0"]["kl"].mean())
