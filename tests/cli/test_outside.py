"""Methods outside the package: a file by its path, an installed package's entry point; called, helped, replayed, refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import patchbay as pb
from patchbay.results import outside
from patchbay.tiny import planted
from tests.commands import patchbay
from tests.tolerance import close

STRIPES = '''"""Stripes: how much each head looks at one token.

    score = mean over prompts of the last query's weight on a key

Nobody 2024. It does not show what the head does there.
"""
from typing import Optional

import torch

import patchbay as pb


@pb.method(paper="nobody2024", verb="find")
def stripes(model: pb.Model, task: pb.Task, *, key: int = 0, parts: Optional[list[pb.Part]] = None) -> pb.Result:
    """Attention of the last query.

    `key`: which token is looked at.
    """
    assert parts is None or all(isinstance(part, pb.Part) for part in parts)
    taps = [model.layers[i].heads[h].pattern for i in range(model.n_layers) for h in range(model.n_heads(i))]
    rows = [[float(run[tap][0, -1, key]) for tap in taps] for run in (pb.run(model, [ids], taps=taps) for ids in task.clean)]
    return pb.Result(torch.tensor(rows).mean(0).reshape(model.n_layers, -1), unit="attention")
'''


def refusal(*args: str) -> str:
    done = patchbay(*args)
    assert done.exit_code == 2, (done.exit_code, done.output, done.exception)
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "stripes.py"
    path.write_text(STRIPES)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made, path = planted.induction(), tmp_path_factory.mktemp("model")
    made.model.save_pretrained(path)
    made.tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that offers `find.stripes`, as pip leaves it; its own __init__ says when it is imported."""
    site = tmp_path / "site"
    (site / "wild_stripes").mkdir(parents=True)
    (site / "wild_stripes" / "__init__.py").write_text("print('imported')\n")
    (site / "wild_stripes" / "heads.py").write_text(STRIPES)
    metadata = site / "wild_stripes-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: wild-stripes\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[patchbay.methods]\nfind.stripes = wild_stripes.heads:stripes\n")
    monkeypatch.syspath_prepend(site)
    outside.offered.cache_clear()
    yield site
    outside.offered.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "wild_stripes"]:
        del sys.modules[name]


TASK = ("--task", "repeated_tokens:max_period=6,max_offset=4", "--n", "3")


def by_hand(folder: str, key: int) -> torch.Tensor:
    """The patterns as transformers gives them."""
    model = pb.load(folder)
    task = pb.tasks.repeated_tokens(model, 3, max_period=6, max_offset=4)
    hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        runs = [hf(torch.tensor([ids]), output_attentions=True).attentions for ids in task.clean]
    return torch.stack([torch.stack([layer[0, :, -1, key] for layer in run]) for run in runs]).mean(0)


def test_a_file_is_a_command_with_its_help_and_no_torch(file: Path) -> None:
    code = "import sys; from patchbay.cli import cli; cli(['find', sys.argv[1], '--help'], standalone_mode=False); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "Stripes: how much each head looks at one token." in done.stdout
    assert "Which token is looked at.  [default: 1]" not in done.stdout
    assert "Which token is looked at.  [default: 0]" in done.stdout
    assert "--parts, --heads PARTS" in done.stdout


@pytest.mark.parametrize("named", ["{}", "{}:stripes"])
def test_a_file_gives_its_own_numbers(file: Path, folder: str, tmp_path: Path, named: str) -> None:
    out = tmp_path / "out"
    done = patchbay("find", named.format(file), folder, *TASK, "--key", "1", "--parts", "L0.H1", "-o", str(out))
    assert done.exit_code == 0, done.output
    found = pb.load_result(out)
    assert close(found.values.float(), by_hand(folder, 1), of=1.0)
    assert found.provenance["method"] == "find.stripes"
    assert found.provenance["origin"]["file"] == str(file)
    assert len(found.provenance["origin"]["sha256"]) == 64
    assert found.provenance["options"] == {"key": 1, "parts": ["L0.H1"]}


def saved(file: Path, folder: str) -> Path:
    out = file.parent / "saved"
    assert patchbay("find", str(file), folder, *TASK, "-o", str(out)).exit_code == 0
    for name in [name for name in sys.modules if name.startswith("outside_")]:
        del sys.modules[name]  # as another process finds it
    return out


