"""replay and diff: a recorded call made again, on a model small enough to see through and on random twins."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import patchbay as pb
from patchbay.results import method as method_module
from patchbay.results.method import method
from patchbay.results.replay import diff, find_method, replay
from patchbay.results.result import Result, load_result
from patchbay.signal.port import Part, PatchbayError
from patchbay.tiny.twins import twin
from tests.fakes import Model, Task
from tests.tolerance import close


@pytest.fixture
def replayable(installed, monkeypatch):
    """`installed`, and fakes for what a replay loads."""
    module = sys.modules["patchbay.results.replay"]
    monkeypatch.setattr(module, "load", lambda source: Model(source=source))
    monkeypatch.setattr(module, "Task", Task)
    return installed


# --- replay -----------------------------------------------------------------------------------------


def test_a_replay_of_a_saved_result_agrees(replayable, tmp_path):
    result = replayable()(Model(), Task(3), scale=0.5, parts=["L0.H1"], seed=4)
    again = replay(load_result(result.save(tmp_path / "r")))
    assert again
    assert again.agrees
    assert again.largest == 0.0
    assert again.same_model
    assert again.notes == ()
    assert again.result.provenance["options"] == result.provenance["options"]
    assert str(again) == "find.weights: the replay agrees; largest difference 0"


def test_a_replay_on_another_model_says_so(replayable):
    result = replayable()(Model(), Task(3))
    again = replay(result, Model(seed=1))
    assert not again
    assert not again.same_model
    assert again.largest > 0.1
    assert "does NOT agree" in str(again)
    assert "model fingerprint was" in str(again)
    assert "score differs by up to" in str(again)


def test_a_replay_notices_altered_numbers_and_other_versions(replayable):
    result = replayable()(Model(), Task(3))
    result.values[0, 0] += 1e-3
    result.provenance["versions"] = {**result.provenance["versions"], "torch": "1.0"}
    again = replay(result)
    assert not again
    assert again.largest == pytest.approx(1e-3, rel=1e-2)
    assert any("version of torch was 1.0" in note for note in again.notes)
    assert replay(result, rtol=0.1)


def test_a_replay_rebuilds_prompts_and_parts_of_results(replayable):
    @method(paper="x")
    def count(model: Model, prompts: list[str], *, of: Result | Sequence[Part]) -> Result:
        parts = of.top(2) if isinstance(of, Result) else of[:2]
        return Result(torch.tensor([[float(len(prompts[0])), float(parts[0].index)]]), unit=type(prompts).__name__)

    count.__wrapped__.__module__ = "patchbay.find.count"
    named = replayable(method(paper="x")(count.__wrapped__), "count")
    result = named(Model(), ["abc"], of=Result(torch.tensor([[1.0, 9.0]]), provenance={"method": "find.it"}))
    again = replay(result)
    assert again
    assert again.notes == ("option 'of' was a Result of find.it; replayed with its 2 top parts (no method made it)",)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "os.system"}, "'os.system' names no method"),
        ({"method": "patchbay.cli"}, "names no method"),
        ({"method": "find.__init__"}, "names no method"),
        ({"method": "find.weights.weights"}, "names no method"),
        ({"method": "find.nothing_like_it"}, "no method 'find.nothing_like_it'"),
        ({"options": {"size": 1}}, "no option 'size'"),
        (
            {"options": {"scale": {"tensor": [3], "dtype": "torch.float32", "sha256": ""}}},
            "option 'scale' held a tensor",
        ),
        ({"options": {"scale": {"result": "find.x", "parts": []}}}, "was a Result of find.x, which could not be made"),
        ({"model": {"source": "", "fingerprint": ""}}, r"pass it, replay\(result, model\)"),
    ],
)
def test_what_cannot_be_replayed_is_said(replayable, change, says):
    result = replayable()(Model(), Task(3))
    result.provenance.update(change)
    with pytest.raises(PatchbayError, match=says):
        replay(result)


def test_only_methods_are_found(replayable, monkeypatch):
    replayable()
    assert find_method("find.weights").paper == "nobody2020"
    monkeypatch.setitem(sys.modules, "patchbay.find.plain", SimpleNamespace(plain=lambda: None))
    with pytest.raises(PatchbayError, match="not a method"):
        find_method("find.plain")
    with pytest.raises(PatchbayError, match="does not say which method"):
        replay(Result(torch.zeros(1, 1)))
    assert "weights" not in vars(method_module)  # nothing is registered


# --- what stood in the options ------------------------------------------------------------------------


@functools.cache
def lent(seed: int = 0) -> pb.Model:
    return pb.load(twin("gpt2", seed=seed))


@functools.cache
def prompts(seed: int = 0, n: int = 6) -> pb.Task:
    """Prompts with twins of their own length."""
    ids = torch.randint(3, 60, (2, n, 7), generator=torch.Generator().manual_seed(seed)).tolist()
    right = [(3 + i) % 9 for i in range(n)]
    return pb.Task(
        f"t{seed}", ids[0], right, [[20 + i] for i in range(n)], [[*a[:6], b[6]] for a, b in zip(*ids, strict=True)]
    )


def kept(result: Result, tmp_path: Path) -> Result:
    return load_result(result.save(tmp_path / "kept"))


def test_tasks_among_the_options_are_made_again(tmp_path):
    knob = pb.Knob("turn", [pb.scale(Part(1, "attn").port(), 1.0)], 1.0)
    others = {"second": prompts(1), "model": prompts(2, 4)}  # whatever their names
    result = pb.measure.dose_response(lent(), prompts(), knob, strengths=[0.0, 2.0], others=others, draws=1)
    again = replay(kept(result, tmp_path), lent())
    assert again, str(again)
    assert again.largest == 0
    assert again.notes == ()
    assert again.result["others"].equal(result["others"])


def test_several_tasks_are_made_again(tmp_path):
    given = [prompts(0, 8), prompts(1, 8)]
    result = pb.prove.desiderata_mask(lent(), given, steps=2, draws=1)  # type: ignore[arg-type]
    again = replay(kept(result, tmp_path), lent())
    assert again, str(again)
    assert again.largest == 0


def test_a_result_among_the_options_is_made_again_by_its_own_method(tmp_path):
    """Its parts alone would not do: an edge has none, and prompts that ranked the parts must be left out again."""
    model, task = lent(), prompts(n=8)
    edges = pb.prove.edge_attribution(model, task)
    heads = pb.find.direct_logit_attribution(model, task[:4])
    for name, result in {
        "edges": pb.prove.circuit(model, task, scores=edges, draws=2),
        "curve": pb.prove.knockout_curve(model, task, heads, draws=2),
        "parts": pb.prove.ablation(model, task, heads, top=2, draws=2),
    }.items():
        again = replay(kept(result, tmp_path / name), model)
        assert again, str(again)
        assert again.largest == 0
        assert again.notes == ()


def test_a_result_that_can_no_longer_be_made_gives_its_parts(tmp_path):
    heads = pb.find.direct_logit_attribution(lent(), prompts())
    heads.provenance["method"] = "find.no_longer_there"
    again = replay(kept(pb.prove.ablation(lent(), prompts(), heads, top=2, draws=2), tmp_path), lent())
    assert again
    assert "replayed with its 100 top parts" in again.notes[0] or "replayed with its 8 top parts" in again.notes[0]
    assert "no method 'find.no_longer_there'" in again.notes[0]


def test_a_result_that_ranks_otherwise_when_made_again_is_noted():
    heads = pb.find.direct_logit_attribution(lent(), prompts())
    result = pb.prove.ablation(lent(), prompts(), heads, top=2, draws=2)
    result.provenance["options"]["parts"]["parts"].reverse()
    assert replay(result, lent()).notes == (
        "option 'parts': find.direct_logit_attribution was run again and ranks other parts",
    )


def test_a_second_model_comes_from_its_source_or_is_asked_for(tmp_path):
    first, second = lent(), lent(1)
    result = kept(pb.prove.cross_model_patching(first, second, prompts(), ["L1.H2"], draws=1), tmp_path / "a")
    with pytest.raises(PatchbayError, match=r"option 'tuned' held a model that was lent.*options=\{'tuned': ...\}"):
        replay(result, first)
    again = replay(result, first, options={"tuned": second})
    assert again, str(again)
    assert again.largest == 0
    other = replay(result, first, options={"tuned": lent(2)})
    assert not other
    assert any(note.startswith("option tuned was {'model'") for note in other.notes)
    with pytest.raises(
        PatchbayError, match=r"options=\['tunde'\]: not recorded of prove.cross_model_patching, which has"
    ):
        replay(result, first, options={"tunde": second})
    second.hf.save_pretrained(tmp_path / "second")
    result.provenance["options"]["tuned"]["model"]["source"] = str(tmp_path / "second")
    assert replay(result, first)


# --- diff -------------------------------------------------------------------------------------------


def test_diff_subtracts_and_says_what_else_differs(replayable):
    function = replayable()
    first, second = function(Model(), Task(3)), function(Model(seed=1), Task(2))
    result = diff(first, second)
    assert torch.equal(result.values, first.values.double() - second.values.double())
    assert torch.equal(result["second"], second.values.double())
    assert result.unit == "logits"
    assert len(result.notes) == 2
    assert "model fingerprints differ" in result.notes[0]
    assert "task differ in " in result.notes[1]
    assert "[[" not in result.notes[1]
    first.provenance |= {"model": second.provenance["model"], "options": {"n": 1, "long": [0] * 40, "same": 3}}
    second.provenance |= {"task": first.provenance["task"], "options": {"n": 2, "long": [1] * 40, "same": 3}}
    assert diff(first, second).notes == ("options differ in n (1 against 2), long",)
    first, second = function(Model(), Task(3)), function(Model(seed=1), Task(2))
    assert diff(first, first).notes == ()
    assert (diff(first, first).values == 0).all()


def test_diff_refuses_other_axes_units_and_parts(tmp_path):
    ones = torch.ones(2)
    base = Result(ones, ("part",), "nats", parts=["L0", "L1"])
    for other, says in [
        (Result(ones, ("layer",), "nats"), "axes differ"),
        (Result(torch.ones(3), ("part",), "nats", parts=["L0", "L1", "L2"]), "sizes differ"),
        (Result(ones, ("part",), "nats", parts=["L0", "L2"]), "differ: .*L1.*against.*L2"),
        (Result(ones, ("part",), "logits", parts=["L0", "L1"]), "unit differ: nats against logits"),
    ]:
        with pytest.raises(PatchbayError, match=says):
            diff(base, other)
    assert load_result(diff(base, base).save(tmp_path / "d")).parts == base.parts


def test_a_tolerance_below_nothing_is_refused(replayable):
    with pytest.raises(PatchbayError, match="rtol=-1: the allowed difference"):
        replay(replayable()(Model(), Task(3)), rtol=-1)
    with pytest.raises(PatchbayError, match="rtol=nan"):
        replay(replayable()(Model(), Task(3)), rtol=float("nan"))


def test_a_difference_names_both_and_is_compared_with_chance():
    axes = ("layer", "head")

    def made(values, error, source):
        values = torch.tensor([values], dtype=torch.float64)
        return Result(
            {"score": (values, axes, "logits"), "standard_error": (torch.full_like(values, error), axes, "logits")},
            provenance={"method": "find.x", "model": {"source": source, "fingerprint": "f" * 16}},
        )

    result = diff(made([5.0, 1.0, float("nan")], 3.0, "before"), made([0.0, 1.0, 0.0], 4.0, "after"))
    assert result["z"][0, :2].tolist() == [1.0, 0.0]
    two_sided = math.erfc(1 / math.sqrt(2))  # one standard error away
    assert close(result["p"][0, 0], two_sided)
    assert close(result["p_adjusted"][0, 0], 2 * two_sided)
    assert result["p_adjusted"][0, 2].isnan()
    assert "first: find.x on before, ffffffffffff" in result.origin()
    assert "second: find.x on after, ffffffffffff" in str(result)
    assert result.provenance["second"]["model"]["source"] == "after"
