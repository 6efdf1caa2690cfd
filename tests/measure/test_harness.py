"""What harnesses of others give: a device that is not there, a knob in a text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import patchbay as pb
from patchbay.measure._harness import device_there, named, new_text
from tests.measure.words import reader


def test_the_device_that_a_harness_names_by_itself_is_none_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_there("cuda:0") is None
    assert device_there("cpu") == "cpu"
    assert device_there(None) is None
    with pytest.raises(pb.PatchbayError, match="device='cuda:1': there is no CUDA here"):
        device_there("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_there("cuda:0") == "cuda:0"


def test_a_knob_is_named_by_its_file_and_a_strength(tmp_path: Path) -> None:
    file = pb.turn.scale(["L1.H1"], 2.0, model=reader("characters", "gpt2")).save(tmp_path / "k.knob")
    assert named(str(file)).strength == 2.0
    assert named(f"{file}@-1").strength == -1.0


def test_new_text_is_what_follows_the_prompt_without_special_tokens() -> None:
    """An end token at an answer's end is none of its letters, where answers are compared letter by letter."""
    model = reader("characters")
    [ids, whole] = model.encode(["the cat", "the cat sat"])
    assert new_text(model, ids, [*whole, int(model.tokenizer.unk_token_id)]) == " sat"
