"""A form is its command: the same fields, words and defaults, and a filled one means the command line that it says."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
import pytest

from patchbay.app import forms
from patchbay.cli import options
from patchbay.errors import PatchbayError


def test_every_method_has_a_form_with_the_words_of_its_help() -> None:
    for room in options.rooms():
        for name in options.methods(room):
            made = forms.form(room, name)
            command = forms.command(room, name)
            expected = {str(one.name): one for one in command.params if one.name not in forms.ELSEWHERE}
            assert {field["name"] for field in made["fields"]} == set(expected), name
            for field in made["fields"]:
                said = getattr(expected[field["name"]], "help", None)
                assert said is None or said.startswith(field["word"]), (name, field)
                assert field["kind"] != "choice" or field["choices"]
                assert field["initial"] in ("", *field["choices"]) or field["kind"] != "choice", (name, field)


def test_what_a_server_decides_is_no_field() -> None:
    fields = {field["name"] for field in forms.form("prove", "ablation")["fields"]}
    assert not fields & {
        "out",
        "keep",
        "overwrite",
        "trust_remote_code",
        "device",
        "plot",
        "figure",
        "report",
        "executor",
    }
    for name in ("out", "keep", "trust_remote_code", "nonsense"):
        with pytest.raises(PatchbayError, match=f"no field {name}"):
            forms.arguments("prove", "ablation", {name: "x"}, Path("/nowhere"))


def test_a_filled_form_is_its_command_line(tmp_path: Path) -> None:
    given = {"task": "facts_in_context:n=8", "parts": "L1.H3,L2.H0", "seed": "3", "metric": "-x", "n": ""}
    words = forms.arguments("prove", "ablation", given, tmp_path)
    read = forms.command("prove", "ablation").make_context("ablation", ["tiny", *words]).params
    assert read["task"] in ("facts_in_context:n=8", ("facts_in_context:n=8",))
    assert read["parts"] == ("L1.H3,L2.H0",)
    assert read["seed"] == 3
    assert read["metric"] == "-x"
    assert read["n"] is None
    line = shlex.split(forms.spoken("prove", "ablation", "tiny", words, "out"))
    assert line[:4] == ["patchbay", "prove", "ablation", "tiny"]
    assert line[4:-2] == words


def test_a_flag_is_given_where_it_differs() -> None:
    flags = [(room, name, one) for room in options.rooms() for name in options.methods(room)
             for one in forms.command(room, name).params if one.secondary_opts and one.name not in forms.ELSEWHERE]  # fmt: skip
    assert flags
    for room, name, one in flags:
        for value in (True, False):
            words = forms.arguments(room, name, {str(one.name): value}, Path("/nowhere"))
            assert words == ([] if value == bool(one.default) else [(one.opts if value else one.secondary_opts)[0]])


@pytest.mark.parametrize(
    "text",
    [
        "{0}/secret.txt",
        "@{0}/secret.txt",
        "{0}/secret.txt:prompt=q",
        "../secret.txt",
        "a,../secret.txt",
        "{0}/secret.txt@2",
        "./link",
        "facts_in_memory:table={0}/secret.txt",
        "speculative(kept='{0}/secret.txt')",
        "text_loss={0}/secret.txt",
        '{{"table": "{0}/secret.txt"}}',
        "./" * 600 + "../secret.txt",
    ],
)
def test_a_field_reads_no_file_outside_the_results(text: str, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret.txt")
    (folder / "own.txt").write_text("mine")
    with pytest.raises(PatchbayError, match="outside the folder"):
        forms.arguments("prove", "ablation", {"prompts": text.format(tmp_path)}, folder)
    assert forms.arguments("prove", "ablation", {"prompts": f"{folder}/own.txt"}, folder) == [
        f"--prompts={folder}/own.txt"
    ]
    assert forms.arguments("find", "logit_lens", {"prompts": "and/or, ../ no file"}, folder)


@pytest.mark.parametrize(
    "asked",
    [("find", "nothing"), ("nowhere", "x"), ("find", "../prove/ablation"), ("find", "_attention"), ("find", "all")],
)
def test_what_is_no_method_is_refused(asked: tuple[str, str]) -> None:
    with pytest.raises(PatchbayError, match="no method"):
        forms.form(*asked)


def test_values_of_other_kinds_are_refused() -> None:
    for value in ([], {}, "x" * (forms.LONGEST + 1)):
        with pytest.raises(PatchbayError, match="is text"):
            forms.arguments("prove", "ablation", {"task": value}, Path("/nowhere"))
    with pytest.raises(PatchbayError, match="takes text"):
        forms.arguments("prove", "ablation", {"task": True}, Path("/nowhere"))
    assert isinstance(forms.command("prove", "ablation"), click.Command)
