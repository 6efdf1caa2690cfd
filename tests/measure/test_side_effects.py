"""Side effects: a planted one is found and told from random ones, equals single calls, and null knobs are seldom flagged."""

from __future__ import annotations

import importlib
import math
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.knobs.knob import Knob
from patchbay.measure._meter import MADE
from patchbay.tiny import planted, twins
from tests.measure.test_text_loss import constant
from tests.measure.words import reader
from tests.shares import by_turns
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.measure.side_effects")
TEXTS = ["the cat sat on the mat", "a dog ran", "it is on", "he was in a hat", "one or two", "see the sun set"]
PAIRS = [{"good": f"the {x} sat", "bad": f"{x} the sat"} for x in ("cat", "dog", "hat", "sun", "man", "hen")]


def meters() -> dict[str, Any]:
    return {"text_loss": {"items": TEXTS}, "pairs": {"meter": "minimal_pairs", "items": PAIRS}}


def test_planted() -> None:
    """Silencing the neurons that decide between two answers turns all answers over, and no random neurons do."""
    built = planted.relation_neuron(seed=1)
    model, truth = pb.load(built.model, built.tokenizer), built.truth
    task = pb.Task.from_prompts(model, truth["prompts"], truth["answers"], truth["wrong"])
    knob = pb.turn.scale(list(truth["neurons"].values()), -1.0, model=model)
    found = pb.measure.side_effects(model, knob, {"answer_choices": task, "text": {"meter": "text_loss", "items": [" the door", " a cup and"] * 4, "unit": "token"}})  # fmt: skip
    facts, text = found.tables["meters"]
    assert (facts["without"], facts["under"], facts["verdict"]) == (1.0, 0.0, "more than random")
    assert float(found["p_draw"][0]) == 1 / 20
    assert text["verdict"] == "not shown"
    within = pb.measure.side_effects(
        model, knob, {"text_loss": {"items": [" the door", " a cup and"] * 4, "unit": "token"}}, draws=0, margin=0.5
    )
    assert within.tables["meters"][0]["verdict"] == "unchanged"
    assert "p_draw" not in within
    assert any("draws=0" in note for note in within.notes)


def test_reference() -> None:
    """Differences of single calls under `model.edited`; the place among the same random knobs; order does not matter."""
    model = reader("characters")
    knob = Knob("k", [pb.scale(pb.Port("attn.z", 1, 2), 1.0)], -2.0)
    found = pb.measure.side_effects(model, knob, meters(), draws=3)
    drawn, _ = module._drawn(model, knob, 3, 0)
    assert len(drawn) == 3
    for at, (name, call) in enumerate(
        {"text_loss": pb.measure.text_loss, "minimal_pairs": pb.measure.minimal_pairs}.items()
    ):
        values = []
        for edits in ([], knob.edits_at(), *drawn):
            with model.edited(*edits) if edits else nullcontext():
                values.append(float(call(model, TEXTS if name == "text_loss" else PAIRS).values))
        assert close(float(found["without"][at]), values[0])
        assert close(float(found["under"][at]), values[1], of=1.0)
        assert close(found["random"][:, at], torch.tensor(values[2:]).double() - values[0], of=5.0, dtype=torch.float32)
        hits = sum(abs(v - values[0]) >= abs(values[1] - values[0]) - 1e-7 for v in values[2:])
        assert float(found["p_draw"][at]) == (1 + hits) / 4
    turned = pb.measure.side_effects(model, knob, dict(reversed(meters().items())), draws=3)
    assert torch.equal(turned["difference"].flip(0), found["difference"])
    assert torch.equal(turned["q"].flip(0), found["q"])


