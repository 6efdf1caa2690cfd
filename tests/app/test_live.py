"""Knobs on a prompt and prompts patched cell by cell are plain runs of the model under those edits, told as they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.app.live import LIVE
from patchbay.errors import PatchbayError
from tests.tolerance import close

PROMPT = "The capital of Lolavia is Grerum. The capital of Lolavia is"
OTHER = "The capital of Lolavia is Budurg. The capital of Lolavia is"  # which goes on as the one above


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pb.turn.scale("L1.H1", 0.0).save(tmp_path / "off.knob")
    return tmp_path


def ask(model: pb.Model, what: str, **asked: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    pieces: list[dict[str, Any]] = []
    return LIVE[what](model, asked, pieces.append), pieces


def probabilities(model: pb.Model, ids: list[int], edits: list[Any]) -> torch.Tensor:
    with model.edited(*edits) if edits else torch.no_grad():
        return model.hf(torch.tensor([ids])).logits[0, -1].detach().double().softmax(-1)


def test_a_turned_knob_is_the_model_under_it(trained: pb.Model, folder: Path) -> None:
    made, _ = ask(trained, "turned", text=PROMPT, knobs=[{"name": "off.knob", "strength": 0.25}])
    ids = list(trained.encode(PROMPT)[0])
    before = probabilities(trained, ids, [])
    after = probabilities(trained, ids, [pb.scale("L1.H1.z", 0.25)])
    for row in made["next"]:
        (token,) = trained.encode(row["token"])[0]
        assert close(torch.tensor([row["before"], row["after"]]), torch.stack([before[token], after[token]]).float())
    assert abs(made["kl"] - float((before * (before / after).log()).sum())) < 1e-4
    assert made["kl"] > 0.01


def test_a_neutral_knob_changes_nothing(trained: pb.Model, folder: Path) -> None:
    made, _ = ask(trained, "turned", text=PROMPT, knobs=[{"name": "off.knob", "strength": 1}])
    assert made["kl"] == 0.0
    assert all(row["before"] == row["after"] for row in made["next"])


def test_both_texts_come_token_by_token(trained: pb.Model, folder: Path) -> None:
    made, pieces = ask(trained, "turned", text=PROMPT, knobs=[{"name": "off.knob", "strength": 0.0}], new=4)
    knob = pb.load_knob(folder / "off.knob")
    assert made["before"] == trained.generate(PROMPT, 4, new_only=True)
    assert made["after"] == trained.generate(PROMPT, 4, edits=[knob], new_only=True)
    for side in ("before", "after"):
        said = "".join(piece["token"] for piece in pieces if piece["side"] == side)
        assert said.removesuffix("<|endoftext|>") == made[side]
    assert len(pieces) > 2


def test_knobs_say_how_far_they_turn_and_which_do_not_fit(trained: pb.Model, folder: Path) -> None:
    pb.Knob("push", [pb.add("L0.resid_out", torch.ones(128))], 3.0).save(folder / "push.knob")
    pb.Knob("far", [pb.scale("L9.H0.z", 1.0)], 0.0).save(folder / "far.knob")
    (folder / "bad.knob").write_bytes(b"no knob")
    rows = {
        row["name"]: row
        for row in ask(trained, "knobs", names=["off.knob", "push.knob", "far.knob", "bad.knob"])[0]["knobs"]
    }
    assert [rows["off.knob"][key] for key in ("neutral", "strength", "low", "high")] == [1.0, 0.0, -1.0, 3.0]
    assert [rows["push.knob"][key] for key in ("neutral", "strength", "low", "high")] == [0.0, 3.0, -6.0, 6.0]
    assert "0..2" in rows["far.knob"]["message"]
    assert "bad.knob" in rows["bad.knob"]["message"]
    assert not rows["off.knob"]["message"]


@pytest.fixture(scope="module")
def twins(trained: pb.Model) -> tuple[str, str]:
    """Two prompts of as many tokens that go on otherwise."""
    task = pb.tasks.facts_in_context(trained, n=12)
    for ours, theirs in zip(task.clean, task.corrupted or (), strict=True):
        if len({int(probabilities(trained, list(ids), []).argmax()) for ids in (ours, theirs)}) == 2:
            return trained.decode(ours), trained.decode(theirs)
    raise AssertionError("no prompt whose twin is answered otherwise")


def test_every_cell_is_a_run_with_the_other_prompts_stream(trained: pb.Model, twins: tuple[str, str]) -> None:
    text, other = twins
    made, pieces = ask(trained, "patching", text=text, other=other)
    ids, there = (list(trained.encode(one)[0]) for one in twins)
    assert [piece["layer"] for piece in pieces] == [0, 1, 2]
    ours, theirs = (int(probabilities(trained, one, []).argmax()) for one in (ids, there))
    assert (made["ours"], made["theirs"]) == (trained.decode([ours]), trained.decode([theirs]))
    for layer in range(3):
        port = trained.port(f"L{layer}.resid_out")
        stream = pb.run(trained, [there], taps=[port])[port][0]
        for at in range(len(ids)):
            p = probabilities(trained, ids, [pb.replace(port, stream[at], positions=at)])
            assert abs(pieces[layer]["values"][at] - float(p[theirs].log() - p[ours].log())) < 2e-3
    assert abs(pieces[2]["values"][-1] - made["other"]) < 2e-3, (
        "the last stream of the last token is all that the logits read"
    )
    cell, _ = ask(trained, "cell", text=text, other=other, layer=2, position=len(ids) - 1)
    after = {row["token"]: row["after"] for row in cell["next"]}
    assert abs(after[made["theirs"]] - float(probabilities(trained, there, [])[theirs])) < 1e-4


@pytest.mark.parametrize(
    ("what", "asked", "said"),
    [
        ("turned", {"text": PROMPT, "knobs": [{"name": "off.knob"}]}, "a knob is"),
        ("turned", {"text": PROMPT, "knobs": [{"name": "../off.knob", "strength": 1.0}]}, "leads out"),
        ("turned", {"text": PROMPT, "knobs": [{"name": "none.knob", "strength": 1.0}]}, "no knob 'none.knob'"),
        ("turned", {"text": PROMPT, "new": 9999}, "from 0 to 128"),
        ("knobs", {"names": "off.knob"}, "names is a list"),
        ("patching", {"text": PROMPT, "other": "The capital"}, "as many"),
        ("patching", {"text": PROMPT, "other": OTHER}, "both prompts go on with"),
        ("cell", {"text": PROMPT, "other": OTHER, "layer": 0, "position": 99}, "positions 0..11"),
        ("cell", {"text": PROMPT, "other": OTHER, "layer": 9, "position": 0}, "0..2"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    what: str, asked: dict[str, Any], said: str, trained: pb.Model, folder: Path
) -> None:
    with pytest.raises(PatchbayError, match=said):
        ask(trained, what, **asked)
