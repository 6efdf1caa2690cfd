"""Masks over parts in train.subspace_fusion: planted heads are told apart, an update is the chain rule's by hand, all that tuning changed has its place."""

from __future__ import annotations

import copy

import pytest
import torch

import patchbay as pb
from patchbay.train._part_masks import Parts, parts_of
from patchbay.train.subspace_fusion import EACH, START, TEMPERATURE, changes, learned_mask, weights
from tests.given import lent
from tests.tolerance import close
from tests.train.test_subspace_fusion import slope, task

OUT = "model.layers.{}.self_attn.o_proj.weight"
HARMED = ("L0.H1", "L1.H0", "L1.H2")
SLICES = {f"L{layer}.H{head}": (layer, slice(8 * head, 8 * head + 8)) for layer in (0, 1) for head in range(4)}


def tuned_from(model: pb.Model, size: float = 0.05) -> pb.Model:
    """What heads write changed: of three so that the answer is lost, of five so that it is not."""
    hf = copy.deepcopy(model.hf)
    found = {layer: slope(model, task(), OUT.format(layer)).sign() for layer in (0, 1)}
    with torch.no_grad():
        for name, (layer, columns) in SLICES.items():
            by = size * (1.5 if name in HARMED else -0.5)
            dict(hf.named_parameters())[OUT.format(layer)][:, columns] += by * found[layer][:, columns]
    return pb.load(hf)


def test_planted() -> None:
    """Heads that lost the answer are left out and the others kept, each whole; the answer is back beyond as many random heads."""
    model = lent("llama")
    found = pb.train.subspace_fusion(model, tuned_from(model), task(), merge={"mask": "head"}, steps=40)
    rows = {row["part"]: row for row in found.tables["parts"]}
    assert {name for name, row in rows.items() if not row["kept"]} == set(HARMED)
    assert [row["part"] for row in found.tables["parts"][:3]] == sorted(HARMED, key=lambda name: rows[name]["l"])
    assert {row["of"] for row in rows.values()} == {32 * 8}
    assert set(rows) == set(SLICES)
    assert float(found["kept"]) == 5 / 8
    base, lost, masked, random = found["score"].tolist()
    assert lost < base < masked
    assert masked > random + 0.01
    assert "kept 5 of 8 parts" in found.notes[0]


def test_reference() -> None:
    """Two updates of Adam; a part's slope is the sum of its entries': dL/dm_i = g_i tau_i / mean - sum_j g_j m_j tau_j / (n mean^2)."""
    model, some = lent("llama"), task()
    changed = changes(model, tuned_from(model))
    found, losses = learned_mask(model, changed, some, 2, 0.1, 3, parts=parts_of(model, changed, "head"))
    draw, names = torch.Generator().manual_seed(3), list(SLICES)
    entry, first, second = (torch.full((8,), value, dtype=torch.float64) for value in (START, 0.0, 0.0))
    for step in (1, 2):
        rows = torch.randperm(len(some), generator=draw)[:16].tolist()
        u = torch.rand(8, generator=draw).clamp(1e-6, 1 - 1e-6).double()
        m = 1 / (1 + torch.exp(-(entry + torch.log(u / (1 - u))) / TEMPERATURE))
        hf = copy.deepcopy(model.hf)
        with torch.no_grad():
            for i, name in enumerate(names):
                layer, columns = SLICES[name]
                tau = changed[OUT.format(layer)][:, columns]
                dict(hf.named_parameters())[OUT.format(layer)][:, columns] += (m[i] / m.mean()).float() * tau
        now = pb.load(hf)
        g = {layer: slope(now, some[rows], OUT.format(layer)).double() for layer in (0, 1)}
        own = torch.stack([
            (g[layer][:, columns] * changed[OUT.format(layer)][:, columns].double()).sum() for layer, columns in SLICES.values()
        ])  # of each part the sum of g tau  # fmt: skip
        by_mask = own / m.mean() - (own * m).sum() / (8 * m.mean() ** 2)  # parts are of one size
        gradient = by_mask * m * (1 - m) / TEMPERATURE
        logp = now.hf(torch.tensor(some[rows].clean)).logits[:, -1].detach().double().log_softmax(-1)[:, 7]
        assert close(losses[step - 1], -float(logp.mean()), of=10.0, dtype=torch.float32)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        entry = entry - 0.1 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    assert float((found[EACH].double() - entry).abs().max()) < 1e-3


