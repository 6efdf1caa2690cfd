"""maps: every cell of a two-axis Result is shown, with one number, on a terminal, in a pipe, in HTML and in a figure."""

import html
import io
import re

import pytest
import torch
from rich.console import Console

from patchbay.draw import plot, result_lines, result_page
from patchbay.results import maps
from patchbay.results.letters import wide
from patchbay.results.result import Result

CELLS = torch.tensor([[0.125, -2.0, float("nan")], [0.9, 0.1, -0.3]], dtype=torch.float64)
EVIL = "<img src=x onerror=alert(1)>"


def lens(cells=CELLS, **more):
    n, m = cells.shape
    return Result(
        cells, ("layer", "position"), "logits", name="effect",
        coords={"layer": [f"L{i}" for i in range(n)], "position": list(range(-m, 0))},
        provenance={"method": "find.logit_lens", "model": {"source": "tiny"}}, **more,
    )  # fmt: skip


def words(text):
    """Numbers as they are written, in order."""
    return re.findall(r"(?<![\w.])-?\d+\.\d+(?!\w)", text)


def on_screen(result, width, **options):
    out = io.StringIO()
    for item in result_lines.of_result(result, 10):
        Console(file=out, width=width, highlight=False, **options).print(item)
    return out.getvalue()


def table_cells(page):
    inside = re.search(r'<table class="map">.*?</table>', page, re.S)[0]
    return [
        [html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in inside.split("</tr>")[1:-1]
    ]


def test_the_numbers_are_the_same_in_a_frame_a_terminal_a_pipe_a_page_and_a_figure():
    result = lens()
    frame = result.to_dataframe().set_index(["layer", "position"])["effect"]
    expected = [
        [f"{frame[f'L{i}', at]:.2f}" if frame[f"L{i}", at] == frame[f"L{i}", at] else "" for at in (-3, -2, -1)]
        for i in (0, 1)
    ]
    assert expected == [["0.12", "-2.00", ""], ["0.90", "0.10", "-0.30"]]
    assert table_cells(result._repr_html_()) == expected
    assert table_cells(result_page.page_of(result)) == expected
    rows = [line for line in str(result).splitlines() if re.match(r"\s+L\d ", line)]
    assert [words(row) for row in rows] == [[cell for cell in row if cell] for row in expected]
    shown = [line for line in on_screen(result, 100).splitlines() if re.match(r"\s+L\d ", line)]
    assert [words(row) for row in shown] == [words(row) for row in rows]
    written = sorted(text.get_text() for text in plot.figure(result).axes[0].texts if words(text.get_text()))
    assert written == sorted(cell for row in expected for cell in row if cell)


def test_colours_are_on_a_terminal_alone_and_not_under_no_color(monkeypatch):
    assert "\x1b[" in on_screen(lens(), 80, force_terminal=True, color_system="truecolor")
    assert "\x1b[" not in on_screen(lens(), 80)
    monkeypatch.setenv("NO_COLOR", "1")
    coloured = on_screen(lens(), 80, force_terminal=True, color_system="truecolor")
    assert not re.search(r"\x1b\[[0-9;]*[34]8;", coloured)  # neither ink nor ground


def test_signed_cells_are_red_white_blue_and_no_value_is_grey():
    drawn = maps.map_of(lens())
    assert drawn.colour(-2.0) == maps.RED
    assert drawn.colour(0.0) == maps.WHITE
    assert drawn.colour(2.0) == maps.BLUE
    assert drawn.colour(float("nan")) == maps.GREY
    positive = maps.map_of(lens(torch.tensor([[5.0, 6.0]])))
    assert positive.colour(5.0) == maps.WHITE  # from the lowest on, where nothing is near 0
    assert positive.colour(6.0) == maps.BLUE


@pytest.mark.parametrize("width", [1, 20, 40, 118])
def test_columns_that_do_not_fit_stand_below_and_none_is_lost(width):
    values = torch.arange(60.0).reshape(2, 30) / 7
    drawn = maps.map_of(lens(values))
    lines = maps.lines(drawn, width)
    least = (
        max(wide(name) for name in [*drawn.rows, drawn.axes[0]]) + 2 + max(wide(t) for row in drawn.texts for t in row)
    )
    assert all(wide(line) <= max(width, least) for line in lines)
    found = {
        name: [n for line in lines if line.startswith(f"{name} ") for n in line.split()[1:]] for name in drawn.rows
    }
    assert found == dict(zip(drawn.rows, drawn.texts, strict=True))


def test_positions_carry_their_tokens_and_cells_their_names():
    result = lens(tables={
        "tokens": [{"position": -3, "token": " The"}, {"position": -1, "token": "\u4e2d"}],
        "cells": [{"layer": "L1", "position": -3, "text": " cat"}],
    })  # fmt: skip
    drawn = maps.map_of(result)
    assert drawn.columns == ["-3 \u2423The", "-2", "-1 \u4e2d"]
    assert drawn.texts[1][0] == "\u2423cat 0.90"
    labels = [label.get_text() for label in plot.figure(result).axes[0].get_xticklabels()]
    assert labels == ["-3  The", "-2", "-1 \u4e2d"]
    assert wide("\u4e2d") == 2
    assert (
        len({wide(line) for line in maps.lines(drawn)[:1] + [x.ljust(0) for x in maps.lines(drawn)[2:]]}) == 1
    )  # ends align


def test_a_grid_of_heads_is_ranked_and_its_map_stands_below():
    result = Result(torch.tensor([[0.5, 0.25], [0.125, 0.75]]), unit="attention")
    shown = on_screen(result, 100)
    assert shown.index("L1.H1") < shown.index("layer    H0")
    row = next(line for line in shown.splitlines() if line.strip().startswith("L0 "))
    assert row.split() == ["L0", "0.500", "0.250"]


def test_what_is_too_large_or_has_more_axes_names_its_largest_cells():
    values = torch.zeros(2, 3, 4)
    values[1, 2, 0], values[0, 1, 3] = -9.0, 4.0
    result = Result(values, ("layer", "position", "prompt"), "logits", coords={"position": ["a", "b", "c"]})
    lines = [line.split() for line in str(result).splitlines()]
    assert ["-9.000", "layer", "L1,", "position", "c,", "prompt", "0"] in lines
    assert ["4.000", "layer", "L0,", "position", "b,", "prompt", "3"] in lines
    big = Result(torch.arange(3200.0).reshape(2, 1600), ("layer", "position"), "logits")
    assert "the 10 largest of 3200 cells" in str(big)
    assert "layer L1, position 1599" in str(big)


def test_a_page_of_a_result_escapes_everything_and_holds_what_it_holds():
    result = Result(
        torch.tensor([1.0, -2.0]), ("part",), EVIL, parts=["L0.H1", "L1.mlp"], notes=[EVIL], name="effect",
        tables={"words": [{"part": "L0.H1", "text": EVIL}]},
        provenance={"method": EVIL, "model": {"source": EVIL}, "task": {"name": EVIL, "clean": [[1], [2]]}, "options": {"a": EVIL}},
    )  # fmt: skip
    page = result_page.page_of(result)
    assert "<img" not in page.split("</style>")[1]
    assert html.escape(EVIL) in page
    assert "L1.mlp" in page
    assert "-2.000" in page
    assert "task prompts" in page


def test_words_that_name_parts_are_a_column():
    named = Result(torch.tensor([[0.25, 0.75]]), ("layer", "neuron"), "logits",
                   tables={"names": [{"part": "L0.N1", "tokens": [" cat", "\n"]}]})  # fmt: skip
    assert named.columns == ["rank", "part", "value", "tokens"]
    assert named.table(1)[0] | {"part": "L0.N1"} == {
        "rank": 1,
        "part": "L0.N1",
        "value": 0.75,
        "tokens": "\u2423cat \\n",
    }
    assert list(named.to_dataframe()["tokens"]) == ["\u2423cat \\n", ""]
    assert "\u2423cat" in str(named)
    assert "\u2423cat" in on_screen(named, 100)


def table_rows(shown, names):
    return [line.split() for line in shown.splitlines() if line.split()[1:2] and line.split()[1] in names]


def test_bars_carry_signs_and_the_strongest_come_first_by_size():
    result = Result(torch.tensor([[0.5, -2.0], [0.25, -0.125]]), unit="logits")
    rows = table_rows(on_screen(result, 100), {"L0.H0", "L0.H1", "L1.H0", "L1.H1"})
    assert [row[1] for row in rows] == ["L0.H1", "L0.H0", "L1.H0", "L1.H1"]
    assert [row[-1][0] for row in rows] == ["-", "+", "+", "-"]
    assert "largest first, either sign" in on_screen(result, 100)
    assert result.top(1)[0].index == 0  # what is chosen stays by value
    plain = table_rows(on_screen(Result(torch.tensor([[0.5, 0.25]]), unit="share"), 100), {"L0.H0"})
    assert plain[0][-1][0] == "\u2588"


def test_six_columns_are_shown_and_the_others_named():
    grid = ("layer", "head")
    names = ["score", "low", "high", "p", "p_adjusted", "null_mean", "standard_error"]
    result = Result({name: (torch.rand(2, 2), grid, "logits") for name in names})
    shown = on_screen(result, 120)
    header = next(line for line in shown.splitlines() if "rank" in line)
    assert header.split() == ["rank", "part", "value", "low", "p_adjusted"]
    assert "--columns all: high, p, null_mean, standard_error" in " ".join(shown.split())
    out = io.StringIO()
    Console(file=out, width=200).print(result_lines.of_result(result, 10, "all")[0])
    assert all(name in out.getvalue() for name in names[1:])


def test_bars_of_many_named_steps_are_the_strongest_and_say_of_how_many():
    values = torch.arange(60.0) - 40
    result = Result(
        values, ("edit",), "logits", coords={"edit": [f"L{i}.H1 -> L9.H2.query, a long name" for i in range(60)]}
    )
    axis = plot.figure(result).axes[0]
    assert "strongest 24 of 60" in axis.get_xlabel()
    assert min(bar.get_width() for bar in axis.patches) == -40
    assert axis.get_yticklabels()[-1].get_text() == "L0.H1 -> L9.H2.query, a long name"  # not cut where there is room
