"""What is saved is read back: numbers, place and density; other folders are not overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import patchbay as pb
from tests.features.given import random
from tests.tolerance import close


@pytest.mark.parametrize(
    "more",
    [
        {"subtract": True, "density": torch.rand(10, generator=torch.Generator().manual_seed(0))},
        {"form": "topk", "k": 4},
        {"form": "jumprelu", "layer": 2, "reads": "attn.z"},
        {"form": "jumprelu", "threshold": torch.tensor(0.2), "reads": "mlp.act"},
        {"normalise": "layer_norm", "trained_on": {"model_name": "tiny", "prepend_bos": True}},
        {"form": "jumprelu", "reads": "mlp.in", "writes": "mlp.out", "W_skip": torch.eye(6)},
        {"reads": "resid_mid", "writes": "mlp.out"},
    ],
)
def test_a_dictionary_comes_back(tmp_path: Path, more: dict[str, Any]) -> None:
    it = random(**more)
    back = pb.load_dictionary(it.save(tmp_path / "held"))
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(6))
    assert torch.equal(back.encode(x), it.encode(x))
    assert torch.equal(back.decode(it.encode(x), x), it.decode(it.encode(x), x))
    assert (back.layer, back.reads, back.writes, back.trained_on) == (it.layer, it.reads, it.writes, {**it.trained_on})
    meta = json.loads((tmp_path / "held" / "cfg.json").read_text())["metadata"]
    assert meta["sae_lens_version"] >= "6", "without it SAELens reads a file of before 6, and drops where it sits"
    if it.density is not None:
        assert back.density is not None
        assert close(back.density, it.density)


def test_other_folders_stay(tmp_path: Path) -> None:
    it = random()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(pb.PatchbayError, match="holds no dictionary: choose another"):
        it.save(tmp_path / "mine")
    it.save(tmp_path / "a")
    with pytest.raises(pb.PatchbayError, match="overwrite=True"):
        it.save(tmp_path / "a")
    it.save(tmp_path / "a", overwrite=True)


@pytest.mark.parametrize(
    "more", [{"form": "groupmax", "k": 5}, {"form": "topk", "k": 2, "reads": "mlp.in", "writes": "mlp.out"}]
)
def test_forms_that_saelens_lacks_are_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    with pytest.raises(pb.PatchbayError, match="SAELens has no form for it"):
        random(**more).save(tmp_path / "a")
    assert not (tmp_path / "a").exists()