def test_a_replay_is_given_the_file_and_refuses_it_changed_or_gone(file: Path, folder: str) -> None:
    out = saved(file, folder)
    assert f"A record runs no code: name the file, --method {file}" in refusal("replay", str(out))
    done = patchbay("replay", str(out), "--method", str(file))
    assert done.exit_code == 0, done.output
    assert "find.stripes: the replay agrees; largest difference 0" in done.stdout
    assert pb.replay(pb.load_result(out), method=file)
    file.write_text(STRIPES.replace("[0, -1, key]", "[0, -2, key]"))
    assert "find.stripes: its file has changed since" in refusal("replay", str(out), "--method", str(file))
    file.unlink()
    for name in [name for name in sys.modules if name.startswith("outside_")]:
        del sys.modules[name]
    assert "which is no longer there" in refusal("replay", str(out))
    assert f"there is no file {file}" in refusal("replay", str(out), "--method", str(file))


def test_a_replay_runs_no_code_that_a_record_names(file: Path, folder: str) -> None:
    """A record that somebody sent names a file that is there, with its digest: still it is not run."""
    out = saved(file, folder)
    evil = file.parent / "evil.py"
    evil.write_text(STRIPES + f"\nopen({str(file.parent / 'ran')!r}, 'w').close()\n")
    record = out / "result.json"
    text = json.loads(record.read_text())
    text["provenance"]["origin"] = {
        "module": "evil",
        "file": str(evil),
        "sha256": hashlib.sha256(evil.read_bytes()).hexdigest(),
    }
    record.write_text(json.dumps(text))
    assert str(evil) in refusal("replay", str(out))
    assert not (file.parent / "ran").exists()


def test_a_file_that_made_nothing_of_a_result_is_refused(file: Path, folder: str) -> None:
    model = pb.load(folder)
    task = pb.tasks.repeated_tokens(model, 3, max_period=6, max_offset=4)
    heads = pb.find.induction_heads(model, task)
    with pytest.raises(pb.PatchbayError, match="method=find.stripes: this Result was made by find.induction_heads"):
        pb.replay(heads, model, method=file)
    with pytest.raises(pb.PatchbayError, match="is not made with @patchbay.method"):
        pb.replay(heads, model, method=len)


def test_a_result_of_it_that_stands_in_anothers_options_replays(file: Path, folder: str) -> None:
    model = pb.load(folder)
    task = pb.tasks.repeated_tokens(model, 3, max_period=6, max_offset=4)
    stripes = outside.named(str(file)).load()
    curve = pb.prove.knockout_curve(model, task, stripes(model, task), draws=2, by="zero")
    assert pb.replay(curve, model, method=stripes)
    assert not pb.replay(curve, model, method=file).notes


