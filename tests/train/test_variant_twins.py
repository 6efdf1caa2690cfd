"""Twins of train.variant: plain arms of as many weights or operations, and the panel of every run, variant less twin, by seed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.train import _equal, _panels
from patchbay.train._kept import Kept
from patchbay.train._plan import Arm, Rows, plan_of, split
from patchbay.train._runs import Lab, begun, curves, equal, run_of
from tests.given import lent
from tests.tolerance import close

PLAN: dict[str, float] = {"steps": 2, "batch_size": 4, "fresh": True, "panel": 0}


def texts(n: int = 24, length: int = 12) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, 60) for _ in range(length)] for _ in range(n)]


def lab(**plan: Any) -> Lab:
    rows: list[Any] = [[one] for one in texts()]
    return Lab(lent("llama"), rows[4:], rows[:4], plan_of({**PLAN, **plan}))


def test_a_twin_of_as_many_weights_is_wider_and_else_the_same() -> None:
    """A gate in front of every block: the plain twin's MLPs grow until it has as many weights; what has its place still starts alike."""
    shared = lab()
    arm = equal(shared, Arm(blocks='{"gate": true}'), Arm())
    assert arm is not None
    assert arm.longer == 1.0
    one, plain, wide = (begun(shared, each, 3) for each in (Arm(blocks='{"gate": true}'), Arm(), arm))
    counts = [sum(p.numel() for p in model.hf.parameters()) for model in (one, plain, wide)]
    assert counts[0] > 1.2 * counts[1]
    per_neuron = 3 * plain.d_model * plain.n_layers
    assert abs(counts[0] - counts[2]) <= per_neuron / 2
    assert wide.hf.config.intermediate_size == plain.hf.config.intermediate_size + round(
        (counts[0] - counts[1]) / per_neuron
    )
    own, other = plain.hf.state_dict(), wide.hf.state_dict()
    same = [name for name in own if own[name].shape == other[name].shape]
    assert all(torch.equal(own[name], other[name]) for name in same)
    assert {name for name in own if name not in same} == {name for name in own if ".mlp." in name}


def test_a_twin_of_as_many_operations_trains_longer() -> None:
    """As many weights, one more unembedding in each step: counted by hand from the shapes."""
    shared = lab()
    arm = equal(shared, Arm("multi-exit:exits=1+2"), Arm())
    assert arm is not None
    assert arm.mlp == 0
    model = begun(shared, Arm(), 0)
    plain = _equal.operations(model, Rows(shared.train, Arm(), shared.plan, 0), "ntp")
    more = (
        3 * 2 * 4 * 12 * model.d_model * model.vocab_size
    )  # forward and two backward products, of 4 rows of 12 tokens
    assert arm.longer == pytest.approx((plain + more) / plain)
    assert equal(shared, Arm(), Arm()) is None


def test_the_result_says_what_the_arms_were() -> None:
    given: dict[str, Any] = {"seeds": 1, "blocks": {"gate": True}}
    found = pb.train.variant(lent("llama"), texts(), plan={**PLAN, "equal": True}, **given)
    assert found.labels_of("condition") == [
        "variant - twin",
        "null - twin",
        "equal - twin",
        "variant - null",
        "variant - equal",
    ]
    assert any(note.startswith("equal: ntp") and "MLPs of width" in note for note in found.notes)
    found = pb.train.variant(lent("llama"), texts(), plan=PLAN, **given)
    assert any("differ in size" in note for note in found.notes)
    with pytest.raises(pb.PatchbayError, match="so is drawn anew: plan="):
        pb.train.variant(lent("llama"), texts(), plan={**PLAN, "fresh": False, "equal": True}, **given)


def test_no_width_that_fits_is_said() -> None:
    with pytest.raises(pb.PatchbayError, match="no width of the MLPs gives a plain llama model of 10 weights"):
        _equal.width(lent("llama"), 10)


def test_the_panel_is_that_of_the_checkpoints(tmp_path: Path) -> None:
    """Readings of groups of held-out documents of every checkpoint, by loops."""
    data = texts()
    plan = {**PLAN, "panel": 6, "held": 0.25}
    found = pb.train.variant(
        lent("llama"), data, seeds=1, blocks={"attention": "sigmoid"}, folder=str(tmp_path / "runs"), plan=plan
    )
    rows = {(row["reading"], row["condition"]): row for row in found.tables["panel"]}
    held = [data[i] for i in split(len(data), 0.25)[1]]
    assert len(held) == 6

    panels: dict[str, list[dict[str, float]]] = {}
    for arm in ("variant", "twin"):
        model = pb.load(tmp_path / "runs" / f"{arm}-0")
        groups = [pb.panel(model, held[i::4], length=12, repeats=_panels.REPEATS).tables["panel"] for i in range(4)]
        panels[arm] = [{row["reading"]: row["value"] for row in group} for group in groups]
    for name in panels["twin"][0]:
        gaps = [one[name] - other[name] for one, other in zip(panels["variant"], panels["twin"], strict=True)]
        row = rows[name, "variant - twin"]
        assert close(row["effect"], sum(gaps) / 4, of=10.0, dtype=torch.float32)
        assert row["low"] <= row["effect"] <= row["high"]
    assert (
        rows["mass_mean", "variant - twin"]["effect"] > 0.5
    )  # a sigmoid's rows at the start are half as long as the text
    assert abs(rows["mass_mean", "null - twin"]["effect"]) < 1e-5
    assert any("mass_mean" in note for note in found.notes if note.startswith("panel, variant - twin"))


