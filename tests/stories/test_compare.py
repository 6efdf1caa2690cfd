"""Compare: each knob's numbers are those of its own curve on the same prompts; a planted direction is recommended, random ones are not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import patchbay as pb
from patchbay.cli import cli
from patchbay.draw import plot, result_page
from patchbay.signal.port import PatchbayError
from tests.tolerance import close

STEPS = [0.0, 1.0, 3.0]


@pytest.fixture(scope="module")
def model() -> pb.Model:
    return pb.load("tiny")


@pytest.fixture(scope="module")
def task(model: pb.Model) -> pb.Task:
    return pb.tasks.facts_in_context(model, n=24)


@pytest.fixture(scope="module")
def neutral(model: pb.Model) -> list[str]:
    return [model.decode(ids) for ids in pb.tasks.laundry_list(model, n=6).clean]


def towards(model: pb.Model, task: pb.Task, size: float = 30.0) -> pb.Knob:
    """Planted: what is added before the unembedding raises the first right answer over the first wrong one, and little else."""
    rows = model.unembed.weight.detach()
    wanted = rows[list(task.right)].mean(0) - rows[[w[0] for w in task.wrong]].mean(0)
    return pb.Knob("towards", [pb.add("final_norm", size * wanted / wanted.norm(), positions="last")], 1.0)


def aside(model: pb.Model, seed: int = 0) -> pb.Knob:
    noise = torch.randn(model.d_model, generator=torch.Generator().manual_seed(seed))
    return pb.Knob("aside", [pb.add("L0.resid_out", 0.2 * noise)], 1.0)


def test_planted_and_null(model: pb.Model, task: pb.Task, neutral: list[str]) -> None:
    """Every prompt asks for one token over another: the direction between them holds, a random one does not."""
    right, wrong = model.token_id(" cat"), model.token_id(" dog")
    asked = pb.Task("one", task.clean[:16], (right,) * 16, ((wrong,),) * 16)
    rows = model.unembed.weight.detach()
    between = pb.Knob("between", [pb.add("final_norm", 4 * (rows[right] - rows[wrong]), positions="last")], 1.0)
    found = pb.compare(model, asked, [between, aside(model)], neutral, strengths=STEPS, draws=6)
    assert found.labels_of("condition") == ["between", "aside"]
    assert float(found["effect"][0, -1]) > 5 * float(found["effect"][1].abs().max())
    first, second = found.tables["knobs"]
    assert first["verdict"] == "holds"
    assert second["verdict"] != "holds"
    assert [row["strength"] == "none" for row in (first, second)] == found["chosen"].isnan().tolist()
    assert first["effect"] == pytest.approx(
        float(first["strength"]) * float(4 * (rows[right] - rows[wrong]).square().sum()), rel=1e-3
    )


def test_reference_each_row_is_its_own_dose_and_response(model: pb.Model, task: pb.Task, neutral: list[str]) -> None:
    knobs = [towards(model, task), aside(model)]
    options: dict[str, Any] = {"strengths": STEPS, "draws": 2, "seed": 3}
    found = pb.compare(model, task, knobs, neutral, **options)
    for i, knob in enumerate(knobs):
        alone = pb.measure.dose_response(model, replace(task, corrupted=None), knob, neutral, **options)
        for name, its in {
            "effect": "effect",
            "low": "effect_low",
            "kl": "kl",
            "loss": "loss",
            "chance_high": "chance_high",
        }.items():
            assert torch.equal(found[name][i], alone[its]), name
        row = found.tables["knobs"][i]
        assert row["strength"] == (f"{float(alone['chosen']):g}" if "chosen" in alone else "none")
        if "chosen" in alone:
            assert row["effect"] == float(alone["test_effect"])
            assert row["KL"] == float(alone["test_kl"])


def test_no_prompt_on_which_any_was_fitted_and_twins_for_all(model: pb.Model, task: pb.Task) -> None:
    first, second = pb.turn.steer(model, task, layers=[1], seed=0), pb.turn.steer(model, task, layers=[1], seed=1)
    fitted = {tuple(ids) for knob in (first, second) for ids in knob.provenance["fitted"]}
    left = [i for i, pair in enumerate(zip(task.clean, task.corrupted or (), strict=True)) if not fitted & set(pair)]
    assert 0 < len(left) < len(task) / 2
    found = pb.compare(model, task, [first, second, aside(model)], strengths=STEPS, draws=0)
    twins = [list(task.corrupted[i]) for i in left]  # type: ignore[index]
    plain = task[left].score(pb.run(model, twins).last_logits)
    for i, knob in enumerate((first, second, aside(model))):
        moved = task[left].score(pb.run(model, twins, edits=[knob.at(3.0)]).last_logits)
        assert close(found["effect"][i, 2], (moved - plain).mean(), of=moved, noise=256)
    assert "all are measured on the twins" in " ".join(found.notes)
    names = found.labels_of("condition")
    assert names[0].removesuffix(" (1)") == names[1].removesuffix(" (2)")


def test_figure_page_and_file_hold_the_same_numbers(
    model: pb.Model, task: pb.Task, neutral: list[str], tmp_path: Path
) -> None:
    found = pb.compare(model, task, [towards(model, task), aside(model)], neutral, strengths=STEPS, draws=2)
    first, second = plot.figure(found).axes
    assert (
        first.lines[0].get_ydata().tolist()
        == second.lines[0].get_ydata().tolist()
        == pytest.approx(found["effect"][0].tolist())
    )
    assert second.lines[0].get_xdata().tolist() == pytest.approx(found["kl"][0].tolist())
    assert first.get_ylabel() == "effect (logits)"
    assert "nats per token" in second.get_xlabel()
    page = result_page.page_of(found)
    assert page.count("<svg") == 1
    for row in found.tables["knobs"]:
        assert row["knob"] in page
        assert row["knob"] in str(found)
    assert pb.load_result(found.save(tmp_path / "found")).equal(found)
    assert pb.replay(found, model)


def test_what_cannot_be_compared_is_refused(model: pb.Model, task: pb.Task) -> None:
    with pytest.raises(PatchbayError, match="two or more are compared"):
        pb.compare(model, task, [aside(model)])
    with pytest.raises(PatchbayError, match="neutral at different strengths"):
        pb.compare(model, task, [aside(model), pb.turn.scale("L1.H1", 0.0)])


def test_the_command(model: pb.Model, task: pb.Task, neutral: list[str], tmp_path: Path) -> None:
    files = [str(knob.save(tmp_path / f"{knob.name}.knob")) for knob in (towards(model, task), aside(model))]
    (tmp_path / "neutral.txt").write_text("\n".join(neutral))
    asked = [
        "compare",
        "tiny",
        "--task",
        "facts_in_context:n=16",
        "--knob",
        files[0],
        "--knob",
        files[1],
        "--neutral",
        str(tmp_path / "neutral.txt"),
    ]
    asked += ["--strengths", "0,1", "--draws", "1", "--report", str(tmp_path / "page.html")]
    told = CliRunner().invoke(cli, [*asked, "--json"])
    assert told.exit_code == 0, told.output
    assert [row["knob"] for row in json.loads(told.stdout)["tables"]["knobs"]] == ["towards", "aside"]
    assert "<svg" in (tmp_path / "page.html").read_text()