def test_null() -> None:
    """500 null knobs of three meters: differences without a direction, a mean, a ratio and an area; at most 5 % of the calls flag one."""
    flagged = 0
    for seed in range(500):
        generator = torch.Generator().manual_seed(seed)
        q = []
        for made in ("mean", "ratio", "mean"):
            base = torch.rand(30, 2, generator=generator, dtype=torch.float64) + 1.0
            other = base.clone()
            other[:, 0] += 0.1 * torch.randn(30, generator=generator, dtype=torch.float64)
            q.append(
                module.compared(module.Seen(base, made, "lower", ""), module.Seen(other, made, "lower", ""), 0, 499).p
            )
        flagged += bool((pb.maths.benjamini_hochberg(torch.tensor(q)) <= 0.05).any())
    assert flagged <= 500 * 0.05 + 2 * math.sqrt(500 * 0.05 * 0.95)
    assert flagged >= 5  # and it is no test that never finds


@pytest.mark.parametrize("made", by_turns(sorted(MADE), of=2))
def test_a_difference_is_that_of_the_two_values(made: str) -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(40, 2, generator=generator, dtype=torch.float64)
    first[:, 1] = (first[:, 1] > 0.5).double() if made in ("auroc", "calibration_error") else first[:, 1] + 1
    second = first.clone()
    second[:, 0] = first[:, 0].flip(0)
    one = module.compared(module.Seen(first, made, "higher", ""), module.Seen(second, made, "higher", ""), 0, 199)
    assert one.difference == pytest.approx(MADE[made](second) - MADE[made](first))
    assert one.low <= one.difference <= one.high
    assert 0 < one.p <= 1
    same = module.compared(module.Seen(first, made, "higher", ""), module.Seen(first, made, "higher", ""), 0, 199)
    assert (same.difference, same.p) == (0.0, 1.0)


def test_a_knob_at_its_neutral_strength_changes_nothing_at_all() -> None:
    model = reader("pairs")
    found = pb.measure.side_effects(model, Knob("k", [pb.scale(pb.Port("attn.z", 1, 2), 1.0)], 1.0), meters(), draws=0)
    assert torch.equal(found["difference"], torch.zeros(2).double())
    assert [row["verdict"] for row in found.tables["meters"]] == ["not shown", "not shown"]


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((0.01, 0.05, 0.2, 0.4, None), "more than random"),
        ((0.01, 0.2, 0.2, 0.4, None), "changed"),
        ((0.2, 0.01, -0.1, 0.2, None), "not shown"),
        ((0.2, 0.5, -0.1, 0.2, 0.3), "unchanged"),
        ((0.2, 0.5, -0.1, 0.4, 0.3), "not shown"),
        ((0.01, 0.5, 0.01, 0.02, 0.3), "changed, within the margin"),
        ((0.05, float("nan"), 0.01, 0.02, None), "changed"),
    ],
)
def test_verdicts(numbers: Any, said: str) -> None:
    assert module.verdict(*numbers) == said


def test_few_different_random_knobs_are_said() -> None:
    model = pb.load(twins.twin("gpt2"))  # two layers of four heads
    knob = Knob("k", [pb.scale(pb.Port("attn.z", 1, 2), 1.0)], 0.0)
    found = pb.measure.side_effects(model, knob, {"text_loss": {"items": [[5, 6, 7], [8, 9, 10]], "unit": "token"}})
    assert len(found["random"]) == 7
    assert any("only 7 of them are different" in note for note in found.notes)
    assert any("p_draw is at least 0.12" in note for note in found.notes)


