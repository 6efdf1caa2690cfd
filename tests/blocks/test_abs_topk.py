"""AbsTopK: the k largest by size stay, exactly; a model of it has its neurons, trains through what stays, saves and loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.blocks.abs_topk import AbsTopK, largest
from patchbay.signal.port import PatchbayError
from patchbay.tiny import twins
from tests.blocks.given import IDS, built
from tests.given import gpt2
from tests.tolerance import close


def test_reference_by_hand() -> None:
    """Sorted by size with Python, token by token; of equals the first."""
    x = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    for row, found in zip(x.flatten(0, 1).tolist(), largest(x, 3).flatten(0, 1).tolist(), strict=True):
        top = sorted(range(7), key=lambda i: -abs(row[i]))[:3]
        assert found == [value if i in top else 0.0 for i, value in enumerate(row)]
    assert largest(torch.tensor([2.0, -2.0, 2.0, 1.0]), 2).tolist() == [2.0, -2.0, 0.0, 0.0]
    assert torch.equal(largest(x, 7), x)


def test_gradients_go_through_what_stays() -> None:
    x = torch.tensor([3.0, -4.0, 1.0], requires_grad=True)
    (AbsTopK(torch.nn.Identity(), 2)(x) * torch.tensor([6.0, -8.0, 5.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [6.0, -8.0, 0.0]


@pytest.mark.parametrize("form", ["llama", "gpt2"])
def test_a_model_of_it_writes_by_k_neurons(form: str, tmp_path: Path) -> None:
    """At most k activations are not 0, those that stay are the plain model's, ports hold, and the folder opens again."""
    plain: Any = twins.twin("llama") if form == "llama" else gpt2(0)
    hf: Any = pb.blocks.build(plain, abs_topk=5)
    model, own = pb.load(hf), pb.load(plain)
    ids = IDS.clamp(max=39).tolist()
    port = "L0.mlp.act"
    found, dense = (pb.run(one, ids, taps=[port])[port] for one in (model, own))
    assert int((found != 0).sum(-1).max()) == 5
    assert torch.equal(found[found != 0], dense[found != 0])
    hf.save_pretrained(tmp_path / "kept")
    assert torch.equal(pb.run(pb.load(tmp_path / "kept"), ids).logits, pb.run(model, ids).logits)
    all_of_them = pb.load(pb.blocks.build(plain, abs_topk=dense.shape[-1]))
    assert close(pb.run(all_of_them, ids).logits, pb.run(own, ids).logits)


def test_what_is_refused() -> None:
    for wrong in (0, True, 2.5, "4"):
        with pytest.raises(PatchbayError, match="how many neurons may write"):
            built(abs_topk=wrong)
    with pytest.raises(PatchbayError, match="abs_topk=999: layer 0 has"):
        built(abs_topk=999)
    with pytest.raises(PatchbayError, match="no activation function of its own"):
        pb.blocks.build(twins.twin("mixtral").config, abs_topk=4)
