"""Ranks by one threshold: Eckart-Young, full rank is the model, what pays, and the same ranks dealt anew as a null."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.blocks import welore
from patchbay.signal.port import PatchbayError
from patchbay.tiny import twins
from tests.blocks.given import IDS
from tests.tolerance import close


def planted() -> Any:
    """A random Llama of which one matrix has four large singular values, and one is even."""
    hf = twins.twin("llama")
    maps = dict(welore.matrices(hf))
    with torch.no_grad():
        steep, flat = maps["model.layers.0.self_attn.q_proj"], maps["model.layers.1.mlp.up_proj"]
        left, _, right = torch.linalg.svd(steep.weight, full_matrices=False)
        steep.weight.copy_((left * torch.tensor([4.0] * 4 + [0.01] * 28)) @ right)
        left, _, right = torch.linalg.svd(flat.weight, full_matrices=False)
        flat.weight.copy_(left @ right)
    return hf


def test_planted_one_threshold_gives_each_its_own_rank() -> None:
    hf = planted()
    for keep in (0.9, 0.6):
        ranks = welore.ranks(hf, keep)
        assert ranks["model.layers.0.self_attn.q_proj"] == 4
        assert ranks["model.layers.1.mlp.up_proj"] == 32
        full = {name: min(module.weight.shape) for name, module in welore.matrices(hf)}
        mean = sum(rank / full[name] for name, rank in ranks.items()) / len(ranks)
        assert keep <= mean < keep + 0.05
    assert welore.low(hf, ranks)[0] == "model.layers.0.self_attn.q_proj"


def test_reference_the_error_is_the_root_of_what_was_dropped() -> None:
    weight = torch.randn(20, 12, dtype=torch.float64)
    sizes = torch.linalg.svdvals(weight)
    for rank in (1, 5, 12):
        left, right = welore.factors(weight, rank)
        assert left.shape == (20, rank)
        assert close(
            (weight - left @ right).norm(), sizes[rank:].square().sum().sqrt(), of=sizes[0], dtype=torch.float64
        )


def test_ranks_as_loops() -> None:
    """The threshold by trying every singular value, largest first."""
    hf = planted()
    spectra = {name: (s / s[0]).tolist() for name, s in welore.spectra(hf).items()}
    for keep in (0.3, 0.7):
        for threshold in sorted({value for s in spectra.values() for value in s}, reverse=True):
            ranks = {name: sum(value >= threshold for value in s) for name, s in spectra.items()}
            if sum(ranks[name] / len(s) for name, s in spectra.items()) / len(ranks) >= keep:
                break
        assert welore.ranks(hf, keep) == ranks


def test_full_ranks_are_the_model_and_cuts_are_saved(tmp_path: Any) -> None:
    hf = planted()
    full = welore.ranks(hf, 1.0)
    with torch.no_grad():
        assert close(pb.blocks.build(hf, ranks=full)(IDS).logits, hf(IDS).logits)
    ranks = welore.ranks(hf, 0.6)
    cut = pb.blocks.build(hf, ranks=ranks)
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in hf.parameters())
    by_hand = twins.twin("llama")
    by_hand.load_state_dict(hf.state_dict())
    with torch.no_grad():
        for name, linear in welore.matrices(by_hand):
            left, sizes, right = torch.linalg.svd(linear.weight.double())
            rank = ranks[name]
            linear.weight.copy_((left[:, :rank] * sizes[:rank]) @ right[:rank])
        assert close(cut(IDS).logits, by_hand(IDS).logits)
        cut.save_pretrained(tmp_path)
        model = pb.load(tmp_path)
        assert torch.equal(model.hf(IDS).logits, cut(IDS).logits)
    assert close(
        model.layers[0].mlp.weights().W_in, dict(welore.matrices(by_hand))["model.layers.0.mlp.up_proj"].weight.T
    )


def test_null_the_same_ranks_dealt_anew() -> None:
    """Of equal size; on a planted spectrum it loses what one threshold keeps."""
    hf = planted()
    ranks = welore.ranks(hf, 0.6)
    shapes = {name: tuple(module.weight.shape) for name, module in welore.matrices(hf)}
    dropped = []
    spectra = welore.spectra(hf)
    for seed in range(5):
        dealt = welore.shuffled(hf, ranks, seed)
        assert list(dealt) == list(ranks)
        assert Counter((shapes[name], rank) for name, rank in dealt.items()) == Counter(
            (shapes[name], rank) for name, rank in ranks.items()
        )
        dropped.append(
            sum(float((spectra[name][rank:] / spectra[name][0]).square().sum()) for name, rank in dealt.items())
        )
    own = sum(float((spectra[name][rank:] / spectra[name][0]).square().sum()) for name, rank in ranks.items())
    assert own <= min(dropped)
    assert own < max(dropped)


def test_what_pays_and_what_is_refused() -> None:
    assert welore.pays((48, 32), 19)
    assert not welore.pays((48, 32), 20)
    hf = planted()
    with pytest.raises(PatchbayError, match="keep=0: the share"):
        welore.ranks(hf, 0)
    with pytest.raises(PatchbayError, match="matrices are model.layers.0.self_attn.q_proj, .* and not 'x'"):
        pb.blocks.build(hf, ranks={"x": 3})
    with pytest.raises(PatchbayError, match="rank 99 of model.layers.0.self_attn.q_proj: from 1 to 32"):
        pb.blocks.build(hf, ranks={"model.layers.0.self_attn.q_proj": 99})
    with pytest.raises(
        PatchbayError, match=r"mlp.experts \(MixtralExperts\) is no plain matrix .*experts in one tensor"
    ):
        welore.ranks(twins.twin("mixtral"), 0.5)
    with pytest.raises(PatchbayError, match=r"gpt2 stores the maps of its layers as \[in, out\] \(Conv1D\)"):
        welore.ranks(twins.twin("gpt2"), 0.5)
