"""Induction heads: the planted one and its nulls, the formula as loops, nothing in a random model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.tiny import planted
from tests.given import gpt2
from tests.shares import by_turns
from tests.tolerance import close


@pytest.mark.parametrize(("seed", "form"), by_turns([0, 1], ["gpt2", "llama"], of=2))
def test_planted(form: Any, seed: int) -> None:
    built = planted.induction(form=form, seed=seed)
    model = pb.load(built.model, built.tokenizer)
    result = pb.find.induction_heads(model, pb.tasks.repeated_tokens(model, 10, seed=seed))
    head = built.truth["induction"]
    best, second = result.table(2)
    assert str(best["part"]) == head
    assert best["value"] == pytest.approx(built.truth["attention"][head], abs=0.02)
    assert best["value"] > 5 * best["null_high"]
    assert second["value"] < 0.2


def test_planted_duplicate_head_is_told_apart() -> None:
    """The previous-token head of the circuit scores nothing here, and the shifted target catches one place beside it."""
    built = planted.induction(seed=0)
    model = pb.load(built.model, built.tokenizer)
    task = pb.tasks.repeated_tokens(model, 10)
    rows = {str(row["part"]): row for row in pb.find.induction_heads(model, task).table()}
    assert rows[built.truth["previous_token"]]["value"] < 0.01
    short = pb.tasks.repeated_tokens(
        model, 10, max_period=2, max_offset=3
    )  # the copy stands two back: one back is the target
    moved = {str(row["part"]): row for row in pb.find.induction_heads(model, short).table()}
    assert moved[built.truth["previous_token"]]["value"] > 0.9


def test_reference() -> None:
    """Olsson et al.: attention to the token after each earlier occurrence, as loops over Hugging Face's own attentions."""
    hf = gpt2(1)
    prompts = [torch.randint(3, 12, (n,)).tolist() for n in (16, 14, 20)]  # few tokens: several earlier occurrences
    result = pb.find.induction_heads(pb.load(hf), prompts, batch_size=2)
    hf.set_attn_implementation("eager")
    expected, shifted = torch.zeros(2, 4), {move: torch.zeros(2, 4) for move in (-3, -2, -1, 1, 2, 3)}
    for ids in prompts:
        with torch.no_grad():
            attentions = hf(torch.tensor([ids]), output_attentions=True).attentions
        for layer in range(2):
            for head in range(4):
                a = attentions[layer][0, head]
                for move in (0, *shifted):
                    sums = []
                    for i in range(len(ids)):
                        hits = [p + 1 for p in range(i - 1) if ids[p] == ids[i]]
                        keys = {k + move for k in hits} - (set(hits) if move else set())
                        keys = {k for k in keys if 0 <= k <= i}
                        sums += [sum(float(a[i, k]) for k in keys)] if keys else []
                    total = expected if move == 0 else shifted[move]
                    total[layer, head] += sum(sums) / len(sums) / len(prompts)
    assert close(result.values, expected)
    every = torch.stack(list(shifted.values()))
    assert close(result["null_mean"], every.mean(0))
    assert close(result["null_high"], every.amax(0))


def test_null() -> None:
    """In a random model no head stands clear of its own shifted targets, nor of even attention."""
    built = planted.null(seed=3)
    model = pb.load(built.model, built.tokenizer)
    result = pb.find.induction_heads(model, pb.tasks.repeated_tokens(model, 40))
    assert (result.values - result["null_mean"]).abs().max() < 0.02
    assert (result.values - result["uniform"]).abs().max() < 0.02


def test_prompts_that_repeat_nothing_are_refused() -> None:
    built = planted.null()
    model = pb.load(built.model, built.tokenizer)
    with pytest.raises(pb.PatchbayError, match=r"1 of 2 prompts repeat no token \(first: prompt 1\).*repeated_tokens"):
        pb.find.induction_heads(model, [[5, 6, 5, 6], [5, 6, 7, 8]])
