"""Files of prompts at the command line: wherever a task, prompts or texts are given, one reader, one way to say its columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from click.testing import CliRunner

import patchbay as pb
from patchbay.cli import cli, reading
from patchbay.cli.prompt_files import read_prompts, read_texts
from patchbay.errors import PatchbayError
from patchbay.tiny import planted

NEUTRAL = list[str] | list[list[int]] | None  # as a method's signature has it
MADE = planted.induction()
PROMPTS, ANSWERS = MADE.truth["prompts"], MADE.truth["answers"]
WRONG = [" Sam" if answer != " Sam" else " Tom" for answer in ANSWERS]


@pytest.fixture(scope="module")
def model() -> pb.Model:
    return pb.load(MADE.model, tokenizer=MADE.tokenizer)


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    path = tmp_path / "quiz.csv"
    lines = ["id,question,answer,other", *(f'{i},"{p}",{a},{w}' for i, (p, a, w) in enumerate(zip(PROMPTS, ANSWERS, WRONG, strict=True)))]  # fmt: skip
    path.write_text("\r\n".join(lines), encoding="utf-16")
    return path


def test_a_file_is_a_task_wherever_one_is_read(model: pb.Model, quiz: Path) -> None:
    text = f"{quiz}:prompt=question,right=answer,wrong=other"
    task = pb.Task.from_prompts(model, PROMPTS, ANSWERS, WRONG, name="quiz")
    assert reading.read_task(text, model) == read_prompts(text, model) == task
    assert reading.read(json.dumps({"x": text}), dict[str, pb.Task] | None, "--others", model) == {"x": task}
    assert reading.read_task(text, model, n=2) == task[:2]
    assert read_prompts(f"{quiz}:prompt=question", model, texts=True) == PROMPTS
    with pytest.raises(PatchbayError, match="asked for n=0"):
        reading.read_task(text, model, n=0)


def test_both_flags_read_it(quiz: Path, tmp_path: Path) -> None:
    MADE.model.save_pretrained(tmp_path / "m")
    MADE.tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "a.txt").write_text("\n".join(PROMPTS[:2]))
    args = ["find", "direct-logit-attribution", str(tmp_path / "m"), "--json"]
    text = f"{quiz}:prompt=question,right=answer,wrong=other"
    found: list[Any] = [
        json.loads(CliRunner().invoke(cli, [*args, flag, text]).stdout) for flag in ("--task", "--prompts")
    ]
    assert found[0]["variables"] == found[1]["variables"]
    assert found[0]["table"][0]["part"] == MADE.truth["induction"]
    done = CliRunner().invoke(
        cli, ["find", "isotropy", str(tmp_path / "m"), "--prompts", str(tmp_path / "a.txt"), "--draws", "3", "--json"]
    )
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(cli, [*args, "--task", str(tmp_path / "none.csv")])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "could not read prompts from" in done.stderr


def test_texts_are_those_of_a_file_or_one_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        PatchbayError,
        match=r"--neutral: could not read prompts from neutral.txt: .*a text that is not .* is written \[\"...\"\]",
    ):
        reading.read("neutral.txt", NEUTRAL, "--neutral")
    Path("neutral.txt").write_text("One, two.\n Three\u2028four\n")
    for text in ("neutral.txt", "@neutral.txt", str(tmp_path / "neutral.txt")):
        assert reading.read(text, NEUTRAL, "--neutral") == ["One, two.", " Three\u2028four"]
    assert reading.read("One, two.", NEUTRAL, "--neutral") == ["One, two."]
    assert reading.read('["One, two.", "b"]', NEUTRAL, "--neutral") == ["One, two.", "b"]
    assert reading.read("[[1, 2], [3]]", NEUTRAL, "--neutral") == [[1, 2], [3]]
    Path("a.jsonl").write_text('{"text": "x", "id": 1}\n')
    assert read_texts("a.jsonl:prompt=text", "--neutral") == ["x"]
    (tmp_path / "texts").mkdir()
    for text, words in (("texts", "texts is a folder, and a file or texts are read"), ("[1, 2]", "is a list of no texts"), ("a.jsonl", "line 1: no column 'prompt'"), ("a.jsonl:prompt=", "columns are written"),
                        ("a.jsonl:prompt=test", "no column 'test'.*did you mean 'text'"), ("a.jsonl:form=jsno", "did you mean 'json")):  # fmt: skip
        with pytest.raises(PatchbayError, match=words):
            read_texts(text, "--neutral")


def test_contrast_pairs_are_two_files_of_any_lengths(tmp_path: Path) -> None:
    MADE.model.save_pretrained(tmp_path / "m")
    MADE.tokenizer.save_pretrained(tmp_path / "m")
    many, few = PROMPTS[:6], [" " + text.split(" ", 2)[2] for text in PROMPTS[1:6]]
    (tmp_path / "plus.jsonl").write_text("\n".join(map(json.dumps, many)))
    (tmp_path / "minus.csv").write_text("id,text\n" + "\n".join(f'{i},"{text}"' for i, text in enumerate(few)))
    sides = ["--positive", str(tmp_path / "plus.jsonl"), "--negative", f"{tmp_path / 'minus.csv'}:prompt=text"]
    done = CliRunner().invoke(cli, ["turn", "steer", str(tmp_path / "m"), *sides, "-o", str(tmp_path / "a.knob")])
    assert done.exit_code == 0, done.output
    saved = pb.load_knob(tmp_path / "a.knob")
    ours = pb.turn.steer(pb.load(str(tmp_path / "m")), positive=many, negative=few)
    assert saved.edits[0].value.tolist() == ours.edits[0].value.tolist()
    assert saved.provenance["options"]["negative"] == few
    done = CliRunner().invoke(cli, ["turn", "steer", str(tmp_path / "m"), *sides, "--way", "pca"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "there are 6 positive and 5 negative prompts" in done.stderr
    done = CliRunner().invoke(cli, ["turn", "steer", str(tmp_path / "m")])
    assert "give a task with twins, or both" in done.stderr


def test_a_corpus_is_read_where_it_is_used(tmp_path: Path) -> None:
    """What takes documents also by a file's name is given that name: `text`, units and files larger than memory are read there."""
    hint = get_type_hints(pb.train.variant)["data"]
    for name in ("a.jsonl", "a.txt", "none.jsonl"):
        assert reading.read(str(tmp_path / name), hint, "--data") == str(tmp_path / name)
    assert reading.read('["a b.txt"]', hint, "--data") == ["a b.txt"]
    assert reading.read("[[1, 2], [3, 4]]", hint, "--data") == [[1, 2], [3, 4]]
    (tmp_path / "a.csv").write_text("body\none\ntwo\n")
    assert reading.read(f"{tmp_path / 'a.csv'}:prompt=body", hint, "--data") == ["one", "two"]
