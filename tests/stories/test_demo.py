"""The demo finds what was built in, says when there is nothing, and prints only numbers of its own run."""

import json
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.signal.port import Part, PatchbayError
from patchbay.stories import _demo_knob, _demo_task, demo
from patchbay.tiny import planted
from patchbay.tiny.twins import twin
from tests.shared import SHARED


@pytest.fixture(scope="module")
def truth() -> dict[str, Any]:
    return dict(planted.induction().truth)


@pytest.fixture(scope="module")
def induction() -> pb.Model:
    made = planted.induction()
    return pb.load(made.model, made.tokenizer)


def n_hooks(model: pb.Model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.hf.modules())


@pytest.fixture(scope="module")
def told(induction: pb.Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    page = tmp_path_factory.mktemp("demo") / "deep" / "page.html"
    return demo.tell(induction, report=page, quiet=True, n=40), page


# --- the whole story, where the truth is known --------------------------------------------------------


@pytest.mark.slow  # the whole demo once more
def test_it_takes_the_question_that_the_model_can_answer(told: tuple[dict[str, Any], Path]) -> None:
    question = told[0]["question"]
    assert question["task"] == "repeated_tokens"
    assert question["shares"]["copy"][0] == 1.0
    assert len(question["tried"]) == 1
    assert "facts_in_context was not possible" in question["tried"][0]


def test_attribution_and_sweep_find_what_was_planted(told: tuple[dict[str, Any], Path], truth: dict[str, Any]) -> None:
    """Attribution sees the head that writes the answer; only the sweep sees the one that it depends on, too."""
    assert told[0]["attribution"][0]["part"] == truth["induction"]
    labelled = {row["part"] for row in told[0]["sweep"]["heads"] if row["label"]}
    assert labelled == {truth["induction"], truth["previous_token"]}
    assert told[0]["proof"]["joint"][0] == pytest.approx(truth["logit"], rel=0.1)


def test_the_knob_moves_the_answers_and_carries_its_evidence(
    told: tuple[dict[str, Any], Path], induction: pb.Model, truth: dict[str, Any]
) -> None:
    data, page = told
    assert data["knob"]["found"] is True
    assert data["knob"]["part"] in (truth["induction"], truth["previous_token"])
    knob = pb.load_knob(data["written"]["knob"])
    assert set(knob.evidence) == {"proof", "dose_response"}
    assert knob.fits(induction)
    task = pb.tasks.repeated_tokens(induction, 30, seed=99).with_metric("accuracy")  # prompts that the demo never saw
    accuracy = [float(task.score(pb.run(induction, task, edits=edits).last_logits).mean()) for edits in ([], [knob])]
    assert accuracy[0] == 1.0
    assert accuracy[1] < 0.2
    assert sorted(path.name for path in page.parent.iterdir()) == ["page.html", "page.knob"]


def test_the_page_is_of_this_run_and_needs_nothing_else(told: tuple[dict[str, Any], Path]) -> None:
    data, page = told
    text = page.read_text()
    assert text.count("<svg") == 6  # attribution, ablation, sweep, three of doses
    assert not re.search(r"<(script|link|img|iframe)\b|(src|href)=\"(?!#|data:image/)", text)
    after = data["knob"]["after"][0]
    assert f"<b>{100 * after:.0f} %</b>" in text
    assert data["model"]["fingerprint"] in text
    assert f"{data['proof']['joint'][0]:.2f}" in text
    assert "repeated_tokens" in text


def test_the_numbers_are_json(told: tuple[dict[str, Any], Path]) -> None:
    from patchbay.draw import screen

    assert json.loads(json.dumps(screen.plain(told[0])))["knob"]["found"] is True


def test_the_model_is_left_as_it_was(induction: pb.Model, told: tuple[dict[str, Any], Path]) -> None:
    fresh = pb.load(planted.induction().model)
    assert induction.fingerprint == fresh.fingerprint
    assert n_hooks(induction) == n_hooks(fresh)


# --- where there is nothing to find -------------------------------------------------------------------


@pytest.fixture(scope="module")
def nothing() -> pb.Model:
    made = planted.null()
    return pb.load(made.model, made.tokenizer)


@pytest.fixture(scope="module")
def told_of_nothing(nothing: pb.Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    page, said = tmp_path_factory.mktemp("null") / "page.html", StringIO()
    with redirect_stdout(said):
        data = demo.tell(nothing, report=page, n=24)
    return data, page, " ".join(said.getvalue().split())


def test_a_model_without_a_mechanism_gets_no_knob(told_of_nothing: tuple[dict[str, Any], Path, str]) -> None:
    data, page, said = told_of_nothing
    assert data["question"]["task"] == "own_text"
    assert data["knob"]["found"] is False
    assert "knob" not in data["written"]
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]
    assert "No knob is found" in said
    assert "no knob was found" in page.read_text()
    assert "facts_in_context was not possible" in said
    assert "repeated_tokens was not taken" in said


def test_judged_numbers_are_those_of_the_half_that_chose_nothing(
    told_of_nothing: tuple[dict[str, Any], Path, str], nothing: pb.Model
) -> None:
    """Recomputed here by one plain run per number."""
    data, page, said = told_of_nothing
    dev, test = _demo_task.ask(nothing, n=24, seed=0).task.split(0.5, 0)
    assert not set(dev.clean) & set(test.clean)
    head, strength = nothing.part(data["knob"]["part"]).port(), data["knob"]["strength"]
    name, at = (
        ("right" if data["knob"]["answer"] == data["question"]["answers"][0] else "wrong"),
        list(_demo_knob.DOSES).index(strength),
    )
    for edits, key in (([], "before"), ([pb.scale(head, strength)], "after")):
        tokens = pb.run(nothing, test, edits=edits).last_logits.argmax(-1).tolist()
        answers = [(right,) for right in test.right] if name == "right" else test.wrong
        share = sum(token in wanted for token, wanted in zip(tokens, answers, strict=True)) / len(test)
        assert data["knob"][key][0] == pytest.approx(share)
    assert float(data["dose_response"][name][at]) == pytest.approx(data["knob"]["after"][0])
    assert f"to {100 * data['knob']['after'][0]:.0f} % (" in said
    assert f"<b>{100 * data['knob']['after'][0]:.0f} %</b>" in page.read_text()


def test_a_model_without_heads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PatchbayError, match="turns attention heads, and this"):
        demo.tell(pb.load(twin("mamba2")), report=tmp_path / "page.html", quiet=True)