def test_meters_as_text_and_what_is_refused() -> None:
    model = reader("characters")
    assert module._named(["answer-choices=repeated_tokens:n=3", "seed=5", "text_loss=a.txt"]) == {"answer_choices": "repeated_tokens:n=3,seed=5", "text_loss": "a.txt"}  # fmt: skip
    knob = Knob("k", [pb.scale(pb.Port("attn.z", 1, 2), 1.0)], 0.0)
    for given, said in (
        ({}, "at least one"),
        ({"text_los": {"items": TEXTS}}, "no method 'measure.text_los'"),
        ({"text_loss": {"unit": "token"}}, "meter 'text_loss' has no items"),
        (["text_loss"], "meters are written NAME=ITEMS"),
        ({"dose": {"meter": "word_odds", "items": [{"text": t, "group": str(i % 2)} for i, t in enumerate(TEXTS)], "least": 1, "draws": 10}}, "returns no numbers by item"),
    ):  # fmt: skip
        with pytest.raises(pb.PatchbayError, match=said):
            pb.measure.side_effects(model, knob, given, draws=0)  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="margin"):
        pb.measure.side_effects(model, knob, meters(), draws=0, margin={"other": 1.0})
    with pytest.raises(pb.PatchbayError, match="treats prompts by their place"):
        pb.measure.side_effects(model, Knob("k", [pb.scale(pb.Port("attn.z", 1, 2), 1.0, rows=[0])], 0.0), meters())
    made = pb.turn.scale(["L1.H1"], 0.0, model=reader("pairs", "gpt2"))
    with pytest.raises(pb.PatchbayError, match="was made on"):
        pb.measure.side_effects(model, made, meters())


def test_at_the_command_line_a_knob_names_its_model(tmp_path: Path) -> None:
    """`patchbay measure side-effects K.knob --meters ...`: on the built-in model that the knob was made on."""
    from click.testing import CliRunner

    from patchbay.cli import cli

    knob = pb.turn.scale(["L1.H1"], 0.0, model=pb.load("tiny")).save(tmp_path / "k.knob")
    (tmp_path / "texts.jsonl").write_text(
        '{"text": "Mary went to the park."}\n{"text": "Then John gave the ball to Mary."}\n'
    )
    command = [
        "measure",
        "side-effects",
        str(knob),
        "--meters",
        f"text_loss={tmp_path / 'texts.jsonl'}",
        "--draws",
        "2",
    ]
    said = CliRunner().invoke(cli, command)
    assert said.exit_code == 0, said.output
    assert "text_loss" in said.output
    assert "verdict" in said.output
    lent = pb.turn.scale(["L1.H1"], 0.0, model=reader("pairs", "gpt2")).save(tmp_path / "lent.knob")
    refused = CliRunner().invoke(cli, ["measure", "side-effects", str(lent), "--meters", "text_loss=x.jsonl"])
    assert "does not say which model it was made on" in refused.output + str(refused.exception)


def test_a_meter_that_fails_leaves_nothing_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reader("characters")
    knob = Knob("k", [pb.scale(pb.Port("attn.z", 1, 2), 1.0)], 0.0)
    with pytest.raises(pb.PatchbayError, match="does not know"):
        pb.measure.side_effects(model, knob, {"text_loss": {"items": TEXTS}, "pairs": {"meter": "minimal_pairs", "items": [{"good": "k\u00e4se", "bad": "a"}]}}, draws=0)  # fmt: skip
    assert model._session is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


@pytest.mark.slow  # 500 knobs that are run
def test_knobs_without_a_side_effect_are_seldom_flagged() -> None:
    """500 knobs, each of which raises letters at random, on pairs of letters of which either may be the good one: at most 5 % are flagged."""
    letters = "abcdefgh"
    model = constant(dict.fromkeys(letters, 0.0))
    places = [model.tokenizer.convert_tokens_to_ids(letter) for letter in letters]
    flagged = 0
    for seed in range(500):
        chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        push = torch.zeros(model.vocab_size)
        push[places] = torch.randn(len(letters), generator=generator)
        pairs = [{side: "".join(chance.choices(letters, k=6)) for side in ("good", "bad")} for _ in range(30)]
        knob = Knob("push", [pb.add(pb.Port("logits"), push)], 1.0)
        found = pb.measure.side_effects(model, knob, {"minimal_pairs": {"items": pairs}}, draws=0, seed=seed)
        flagged += found.tables["meters"][0]["q"] <= 0.05
    assert flagged <= 500 * 0.05 + 2 * math.sqrt(500 * 0.05 * 0.95)
