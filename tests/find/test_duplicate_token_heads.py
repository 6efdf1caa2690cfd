"""Duplicate-token heads: a planted one, told from an induction head; the formula as loops; nothing in a random model."""

from __future__ import annotations

import pytest
import torch

import patchbay as pb
from patchbay.tiny import planted
from patchbay.tiny.planted_canvas import Canvas, Form
from patchbay.tiny.planted_vocabulary import tokenizer
from tests.given import gpt2
from tests.tolerance import close


def with_duplicate_head(form: Form, seed: int) -> tuple[pb.Model, str]:
    """A head whose queries and keys are the words themselves: it attends to all occurrences of its word, its own among them."""
    canvas = Canvas(form, seed)
    words = canvas.take(canvas.n_vocab)
    canvas.embed(words)
    head = canvas.pick_head(1)
    codes = canvas.slots(canvas.n_vocab, signed=True)
    canvas.set_head(1, head, q=50.0 * words.T @ codes, k=words.T @ codes, v=words.T, o=words)
    canvas.unembed(6.0 * words)
    return pb.load(canvas.model, tokenizer()), f"L1.H{head}"


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_planted(form: Form) -> None:
    """With one earlier occurrence, half of the planted head's attention stays on the token itself."""
    model, head = with_duplicate_head(form, 0)
    result = pb.find.duplicate_token_heads(model, pb.tasks.repeated_tokens(model, 12))
    best, second = result.table(2)
    assert str(best["part"]) == head
    assert best["value"] == pytest.approx(0.5, abs=0.02)
    assert best["without_first"] == pytest.approx(
        0.5, abs=0.06
    )  # where the earlier one is the first token, none is left
    assert best["value"] > 5 * best["null_high"]
    assert best["p_adjusted"] <= 0.05
    assert second["value"] < 0.2
    assert float(result["held_out"]) > 0.4


def test_planted_induction_head_is_told_apart() -> None:
    built = planted.induction(seed=0)
    model = pb.load(built.model, built.tokenizer)
    rows = {
        str(r["part"]): r for r in pb.find.duplicate_token_heads(model, pb.tasks.repeated_tokens(model, 12)).table()
    }
    row = rows[built.truth["induction"]]
    assert row["value"] < 0.05 < 0.5 < row["null_high"]  # its attention is one to the right


def test_reference() -> None:
    hf = gpt2(1)
    prompts = [torch.randint(3, 12, (n,)).tolist() for n in (16, 14, 20)]
    result = pb.find.duplicate_token_heads(pb.load(hf), prompts, batch_size=2)
    hf.set_attn_implementation("eager")
    expected, without, shifted = (
        torch.zeros(2, 4),
        torch.zeros(2, 4),
        {m: torch.zeros(2, 4) for m in (-3, -2, -1, 1, 2, 3)},
    )
    for ids in prompts:
        with torch.no_grad():
            attentions = hf(torch.tensor([ids]), output_attentions=True).attentions
        for layer in range(2):
            for head in range(4):
                a = attentions[layer][0, head]
                same = {i: [p for p in range(i) if ids[p] == ids[i]] for i in range(len(ids))}
                paid = [sum(float(a[i, p]) for p in same[i]) for i in same if same[i]]
                expected[layer, head] += sum(paid) / len(paid) / len(prompts)
                bare = [
                    sum(float(a[i, p]) for p in same[i] if p) / float(a[i, 1 : i + 1].sum())
                    for i in same
                    if any(same[i])
                ]
                without[layer, head] += sum(bare) / len(bare) / len(prompts)
                for move, total in shifted.items():
                    sums = []
                    for i, hits in same.items():
                        keys = {p + move for p in hits if 0 <= p + move <= i} - set(hits)
                        sums += [sum(float(a[i, k]) for k in keys)] if keys else []
                    total[layer, head] += sum(sums) / len(sums) / len(prompts)
    assert close(result.values, expected)
    assert close(result["without_first"], without)
    every = torch.stack(list(shifted.values()))
    assert close(result["null_mean"], every.mean(0))
    assert close(result["null_high"], every.amax(0))


def test_null() -> None:
    """In a random model no head stands clear of even attention by much, and even attention scores `uniform`.

    A token's own key looks like its earlier one, so that a small excess of either sign is real: its size is what is tested.
    """
    built = planted.null(seed=3)
    model = pb.load(built.model, built.tokenizer)
    task = pb.tasks.repeated_tokens(model, 40)
    result = pb.find.duplicate_token_heads(model, task)
    assert result["excess"].abs().max() < 0.03
    with model.edited(*(pb.zero(layer.attn.k) for layer in model.layers)):
        even = pb.find.duplicate_token_heads(model, task)
    assert close(even.values, even["uniform"].expand(2, 4))
    assert (even["p"] == 1.0).all()


def test_prompts_that_repeat_nothing_are_refused() -> None:
    built = planted.null()
    model = pb.load(built.model, built.tokenizer)
    with pytest.raises(pb.PatchbayError, match=r"1 of 2 prompts repeat no token \(first: prompt 1\).*repeated_tokens"):
        pb.find.duplicate_token_heads(model, [[5, 6, 5, 6], [5, 6, 7, 8]])
