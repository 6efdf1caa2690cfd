"""Papers taken in, given out as feeds, begun, and sent, as people type it."""

from __future__ import annotations

import json
from pathlib import Path

import feedparser
import pytest
from click.testing import CliRunner, Result

from patchbay.cli import cli, feed_commands
from patchbay.papers.feed.listed import Listed
from patchbay.papers.feed.store import Store

PAGE = "Daily Papers\n\nFeb 2\n\nA title\n\nIts abstract.\n\n  • 4 authors\n·\nOct 9, 2018 12\n"


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATCHBAY_PAPERS", str(tmp_path / "data" / "papers.sqlite"))
    return tmp_path / "data" / "papers.sqlite"


def ask(*words: str) -> Result:
    return CliRunner().invoke(cli, ["papers", *words])


def test_a_saved_page_is_taken_in_once(tmp_path: Path) -> None:
    page = tmp_path / "page.txt"
    page.write_text(PAGE, encoding="utf-8")
    done = ask("sync", str(page))
    assert (done.exit_code, "1 new, 0 changed, 0 as they were" in done.stdout) == (0, True)
    told = json.loads(ask("sync", str(page), "--json").stdout)
    assert told[str(page)] == {"new": 0, "changed": 0, "same": 1}
    assert "12 likes" in ask("title", "a").stdout
    for wrong in ((), ("hugging-fase",), (str(tmp_path),)):
        assert ask("sync", *wrong).exit_code == 2


def test_days_that_were_read_whole_are_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from patchbay.papers.feed import sources

    asked: list[tuple[str, str | None]] = []

    def pages(*, day: str, place: str | None) -> object:
        asked.append((day, place))
        if len(asked) == 2:
            yield sources.Page([Listed("Half a day")], "1")
            raise KeyboardInterrupt
        yield sources.Page([Listed(f"Of {day}")], "1")

    monkeypatch.setattr(sources, "hugging_face", pages)
    monkeypatch.setattr(sources, "days", lambda since, until: iter(["2024-01-01", "2024-01-02"]))
    assert ask("sync", "hugging-face", "--since", "2024-01-01").exit_code in (1, 130)
    assert ask("sync", "hugging-face", "--since", "2024-01-01").exit_code == 0
    assert asked == [("2024-01-01", None), ("2024-01-02", None), ("2024-01-02", "1")]
    assert ask("half", "day").exit_code == 0  # what was read before the interrupt is there


def test_the_feed_is_one_that_readers_take() -> None:
    for form in ("atom", "rss"):
        assert len(feedparser.parse(ask("feed", "heads", "--form", form, "--rows", "3").stdout).entries) == 3
    assert len(json.loads(ask("feed", "--json", "--rows", "2").stdout)["items"]) == 2
    assert ask("feed", "--form", "xml").exit_code == 2


def test_a_paper_is_begun_with_its_own_title_and_key(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(store) as made:
        made.add(
            [Listed('On "gears"', arxiv="2401.00001", authors=("Jörg Müller-Zahn", "X")), Listed("No authors")], "a"
        )
        made.add([Listed("Dated", arxiv="2401.00002", authors=("Ada Lovelace",), published=None)], "a")
    written: list[tuple[object, ...]] = []
    monkeypatch.setattr(feed_commands, "write_method", lambda *given: written.append(given))
    assert ask("add", "2401.00001", "--name", "gears", "--key", "muller2024").exit_code == 0
    assert written == [("find", "gears", "muller2024", "On 'gears'", None)]
    done = ask("add", "No authors", "--name", "x")
    assert (done.exit_code, "--key" in done.stderr) == (2, True)
    done = ask("add", "olsson2022", "--name", "x")
    assert (done.exit_code, "the catalogue has it as olsson2022" in done.stderr) == (2, True)


def test_subscriptions_begin_and_end() -> None:
    token = json.loads(ask("subscribe", "a@example.org", "--weekly", "--words", "circuits", "--json").stdout)["token"]
    done = ask("digest", "--smtp", "smtp://127.0.0.1:9", "--from", "b@example.org")
    assert (done.exit_code, done.stdout) == (0, "no letter is due\n")
    assert ask("unsubscribe", token).stdout == "a@example.org gets no more letters\n"
    assert ask("unsubscribe", token).exit_code == 2
    assert ask("digest", "--smtp", "http://x", "--from", "b@example.org").exit_code == 2
