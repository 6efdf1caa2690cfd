"""Lenses as files: what is written is read bit for bit, by the names of the tuned-lens package."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from patchbay.features import lens
from tests import given
from tests.tolerance import close


def test_a_lens_is_written_and_read_bit_for_bit(tmp_path: Path) -> None:
    model, generator = given.lent("gpt2"), torch.Generator().manual_seed(0)
    made = lens.Lens(torch.randn(2, 32, 32, generator=generator), torch.randn(2, 32, generator=generator), adds=True)
    found = lens.load(lens.save(made, tmp_path / "lens"), model, lens.TUNED)
    assert torch.equal(found.weight, made.weight)
    assert torch.equal(found.bias, made.bias)
    assert found.adds
    assert set(load_file(tmp_path / "lens" / lens.WEIGHTS)) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_a_folder_of_the_packages_form_is_read(tmp_path: Path) -> None:
    """No fingerprint, and half precision: a state dict of Linear layers, applied as they are."""
    model = given.lent("gpt2")
    layers = [torch.nn.Linear(32, 32).half() for _ in range(2)]
    save_file(torch.nn.ModuleList(layers).state_dict(), tmp_path / "params.safetensors")
    settings = {
        "d_model": 32,
        "num_hidden_layers": 2,
        "bias": True,
        "lens_type": "linear_tuned_lens",
        "unemb_hash": "ab",
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    found = lens.load(tmp_path, model, lens.TUNED)
    state = torch.randn(3, 32)
    with torch.no_grad():
        assert close(found(1, state), state + layers[1].float()(state))
    assert torch.equal(found(2, state), state)  # the last is the model's own
