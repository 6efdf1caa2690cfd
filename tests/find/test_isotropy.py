"""Isotropy: the planted cone's closed form, pairs as loops, Gaussian states within the closed-form band, constant states at 0."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.tiny import planted, twins
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.find.isotropy")
isotropy: Any = module.isotropy


def test_planted() -> None:
    """The planted embedding is sqrt(d - 1) times one direction plus a unit code for each word: the cosine of two words is 1 - 1/d."""
    built = planted.copy(form="llama", seed=1)  # copied words also carry a mark: prompts of the others
    plain = [i for i in range(3, 64) if i not in built.truth["marked_ids"]][:30]
    model = pb.load(built.model, built.tokenizer)
    prompts = [plain[:10], plain[10:20], plain[20:30]]
    result = isotropy(model, prompts, draws=50)
    rows = torch.nn.functional.normalize(model.embed.weight.detach()[plain].double(), dim=1)
    share = float(rows[0] @ rows[1])
    assert 1 - share < 0.01
    assert close(float(result.values[0]), 1 - share, of=result.values)
    assert close(float(result["across"][0]), 1 - share, of=result["across"])
    assert result["centred"][0] > 1.0  # without the common direction, words are orthogonal (less their mean)
    assert result["low"][0] <= result.values[0] <= result["high"][0]


def test_reference() -> None:
    """Cosines of all pairs by loops over Hugging Face's hidden states; its last one is behind the final norm."""
    hf = twins.twin("gpt2")
    prompts = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14]]
    result = isotropy(pb.load(hf), prompts, batch_size=2, draws=20)
    assert result.labels_of("layer") == ["embed", "L0", "L1", "final_norm"]
    hidden = []
    for ids in prompts:
        with torch.no_grad():
            hidden.append([h[0].double() for h in hf(torch.tensor([ids]), output_hidden_states=True).hidden_states])

    def mean(rows: list[torch.Tensor]) -> float:
        total, count = 0.0, 0
        for states in rows:
            for i in range(len(states)):
                for j in range(i):
                    total += float(states[i] @ states[j] / (states[i].norm() * states[j].norm()))
                    count += 1
        return 1 - total / count

    for row, layer in ((0, 0), (1, 1), (3, 2)):
        texts = [text[layer] for text in hidden]
        assert close(float(result.values[row]), mean(texts), of=result.values)
        assert close(
            float(result["without_first"][row]), mean([text[1:] for text in texts[:2]]), of=result["without_first"]
        )
        average = torch.cat(texts).mean(0)
        assert close(float(result["centred"][row]), mean([text - average for text in texts]), of=result["centred"])
        every = [(n, state) for n, text in enumerate(texts) for state in text]
        others = [
            float(torch.nn.functional.cosine_similarity(a, b, dim=0)) for n, a in every for m, b in every if n < m
        ]
        assert close(float(result["across"][row]), 1 - sum(others) / len(others), of=result["across"])
        drawn = torch.randint(3, (20, 3), generator=torch.Generator().manual_seed(0)).tolist()
        again = torch.tensor([mean([texts[i] for i in some]) for some in drawn], dtype=torch.float64)
        for name, end in (("low", 0.025), ("high", 0.975)):
            assert close(float(result[name][row]), float(again.quantile(end)), of=result.values), (
                "pairs drawn with their texts"
            )


def test_null() -> None:
    """Independent Gaussian embeddings lie within the closed-form band (for different words); equal states are at 0."""
    inside = 0
    for seed in range(10):
        built = planted.null(form="llama", seed=seed)
        model = pb.load(built.model, built.tokenizer)
        generator = torch.Generator().manual_seed(seed)
        prompts = [(3 + torch.randperm(60, generator=generator)[:20]).tolist() for _ in range(2)]
        result = isotropy(model, prompts, draws=5)
        inside += int(result["null_low"] <= result.values[0] <= result["null_high"])
    assert inside >= 8
    same = isotropy(model, [[5] * 8, [5] * 4], draws=5)
    assert close(same.values[0], 0.0, of=1.0)
    assert close(float(result["null_high"]), 1 + 1.96 / (model.d_model * 2 * 190) ** 0.5)


def test_one_text_and_other_sites() -> None:
    model = pb.load(twins.twin("mamba2"))
    one = isotropy(model, [[5, 6, 7]], draws=5)
    assert "low" not in one
    assert any("not measured: low, high, across" in note for note in one.notes)
    assert isotropy(model, [[5, 6, 7], [8, 9]], site="attn.out", draws=5).labels_of("layer")[0] == "L0"


def test_bad_input() -> None:
    built = planted.null()
    model = pb.load(built.model, built.tokenizer)
    with pytest.raises(pb.PatchbayError, match="texts of up to 1 tokens"):
        isotropy(model, [[5], [6]])
    with pytest.raises(pb.PatchbayError, match="batch_size=0"):
        isotropy(model, [[5, 6]], batch_size=0)
