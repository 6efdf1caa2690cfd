"""Language similarity: planted angles are read back, cosines as loops, random pairs gain nothing."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.tiny import planted, twins
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.find.language_similarity")
language_similarity: Any = module.language_similarity
WORDS = [list(range(3 + 15 * n, 18 + 15 * n)) for n in range(4)]  # a reference and three languages


def planted_angles(common: float = 0.0) -> pb.Model:
    """Word i of a language is embedded at a cosine a from word i of the reference; `common` is added to all words."""
    built = planted.null(form="llama", seed=0, d_model=1024, n_layers=1)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 1024, generator=generator)
    basis = torch.linalg.qr(rows.T)[0].T  # [60, d_model], orthonormal
    weight = built.model.get_input_embeddings().weight.data
    reference = basis[:15]
    weight[WORDS[0]] = reference
    for n, a in enumerate((0.9, 0.5, 0.0), start=1):
        weight[WORDS[n]] = a * reference + (1 - a**2) ** 0.5 * basis[15 * n : 15 * (n + 1)]
    weight += common * torch.nn.functional.normalize(torch.randn(1024, generator=generator), dim=0)
    return pb.load(built.model, built.tokenizer)


def test_planted() -> None:
    """0.9, 0.5 and 0 come back at the embedding, in that order; a common direction lifts the floor and not the gain's order."""
    model = planted_angles()
    prompts = [[5, token] for token in WORDS[0]]
    translations = {name: [[9, token] for token in WORDS[n]] for n, name in enumerate(("near", "middle", "far"), 1)}
    result = language_similarity(model, prompts, translations, draws=200)
    assert close(result.values[0], torch.tensor([0.9, 0.5, 0.0]).double())
    assert close(result["floor"][0], 0.0, of=1.0)
    assert [row["language"] for row in result.tables["ranking"]] == ["near", "middle", "far"]
    assert result["p"][0, :2].max() < 0.05
    assert result["p"][0, 2] > 0.2
    coned = language_similarity(planted_angles(3.0), prompts, translations, draws=50)
    assert coned["floor"][0].min() > 0.85
    assert torch.allclose(coned["centred"][0], torch.tensor([0.9, 0.5, 0.0]).double(), atol=0.02)
    own = language_similarity(model, prompts, {"same": prompts}, draws=20)
    assert close(own.values, torch.ones(2, 1).double())
    assert any("15 of 15 pairs end in the same token" in note for note in own.notes)


def test_reference() -> None:
    """Mean cosine over pairs, over all other pairs, and after each side's mean is taken away, by loops."""
    hf = twins.twin("gpt2")
    prompts, theirs = [[5, 6, 7], [8, 9], [10, 11, 12, 13]], [[20, 21], [22, 23, 24], [25]]
    result = language_similarity(pb.load(hf), prompts, {"x": theirs}, draws=30, batch_size=2)
    for layer in (0, 1):
        a, b = (
            [
                hf(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0, -1].detach().double()
                for ids in side
            ]
            for side in (prompts, theirs)
        )

        def cosine(x: torch.Tensor, y: torch.Tensor) -> float:
            return float(x @ y) / float(x.norm() * y.norm())

        assert close(float(result.values[layer, 0]), sum(cosine(a[i], b[i]) for i in range(3)) / 3, of=result.values)
        floor = sum(cosine(a[i], b[j]) for i in range(3) for j in range(3) if i != j) / 6
        assert close(float(result["floor"][layer, 0]), floor, of=result["floor"])
        assert close(float(result["gain"][layer, 0]), float(result.values[layer, 0]) - floor, of=result["gain"])
        mean_a, mean_b = sum(a) / 3, sum(b) / 3
        centred = sum(cosine(a[i] - mean_a, b[i] - mean_b) for i in range(3)) / 3
        assert close(float(result["centred"][layer, 0]), centred, of=result["centred"])


def test_null() -> None:
    """Pairs of texts that have nothing to do with each other: no gain beyond its interval, whatever the floor."""
    built = planted.null(seed=2)
    model = pb.load(built.model, built.tokenizer)
    draw = torch.randint(3, 64, (2, 40, 6), generator=torch.Generator().manual_seed(0)).tolist()
    result = language_similarity(model, draw[0], {"none": draw[1]}, draws=200)
    assert result["p"].min() > 0.05
    assert ((result["gain_low"] < 0) & (result["gain_high"] > 0)).all()
    assert result["gain"].abs().max() < 0.03


def test_bad_input_and_state_space_models() -> None:
    built = planted.null()
    model = pb.load(built.model, built.tokenizer)
    texts = [[5, 6], [7, 8], [9, 10]]
    with pytest.raises(pb.PatchbayError, match="x: 2 translations of 3 prompts"):
        language_similarity(model, texts, {"x": texts[:2]})
    with pytest.raises(pb.PatchbayError, match="at least 3 pairs"):
        language_similarity(model, texts[:2], {"x": texts[:2]})
    with pytest.raises(pb.PatchbayError, match="translations map a language"):
        language_similarity(model, texts, {})
    with pytest.raises(pb.PatchbayError, match="translations map a language"):
        language_similarity(model, texts, {"x": 3})  # type: ignore[dict-item]
    mamba = language_similarity(pb.load(twins.twin("mamba2")), texts, {"x": texts[::-1]}, draws=5)
    assert mamba.values.isfinite().all()
