"""What leaves the command line: any encoding, any argument, and refusals in the words of the command line."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from patchbay.cli import cli, main
from patchbay.draw import papers_shown
from patchbay.papers import catalogue

FIND = ["find", "previous-token-heads", "tiny", "--task", "repeated_tokens", "--n", "2"]


def run(*args: str | bytes, **environment: str) -> subprocess.CompletedProcess[bytes]:
    whole = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-m", "patchbay", *args], capture_output=True, env=whole, check=False)


def said_in(encoding: str, args: list[str], monkeypatch: pytest.MonkeyPatch) -> bytes:
    """What the command writes to an output of this encoding, as the console script runs it, in this process."""
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    pressed = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["patchbay", *args])
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGINT, pressed)
    assert ended.value.code == 0
    out.flush()
    return out.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_output_in_an_encoding_that_lacks_letters_is_whole(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables have bars and lines that these encodings lack."""
    assert "L1.H" in said_in(encoding, FIND, monkeypatch).decode(encoding)
    listed = run("papers", "--json", PYTHONIOENCODING=encoding, PATCHBAY_PAPERS="absent.sqlite")
    titles = {entry["title"] for entry in json.loads(listed.stdout.decode(encoding))}
    assert titles == {entry["title"] for entry in catalogue.papers()}


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_card_with_contexts_is_whole_in_any_encoding(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts.txt").write_text("The capital of Lolavia is Budurg.\n", encoding="utf-8")
    said = said_in(encoding, ["show", "tiny", "L1.N5", "--texts", str(tmp_path / "texts.txt")], monkeypatch).decode(
        encoding
    )
    assert "highest activation of 7 tokens" in " ".join(said.split())
    assert ("\u00ab" in said) == (encoding != "ascii")


@pytest.mark.filterwarnings("always")
def test_a_warning_is_one_line_without_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said_in("utf-8", ["tasks", "facts_in_memory", "tiny", "--n", "1"], monkeypatch)
    assert capsys.readouterr().err == ""
    said_in("utf-8", ["generate", "tiny", "The capital of Zorland", "--max-new-tokens", "1"], monkeypatch)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "Zorland" in line] == [
        "Warning: prompt 0 holds 1 tokens '<unk>', which stand for text that the tokenizer does not know: ' Zorland'"
    ]
    assert not [line for line in lines if ".py:" in line or "encode(" in line]


def test_without_colour_and_on_any_width_nothing_is_coloured_or_fails() -> None:
    for width in ("1", "20", "400"):
        done = run("papers", "sink", NO_COLOR="1", COLUMNS=width)
        assert done.returncode == 0, done.stderr
        assert b"\x1b[" not in done.stdout


def test_an_argument_that_is_no_text_is_refused() -> None:
    done = run("find", b"\xff\xfe")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"Error: the argument b'\\xff\\xfe' is not UTF-8\n"


def test_refusals_name_options_as_they_are_written_here(tmp_path: Path) -> None:
    asked = ["prove", "ablation", "tiny", "--task", "repeated_tokens", "--n", "4", "--parts", "L1.H1", "--top", "0"]
    for args, said in ((asked, "--top 0: at least one part"), (["replay", str(tmp_path), "--rtol", "-1"], "--rtol")):
        done = CliRunner().invoke(cli, args)
        assert done.exit_code == 2
        assert said in done.stderr


def test_a_figure_is_replaced_only_when_asked(tmp_path: Path) -> None:
    figure = tmp_path / "a.png"
    figure.write_text("mine")
    refused = CliRunner().invoke(cli, [*FIND, "--plot", str(figure)])
    assert refused.exit_code == 2
    assert "is already there; --overwrite replaces it" in refused.stderr.replace("\n", " ")
    assert figure.read_text() == "mine"


def test_one_paper_is_one_paper() -> None:
    assert papers_shown.papers_table(catalogue.papers()[:1], 5).title == "1 paper"
    assert papers_shown.papers_table(catalogue.papers()[:2], 5).title == "2 papers"


def test_a_knob_has_a_page_too_with_its_evidence(tmp_path: Path) -> None:
    page = tmp_path / "pages.html"
    args = ["turn", "steer", "tiny", "--task", "indirect_object", "--n", "4", "--report", str(page)]
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert "add(" in text
    assert "turn.steer" in text
    assert "Where the numbers came from" in text
    assert "<script" not in text
    wrong = CliRunner().invoke(cli, [*FIND, "--report", str(tmp_path / "page.txt")], standalone_mode=False)
    assert "cannot write a report" in str(wrong.exception)
