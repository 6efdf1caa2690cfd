"""`patchbay corpus`: each command says what the function of its name says; an empty corpus, a wrong rule and a torn file are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import patchbay as pb
from patchbay.corpus import records_of, texts_of
from tests.commands import answer, patchbay

TEXTS = ["one two three", "one two three", "mail a@b.org", "###"]


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text, "url": f"u{i // 3}"}) + "\n" for i, text in enumerate(TEXTS)))
    return str(path)


def test_stories_are_written_and_graded(tmp_path: Path) -> None:
    out = str(tmp_path / "stories.jsonl")
    assert answer("corpus", "stories", "--n", "5", "--seed", "3", "-o", out) == {"written": out, "texts": 5}
    assert list(texts_of(out)) == list(pb.corpus.stories.texts(5, seed=3))
    assert answer("corpus", "grade", out)["whole"] == 1.0
    assert patchbay("corpus", "stories", "--n", "2").stdout.splitlines() == list(pb.corpus.stories.texts(2))
    assert "grade" in patchbay("corpus", "grade", out).stdout


def test_texts_are_tagged_filtered_and_once(file: str, tmp_path: Path) -> None:
    said, out = str(tmp_path / "said.jsonl"), str(tmp_path / "out.jsonl")
    patchbay("corpus", "tag", file, "-o", said)
    assert [json.loads(line) for line in Path(said).read_text().splitlines()] == [
        pb.corpus.mixer.attributes(text) for text in TEXTS
    ]
    for more in ((), ("--attributes", said)):
        done = patchbay(
            "corpus", "filter", file, "--keep", "n_words:2:", "--keep", "symbols::0.5", *more, "--mask", "-o", out, "--overwrite"
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        left = [TEXTS[0], TEXTS[1], "mail |||EMAIL_ADDRESS|||"]
        assert list(records_of(out)) == [{"text": text, "url": f"u{i // 3}"} for i, text in enumerate(left)]
    assert patchbay("corpus", "unique", file).stdout.splitlines() == [TEXTS[0], TEXTS[2], TEXTS[3]]
    assert patchbay("corpus", "unique", file, "--unit", "url").stdout.splitlines() == [TEXTS[0], TEXTS[3]]
    lines = patchbay("corpus", "unique", file, "--json").stdout.splitlines()
    assert [json.loads(line) for line in lines] == [{"text": TEXTS[i], "url": f"u{i // 3}"} for i in (0, 2, 3)]


def test_a_file_that_is_there_stays(file: str) -> None:
    before = Path(file).read_text()
    done = patchbay("corpus", "filter", file, "--keep", "n_words:2:", "-o", file)
    assert done.exit_code == 2
    assert "is already there; --overwrite replaces it" in done.output
    assert Path(file).read_text() == before
    assert patchbay("corpus", "filter", file, "--keep", "n_words:2:", "-o", file, "--overwrite").exit_code == 0
    assert list(texts_of(file)) == TEXTS[:3]


def test_texts_are_read_without_torch(file: str) -> None:
    asked = "import runpy, sys; sys.argv = ['patchbay', 'corpus', 'unique', sys.argv[1]]\ntry: runpy.run_module('patchbay', run_name='__main__')"
    asked += "\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", asked, file], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [TEXTS[0], TEXTS[2], TEXTS[3], "False"]


@pytest.mark.parametrize("slack", [0.2, 0.3])
def test_shares_that_explain_nothing_say_so(
    slack: float, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = {"a": 0.5, "b": 0.5}
    found = pb.corpus.mixture.Mixture(shares, shares, shares, None, None, slack, 0.5, 4, 9)
    monkeypatch.setattr(pb.corpus.mixture, "infer", lambda *_, **__: found)
    said = " ".join(patchbay("corpus", "mixture", str(tmp_path), f"a={file}", f"b={file}").stdout.split())
    assert ("the shares say little" in said) == (slack > 0.25)


def test_a_mixture_is_that_of_the_function(tmp_path: Path) -> None:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.train_from_iterator(
        ["aab abab aab"] * 3 + ["ccd cdcd ccd"], trainers.BpeTrainer(vocab_size=12, show_progress=False)
    )
    made.save(str(tmp_path / "tokenizer.json"))
    for name, text in (("a", "aab abab aab\n"), ("c", "ccd cdcd ccd\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    samples = [f"{name}={tmp_path / name}.txt" for name in "ac"]
    found = answer("corpus", "mixture", str(tmp_path), *samples, "--merges", "4")
    own = pb.corpus.mixture.infer(
        made, {name: [(tmp_path / f"{name}.txt").read_text().strip()] for name in "ac"}, merges=4
    )
    assert found["shares"] == pytest.approx(own.shares)
    assert "share of pairs" in patchbay("corpus", "mixture", str(tmp_path), *samples, "--merges", "4").stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("filter", "FILE", "--keep", "length"), "a rule is NAME:LEAST:MOST"),
        (("filter", "FILE", "--keep", "length::"), "a rule is NAME:LEAST:MOST"),
        (("filter", "FILE", "--keep", "length:nan:"), "a rule is NAME:LEAST:MOST"),
        (("filter", "FILE", "--keep", "length:1:2:3"), "a rule is NAME:LEAST:MOST"),
        (("filter", "FILE", "--keep", "length:5:2"), "no text has that"),
        (("filter", "FILE"), "nothing to filter by"),
        (("filter", "FILE", "--keep", "length:1:", "--attributes", "none.jsonl"), "cannot be read"),
        (("unique", "FILE", "--capacity", str(10**15)), "this machine has not got"),
        (("mixture", "FILE", "a=FILE", "b=FILE"), "is no tokenizer.json"),
        (("mixture", "FILE", "a=FILE", "a=FILE"), "name of two samples"),
        (("filter", "FILE", "--keep", "lenght:1:"), "did you mean 'length'"),
        (("filter", "FILE", "--keep", "length:1000:"), "no text is left"),
        (("stories", "-o", "a.txt"), "written as a .jsonl"),
        (("unique", "none.txt"), "cannot be read"),
        (("mixture", "none", "kind"), "a sample is KIND=FILE"),
    ],
)
def test_refusals(args: tuple[str, ...], says: str, file: str, tmp_path: Path) -> None:
    out = tmp_path / "left.jsonl"
    more = ("-o", str(out)) if "-o" not in args and args[0] != "mixture" else ()
    done = patchbay("corpus", *[one.replace("FILE", file) for one in args], *more)
    assert done.exit_code == 2
    assert says in " ".join(done.output.split())
    assert not out.exists()


def test_a_torn_file_of_attributes_is_named(file: str, tmp_path: Path) -> None:
    said = tmp_path / "said.jsonl"
    said.write_text('{"length": 3}\n{"leng')
    done = patchbay("corpus", "filter", file, "--keep", "length:1:", "--attributes", str(said))
    assert done.exit_code == 2
    assert "line 2 is no record of numbers by name: the file ends in mid-line" in done.output.replace("\n", " ")
