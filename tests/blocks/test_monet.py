"""Monet layers: experts written out one by one, gates by loops, experts that are off, statistics of nothing, files, refusals."""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.blocks import monet
from patchbay.blocks.monet import Monet
from patchbay.signal.port import PatchbayError
from tests.blocks.given import IDS, built
from tests.tolerance import close

SMALL = {"experts": 5, "heads": 3, "keep": 2, "width": 4}


def small(form: str, *, seed: int = 0) -> tuple[Monet, Tensor]:
    """A layer in double precision whose biases and statistics are of some size, and what it reads."""
    torch.manual_seed(seed)
    made = monet.layer(6, {**SMALL, "form": form}).double().eval()
    with torch.no_grad():
        made.bias.normal_()
        made.mean.normal_(std=0.3)
        made.variance.uniform_(0.5, 2.0)
    return made, torch.randn(2, 3, 6, dtype=torch.float64)


@torch.no_grad()
def expert(layer: Monet, i: int, j: int, x: Tensor) -> Tensor:
    """One expert of one token, as it is written."""
    acts = [(layer.read[min(side, len(layer.read) - 1), half] @ x).relu() ** 2 for side, half in ((0, i), (1, j))]
    if layer.form == "horizontal":
        return layer.write[0, 0, j] @ acts[0] + layer.bias[0, j]
    first = layer.write[0, 0, i] @ acts[0] + layer.write[0, 1, i] @ acts[1] + layer.bias[0, i]
    second = layer.write[1, 0, j] @ acts[0] + layer.write[1, 1, j] @ acts[1] + layer.bias[1, j]
    return torch.cat([first, second])


@torch.no_grad()
def gates_by_loops(layer: Monet, x: Tensor) -> Tensor:
    """[side, head, half] of one token."""
    out = torch.zeros(2, layer.heads, SMALL["experts"], dtype=torch.float64)
    least = NormalDist().inv_cdf(1 - SMALL["keep"] / SMALL["experts"])
    for side in range(2):
        for head in range(layer.heads):
            z = layer.route[side, head] @ x
            normed = (z - layer.mean[side, head]) / (layer.variance[side, head] + 1e-6).sqrt()
            kept = [e for e in range(len(z)) if float(normed[e]) >= min(float(normed.max()), least)]
            total = sum(float(z[e].exp()) for e in kept)
            for e in kept:
                out[side, head, e] = float(z[e].exp()) / total
    return out


@pytest.mark.parametrize("form", monet.FORMS)
@pytest.mark.parametrize("off", [[], [(0, 1), (3, 3), (4, 0)]], ids=["all", "some off"])
def test_reference(form: str, off: list[tuple[int, int]]) -> None:
    """The layer of factors is the sum over all pairs of experts, less those that are off."""
    layer, x = small(form)
    monet.cut(torch.nn.Sequential(layer), {0: off})
    found = layer(x)
    for row in range(2):
        for at in range(3):
            g = gates_by_loops(layer, x[row, at])
            assert close(layer.gates(x)[:, row, at], g, of=1.0)
            expected = torch.zeros(6, dtype=torch.float64)
            for i in range(5):
                for j in range(5):
                    if (i, j) not in off:
                        expected += sum(g[0, h, i] * g[1, h, j] for h in range(3)) * expert(layer, i, j, x[row, at])
            assert close(found[row, at], expected)


@pytest.mark.parametrize("form", monet.FORMS)
def test_gradients_are_those_of_the_experts_written_out(form: str) -> None:
    layer, x = small(form, seed=1)
    other = {name: p.detach().clone() for name, p in layer.named_parameters()}
    layer.mixed(x, layer.gates(x)).square().sum().backward()
    own = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    layer.weighed(x, layer.used(layer.gates(x))).square().sum().backward()
    assert own.keys() == other.keys()
    assert all(close(own[name], p.grad) for name, p in layer.named_parameters() if p.grad is not None)


def test_as_many_numbers_in_both_forms() -> None:
    counts = {sum(p.numel() for p in (m.read, m.write, m.bias)) for m, _ in (small(form) for form in monet.FORMS)}
    assert counts == {2 * 5 * 6 * 4 + 5 * 6}