def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(induction: pb.Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "page.html"):
        with pytest.raises(PatchbayError, match="cannot write the report"):
            demo.tell(induction, report=place, quiet=True)


# --- pieces -------------------------------------------------------------------------------------------


def test_turns_near_the_best_are_compared() -> None:
    heads = [Part(0, "head", 0), Part(0, "head", 1)]
    shares = torch.tensor([[0.1, 0.2, 0.94, 0.99], [0.97, 0.5, 0.3, 0.93]])  # [head, strength]
    assert _demo_knob._near(heads, shares) == [(heads[0], 2.0), (heads[0], 4.0), (heads[1], -2.0)]


def test_of_the_turns_near_the_best_the_one_that_changes_unrelated_text_least_is_chosen(
    told_of_nothing: tuple[dict[str, Any], Path, str], nothing: pb.Model
) -> None:
    """The side effects of every candidate, measured by the method on the half of the texts that chooses."""
    data = told_of_nothing[0]
    swept = data["sweep"]["heads"]
    best = max(float(row["shares"].max()) for row in swept)
    near = [
        (row["part"], s)
        for row in swept
        for s, share in zip(_demo_knob.SWEPT, row["shares"], strict=True)
        if share >= best - 0.05 - 1e-6
    ]
    question = _demo_task.ask(nothing, n=40, seed=0)
    harm = {}
    for part, strength in near:
        knob = pb.turn.scale(part, strength)
        neutral = question.neutral[::2]
        seen = pb.measure.dose_response(nothing, question.task[:2], knob, strengths=[strength], neutral=neutral)
        harm[part, strength] = float(seen["kl"][0])
    assert len(near) > 1
    assert min(harm, key=harm.__getitem__) == (data["knob"]["part"], data["knob"]["strength"])


def test_answers_count_right_wrong_and_other(induction: pb.Model) -> None:
    task = pb.Task("own", clean=((3, 4), (5, 6), (7, 8)), right=(10, 10, 10), wrong=((11, 12), (11,), (11,)))
    logits = torch.zeros(4, induction.vocab_size)
    for row, token in enumerate((10, 12, 12, 10)):
        logits[row, token] = 1.0
    prompts = torch.tensor([0, 0, 1, 2])
    assert _demo_task.answers(task)(logits, prompts).tolist() == [1.0, -1.0, 0.0, 1.0]


def test_own_text_asks_between_the_same_two_tokens(nothing: pb.Model) -> None:
    task = _demo_task._own_text(nothing, 30, 0).task
    assert len({*task.right}) == 1
    assert len({*task.wrong}) == 1
    for ids, right, wrong in zip(task.clean, task.right, task.wrong, strict=True):
        assert {*pb.run(nothing, [list(ids)]).last_logits[0].topk(2).indices.tolist()} == {right, *wrong}


# --- trained models -----------------------------------------------------------------------------------


def test_the_built_in_model_moves_from_memory_to_context(tmp_path: Path) -> None:
    from patchbay.model.source import built_in_names

    if "tiny" not in built_in_names():
        pytest.skip("no built-in model named tiny in this checkout")
    data = demo.tell(pb.load("tiny"), report=tmp_path / "page.html", quiet=True, n=60)
    assert data["question"]["task"] == "facts_in_context"
    assert data["knob"]["found"] is True
    assert data["knob"]["gain"][0] > 0.2
    text = (tmp_path / "page.html").read_text()
    assert "unrelated stories" in text
    assert "plain facts completed" in text


@pytest.mark.slow  # the whole of the demo on another checkpoint
def test_a_shared_checkpoint_gets_a_question_that_it_can_take(tmp_path: Path) -> None:
    folder = SHARED / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no shared checkpoint at {folder}: set PATCHBAY_SHARED")
    data = demo.tell(pb.load(str(folder)), report=tmp_path / "page.html", quiet=True, n=40)
    assert data["question"]["task"] == "own_text"
    assert len(data["question"]["tried"]) == 2
    assert isinstance(data["knob"]["found"], bool)
