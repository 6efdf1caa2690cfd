"""Previous-token heads: the planted one, the formula as loops, nothing in a random model, and the known ones of real models."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.tiny import planted
from tests.given import llama
from tests.shared import SHARED
from tests.tolerance import close


@pytest.mark.parametrize("form", ["gpt2", "llama"])
@pytest.mark.parametrize("seed", [0, 1])
def test_planted(form: Any, seed: int) -> None:
    built = planted.induction(form=form, seed=seed)
    model = pb.load(built.model, built.tokenizer)
    result = pb.find.previous_token_heads(model, pb.tasks.repeated_tokens(model, 10, seed=seed))
    head = built.truth["previous_token"]
    best, second = result.table(2)
    assert str(best["part"]) == head
    assert best["value"] == pytest.approx(built.truth["attention"][head], abs=0.01)
    assert second["value"] < 3 * result["uniform"] < 0.5


def test_reference() -> None:
    """The formula as loops over Hugging Face's own attentions, on prompts of different lengths."""
    hf = llama(0)
    prompts = [torch.randint(3, 90, (n,)).tolist() for n in (5, 9, 3, 12)]
    result = pb.find.previous_token_heads(pb.load(hf), prompts, first=2, batch_size=3)
    hf.set_attn_implementation("eager")
    expected = torch.zeros(2, 4)
    for ids in prompts:
        with torch.no_grad():
            attentions = hf(torch.tensor([ids]), output_attentions=True).attentions
        for layer in range(2):
            for head in range(4):
                paid = [float(attentions[layer][0, head, i, i - 1]) for i in range(2, len(ids))]
                expected[layer, head] += sum(paid) / len(paid) / len(prompts)
    assert close(result.values, expected)


def test_null() -> None:
    """In a random model every head stays near what even attention would score."""
    built = planted.null(seed=1)
    model = pb.load(built.model, built.tokenizer)
    result = pb.find.previous_token_heads(model, pb.tasks.repeated_tokens(model, 30))
    assert (result.values - result["uniform"]).abs().max() < 0.05


def test_uniform_attention_scores_uniform() -> None:
    """Keys set to zero make every head attend evenly: an oracle in closed form."""
    built = planted.null(seed=0)
    model = pb.load(built.model, built.tokenizer)
    with model.edited(*(pb.zero(layer.attn.k) for layer in model.layers)):
        result = pb.find.previous_token_heads(model, [[5, 6, 7, 8, 9]], first=1)
    expected = (1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 4
    assert close(result.values, torch.full((2, 4), expected))
    assert close(result["uniform"], expected)


def test_errors() -> None:
    built = planted.null()
    model = pb.load(built.model, built.tokenizer)
    with pytest.raises(pb.PatchbayError, match="prompt 1 has 2 tokens; with first=2 each needs 3"):
        pb.find.previous_token_heads(model, [[5, 6, 7], [5, 6]])
    with pytest.raises(pb.PatchbayError, match="at least 1"):
        pb.find.previous_token_heads(model, [[5, 6, 7]], first=0)


@pytest.mark.parametrize(
    ("folder", "known"),
    [("stories260K", {"L1.H3": 0.64, "L3.H6": 0.62}), ("gpt2-sp512-tinystories-0.28m", {"L1.H3": 0.40})],
)
def test_heads_of_trained_models(folder: str, known: dict[str, float]) -> None:
    """The known heads of trained models on stories, and every other as Hugging Face's own attentions have it."""
    if not (SHARED / "models" / folder).is_dir():
        pytest.skip(f"no {SHARED / 'models' / folder}: set PATCHBAY_SHARED to the folder of shared checkpoints")
    model = pb.load(SHARED / "models" / folder)
    lines = (SHARED / "data" / "tinystories_train_1000.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    encoded = model.tokenizer([json.loads(line)["text"] for line in lines])["input_ids"]
    prompts = [ids[:96] for ids in encoded if len(ids) >= 96]
    result = pb.find.previous_token_heads(model, prompts)
    found = {str(row["part"]): row["value"] for row in result.table(len(known))}
    assert set(found) == set(known)
    for head, score in known.items():
        assert found[head] == pytest.approx(score, abs=0.03)
    model.hf.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model.hf(torch.tensor(prompts), output_attentions=True).attentions
    direct = torch.stack([a.diagonal(-1, -2, -1)[..., 1:].mean((0, 2)) for a in attentions])  # [layer, head]
    assert close(result.values, direct)