def test_a_module_that_is_imported_needs_no_naming(file: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(file.parent)
    from stripes import stripes  # type: ignore[import-not-found]

    try:
        model = pb.load(folder)
        found = stripes(model, pb.tasks.repeated_tokens(model, 2, max_period=6))
        assert pb.replay(found, model)
    finally:
        del sys.modules["stripes"]


def test_an_installed_method_is_listed_unimported_called_and_replayed(
    installed: Path, folder: str, tmp_path: Path
) -> None:
    listing = patchbay("find", "--help")
    assert "how much each head looks at one token" in " ".join(listing.stdout.split())
    assert "Which token is looked at.  [default: 0]" in patchbay("find", "stripes", "--help").stdout
    assert "wild_stripes" not in sys.modules, "help imports nothing"
    patchbay("find", "induction-heads", folder, *TASK)
    assert "wild_stripes" not in sys.modules, "another command imports nothing"
    done = patchbay("find", "stripes", folder, *TASK, "--json", "-o", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["provenance"]["method"] == "find.stripes"
    assert close(pb.load_result(tmp_path / "out").values.float(), by_hand(folder, 0), of=1.0)
    assert patchbay("replay", str(tmp_path / "out")).exit_code == 0, "it is named by its entry point"


ENTRIES = {
    "no module": ("find.stripes = wild_stripes.nothing:stripes", "which is not there"),
    "no function": ("find.stripes = wild_stripes.heads:zebra", "which is no method 'stripes'; methods of"),
    "another verb": ("prove.stripes = wild_stripes.heads:stripes", "names a function with verb='find'"),
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_an_entry_point_that_names_no_method_is_refused(installed: Path, kind: str) -> None:
    line, says = ENTRIES[kind]
    (installed / "wild_stripes-1.0.dist-info" / "entry_points.txt").write_text(f"[patchbay.methods]\n{line}\n")
    outside.offered.cache_clear()
    told = refusal(line.partition(".")[0], "stripes", "tiny")
    assert "of wild-stripes" in told
    assert says in told
    assert patchbay(line.partition(".")[0], "--help").exit_code == 0


def test_two_packages_that_offer_one_name_and_one_that_is_taken(installed: Path) -> None:
    other = installed / "other-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text(
        "[patchbay.methods]\nfind.stripes = wild_stripes:stripes\nfind.logit_lens = wild_stripes.heads:stripes\n"
    )
    outside.offered.cache_clear()
    assert "find.stripes is offered by several packages, other, wild-stripes" in refusal("find", "stripes", "tiny")
    assert outside.offers("find") == ["stripes"]
    assert patchbay("find", "logit-lens", "--help").stdout.startswith("Usage: patchbay find logit-lens")
    assert "wild_stripes" not in sys.modules


TWO = STRIPES + "\n\n" + STRIPES[STRIPES.index("@pb.method") :].replace("def stripes", "def bars")
BAD = {
    "no file": (None, "there is no file"),
    "not Python": ("this is no Python", "is not Python: "),
    "bytes": (b"\x00\xff\xfe", "is not Python: "),
    "an encoding that there is not": (b"# coding: nonsense\n", "is not Python: "),
    "empty": ("", "has no method: it has no functions"),
    "no method": ("def stripes():\n    pass\n", "has no method: its functions are stripes; a method is a function made with"),
    "two": (TWO, "has 2 methods; name one: "),
    "no verb": (STRIPES.replace(', verb="find"', ""), "does not say which verb it is"),
    "a wrong verb": (STRIPES.replace('"find"', '"fnd"'), "has verb='fnd'; verbs are find, prove, turn, decode, measure, train; did you mean 'find'?"),
    "another verb": (STRIPES.replace('"find"', '"prove"'), "has verb='prove': patchbay prove "),
    "a name that is taken": (STRIPES.replace("def stripes", "def logit_lens"), "find.logit_lens is a method of Patchbay itself"),
    "a command's name": (STRIPES.replace("def stripes", "def all"), "'all' cannot name a method"),
    "an import that fails": ("import nothing_like_it\n" + STRIPES, "cannot be imported: ModuleNotFoundError: No module named 'nothing_like_it'"),
    "an error": (STRIPES + "\n1 / 0\n", "cannot be imported: ZeroDivisionError: division by zero"),
    "an exit": (STRIPES + "\nraise SystemExit(0)\n", "cannot be imported: SystemExit: 0"),
    "an option before *": (STRIPES.replace("*, key", "key"), "option 'key' has a default and must be keyword-only"),
    "covered": (STRIPES + "\nstripes = 3\n", "is not the method find.stripes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_method_is_refused_in_one_sentence(tmp_path: Path, folder: str, kind: str) -> None:
    text, says = BAD[kind]
    path = tmp_path / "stripes.py"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    told = refusal("find", str(path), folder, *TASK)
    assert str(path) in told or "stripes" in told
    assert says in told


def test_names_that_lead_to_no_method(file: Path) -> None:
    assert "has no method 'strips'; methods of" in refusal("find", f"{file}:strips", "tiny")
    assert "did you mean 'stripes'?" in refusal("find", f"{file}:strips", "tiny")
    assert "names no method; one outside the package is FILE.py" in refusal("find", f"{file.parent}/", "tiny")
    assert "names no method; one outside the package is FILE.py" in refusal("find", "./stripes:name", "tiny")
    os.mkdir(file.parent / "a.py")
    assert "is a folder" in refusal("find", str(file.parent / "a.py"), "tiny")


def test_what_a_file_prints_when_it_is_imported_does_not_stand_in_an_answer(file: Path, folder: str) -> None:
    file.write_text(STRIPES + "\nprint('hello')\n")
    done = patchbay("find", str(file), folder, *TASK, "--json")
    assert json.loads(done.stdout)["provenance"]["origin"]["file"] == str(file)
