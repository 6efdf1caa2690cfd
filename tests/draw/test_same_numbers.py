"""Every kind of drawing: the numbers of a frame, a terminal, a pipe, a page, a notebook and a figure are the same."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import unescape
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import patchbay as pb
from patchbay.draw import plot, result_lines, result_page
from patchbay.results.result import Result
from tests import given
from tests.draw.test_plot import bars, curve, grid
from tests.draw.test_plot_dose import dosed
from tests.measure.words import reader
from tests.tolerance import close

NUMBER = re.compile(r"(?<![\w.#])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w%])")


def lines() -> Result:
    values = torch.tensor([[5.13, 3.27, 1.41], [5.19, 4.93, 4.87]])
    held = {"score": (values, ("condition", "n_parts"), "logits")}
    return Result(held, coords={"condition": ["chosen", "random"], "n_parts": [0, 1, 2]})


def named() -> Result:
    return Result(torch.tensor([0.137, 0.859]), ("token",), "probability", coords={"token": ["no", "yes"]})


def compared() -> Result:
    values, axes = torch.tensor([[0.0, 1.37, 2.91], [0.0, 0.53, 0.71]]), ("condition", "strength")
    held: dict[str, Any] = {"effect": (values, axes, "logits"), "low": (values - 0.21, axes, "logits"), "high": (values + 0.17, axes, "logits")}  # fmt: skip
    return Result(held, coords={"condition": ["mean", "probe"], "strength": [0.0, 1.0, 2.0]})


def metered() -> Result:
    rows = [{"good": f"a{x}", "bad": f"{x} a b", "group": "one" if x < "c" else "two"} for x in "abcdef"]
    return pb.measure.minimal_pairs(reader("characters"), rows)


def swept() -> Result:
    edits = [pb.zero(f"L{layer}.H{head}.z") for layer in (0, 1) for head in (0, 1)]
    return pb.sweep(given.lent("gpt2"), [[5, 6, 7, 8]], edits, lambda logits, prompts: logits[:, 3])


def wired() -> Result:
    return pb.find.channels(given.lent("gpt2"), nulls=5)


def explained() -> Result:
    return pb.why(given.lent("gpt2"), [11, 3, 42, 7], draws=1)


def drawn_numbers(result: Result) -> list[float]:
    """What the figure's lines, bars, images and texts hold."""
    found: list[float] = []
    for axis in plot.figure(result).axes:
        for line in axis.lines:
            found += [*map(float, np.ravel(line.get_ydata())), *map(float, np.ravel(line.get_xdata()))]
        found += [
            side
            for patch in axis.patches
            if hasattr(patch, "get_width")
            for side in (patch.get_width(), patch.get_height())
        ]
        for image in axis.images:
            found += [float(x) for x in np.ma.filled(image.get_array().astype(float), np.nan).ravel()]
        for text in axis.texts:
            found += [float(x) for x in NUMBER.findall(text.get_text())]
    return found


def written(text: str) -> list[tuple[float, float]]:
    """Numbers of a text, and half of the unit of each one's last digit."""
    found = []
    for one in NUMBER.findall(text):
        mantissa, _, power = one.partition("e")
        digits = len(mantissa.partition(".")[2])
        found.append((float(one), 0.5 * 10.0 ** (int(power or 0) - digits)))
    return found


def on_a_terminal(result: Result) -> str:
    out = io.StringIO()
    for item in result_lines.of_result(result, 50, "all"):
        Console(file=out, width=400, highlight=False).print(item)
    return out.getvalue()


def seen(page: str) -> str:
    """A page's text without its marks, and without what is no text of it."""
    page = re.sub(r"<(script|style|svg)\b.*?</\1>", " ", page, flags=re.S)
    return unescape(re.sub(r"<[^>]+>", " ", page))


FORMS: dict[str, Callable[[Result], str]] = {
    "pipe": str,
    "terminal": on_a_terminal,
    "notebook": lambda result: seen(result._repr_html_()),
    "page": lambda result: seen(result_page.page_of(result)),
}
KINDS: dict[str, Callable[[], Result]] = {
    "map": grid,
    "curve": curve,
    "lines": lines,
    "bars": bars,
    "named": named,
    "dose": dosed,
    "compare": compared,
    "meter": metered,
    "sweep": swept,
    "wiring": wired,
    "why": explained,
}


def main_numbers(kind: str, result: Result) -> list[float]:
    """What a drawing of this kind is of."""
    if kind == "dose":
        return [float(x) for x in result["effect"]]
    if kind == "sweep":
        return [float(x) for x in result["effect"]]
    if kind == "meter":
        return [float(result.values), float(result["low"]), float(result["null"])]
    found = sorted((float(x) for x in result.values.double().flatten() if x == x), key=abs)
    return found[-3:]


@pytest.fixture(scope="module")
def held() -> dict[str, Result]:
    return {kind: make() for kind, make in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_the_same_in_every_form(kind: str, held: dict[str, Result]) -> None:
    result = held[kind]
    expected = main_numbers(kind, result)
    assert expected
    assert any(expected)
    frame = result.to_dataframe().select_dtypes("number").to_numpy().ravel()
    for value in expected:
        if kind != "meter":  # whose frame has a row for each item, and its numbers beside them
            assert any(close(float(x), value, dtype=torch.float32) for x in frame if x == x), ("frame", value)
        for form, text_of in FORMS.items():
            numbers = written(text_of(result))
            assert any(abs(x - value) <= half * 1.001 and abs(x) + half >= abs(value) / 2 for x, half in numbers), (
                form,
                value,
            )
        if plot.drawable(result) and kind not in (
            "wiring",
            "why",
        ):  # circles and arrows; why has a figure in each section
            assert any(close(x, value, dtype=torch.float32) for x in drawn_numbers(result) if x == x), ("figure", value)


def test_a_form_with_other_numbers_would_be_seen(held: dict[str, Result]) -> None:
    """The check itself: twice the values are in no form of the Result."""
    for kind in ("map", "bars", "lines"):
        numbers = [pair for text_of in FORMS.values() for pair in written(text_of(held[kind]))]
        for value in main_numbers(kind, held[kind]):
            assert not any(abs(x - 2.37 * value) <= half for x, half in numbers if half < 0.05)
