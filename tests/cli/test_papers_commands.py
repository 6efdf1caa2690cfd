"""`patchbay papers` as people type it: words, one paper, days, marks."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

import patchbay as pb
from patchbay.cli import cli
from patchbay.papers.feed.listed import Listed
from patchbay.papers.feed.store import Store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's store with three papers."""
    file = tmp_path / "papers.sqlite"
    monkeypatch.setenv("PATCHBAY_PAPERS", str(file))
    with Store(file) as made:
        made.add(
            [
                Listed("A paper of today [bold]", "About gears.", "2401.00001", published=date(2024, 1, 31), likes=4),
                Listed("Another", "About gears and cogs.", "2401.00002", published=date(2024, 2, 1), likes=40),
                Listed(
                    "In-context Learning and Induction Heads", "An abstract.", "2209.11895", published=date(2022, 9, 24)
                ),
            ],
            "a",
        )
    return file


def ask(*words: str) -> Result:
    return CliRunner().invoke(cli, ["papers", *words])


def rows(*words: str) -> list[dict[str, object]]:
    done = ask(*words, "--json")
    assert done.exit_code == 0, done.output
    return list(json.loads(done.stdout))


def test_words_are_searched_for_and_commands_are_commands(store: Path) -> None:
    assert {row["arxiv"] for row in rows("gears")} == {"2401.00001", "2401.00002"}
    assert [row["arxiv"] for row in rows("gears", "cogs")] == ["2401.00002"]
    assert [row["key"] for row in rows("search", "talking", "heads")] == ["merullo2024"]
    assert ask("zebra", "knob").exit_code == 2
    assert "[bold]" in ask("today").stdout  # a title is text
    assert len(rows()) > 100  # the catalogue


def test_without_a_store_the_catalogue_is_there_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "none" / "papers.sqlite"
    monkeypatch.setenv("PATCHBAY_PAPERS", str(file))
    assert rows("induction", "heads")[0]["key"] == "olsson2022"
    assert not file.parent.exists()
    done = ask("sink", "--store", str(file))
    assert done.exit_code == 2
    assert "papers sync" in done.stderr


def test_one_paper_is_shown_with_its_entry_and_its_abstract(store: Path) -> None:
    for name in ("olsson2022", "2209.11895"):
        told = ask("show", name).stdout
        assert "find.induction_heads" in told
        assert "An abstract." in told
    assert "papers add" in ask("show", "2401.00001").stdout
    done = ask("show", "olson2022")
    assert (done.exit_code, "olsson2022" in done.stderr) == (2, True)
    assert ask("show").exit_code == 2


def test_days_and_what_is_liked(store: Path) -> None:
    assert [row["arxiv"] for row in rows("list", "--month", "2024-01")] == ["2401.00001"]
    assert [row["arxiv"] for row in rows("list", "--week", "2024-02-01")] == ["2401.00002", "2401.00001"]
    said = ask("list", "--day", "2024-01-31").stdout
    assert "earlier: --day 2022-09-24" in said
    assert "later: --day 2024-02-01" in said
    assert [row["arxiv"] for row in rows("list", "--trending")] == ["2401.00002", "2401.00001"]
    for wrong in ((), ("--day", "2024-01-31", "--trending"), ("--day", "31.1.2024")):
        assert ask("list", *wrong).exit_code == 2


def test_marks_stay(store: Path) -> None:
    assert ask("mark", "2401.00001", "olsson2022").exit_code == 0
    assert {row["arxiv"] for row in rows("search", "--marked")} == {"2401.00001", "2209.11895"}
    ask("mark", "olsson2022", "--off")
    assert [row["arxiv"] for row in rows("--marked")] == ["2401.00001"]
    assert rows("similar", "2401.00001")[0]["arxiv"] == "2401.00002"


def test_a_claim_that_is_none_is_refused(store: Path) -> None:
    assert ask("run", "agerri2022").exit_code == 2
    assert ask("run", "no2022").exit_code == 2


def test_a_verdict_is_kept_beside_its_paper_where_there_is_a_store(
    store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Checked:
        verdict, kind, first = "confirmed", "mechanism", SimpleNamespace(text="heads look back")

        def told(self) -> list[str]:
            return ["  model, seed 0: 0.5"]

    monkeypatch.setattr("patchbay.papers.claims.check", lambda *_, **__: Checked())
    assert ask("run", "olsson2022").exit_code == 0
    (kept,) = json.loads(ask("show", "olsson2022", "--json").output)["verdicts"]
    assert (kept["model"], kept["verdict"]) == ("tiny", "confirmed")
    assert kept["told"] == "confirmed: heads look back\nmodel, seed 0: 0.5"
    assert kept["weights"] == pb.load("tiny").fingerprint[:16]
    assert f"checked on tiny ({kept['weights']})" in ask("show", "olsson2022").output
    monkeypatch.setenv("PATCHBAY_PAPERS", str(tmp_path / "none.sqlite"))
    assert ask("run", "olsson2022").exit_code == 0
    assert not (tmp_path / "none.sqlite").exists(), "a check alone makes no store"
