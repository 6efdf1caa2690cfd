"""Key clusters: planted families crowd, scattered keys do not; shares and the null as loops; renumbered tokens, same clusters."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay import maths
from patchbay.tiny import planted, twins
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.find.key_clusters")
key_clusters: Any = module.key_clusters


def families(noise: float, seed: int = 0) -> tuple[pb.Model, torch.Tensor]:
    """A random model whose unembedding rows are one of four centres plus noise: the model and each token's family."""
    built = planted.null(form="llama", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    family = torch.randint(4, (64,), generator=generator)
    centres, scatter = (torch.randn(n, 256, generator=generator) / 16 for n in (4, 64))
    built.model.get_output_embeddings().weight.data.copy_(centres[family] + noise * scatter)
    return pb.load(built.model, built.tokenizer), family


PROMPTS = torch.randint(3, 64, (12, 5), generator=torch.Generator().manual_seed(1)).tolist()


def test_planted() -> None:
    """Tight families: they are the clusters, and ranks 3 to 9 are the first's relatives. Noise far above the centres: chance."""
    model, family = families(0.1)
    result = key_clusters(model, PROMPTS, n_clusters=4, top=2, upto=9)
    cluster = result["cluster"]
    for a in range(4):
        assert len(cluster[family == a].unique()) == 1
    assert result.values.min() > 0.9
    assert result.values.min() > result["null_mean"].max() + 0.4
    assert result["p"].max() < 0.05
    scattered, _ = families(30.0)
    chance = key_clusters(scattered, PROMPTS * 2, n_clusters=8, top=2, upto=30)
    assert (chance.values - chance["null_mean"]).abs().max() < 0.25
    assert abs(float((chance.values - chance["null_mean"]).mean())) < 0.08


def test_planted_right_answers() -> None:
    """Right tokens that are never relatives of the top ones: rarer among the relatives, and the other way round."""
    model, family = families(1.0)
    logits = pb.run(model, PROMPTS, logits="last").last_logits
    outside = [torch.nonzero(family != family[row.argmax()])[:, 0].tolist() for row in logits]
    inside = [torch.nonzero(family == family[row.argmax()])[:, 0].tolist() for row in logits]
    far = key_clusters(model, PROMPTS, n_clusters=4, top=1, upto=40, answers=outside)
    near = key_clusters(model, PROMPTS, n_clusters=4, top=1, upto=40, answers=inside)
    assert far["right_same"] < 0.2 < 0.8 < far["right_other"]
    assert near["right_other"] < 0.2 < 0.8 < near["right_same"]
    assert "p 0.0" in far.notes[1]


def test_reference() -> None:
    """Ranks, shares and the expectation for tokens in random order, one prompt and token at a time."""
    hf = twins.twin("gpt2")
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    answers = [[3, 50], [60], [70, 71, 72]]
    result = key_clusters(pb.load(hf), prompts, n_clusters=7, top=3, upto=12, answers=answers, batch_size=2)
    cluster = result["cluster"].tolist()
    same: list[list[bool]] = []
    expected, right = [], {True: [0, 0], False: [0, 0]}
    for ids, wanted in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = hf(torch.tensor([ids])).logits[0, -1].tolist()
        order = sorted(range(96), key=lambda token: -logits[token])
        main = {cluster[token] for token in order[:3]}
        same.append([cluster[token] in main for token in order[3:12]])
        members = sum(c in main for c in cluster)
        expected.append((members - 3) / (96 - 3))
        for token in order[3:12]:
            cell = right[cluster[token] in main]
            cell[0] += token in wanted
            cell[1] += 1
    assert result.labels_of("token") == [f"{r}-{r}" for r in range(4, 13)]
    assert close(result.values.tolist(), [sum(row[i] for row in same) / 3 for i in range(9)])
    assert close(result["null_mean"].tolist(), [sum(expected) / 3] * 9)
    shares = torch.tensor(same).double()  # [prompt, rank]
    p = [maths.permutation_p(shares[:, i], torch.tensor(expected)) for i in range(9)]
    assert close(result["p"], maths.benjamini_hochberg(torch.tensor(p)))
    assert len(set(p)) > 1
    for name, side in (("right_same", True), ("right_other", False)):
        assert close(float(result[name]), right[side][0] / right[side][1])


def test_clusters_do_not_depend_on_how_tokens_are_numbered() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 6, generator=generator)
    order = torch.randperm(50, generator=generator)
    assert torch.equal(module._k_means(rows, 7, 0)[order], module._k_means(rows[order], 7, 0))
    found = module._k_means(rows, 7, 0)
    assert not torch.equal(found, module._k_means(rows, 7, 1)), "another seed, other centres to begin with"
    centres = torch.stack([rows[found == c].mean(0) for c in range(7)])
    assert torch.equal(torch.cdist(rows, centres).argmin(1), found)  # a fixed point: every row is nearest its own mean
    assert sorted(module._k_means(rows, 50, 0).tolist()) == list(range(50))
    assert set(module._k_means(torch.ones(5, 3), 2, 0).tolist()) == {0}


def test_null() -> None:
    """Scattered keys of a random model: no bin is above what random order gives."""
    built = planted.null(seed=5)
    model = pb.load(built.model, built.tokenizer)
    prompts = torch.randint(3, 64, (60, 5), generator=torch.Generator().manual_seed(2)).tolist()
    weight = built.model.get_output_embeddings().weight.data
    weight.copy_(torch.linalg.qr(torch.randn(256, 64, generator=torch.Generator().manual_seed(3)))[0].T)
    result = key_clusters(model, prompts, n_clusters=16, top=3, upto=30)
    assert (result.values - result["null_mean"]).abs().max() < 0.12
    assert result["p"].min() > 0.01


def test_bad_input_and_state_space_models() -> None:
    built = planted.null()
    model = pb.load(built.model, built.tokenizer)
    with pytest.raises(pb.PatchbayError, match="all up to the vocabulary's 64"):
        key_clusters(model, [[5, 6]])
    with pytest.raises(pb.PatchbayError, match="n_clusters=65"):
        key_clusters(model, [[5, 6]], n_clusters=65, upto=20)
    with pytest.raises(pb.PatchbayError, match="answers: 1 lists for 2 prompts"):
        key_clusters(model, [[5, 6], [7, 8]], upto=20, answers=[[5]])
    assert key_clusters(pb.load(twins.twin("mamba2")), [[5, 6], [7, 8]], upto=40).values.isfinite().all()
