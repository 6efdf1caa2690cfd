"""The commands that use knobs: generate before and after, one knob for each prompt; show and export of knob files."""

from __future__ import annotations

import os
import pty
import re
from pathlib import Path

import pytest
import torch

import patchbay as pb
from patchbay.tiny import twins
from tests.commands import answer, patchbay
from tests.forked import start

LAND = "The capital of Lolavia is"


@pytest.fixture(scope="module")
def model() -> pb.Model:
    return pb.load("tiny")


@pytest.fixture(scope="module")
def knobs(model: pb.Model, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A head turned round, with a proof in its file, and a vector that steers."""
    folder = tmp_path_factory.mktemp("knobs")
    head = pb.turn.scale(["L1.H3"], -2.0, model=model)
    task = pb.tasks.facts_in_context(model, 8)
    head = head.with_evidence(
        dose_response=pb.measure.dose_response(model, task, head, strengths=[0.0, 1.0, 2.0], draws=0)
    )
    vector = 4 * torch.randn(128, generator=torch.Generator().manual_seed(0))
    steer = pb.Knob("steer", [pb.add(model.layers[1].resid_out, vector)], 1.0, head.provenance)
    return [str(head.save(folder / "head.knob")), str(steer.save(folder / "steer.knob"))]


def test_one_knob_for_each_prompt_as_rows_of_one_batch(model: pb.Model, knobs: list[str]) -> None:
    """As many of both, one prompt for many knobs, one knob for many prompts; equal to each by itself."""
    texts = [LAND, "Emma asked Kate about the"]
    head, steer = (pb.load_knob(path) for path in knobs)
    both = answer(
        "generate", "tiny", *texts, "--each", "--knob", knobs[0], "--knob", f"{knobs[1]}@2", "--max-new-tokens", "4"
    )
    for row, text, knob in zip(both["generations"], texts, (head, steer.at(2.0)), strict=True):
        assert row == {
            "prompt": text,
            "before": model.generate(text, 4),
            "after": model.generate(text, 4, edits=[knob]),
        }
    assert [len(edits) for edits in both["edits"]] == [1, 1]
    fan = answer(
        "generate",
        "tiny",
        LAND,
        "--each",
        *(arg for s in (-2, 0, 3) for arg in ("--knob", f"{knobs[0]}@{s}")),
        "--max-new-tokens",
        "4",
    )
    for row, s in zip(fan["generations"], (-2.0, 0.0, 3.0), strict=True):
        assert row["after"] == model.generate(LAND, 4, edits=[head.at(s)])
    together = answer("generate", "tiny", LAND, "--knob", knobs[0], "--knob", knobs[1], "--max-new-tokens", "4")
    assert together["generations"][0]["after"] == model.generate(LAND, 4, edits=[head, steer])
    wrong = patchbay("generate", "tiny", *texts, "--each", *(arg for _ in range(3) for arg in ("--knob", knobs[0])))
    assert wrong.exit_code == 2
    assert "2 prompts and 3 knobs" in wrong.stderr
    assert "no --knob was given" in patchbay("generate", "tiny", LAND, "--each").stderr


def test_generate_says_the_strength_in_force(knobs: list[str]) -> None:
    """A vector prints alike at every strength: the strength stands beside it, and at the neutral one that nothing is edited."""
    steer = pb.load_knob(knobs[1])
    for strength, said in (
        ("4", "at strength 4: add("),
        ("-0.5", "at strength -0.5: add("),
        ("0", "at strength 0: no edits"),
    ):
        done = patchbay("generate", "tiny", LAND, "--knob", f"{knobs[1]}@{strength}", "--max-new-tokens", "1")
        assert f"{steer.name} {said}" in " ".join(done.stdout.split())
    held = answer("generate", "tiny", LAND, "--knob", f"{knobs[1]}@4", "--max-new-tokens", "1")
    assert held["knobs"] == [{"name": steer.name, "strength": 4.0, "neutral": 0.0}]


def test_sampling_draws_the_same_before_and_after(knobs: list[str]) -> None:
    """At its neutral strength a knob changes nothing, also where tokens are drawn."""
    rows = answer(
        "generate",
        "tiny",
        LAND,
        "Emma",
        "--knob",
        f"{knobs[0]}@1",
        "--temperature",
        "1",
        "--seed",
        "3",
        "--max-new-tokens",
        "5",
    )
    assert all(row["before"] == row["after"] for row in rows["generations"])


def test_it_streams_to_a_terminal(knobs: list[str], tmp_path: Path) -> None:
    """On a terminal the text grows token by token; what is left at the end is the table."""
    main, side = pty.openpty()
    command = ["-m", "patchbay", "generate", "tiny", LAND, "--knob", knobs[0], "--max-new-tokens", "6"]
    with open(os.devnull, "wb") as nothing:
        child = start(
            *command, cwd=tmp_path, stdout=side, stderr=nothing, env={"COLUMNS": "120", "TERM": "xterm-256color"}
        )
    os.close(side)
    seen = b""
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:  # the terminal is closed when the child ends
            break
        if not piece:
            break
        seen += piece
    os.close(main)
    assert os.waitpid(child, 0)[1] == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert text.count("before") >= 2  # drawn, then drawn again
    assert LAND in text


def test_show_says_what_a_file_holds(model: pb.Model, knobs: list[str]) -> None:
    card = answer("knob", "show", knobs[0])
    assert card["edits"] == ["scale(L1.H3.z, 1)"]
    assert card["now"] == ["scale(L1.H3.z, -2)"]
    assert (card["strength"], card["neutral"]) == (-2.0, 1.0)
    assert card["made_on"]["fingerprint"] == model.fingerprint
    assert card["evidence"]["dose_response"]["method"] == "measure.dose_response"
    shown = patchbay("knob", "show", f"{knobs[0]}@1").stdout
    assert model.fingerprint in shown
    assert "at this strength: no edits" in shown
    assert "dose_response" in shown
    assert patchbay("knob", "--help").stdout.count("\n") > 5


def test_export_writes_each_form(model: pb.Model, knobs: list[str], tmp_path: Path) -> None:
    made = {form: str(tmp_path / form) for form in ("checkpoint", "lora", "gguf", "vector")}
    folded = answer("knob", "export", knobs[0], "tiny", "-o", made["checkpoint"])
    assert folded["error"] < 1e-4
    assert folded["changed"] == ["transformer.h.1.attn.c_proj"]
    other = pb.load(made["checkpoint"])
    assert other.generate(LAND, 6) == model.generate(LAND, 6, edits=[pb.load_knob(knobs[0])])
    answer("knob", "export", knobs[0], "tiny", "-o", made["lora"], "--form", "lora")
    assert (tmp_path / "lora" / "adapter_config.json").is_file()
    for form, file in (("gguf", "control-vector.gguf"), ("vector", "steering.safetensors")):
        assert file in answer("knob", "export", f"{knobs[1]}@-2", "tiny", "-o", made[form], "--form", form)["files"]
        assert (
            "only adds"
            in patchbay("knob", "export", knobs[0], "tiny", "-o", str(tmp_path / "no"), "--form", form).stderr
        )
    again = patchbay("knob", "export", knobs[0], "tiny", "-o", made["lora"], "--form", "lora")
    assert again.exit_code == 2
    assert "overwrite" in again.stderr
    assert (
        patchbay("knob", "export", knobs[0], "tiny", "-o", made["lora"], "--form", "lora", "--overwrite").exit_code == 0
    )


def test_other_weights_only_when_asked(model: pb.Model, knobs: list[str], tmp_path: Path) -> None:
    twin = twins.twin("gpt2", n_layer=3, n_head=4)
    twin.save_pretrained(tmp_path / "twin")
    here = pb.load(tmp_path / "twin").fingerprint
    args = ("knob", "export", knobs[0], str(tmp_path / "twin"), "-o", str(tmp_path / "out"))
    refused = patchbay(*args)
    assert refused.exit_code == 2
    assert model.fingerprint in refused.stderr
    assert here in refused.stderr
    assert not (tmp_path / "out").exists()
    done = patchbay(*args, "--other-weights")
    assert done.exit_code == 0
    assert model.fingerprint in done.stderr
    assert here in done.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "no knob, or a damaged one"), (b"not a knob at all", "no knob, or a damaged one"), (None, "not there")],
)
def test_files_that_are_no_knobs(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "x.knob"
    if content is not None:
        path.write_bytes(content)
    done = patchbay("knob", "show", str(path))
    assert done.exit_code == 2
    assert said in done.stderr
    assert "Traceback" not in done.output
