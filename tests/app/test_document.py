"""What the front end is sent is what the Result holds: every number, label and part, as strict JSON."""

from __future__ import annotations

import base64
import json
import math

import numpy as np
import pytest
import torch

import patchbay as pb
from patchbay.app import document as documents
from patchbay.app.document import document, slice_of
from patchbay.errors import PatchbayError
from patchbay.results.result import Result


def array(variable: dict) -> np.ndarray:
    kind = {"float32": "<f4", "float64": "<f8"}[variable["type"]]
    return np.frombuffer(base64.b64decode(variable["data"]), kind).reshape(variable["shape"])


def sample() -> Result:
    values = torch.tensor([[0.1, math.nan, -3.0], [math.inf, 1e-9, 2.0]], dtype=torch.float64)
    return Result(
        {
            "score": (values, ("layer", "head"), "logits"),
            "p": (torch.rand(2, 3), ("layer", "head"), "probability"),
            "ids": (torch.tensor([2**40 + 1, -7]), ("layer",), "token id"),
            "single": (0.25, (), "nats"),
        },
        tables={"rows": [{"text": "</script>\u2028", "value": math.nan, "part": pb.Part(0, "head", 1)}]},
        notes=["a note"],
        highlights=["L1.H2"],
        provenance={
            "method": "find.made",
            "options": {},
            "model": {"source": "tiny"},
            "task": {"name": "t", "clean": [[1], [2]]},
        },
    )


def test_arrays_are_the_results_own_to_the_last_bit() -> None:
    result = sample()
    made = json.loads(json.dumps(document(result), allow_nan=False))
    assert [one["name"] for one in made["variables"]] == list(result.variables)
    for one in made["variables"]:
        held = result[one["name"]]
        assert one["axes"] == list(result.axes_of(one["name"]))
        assert one["unit"] == result.units[one["name"]]
        assert np.array_equal(array(one).astype("f8"), held.double().numpy(), equal_nan=True)
        assert held.is_floating_point() or array(one).astype(np.int64).tolist() == held.tolist()
    assert (made["variables"][0]["low"], made["variables"][0]["high"]) == (-3.0, 2.0)


def test_rows_are_those_of_the_table_either_sign_first() -> None:
    result = sample()
    made = document(result)
    assert [row["part"] for row in made["rows"]] == [str(part) for part in result.top(by="abs")]
    assert made["measured"] == 5
    assert made["highlights"] == ["L1.H2"]
    assert made["tables"]["rows"] == {"rows": [{"text": "</script>\u2028", "value": None, "part": "L0.H1"}], "n": 1}
    assert ["task prompts", "2"] in made["provenance"]


def test_cells_and_positions_have_their_names(trained: pb.Model) -> None:
    result = pb.find.logit_lens(trained, "The capital of Lolavia is")
    made = document(result)
    named = {(str(row["layer"]), str(row["position"])): row["text"] for row in result.tables["cells"]}
    flat = [
        named[str(layer), str(place)] for layer in result.labels_of("layer") for place in result.labels_of("position")
    ]
    assert [text.replace("\u2423", " ") for text in made["names"]] == flat
    assert [label.split(" ", 1)[1].replace("\u2423", " ") for label in made["labels"]["position"]] == [
        "The",
        " capital",
        " of",
        " Lolavia",
        " is",
    ]


def test_a_large_array_stays_behind_and_comes_in_slices() -> None:
    result = Result(torch.arange(120.0).reshape(2, 3, 4, 5), ("layer", "head", "query", "key"), "attention")
    made = document(result, inline=119)["variables"][0]
    assert made["data"] is None
    assert (made["low"], made["high"]) == (0.0, 119.0)
    data, kind = slice_of(result, "score", [1, 2])
    assert kind == made["type"] == "float32"
    assert np.array_equal(np.frombuffer(data, "<f4").reshape(4, 5), result.values[1, 2].numpy())
    for fixed in ([1], [0, 3], [2, 0], [0, 0, 0]):
        with pytest.raises(PatchbayError, match="step"):
            slice_of(result, "score", fixed)


def test_a_long_ranking_says_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "ROWS", 3)
    made = document(Result(torch.tensor([[1.0, -5.0, 2.0, 4.0]]), ("layer", "neuron"), "logits"))
    assert [row["value"] for row in made["rows"]] == [-5.0, 4.0, 2.0]
    assert made["measured"] == 4


def test_the_call_makes_the_result_again(trained: pb.Model) -> None:
    result = pb.find.logit_lens(trained, "The capital of Lolavia is", batch_size=4)
    line = document(result)["python"].splitlines()[-1]
    assert "batch_size=4" in line
    assert eval(line, {"pb": pb, "model": trained}).equal(result)


def test_a_call_that_its_record_does_not_hold_is_a_replay(trained: pb.Model) -> None:
    task = pb.tasks.facts_in_context(trained, n=4)
    for result in (
        pb.find.direct_logit_attribution(trained, task),
        pb.find.direct_logit_attribution(trained, task[:2]),
    ):
        assert document(result, name="a/b")["python"].endswith("pb.replay(pb.load_result('a/b'))")
    assert document(Result([1.0], ("layer",)))["python"] == ""


def test_a_knob_comes_with_its_edits_and_evidence() -> None:
    plain = pb.turn.scale("L1.H1", 0.0)
    knob = pb.Knob("off", plain.edits, 0.5, plain.provenance, {"measured": sample()})
    made = json.loads(json.dumps(document(knob), allow_nan=False))
    assert (made["kind"], made["strength"], made["n_edits"]) == ("knob", 0.5, len(knob.edits))
    assert made["edits"] == [str(edit) for edit in knob.edits]
    assert made["evidence"]["measured"]["main"] == "score"
