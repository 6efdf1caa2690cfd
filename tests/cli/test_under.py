"""`patchbay decode METHOD MODEL PROMPT...` under `--knob`, `--edit` and `--each`: the same numbers as in Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import patchbay as pb
from patchbay.cli import cli
from patchbay.knobs.rows import by_row

TEXTS = ["The capital of Lolavia is", "Emma asked Kate about the"]
CALL = ("decode", "contrastive-search", "tiny", *TEXTS, "--k", "3", "--max-new-tokens", "4")


def patchbay(*args: str) -> Result:
    return CliRunner().invoke(cli, list(args), prog_name="patchbay")


def tokens(*args: str) -> Any:
    done = patchbay(*args, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    return [row["text"] for row in told["tables"]["texts"]]


@pytest.fixture(scope="module")
def knob(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pb.turn.scale(["L1.H3"], -2.0, model=pb.load("tiny")).save(tmp_path_factory.mktemp("knob") / "head.knob")


def texts(*edits: Any) -> list[str]:
    model = pb.load("tiny")
    with model.edited(*edits):
        found = pb.decode.contrastive_search(model, TEXTS, k=3, max_new_tokens=4)
    return [row["text"] for row in found.tables["texts"]]


def test_prompts_stand_behind_the_model_and_knobs_act(knob: Path) -> None:
    turned = pb.load_knob(knob)
    assert tokens(*CALL) == texts()
    assert tokens(*CALL, "--knob", str(knob)) == texts(turned)
    assert tokens(*CALL, "--edit", "zero(L1.H3.z)") == texts(pb.zero("L1.H3.z"))
    each = tokens(*CALL, "--each", "--knob", f"{knob}@-9", "--knob", f"{knob}@1")
    assert each == texts(*by_row(pb.load("tiny"), [turned.at(-9.0), turned.at(1.0)]))
    assert each[1] == texts()[1]
    assert each[0] != texts()[0]


def test_an_amateur_is_a_model_or_a_knob(knob: Path) -> None:
    call = ("decode", "contrastive-decoding", "tiny", *TEXTS, "--max-new-tokens", "4", "--beta", "0.5", "--amateur")
    model = pb.load("tiny")
    for written, other in ((str(knob), pb.load_knob(knob)), ("tiny-llama", pb.load("tiny-llama"))):
        found = pb.decode.contrastive_decoding(model, other, TEXTS, beta=0.5, max_new_tokens=4)
        assert tokens(*call, written) == [row["text"] for row in found.tables["texts"]]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--each",), "--each is one knob for each prompt, and no --knob was given"),
        (("--each", "--knob", "KNOB"), "--each: 2 prompts and 1 knobs"),
        (("--prompts", "x.txt"), "prompts are written after the model, or given by --task or --prompts"),
    ],
)
def test_refusals(more: tuple[str, ...], says: str, knob: Path) -> None:
    done = patchbay(*CALL, *(str(knob) if one == "KNOB" else one for one in more))
    assert done.exit_code == 2
    assert says in done.output
