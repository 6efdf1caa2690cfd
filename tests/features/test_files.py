"""What is no dictionary, a damaged one or a pickle is refused, with what to do."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import patchbay as pb
from tests.features.given import random, write


class Runs:
    """A pickle that runs code when it is opened."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path(self.path),)  # type: ignore[return-value]


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    (tmp_path / "ae.pt").write_bytes(pickle.dumps(Runs(str(mark))))
    for given in (tmp_path / "ae.pt", tmp_path):
        with pytest.raises(pb.PatchbayError, match=r"is a pickle(?s:.)*weights_only=True(?s:.)*save_file"):
            pb.load_dictionary(given)
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_1"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", W_enc=np.array([Runs(str(mark))], dtype=object))
    with pytest.raises(pb.PatchbayError, match="damaged, or holds objects that would run code"):
        pb.load_dictionary(folder)
    assert not mark.exists()


def test_folders_without_one_say_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "layers.1").mkdir()
    with pytest.raises(
        pb.PatchbayError, match=r"known are saelens \(cfg.json(?s:.)*It has folders: layers.1; give one"
    ):
        pb.load_dictionary(tmp_path)
    with pytest.raises(pb.PatchbayError, match="is not there; a dictionary is a folder"):
        pb.load_dictionary(tmp_path / "nowhere")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    random().save(tmp_path / "a")
    whole = (tmp_path / "a" / "sae_weights.safetensors").read_bytes()
    (tmp_path / "a" / "sae_weights.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(pb.PatchbayError, match="is damaged"):
        pb.load_dictionary(tmp_path / "a")
    (tmp_path / "a" / "cfg.json").write_text("{")
    with pytest.raises(pb.PatchbayError, match=r"cfg\.json is damaged"):
        pb.load_dictionary(tmp_path / "a")
    folder = write(tmp_path / "b", "cfg.json", {}, "sae_weights.safetensors", {"W_enc": torch.ones(2, 3)})
    with pytest.raises(pb.PatchbayError, match="lacks b_dec; it has W_enc"):
        pb.load_dictionary(folder, at="L0.resid_out")
