"""However a file outside the folder is named it is refused; what names none, or one inside, passes."""

from __future__ import annotations

from pathlib import Path

import pytest

import patchbay as pb
from patchbay.errors import PatchbayError
from patchbay.serve.outside import refuse_outside
from patchbay.serve.schema import Giver
from tests import given

FORMS = ["FILE", "@FILE", "FILE:prompt=q", "a,FILE", "FILE@2", "facts_in_memory:table=FILE", "speculative(kept='FILE')", "text_loss=FILE", '{"table": "FILE"}', "a\nFILE"]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "own.txt").write_text("mine")
    (tmp_path / "home" / "link").symlink_to(tmp_path / "secret.txt")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "home"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name", ["ROOT/secret.txt", "~/secret.txt", "../secret.txt", "./link", "link", "./././../secret.txt"]
)
def test_a_file_outside_is_refused_in_every_form(form: str, name: str, folder: Path) -> None:
    text = form.replace("FILE", name.replace("ROOT", str(folder.parent)))
    with pytest.raises(PatchbayError, match="outside the folder"):
        refuse_outside(text, folder, folder)


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_where_the_reader_stands_is_refused_unless_the_folder_has_it(form: str, folder: Path) -> None:
    with pytest.raises(PatchbayError, match="outside the folder"):
        refuse_outside(form.replace("FILE", "secret.txt"), folder, folder.parent)
    refuse_outside(form.replace("FILE", "secret.txt"), folder, folder)  # there it is no file
    (folder.parent / "own.txt").write_text("another")
    refuse_outside(form.replace("FILE", "own.txt"), folder, folder.parent)
    refuse_outside(form.replace("FILE", f"{folder}/own.txt"), folder, folder.parent)


@pytest.mark.parametrize(
    "text", ["The capital: a=b", "and/or, ../ no file", "home is, where", "a((1, 2))", "", " ", "a\0b", "\ud800", "x" * 9000, "~nobody-here/x", "Say: 'own.txt'"]
)  # fmt: skip
def test_what_names_no_file_passes(text: str, folder: Path) -> None:
    refuse_outside(text, folder, folder.parent)


def test_a_file_of_the_folder_keeps_its_named_fields(folder: Path) -> None:
    giver = Giver(given.lent("gpt2"), folder)
    assert giver.checked("own.txt:prompt=q") == f"{folder.resolve() / 'own.txt'}:prompt=q"


def test_no_address_is_asked_for_an_agent(tmp_path: Path) -> None:
    """An address that a method would ask over a wire is refused, also one of this machine; none at all is as ever."""
    giver = Giver(given.lent("gpt2"), tmp_path)
    told = {"prompts": [[3, 4], [5, 6]], "features": ["L0.N1"]}
    for more in ({"endpoint": "http://127.0.0.1:1/v1"}, {"unsafe_endpoint": True}):
        with pytest.raises(PatchbayError, match="nothing outside the folder is asked for an agent"):
            giver.arguments(pb.find.feature_names, told | more)
    assert giver.arguments(pb.find.feature_names, told | {"endpoint": "", "draws": 1})["draws"] == 1
