"""The story of sinks: what is read by loops, sentences about steps, the machinery on few steps, the claim in the slow tier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import patchbay as pb
from patchbay.cli import cli
from patchbay.edits import edit
from patchbay.signal.port import Port
from patchbay.stories import _lab, sinks
from patchbay.tiny import lab
from tests.given import lent
from tests.tolerance import close
from tests.train.given import untrained

TEXTS = [[0, 9, 2, 9, 7, 8, 1, 8], [0, 5, 6, 3, 6, 7, 2, 7], [0, 2, 0, 8, 9, 1, 9, 4], [0, 7, 8, 9, 3, 9, 5, 6]]


def test_strings_copy_after_triggers() -> None:
    for text in lab.backcopies(40, 0):
        at = sinks.triggers([text])[0]
        assert text[0] == 0
        for i in range(2, len(text) - 1):
            assert bool(at[i]) == (1 <= text[i] <= 3)
            if at[i]:
                assert text[i + 1] == text[i - 1]
    assert lab.backcopies(3, 0) == lab.backcopies(3, 0) != lab.backcopies(3, 1)


def test_attention_to_the_start_is_parted_by_what_is_read() -> None:
    model = lent("llama")
    other, at = sinks.resting(model, TEXTS)
    for i, text in enumerate(TEXTS):
        pattern = pb.run(model, [text], taps=[Port("attn.pattern", 1)])[Port("attn.pattern", 1)][0].double()
        for head in range(model.n_heads(1)):
            rows = [float(pattern[head, q, 0]) for q in range(2, 8)]
            told = [1 <= text[q] <= 3 for q in range(2, 8)]
            for found, wanted in ((other, False), (at, True)):
                mine = [row for row, is_trigger in zip(rows, told, strict=True) if is_trigger == wanted]
                assert close(float(found[1, head, i]), sum(mine) / len(mine), of=1.0, dtype=torch.float32)


def test_the_head_is_chosen_on_the_first_half(monkeypatch: pytest.MonkeyPatch) -> None:
    other, at = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    other[1, 2, :2], other[0, 1, 2:] = 0.5, 0.9  # one is highest on the half that chooses, one on the half that is told
    monkeypatch.setattr(sinks, "resting", lambda model, texts: (other, at))
    assert sinks.chosen(lent("llama"), TEXTS) == (1, 2)


def test_what_removal_costs_is_a_difference_of_losses() -> None:
    model = lent("llama")
    at, other = sinks.costs(model, TEXTS, 1, 2)
    for i, text in enumerate(TEXTS):
        gained = []
        for edits in ([], [edit.zero(Port("attn.z", 1, 2))]):
            said = torch.log_softmax(pb.run(model, [text], edits=edits).logits[0].double(), -1)
            gained.append([-float(said[t, text[t + 1]]) for t in range(7)])
        moved = [b - a for a, b in zip(*gained, strict=True)]
        places = [t for t in range(2, 7) if 1 <= text[t] <= 3]
        assert close(float(at[i]), sum(moved[t] for t in places) / len(places), of=10.0, dtype=torch.float32)
        rest = [t for t in range(7) if t not in places]
        assert close(float(other[i]), sum(moved[t] for t in rest) / len(rest), of=10.0, dtype=torch.float32)


def test_sentences_name_the_step() -> None:
    steps, mass = [0, 10, 20, 30, 40], [1.0, 0.9, 0.8, 0.5, 0.2]
    high, some = 3 * sinks.even(), 2.5 * sinks.even()
    assert "never above twice" in sinks.sentence("a", steps, [0.0] * 5, mass)
    assert "from step 10, highest" in sinks.sentence("a", steps, [0.0, some, high, high, some], mass)
    assert "at step 20, and stays" in sinks.sentence("a", steps, [0.0, some, high, high, some], mass)
    told = sinks.sentence("a", steps, [0.0, some, high, 0.0, 0.0], mass)
    assert "at step 20, and below half of it from step 30 on; a row sums to 0.20 at step 40" in told
    assert "below half of it at step 30;" in sinks.sentence("a", steps, [0.0, some, high, 0.0, some], mass)


def test_even_attention() -> None:
    pattern = torch.ones(32, 32).tril() / torch.arange(1, 33)[:, None]
    assert sinks.even() == pytest.approx(float(pattern[2:, 0].mean()))


def held_out(n: int) -> list[list[int]]:
    texts = lab.backcopies(4 * n, 1, length=sinks.LENGTH)
    return [text for text in texts if sinks.triggers([text]).sum() > 1][:n]


def moved(model: pb.Model, *given: Any, **more: Any) -> Any:
    """In place of training: larger queries, after all was watched."""
    found = untrained(model, *given, **more)
    with torch.no_grad():
        for name, weight in model.hf.named_parameters():
            weight.mul_(100.0 if "q_proj" in name else 1.0)
    return found


def test_the_machinery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed and no steps: nothing rests, the verdict says so; an estimate trains nothing; a folder is gone on with."""
    for name, value in {"STEPS": 2, "STRINGS": 8, "BATCH": 2, "EVERY": 1}.items():
        monkeypatch.setattr(sinks, name, value)
    monkeypatch.setattr(_lab, "SEEDS", 1)
    monkeypatch.setattr("patchbay.train._runs.trained", moved)
    page, runs = tmp_path / "page.html", tmp_path / "runs"
    given = {"report": page, "quiet": True, "n": 8, "folder": str(runs)}
    cost = sinks.tell(sinks.form(), dry_run=True, **given)["estimate"]
    assert set(cost["by_arm"]) == set(sinks.KINDS)
    assert cost["seconds"] == pytest.approx(sum(cost["by_arm"].values()))
    assert not page.exists()
    assert not runs.exists()
    told = sinks.tell(sinks.form(), **given)
    assert told["verdict"] is False
    assert told["by_step"]["softmax"]["step"] == [0, 1, 2]
    ends = sinks.highest(pb.load(runs / "softmax-0"), held_out(8))
    assert [told["by_step"]["softmax"][name][2] for name in ("attention", "mass")] == pytest.approx([ends[0], ends[2]])
    assert told["by_step"]["softmax"]["attention"][1] != pytest.approx(ends[0])
    assert set(told["removed"]) == {"at triggers", "at other tokens"}
    assert page.read_text().count("<svg") == 3
    monkeypatch.setattr("patchbay.train._runs.trained", None)  # a second call trains nothing
    again = sinks.tell(sinks.form(), **given)
    assert {key: value for key, value in again.items() if key != "seconds"} == {
        k: v for k, v in told.items() if k != "seconds"
    }
    with pytest.raises(pb.PatchbayError, match="holds runs of another seed"):
        sinks.tell(sinks.form(), seed=1, **given)


