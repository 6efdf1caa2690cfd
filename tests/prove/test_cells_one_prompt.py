"""One prompt: its effect and the random parts' range are said; no interval, no p over prompts, and no warning about their lack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.draw import report, result_lines
from patchbay.tiny.twins import twin

PAIR = pb.Task(
    name="pair", clean=((5, 17, 8, 5, 30, 9),), right=(22,), wrong=((17,),), corrupted=((5, 22, 8, 5, 30, 9),)
)
CALLS: dict[str, Callable[[pb.Model, pb.Task], pb.Result]] = {
    "activation_patching": lambda m, t: pb.prove.activation_patching(m, t, site="head"),
    "activation_patching by position": lambda m, t: pb.prove.activation_patching(m, t),
    "attribution_patching": lambda m, t: pb.prove.attribution_patching(m, t),
    "path_patching": lambda m, t: pb.prove.path_patching(m, t),
    "attention_knockout": lambda m, t: pb.prove.attention_knockout(m, t),
    "edge_attribution": lambda m, t: pb.prove.edge_attribution(m, t),
    "ablation": lambda m, t: pb.prove.ablation(m, t, "L1.H1", draws=2),
    "knockout_curve": lambda m, t: pb.prove.knockout_curve(m, t, ["L1.H1", "L0.H0"], sizes=[1, 2], draws=2),
    "direct_logit_attribution": lambda m, t: pb.find.direct_logit_attribution(m, t),
    "name_mover_heads": lambda m, t: pb.find.name_mover_heads(m, SAID),
    "previous_token_heads": lambda m, t: pb.find.previous_token_heads(m, t),
    "attention_sinks": lambda m, t: pb.find.attention_sinks(m, t),
}  # fmt: skip
SAID = pb.Task(name="said", clean=((5, 22, 8, 5, 30, 9),), right=(22,), wrong=((17,),))
OVER_PROMPTS = ("low", "high", "p_adjusted", "standard_error", "effect_low", "effect_high")


@pytest.fixture(scope="module")
def model() -> pb.Model:
    return pb.load(twin("gpt2"))


def parts_of(result: Any) -> str:
    from rich.console import Console

    out = Console(width=160)
    with out.capture() as caught:
        for line in result_lines.of_result(result, 10):
            out.print(line)
    return caught.get()


@pytest.mark.parametrize("name", CALLS)
def test_no_interval_no_p_and_no_warning(model: pb.Model, name: str) -> None:
    result = CALLS[name](model, PAIR)
    over_prompts = [
        label for label in OVER_PROMPTS if not ("random" in result and label == "p_adjusted")
    ]  # p of draws has one
    for told in (str(result), parts_of(result), result._repr_html_()):
        words = told.replace("<", " ").replace(">", " ").split()
        assert "nan" not in told.lower(), told
        assert "95 %" not in told
        assert "adjusted p" not in told
        assert "mean little" not in told
        assert not [column for column in over_prompts if column in words], told
    for label in over_prompts:
        if label in result:
            assert result[label].isnan().all(), label
    assert result.values.isfinite().any()
    if len(result.axes) in (1, 2):
        result.plot()


def test_one_pair_is_ranked_and_its_gap_said(model: pb.Model) -> None:
    result = pb.prove.activation_patching(model, PAIR, site="head")
    gap = float(result["clean"] - result["corrupted"])
    assert gap > 0
    assert any(f"one pair, whose gap is {gap:.3g} logits" in note for note in result.notes)
    turned = pb.Task(name="pair", clean=PAIR.clean, right=(17,), wrong=((22,),), corrupted=PAIR.corrupted)
    notes = [pb.prove.activation_patching(model, task, site="head").notes for task in (PAIR, turned)]
    assert sum(any("shares mean little" in note for note in each) for each in notes) == 1  # where the gap is not a gap
    assert [row["rank"] for row in result.told(3)] == [1, 2, 3]
    assert list(result.told(3)[0]) == ["rank", "part", "value", "effect"]


def test_two_pairs_have_both(model: pb.Model) -> None:
    two = pb.Task(
        name="pairs",
        clean=PAIR.clean * 2,
        right=(17, 17),
        wrong=((22,), (22,)),
        corrupted=(*PAIR.corrupted, (5, 23, 8, 5, 30, 9)),
    )  # type: ignore[misc]
    result = pb.prove.activation_patching(model, two, site="head")
    assert {"low", "high", "p", "p_adjusted"} <= set(result.told(1)[0])
    assert not result["p"].isnan().any()
    assert any("at adjusted p <= 0.05" in note for note in result.notes)


def test_random_parts_are_said_of_one_prompt(model: pb.Model) -> None:
    result = pb.prove.ablation(model, PAIR, "L1.H1", draws=3)
    low, high = float(result["random"].min()), float(result["random"].max())
    assert f"(draws {low:.3g} to {high:.3g})" in result.notes[0]
    assert float(result["p"]) == pytest.approx((1 + int((result["random"] >= result["joint"] - 1e-9).sum())) / 4)
    drawn = report.ablation_figure(result).axes[0]
    caps = [line for line in drawn.lines if line.get_marker() in ("|", "_")]
    assert all(not torch.tensor(line.get_xdata(orig=False), dtype=torch.float64).isfinite().any() for line in caps)