def test_null() -> None:
    """What heads write changed where it does nothing (a layer that is added to by 0): no head is left out, nothing is gained."""
    model = lent("llama")
    hf = copy.deepcopy(model.hf)
    with torch.no_grad():
        hf.model.layers[1].self_attn.v_proj.weight.zero_()
    still = pb.load(hf)
    other = copy.deepcopy(hf)
    with torch.no_grad():
        other.model.layers[1].self_attn.o_proj.weight += 0.3
    found = pb.train.subspace_fusion(still, pb.load(other), task(), merge={"mask": "head"}, steps=3)
    assert float(found["kept"]) == 1.0
    assert float(found["gain"]) == 0.0


def whole(model: pb.Model, seed: int = 1) -> dict[str, torch.Tensor]:
    """A change of every number."""
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=draw) for name, p in model.hf.named_parameters()}


@pytest.mark.parametrize(
    ("family", "asked", "n", "rest"),
    [
        ("llama", "head,group,neuron", 2 * (4 + 2 + 48), {"embed_tokens", "norm", "lm_head"}),
        ("llama", "head,mlp", 2 * (4 + 1), {"embed_tokens", "norm", "lm_head", "k_proj", "v_proj"}),
        ("llama", "layer", 2, {"embed_tokens", "norm", "lm_head"}),
        ("gpt2", "attn,mlp", 2 * 2, {"wte", "wpe", "ln_1", "ln_2", "ln_f"}),
        ("gpt2", "head,neuron", 2 * (4 + 128), {"wte", "wpe", "ln_1", "ln_2", "ln_f", "c_proj"}),
        ("mixtral", "expert,head", 2 * (4 + 4), {"embed_tokens", "norm", "lm_head", "k_proj", "v_proj", "gate"}),
    ],
)
def test_all_that_changed_has_its_place(family: str, asked: str, n: int, rest: set[str]) -> None:
    """Each number in one part or in the rest of its tensor; ones are the tuned model, and a part of zeros is the base there alone."""
    model = lent(family)
    changed = whole(model)
    found = parts_of(model, changed, asked)
    assert sum(not name.startswith("rest of ") for name in found.names) == n
    left = [name.removeprefix("rest of ") for name in found.names if name.startswith("rest of ")]
    assert all(any(one in name for one in rest) for name in left)
    assert all(any(one in name for name in left) for one in rest)
    counts = [row["of"] for row in found.rows(torch.zeros(len(found.names)), changed)]
    assert min(counts) > 0
    assert sum(counts) == sum(tau.numel() for tau in changed.values())
    own = dict(model.hf.named_parameters())
    there = weights(model, changed, found.spread(torch.ones(len(found.names))))
    assert all(close(there[name], own[name].detach() + changed[name]) for name in changed)
    without = torch.ones(len(found.names))
    without[0] = 0.0
    there = weights(model, changed, found.spread(without))
    for name, at in found.of.items():
        assert torch.equal(there[name][at == 0], own[name].detach()[at == 0])
        assert bool((there[name] != own[name].detach())[at != 0].all())


def test_the_control_draws_among_parts_of_a_kind() -> None:
    """As many of each kind; what is in no part stays as it was."""
    parts = Parts([*"abcdefgh", "rest of x"], ["head"] * 4 + ["mlp"] * 4 + [""], {})
    kept = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0, 0])
    drawn = [parts.shuffled(kept, seed) for seed in range(40)]
    assert {(float(one[:4].sum()), float(one[4:8].sum()), float(one[8])) for one in drawn} == {(1.0, 3.0, 0.0)}
    assert len({tuple(one[:4].tolist()) for one in drawn}) == 4
    assert torch.equal(kept, torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0, 0]))


@pytest.mark.parametrize(
    ("merge", "says"),
    [
        ({"mask": "heads"}, "no kind 'heads'; kinds are head, group, neuron, expert, layer, attn, mlp.*'head'"),
        ({"mask": "layer,head"}, r"L0.H0 and L0 share weights of model.layers.0.self_attn"),
        ({"mask": "expert"}, "this llama model has no parts of the kind expert"),
        ({"mask": "mlp"}, "tuning changed nothing in parts of these kinds"),
        ({"mask": 3}, "and kinds of parts, as"),
        ({"mask": "head", "by": "sum"}, "the names of other tuned models"),
    ],
)
def test_refusals(merge: dict[str, object], says: str) -> None:
    model = lent("llama")
    with pytest.raises(pb.PatchbayError, match=says):
        pb.train.subspace_fusion(model, tuned_from(model), task(), merge=merge, steps=1)
