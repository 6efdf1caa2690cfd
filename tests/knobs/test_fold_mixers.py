"""fold: what state spaces, convolutions, attention beside them, and experts beside a shared one write is folded as heads and MLPs are."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import patchbay as pb
from patchbay.knobs.knob import Knob
from patchbay.signal.port import Port
from patchbay.tiny.twins import twin
from tests.tolerance import NOISE, close

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
FOLDED = [
    ("falcon_h1", "attn.out", 1),  # a state space and attention, each times its factor
    ("falcon_h1", "mlp.out", 0),
    ("nemotron_h", "attn.out", 0),  # a state space
    ("nemotron_h", "attn.out", 1),  # attention
    ("nemotron_h", "attn.out", 3),  # an MLP that is a layer
    ("jamba", "attn.out", 0),
    ("jamba", "mlp.out", 1),  # experts
    ("hunyuan_v1_moe", "mlp.out", 1),  # experts and a shared one
    ("lfm2_moe", "attn.out", 0),  # a convolution
    ("qwen3_next", "mlp.out", 1),
]


@pytest.mark.parametrize(("name", "signal", "layer"), FOLDED)
def test_what_a_mixer_writes_is_folded(name: str, signal: str, layer: int, tmp_path: Path) -> None:
    model = pb.load(twin(name))
    knob = Knob(
        "k", [pb.project(Port(signal, layer), torch.randn(2, 32, generator=torch.Generator().manual_seed(3)))], 1.0
    )
    knob.export(model, tmp_path / "out")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = pb.run(model, IDS, edits=[knob]).logits
    with torch.no_grad():
        assert close(hf(IDS).logits, expected, noise=4 * NOISE)
    assert not close(expected, pb.run(model, IDS).logits, noise=1000)


def test_a_direction_is_taken_out_of_every_writer_of_a_hybrid(tmp_path: Path) -> None:
    model = pb.load(twin("falcon_h1"))
    knob = pb.turn.remove_direction(model, torch.randn(32, generator=torch.Generator().manual_seed(5)))
    knob.export(model, tmp_path / "out")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert close(hf(IDS).logits, pb.run(model, IDS, edits=[knob]).logits, noise=4 * NOISE)


def test_experts_that_are_a_layer_are_not_half_folded(tmp_path: Path) -> None:
    """Nemotron-H's layer of experts: its shared expert alone would be another model."""
    model = pb.load(twin("nemotron_h"))
    knob = Knob("k", [pb.scale(Port("attn.out", 2), 1.0)], 0.5)
    with pytest.raises(pb.PatchbayError, match=r"not written|not foldable"):
        knob.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