@pytest.mark.parametrize("form", monet.FORMS)
def test_a_model_with_such_layers_is_read_saved_and_loaded_with_what_is_off(form: str, tmp_path: Path) -> None:
    hf = built(monet={**SMALL, "form": form})
    model = pb.load(hf)
    plain = pb.run(model, IDS).logits
    assert len(monet.layers(hf)) == model.n_layers
    zeroed = pb.run(model, IDS, edits=[pb.zero("L1.mlp.out")]).logits
    pairs = [(i, j) for i in range(5) for j in range(5)]
    with monet.without(hf, {1: pairs}):
        assert close(pb.run(model, IDS).logits, zeroed)
    assert torch.equal(pb.run(model, IDS).logits, plain)
    monet.cut(hf, {0: [(2, 3)], 1: [(0, 0)]})
    with monet.without(hf, {0: [(1, 1)]}):
        assert monet.layers(hf)[0].off.nonzero().tolist() == [[1, 1], [2, 3]]
        assert monet.layers(hf)[1].off.nonzero().tolist() == [[0, 0]]
    hf.save_pretrained(tmp_path / "saved")
    again = pb.load(tmp_path / "saved")
    assert monet.layers(again.hf)[0].off.nonzero().tolist() == [[2, 3]]
    assert torch.equal(pb.run(again, IDS).logits, pb.run(model, IDS).logits)
    table = pb.sweep(model, IDS, [pb.zero("L0.mlp.out"), pb.zero("L1.mlp.out")], metric=lambda logits, _: logits[:, 7])
    for e, edit in enumerate([pb.zero("L0.mlp.out"), pb.zero("L1.mlp.out")]):
        assert close(table["value"][e], pb.run(model, IDS, edits=[edit]).last_logits[:, 7])


def test_statistics_of_nothing_keep_other_numbers_of_halves_until_texts_have_run() -> None:
    hf = built(monet={"experts": 32, "heads": 2, "keep": 8, "width": 4})
    with torch.no_grad():
        for layer in monet.layers(hf):
            layer.route.normal_(std=0.02)  # small, which the norm undoes
    fresh = monet.kept(hf, IDS)
    monet.warm(hf, [IDS] * 60)
    assert not hf.training
    warmed = monet.kept(hf, IDS)
    assert float(fresh.mean()) < 3 < 6 < float(warmed.mean()) < 10


def test_shares_add_up_and_losses_are_what_they_say() -> None:
    hf = built(monet=SMALL)
    found = monet.shares(hf, [IDS, IDS])
    assert close(found.sum((1, 2)), torch.full((hf.config.num_hidden_layers,), 3.0))
    assert close(found, monet.shares(hf, [IDS]))
    even = torch.full((2, 4, 7, 3, 5), 0.2)
    uniformity, ambiguity = monet.losses([[even], [even]])
    assert close(float(uniformity), float(torch.tensor(5.0).log()), of=1.0)
    assert close(float(ambiguity), 0.8, of=1.0)
    sure = torch.zeros(2, 5, 3, 5)
    sure[..., torch.arange(5), :, torch.arange(5)] = 1.0
    uniformity, ambiguity = monet.losses([[sure]])
    assert close(float(ambiguity), 0.0, of=1.0)
    assert close(float(uniformity), float(torch.tensor(5.0).log()), of=1.0)


def test_watching_changes_nothing_and_ends() -> None:
    hf = built(monet=SMALL).train()
    alone = {name: value.clone() for name, value in hf.state_dict().items()}
    hf(IDS)
    moved = {name: value.clone() for name, value in hf.state_dict().items()}
    hf.load_state_dict(alone)
    with monet.watched(hf) as seen:
        hf(IDS)
    assert all(torch.equal(value, moved[name]) for name, value in hf.state_dict().items())
    assert [len(runs) for runs in seen] == [1] * hf.config.num_hidden_layers
    assert not any(module.heard for module in monet.layers(hf))


def test_experts_of_a_domain_are_used_twice_as_much_there_as_in_the_next() -> None:
    used = torch.zeros(3, 1, 2, 2)
    used[:, 0, 0, 0] = torch.tensor([1.0, 2.0, 0.5])
    used[:, 0, 0, 1] = torch.tensor([1.0, 1.9, 0.5])
    used[:, 0, 1, 0] = torch.tensor([3.0, 0.0, 0.0])
    assert monet.own_of(used) == [{0: [(1, 0)]}, {0: [(0, 0)]}, {0: []}]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (True, "a table of experts"),
        ({"expert": 3}, "monet has no expert"),
        ({"experts": 0}, "experts=0; a whole number"),
        ({"experts": 4, "keep": 4}, "leaves no choice"),
        ({"form": "vertical", "width": 3}, "halves the width"),
        ({"form": "diagonal"}, "diagonal"),
    ],
)
def test_refused_by_name(given: Any, words: str) -> None:
    with pytest.raises(PatchbayError, match=words):
        built(monet=given)


def test_what_is_not_there_is_refused() -> None:
    hf = built(monet=SMALL)
    for pairs, words in (({9: [(0, 0)]}, "Monet layer 9"), ({0: [(5, 0)]}, "halves are 0 to 4")):
        with pytest.raises(PatchbayError, match=words):
            monet.cut(hf, pairs)  # type: ignore[arg-type]
    with pytest.raises(PatchbayError, match="no Monet layer"):
        monet.shares(torch.nn.Linear(2, 2), [IDS])
    with pytest.raises(PatchbayError, match="needs texts"):
        monet.shares(hf, [])
