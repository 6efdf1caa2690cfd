"""N-gram heads: the planted induction head, the formula as loops for every order, closed form, nothing in a random model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.tiny import planted
from tests.given import gpt2
from tests.tolerance import close


@pytest.mark.parametrize("form", ["gpt2", "llama"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_planted(form: Any, n: int) -> None:
    """An induction head attends to what followed, whatever the order: all its attention, less what even attention has."""
    built = planted.induction(form=form, seed=1)
    model = pb.load(built.model, built.tokenizer)
    result = pb.find.ngram_heads(model, pb.tasks.repeated_tokens(model, 12, seed=1), order=n)
    head = built.truth["induction"]
    best, second = result.table(2)
    assert str(best["part"]) == head
    assert best["value"] == pytest.approx(built.truth["attention"][head] - float(result["uniform"]), abs=0.02)
    assert best["without_first"] == pytest.approx(best["value"], abs=0.03)
    assert best["p_adjusted"] <= 0.05 < 0.2 < best["value"] - second["value"]
    assert float(result["held_out"]) > 0.9


def test_planted_order_is_told() -> None:
    """Where the last token came twice, but only once after the same token before it, the planted head pays to both alike."""
    built = planted.induction(seed=0)
    model = pb.load(built.model, built.tokenizer)
    words = torch.randperm(48, generator=torch.Generator().manual_seed(0)).add(12).tolist()
    prompts = [[*words[i : i + 4], 5, 6, 7, *words[i + 4 : i + 8], 9, 6, 8, 11, 5, 6] for i in range(0, 40, 8)]
    result = pb.find.ngram_heads(model, prompts, order=2)
    row = next(r for r in result.table() if str(r["part"]) == built.truth["induction"])
    assert row["excess_1"] > 0.85
    assert 0.25 < row["shorter"] < 0.75  # some to 7, some to 8: a head of order 1
    assert 0.94 < row["shorter"] + row["excess_2"] + 1 / 17 < 1 + 1e-6  # nearly all that it pays goes to the two


def _reference(attentions: Any, prompts: list[list[int]], n: int, leave_out: bool = False) -> torch.Tensor:
    total = torch.zeros(2, 4)
    for ids, layers in zip(prompts, attentions, strict=True):
        for layer in range(2):
            for head in range(4):
                a, found = layers[layer][0, head], []
                for i in range(len(ids)):
                    keys = [
                        j
                        for j in range(n, i)
                        if i - n + 1 >= 0
                        and all(ids[j - 1 - m] == ids[i - m] for m in range(n))
                        and not (leave_out and j == 0)
                    ]
                    if keys:
                        scale = 1 / float(a[i, 1 : i + 1].sum()) if leave_out else 1.0
                        even = len(keys) / (i if leave_out else i + 1)
                        found.append(sum(float(a[i, j]) for j in keys) * scale - even)
                total[layer, head] += sum(found) / len(found) / len(prompts)
    return total


@pytest.mark.parametrize("n", [1, 2, 3])
def test_reference(n: int) -> None:
    """The definition as loops over Hugging Face's own attentions: strict j < i, whole n-grams, prompt by prompt."""
    hf = gpt2(1)
    prompts = [torch.randint(3, 6, (size,)).tolist() for size in (26, 24, 30)]  # few tokens: matches of every order
    result = pb.find.ngram_heads(pb.load(hf), prompts, order=n, batch_size=2)
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = [hf(torch.tensor([ids]), output_attentions=True).attentions for ids in prompts]
    assert close(result.values, _reference(attentions, prompts, n), of=1.0)
    assert close(result["without_first"], _reference(attentions, prompts, n, True), of=1.0)
    for order in (1, 2, 3):
        assert close(result[f"excess_{order}"], _reference(attentions, prompts, order), of=1.0)
    first, second, third = (_reference(attentions[i : i + 1], prompts[i : i + 1], n) for i in range(3))
    best = int((first + third).argmax())
    assert close(float(result["held_out"]), float(second.flatten()[best]), of=1.0)


def test_an_immediate_repeat_does_not_count() -> None:
    """x_i = x_{i-1}: the token after the earlier one is the query itself, and j < i is strict."""
    built = planted.null(seed=0)
    model = pb.load(built.model, built.tokenizer)
    with pytest.raises(pb.PatchbayError, match="none of the 1 prompts says 1 tokens in a row again"):
        pb.find.ngram_heads(model, [[5, 6, 7, 7]])


def test_null() -> None:
    """A random model has no excess, and even attention has none at all."""
    built = planted.null(seed=3)
    model = pb.load(built.model, built.tokenizer)
    task = pb.tasks.repeated_tokens(model, 40)
    result = pb.find.ngram_heads(model, task)
    assert result.values.abs().max() < 0.02
    assert (result["p_adjusted"] > 0.05).all()
    with model.edited(*(pb.zero(layer.attn.k) for layer in model.layers)):
        even = pb.find.ngram_heads(model, task)
    assert close(even.values, 0.0, of=1.0)
    assert close(even["without_first"], 0.0, of=1.0)


def test_errors() -> None:
    built = planted.null()
    model = pb.load(built.model, built.tokenizer)
    with pytest.raises(pb.PatchbayError, match="order=4; possible are 1, 2, 3"):
        pb.find.ngram_heads(model, [[5, 6, 5, 6]], order=4)
    with pytest.raises(pb.PatchbayError, match=r"none of the 1 prompts says 2 tokens.*repeated_tokens"):
        pb.find.ngram_heads(model, [[5, 6, 7, 5, 8, 9]], order=2)
