"""The folder of results: what is whole is listed as what it is, what is damaged as damaged, and no name leads out of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import patchbay as pb
from patchbay.app.folder import Results
from patchbay.errors import PatchbayError
from patchbay.results.result import Result

MADE = Result(
    [[1.0, 2.0]], ("layer", "head"), "logits", provenance={"method": "find.made", "date": "2020-01-02T03:04:05+00:00"}
)


def truncated(folder: Path) -> None:
    path = folder / "arrays.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def no_json(folder: Path) -> None:
    (folder / "result.json").write_text("{")


def other_version(folder: Path) -> None:
    record = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(record | {"version": 99}))


def half(folder: Path) -> None:
    (folder / "arrays.safetensors").unlink()


def no_provenance(folder: Path) -> None:
    record = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(record | {"provenance": 7}))


DAMAGE = {
    truncated: "truncated or altered",
    no_json: "is damaged or no Patchbay file",
    other_version: "version 99",
    half: "lacks arrays.safetensors",
    no_provenance: "",
}


def test_what_is_damaged_is_listed_as_damaged_and_the_rest_works(tmp_path: Path) -> None:
    MADE.save(tmp_path / "whole")
    for how in DAMAGE:
        how(MADE.save(tmp_path / "deep" / how.__name__))
    (tmp_path / "bad.knob").write_bytes(b"\xff" * 40)
    (tmp_path / "empty.knob").write_bytes(b"")
    listed = {one["name"]: one for one in Results(tmp_path).listed()}
    assert listed["whole"] | {"kind": "result", "method": "find.made", "about": "logits"} == listed["whole"]
    assert listed["whole"]["date"].startswith("2020-01-02")
    for how, said in DAMAGE.items():
        one = listed.pop(f"deep/{how.__name__}")
        assert one["kind"] == "damaged", how
        assert said in one["message"]
        if how is not no_provenance:
            with pytest.raises(PatchbayError):
                Results(tmp_path).document(one["name"])
    assert {name for name, one in listed.items() if one["kind"] == "damaged"} == {"bad.knob", "empty.knob"}
    assert Results(tmp_path).document("whole")["name"] == "whole"


def test_a_changed_folder_is_read_anew(tmp_path: Path) -> None:
    results = Results(tmp_path)
    folder = MADE.save(tmp_path / "one")
    assert results.listed()[0]["kind"] == "result"
    truncated(folder)
    assert results.listed()[0]["kind"] == "damaged"
    shutil.rmtree(folder)
    assert results.listed() == []


def test_knobs_are_listed_and_read(tmp_path: Path) -> None:
    pb.turn.scale("L1.H1", 0.0).save(tmp_path / "off.knob")
    results = Results(tmp_path)
    (one,) = results.listed()
    assert (one["kind"], one["method"]) == ("knob", "turn.scale")
    assert results.document("off.knob")["edits"]


@pytest.mark.parametrize("name", ["..", "../secret", "a/../../secret", "/etc", "link", "link/inner", ".", "", "a\0b"])
def test_no_name_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    MADE.save(tmp_path / "secret")
    MADE.save(tmp_path / "outside" / "inner")
    folder = tmp_path / "results"
    (folder / "a").mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path / "outside", target_is_directory=True)
    with pytest.raises(PatchbayError):
        Results(folder).read(name)
    assert Results(folder).listed() == []


def test_a_free_name_has_the_next_number(tmp_path: Path) -> None:
    results = Results(tmp_path)
    assert results.free("lens") == "lens"
    MADE.save(tmp_path / "lens")
    pb.turn.scale("L1.H1", 0.0).save(tmp_path / "lens-2.knob")
    assert results.free("lens") == "lens-3"
    assert results.free("lens", {"lens-3"}) == "lens-4"


def test_the_server_starts_without_torch() -> None:
    code = "import sys, patchbay.app.opened, patchbay.app.pages, patchbay.app.runs; from patchbay.app import forms; forms.about(); forms.form('find', 'logit_lens'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