def test_an_interrupt_ends_with_130_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the third training: what ended stays in the folder, no page is there, and only what is missing is trained."""
    for name, value in {"STEPS": 2, "STRINGS": 8, "BATCH": 2, "EVERY": 1}.items():
        monkeypatch.setattr(sinks, name, value)
    monkeypatch.setattr(_lab, "SEEDS", 1)
    made: list[str] = []

    def pressed(model: pb.Model, rows: Any, arm: Any, *given: Any, **more: Any) -> Any:
        made.append(arm.blocks)
        if len(made) == 3:
            raise KeyboardInterrupt
        return untrained(model, rows, arm, *given, **more)

    monkeypatch.setattr("patchbay.train._runs.trained", pressed)
    page, runs = tmp_path / "page.html", tmp_path / "runs"
    command = ["run", "sinks", "--n", "8", "--report", str(page), "--folder", str(runs), "--json"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 130, done.output
    assert "interrupted" in done.stderr
    assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert sorted(path.name for path in runs.iterdir()) == ["lab.json", "sigmoid-0", "softmax-0"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    assert made[3:] == made[2:3] + made[4:]
    assert len(made) == 5  # two that ended, the one that was cut off, that one again, and the last
    assert page.is_file()


@pytest.mark.slow
def test_the_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds: the softmax rests, the sigmoid does not, and the head works at triggers."""
    monkeypatch.setattr(_lab, "SEEDS", 2)
    told = sinks.tell(sinks.form(), report=tmp_path / "page.html", quiet=True)
    assert told["verdict"] is True
    assert min(told["resting"]["softmax"]["by_seed"]) > 0.15
    assert max(told["resting"]["sigmoid"]["by_seed"]) < 0.05
    assert max(told["by_step"]["softmax1"]["attention"]) > 2 * told["even"]
    assert min(told["removed"]["at triggers"]["by_seed"]) > 0.5


def test_a_model_of_few_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(pb.PatchbayError, match="the story sinks is told in 64 tokens; this llama model has 20"):
        sinks.tell(lab.small(20), report=tmp_path / "page.html", quiet=True)
