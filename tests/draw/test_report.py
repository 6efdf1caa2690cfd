"""Reports: a page needs nothing but itself, says what it was given, and is written whole or not at all."""

import re
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from patchbay.draw import plot, report, result_page
from patchbay.draw.report import Curve, Picture, Section, Table
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from tests.tolerance import close


class Links(HTMLParser):
    """Everything in a page that makes a browser fetch or run something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster") and not (
                value or ""
            ).startswith(("#", "data:image/")):
                self.fetched.append(f"{tag} {name}={value}")
            if name.startswith("on") or (name == "style" and "url(" in (value or "").replace("url(#", "")):
                self.fetched.append(f"{tag} {name}={value}")


def fetched(page: str) -> list[str]:
    """What the page would load or run from outside itself."""
    parser = Links()
    parser.feed(page)
    active = [tag for tag in parser.tags if tag in ("script", "iframe", "link", "img", "object", "embed", "base")]
    styles = re.findall(r"@import|url\(\s*['\"]?(?!#)[^)]*\)", page)
    return [*parser.fetched, *active, *styles]


def ablation(n_draws: int = 4) -> Result:
    return Result(
        {
            "effect": (torch.tensor([2.0, 0.5]), ("part",), "logits"),
            "low": (torch.tensor([1.5, 0.25]), ("part",), "logits"),
            "high": (torch.tensor([2.5, 0.75]), ("part",), "logits"),
            "random": (torch.linspace(-0.1, 0.1, n_draws), ("draw",), "logits"),
            "joint": (3.0, (), "logits"),
            "joint_low": (2.75, (), "logits"),
            "joint_high": (3.25, (), "logits"),
        },
        parts=["L1.H0", "L0.H2"],
    )


def heat_map() -> Result:
    return Result(torch.tensor([[0.5, -1.0], [0.25, 2.0]]), unit="logits", provenance={"method": "find.example"})


def sections() -> list[Section]:
    curve = Curve("kept", [0.0, 1.0, 2.0], [0.1, 0.5, 0.9], [0.0, 0.4, 0.8], [0.2, 0.6, 1.0])
    return [
        Section(
            "First & foremost",
            ["A **bold** claim, with <script>alert(1)</script> in it."],
            [Table(("head", "logits"), [["L0.H1", 1.23456], ["L1.H0", float("nan")]], "a table")],
            [
                Picture(partial(plot.figure, heat_map()), "a map"),
                Picture(partial(report.ablation_figure, ablation()), "bars"),
                Picture(partial(report.curves_figure, [curve], "share", chosen=2.0), "curves"),
            ],
        ),
        result_page.of_result(heat_map()),
    ]


def test_a_page_fetches_and_runs_nothing() -> None:
    page = report.page("Title", "lead", sections(), tiles=[("27 → 93 %", "moved")], foot=["made here"])
    assert fetched(page) == []
    assert page.count("<svg") == 4


@pytest.mark.parametrize(
    "foreign",
    [
        '<img src="https://example.org/x.png">',
        "<style>@import 'x.css'</style>",
        '<p style="background:url(http://example.org)">',
        "<script>1</script>",
        '<a href="http://example.org">out</a>',
    ],
)
def test_the_check_for_fetches_sees_them(foreign: str) -> None:
    assert fetched(f"<html><body>{foreign}</body></html>")


def test_a_page_says_what_it_was_given_and_escapes_it() -> None:
    page = report.page("A < B", "lead", sections(), foot=["made here"])
    assert "<h1>A &lt; B</h1>" in page
    assert "First &amp; foremost" in page
    assert "A <b>bold</b> claim, with &lt;script&gt;" in page
    assert '<td class="number">1.235</td>' in page
    assert '<td class="number">-</td>' in page
    assert "<caption>a table</caption>" in page
    assert "find.example" in page
    assert "2.00" in page  # the map's cells are written as text
    assert "made here" in page


def test_ablation_figure_draws_every_bar_and_every_draw() -> None:
    axis = report.ablation_figure(ablation(7)).axes[0]
    assert [bar.get_width() for bar in axis.containers[0]] == [3.0, 2.0, 0.5]
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    assert close(torch.tensor(dots[0].get_xdata()).float(), torch.linspace(-0.1, 0.1, 7))
    assert [text.get_text() for text in axis.get_yticklabels()] == ["together", "L1.H0", "L0.H2", "7 random draws"]


def test_curves_figure_draws_lines_bands_and_the_chosen_strength() -> None:
    curves = [Curve("a", [0.0, 1.0], [0.2, 0.4], [0.1, 0.3], [0.3, 0.5]), Curve("b", [0.0, 1.0], [0.3, 0.1])]
    axis = report.curves_figure(curves, "share", chosen=2.0).axes[0]
    assert [list(line.get_ydata()) for line in axis.lines[:2]] == [[0.2, 0.4], [0.3, 0.1]]
    assert len(axis.collections) == 1  # one band: the second curve has none
    assert [line.get_xdata()[0] for line in axis.lines[2:]] == [1, 2.0]


def test_numbers_keep_four_figures() -> None:
    cells = [1.23456, 12.3456, 1234.56, 0.0, 0.00012345, 123456.0, 7, "text", float("inf")]
    assert [report.number(cell) for cell in cells] == [
        "1.235",
        "12.35",
        "1235",
        "0.000",
        "0.000123",
        "1.23e+05",
        "7",
        "text",
        "-",
    ]


def test_write_makes_the_folder_and_replaces_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "page.html"
    assert report.write(target, "one") == target
    report.write(target, "two")
    assert target.read_text() == "two"
    assert [path.name for path in target.parent.iterdir()] == ["page.html"]


def test_a_failed_write_leaves_the_old_page_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = report.write(tmp_path / "page.html", "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(PatchbayError, match="No space left on device; nothing was written"):
        report.write(target, "new")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