def test_a_panel_that_is_no_more_than_the_null_is_not_told() -> None:
    """Both the variant and the null arm move a reading as much: a seed's doing, not the variant's."""
    base = [{"a": [0.0, 0.1, 0.2, 0.3], "b": [1.0, 1.1, 1.0, 1.1]} for _ in range(2)]
    moved = [{"a": [x + 1.0 for x in one["a"]], "b": [x + 1.0 for x in one["b"]]} for one in base]
    null = [{"a": [x + 2.0 for x in one["a"]], "b": one["b"]} for one in base]
    rows, notes = _panels.compared(
        {"variant": moved, "twin": base, "null": null}, twin="twin", nulls=["null"], seeds=[0, 1]
    )
    assert {row["reading"] for row in rows} == {"a", "b"}
    assert "b +1" in notes[0]
    assert "a +1" not in notes[0]
    rows, notes = _panels.compared({"variant": [{}], "twin": base[:1]}, twin="twin", nulls=[], seeds=[0])
    assert (rows, notes[0][:23]) == ([], "the panel was not read:")


def test_rows_that_do_not_sum_to_one_are_told() -> None:
    """Readings of a sigmoid's attention are no shares of a row: which arms those are stands beside them."""
    runs = {
        arm: [{"mass_mean": [mass, mass + 0.5 * (mass > 1)], "kl_mean": [1.0, 2.0]}]
        for arm, mass in (("variant", 4.0), ("twin", 1.0), ("null", 1.0))
    }
    notes = _panels.compared(runs, twin="twin", nulls=["null"], seeds=[0])[1]
    [said] = [note for note in notes if note.startswith("a row of attention sums to ")]
    assert "variant 4.25, twin 1, null 1: alpha, previous_token and induction are sums of attention there" in said
    even = {arm: [{"mass_mean": [1.0, 1.0]}] for arm in runs}
    assert not any("a row" in note for note in _panels.compared(even, twin="twin", nulls=["null"], seeds=[0])[1])


def test_how_much_of_the_documents_was_read_is_told() -> None:
    for steps, said in (
        (2, "trained on 8 of 22 documents, each once, scored on 2 others"),
        (11, "trained on 22 documents, each read 2 times"),
    ):
        notes = pb.train.variant(lent("llama"), texts(), seeds=1, plan={**PLAN, "steps": steps}).notes
        assert any(note.startswith(said) for note in notes)


def test_a_curve_is_what_shorter_runs_end_with() -> None:
    """Readings before steps 0 and 1: those of runs of no step and of one, since batches follow from seed and step alone; the last is the run's own."""
    train, held = split(24, 0.1)
    ends = []
    for steps in (2, 1, 0):
        plan = plan_of({**PLAN, "panel": 1, "curve": 1, "steps": steps})
        some = Lab(lent("llama"), *([[texts()[i]] for i in places] for places in (train, held)), plan)
        ends.append((some, run_of(some, "twin", Arm(), 0, Kept(None, Path(), {}))))
    table = curves(*ends[0][:1], {("twin", 0): ends[0][1]})["curves"]
    rows = {(row["step"], row["reading"]): row["value"] for row in table if (row["arm"], row["seed"]) == ("twin", 0)}
    assert len(rows) == len(table)
    assert sorted({step for step, _ in rows}) == [0, 1, 2]
    assert {"alpha_mean", "induction_highest", "kl_mean"} <= set(ends[0][1].panel)
    for step, (_, run) in zip((2, 1, 0), ends, strict=True):
        for reading, value in {**_panels.means(run.panel), "loss": float(run.scores.mean())}.items():
            assert close(rows[step, reading], value, of=10.0, dtype=torch.float32), reading
    assert rows[0, "loss"] != rows[1, "loss"]
    assert curves(lab(), {("twin", 0): ends[0][1]}) == {}


def test_a_variant_that_changes_nothing_says_so() -> None:
    """Units are permuted where a document is one unit; of three units they are."""
    for documents, nothing in ((texts(8), True), ([[ids[:4], ids[4:8], ids[8:]] for ids in texts(8)], False)):
        found = pb.train.variant(lent("llama"), documents, objective="spt", seeds=1, plan=PLAN)
        assert any(note.startswith("variant and twin end with the same weights") for note in found.notes) == nothing
