"""What a notebook shows: every noun as a small table, escaped; a figure as itself; an error as the user's line and the message."""

import re

import pytest
import torch

import patchbay as pb
from patchbay.draw import report
from patchbay.signal.card import card

EVIL = "<script>alert('x')</script>"


def nouns() -> dict[str, object]:
    model = pb.load("tiny")
    task = pb.tasks.repeated_tokens(model, 2)
    return {
        "self-check": model,
        "attention head": model.layers[1].heads[2],
        "pattern": pb.Part(1, "head", 2),
        "L1.H2.z": pb.Port("attn.z", 1, 2),
        "L1.attn.z": pb.run(model, task, taps=["L1.attn.z"], edits=[pb.zero("L0.H0.z")]),
        "repeated": task,
        "scale(L0.H1.z": pb.turn.scale(["L0.H1"], 0.5),
        "part": pb.Result(torch.rand(2, 2), unit="attention"),
        "position": model.tokens("The capital"),
    }


def test_every_noun_is_a_small_table() -> None:
    for word, value in nouns().items():
        page = value._repr_html_()  # type: ignore[attr-defined]
        assert word in page, type(value)
        assert page.count("<table") == page.count("</table>") >= 1, type(value)
        assert "<script" not in page
        assert len(page) < 20_000


def test_all_text_is_escaped() -> None:
    knob = pb.Knob(EVIL, [pb.scale("L0.H1.z", 1.0)], 0.5, provenance={"method": EVIL})
    result = pb.Result(torch.rand(2, 2), unit=EVIL, notes=[EVIL], provenance={"method": EVIL})
    for value in (knob, result):
        assert "<script" not in value._repr_html_()
    assert card(EVIL, [[EVIL, EVIL]], columns=(EVIL, EVIL), below=EVIL).count("&lt;script") == 6


def test_figures_show_themselves() -> None:
    drawn = pb.Result(torch.rand(2, 2), unit="attention").plot()
    assert drawn._repr_png_().startswith(bytes([137, 80, 78, 71, 13, 10, 26, 10]))  # type: ignore[union-attr]
    drawn = report.curves_figure([report.Curve("a", [0, 1], [0, 1])], "y")
    assert drawn._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


def test_a_users_error_is_two_lines() -> None:
    def ask() -> None:
        pb.zero("L0.H1")

    with pytest.raises(pb.PatchbayError) as caught:
        ask()
    lines = caught.value._render_traceback_()
    assert len(lines) == 2
    assert re.fullmatch(r"line \d+: pb.zero\(\"L0.H1\"\)", lines[0])
    assert lines[1].startswith("PatchbayError: 'L0.H1' is not a port")
