"""Successor heads: the planted permutation, the formula on GPT-2's own modules, chance in a random model, words that are not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.find.successor_heads import successor_heads
from patchbay.tiny import planted, twins
from tests.shares import by_turns
from tests.tolerance import close

CLASSES = {"numbers": list(range(5, 25)), "days": [40, 41, 42, 43, 44, 45, 46]}


@pytest.mark.parametrize(("seed", "form"), by_turns([0, 1], ["gpt2", "llama"], of=2))
def test_planted(form: Any, seed: int) -> None:
    """The planted OV permutes the word code: 1.0 on the raw embedding and the sum, chance where the MLP's noise is all there is."""
    built = planted.successor(form=form, seed=seed)
    model = pb.load(built.model, built.tokenizer)
    result = successor_heads(model)
    best, second = result.table(2)
    assert str(best["part"]) == built.truth["successor"]
    assert (best["value"], best["copy"]) == (1.0, 0.0)
    assert best["p_adjusted"] < 0.01
    assert second["value"] < 0.3
    assert second["p_adjusted"] > 0.05
    assert best["mlp0"] < 0.4
    rows = {row["class"]: row for row in result.tables["classes"]}
    assert set(rows) == {"number_words", "days", "months"}
    assert rows["days"]["successions"] == 7  # Monday follows Sunday
    assert rows["number_words"]["successions"] == 9  # nothing follows ten here
    assert result["chance"] == pytest.approx((9 / 10 + 7 / 7 + 12 / 12) / 28)


def test_a_copying_head_copies() -> None:
    built = planted.copy(seed=0)
    model = pb.load(built.model, built.tokenizer)
    rows = {str(row["part"]): row for row in successor_heads(model).table()}
    assert (rows[built.truth["copy"]]["copy"], rows[built.truth["copy"]]["value"]) == (1.0, 0.0)


def test_reference() -> None:
    """Gould et al.: U (LN(e) W_V W_O) by GPT-2's own modules; e is the embedding row, the MLP of it, or both."""
    hf = twins.twin("gpt2")
    result = successor_heads(pb.load(hf), classes=CLASSES)
    first, second = hf.transformer.h
    expected = {name: torch.zeros(2, 4, dtype=torch.float64) for name in ("raw", "mlp0", "sum", "copy")}
    count = 19 + 7
    with torch.no_grad():
        for name, tokens in CLASSES.items():
            wraps = name == "days"
            for place, token in enumerate(tokens):
                if place + 1 == len(tokens) and not wraps:
                    continue
                after = (place + 1) % len(tokens)
                raw = hf.transformer.wte.weight[token]
                mlp0 = first.mlp(first.ln_2(raw))
                for way, x in (("raw", raw), ("mlp0", mlp0), ("sum", raw + mlp0)):
                    for layer, block in enumerate((first, second)):
                        v = block.attn.c_attn(block.ln_1(x))[64:]
                        for head in range(4):
                            at = slice(8 * head, 8 * head + 8)
                            write = v[at] @ block.attn.c_proj.weight[at]
                            said = hf.lm_head.weight[tokens] @ (hf.transformer.ln_f.weight * (write - write.mean()))
                            best = int(said.argmax())
                            expected[way][layer, head] += (best == after) / count
                            if way == ("raw" if layer == 0 else "sum"):
                                expected["copy"][layer, head] += (best == place) / count
    for name, value in expected.items():
        assert close(result[name], value, dtype=torch.float64), name
    assert torch.equal(result.values[0], result["raw"][0])
    assert torch.equal(result.values[1], result["sum"][1])
    assert expected["raw"].unique().numel() > 2


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi", "deepseek_v3", "gpt_oss"])
def test_what_all_logits_of_a_class_gain_changes_nothing(name: str) -> None:
    hf = twins.twin(name)
    before = successor_heads(pb.load(hf), classes=CLASSES, draws=1)
    rows = [token for tokens in CLASSES.values() for token in tokens]
    if hf.get_input_embeddings().weight is hf.get_output_embeddings().weight:
        pytest.skip(f"{name} ties its embeddings: the unembedding cannot be moved alone")
    with torch.no_grad():
        hf.get_output_embeddings().weight[rows] += torch.randn(hf.config.hidden_size)
    after = successor_heads(pb.load(hf), classes=CLASSES, draws=1)
    assert all(torch.equal(before[v], after[v]) for v in ("score", "copy", "raw", "mlp0", "sum"))


def test_null() -> None:
    """In a random model no head knows what comes next."""
    built = planted.null(seed=2)
    result = successor_heads(pb.load(built.model, built.tokenizer))
    assert (result["p_adjusted"] > 0.05).all()
    assert abs(float(result.values.mean()) - float(result["chance"])) < 0.06
    assert (result["null_mean"] - result["chance"]).abs().max() < 0.06


def test_trained_and_dropped_words_are_said() -> None:
    """The built-in tokenizer has the numbers below 100, letters, days and months, and not one number word."""
    result = successor_heads(pb.load("tiny"))
    assert any(note.startswith("numbers: 100 single tokens; dropped 100, 101") for note in result.notes)
    assert any(note.startswith("number_words: left out: 0 single tokens; dropped one, two") for note in result.notes)
    assert {row["word"] for row in result.tables["dropped"]} == {str(n) for n in range(100, 201)}
    best = result.table(1)[0]
    assert str(best["part"]) == "L0.H0"
    assert best["value"] > 0.3
    assert best["p_adjusted"] < 0.05


def test_bad_input() -> None:
    model = pb.load(twins.twin("gpt2"))
    with pytest.raises(pb.PatchbayError, match="this model has no tokenizer.*classes of token ids"):
        successor_heads(model)
    with pytest.raises(pb.PatchbayError, match="embed='w_e'; possible are auto, raw, mlp0, sum"):
        successor_heads(model, classes=CLASSES, embed="w_e")  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="classes map a name to its words in order"):
        successor_heads(model, classes={"numbers": 3})  # type: ignore[dict-item]
    with pytest.raises(pb.PatchbayError, match="token id 96, the vocabulary is 0..95"):
        successor_heads(model, classes={"numbers": [5, 6, 96]})
    with pytest.raises(pb.PatchbayError, match="holds a token twice"):
        successor_heads(model, classes={"numbers": [5, 6, 5]})
    with pytest.raises(pb.PatchbayError, match=r"no class has two successions.*pair 2 of 2"):
        successor_heads(model, classes={"pair": [5, 6]})
    with pytest.raises(pb.PatchbayError, match="no layer of this mamba model has it"):
        successor_heads(pb.load(twins.twin("mamba2")), classes=CLASSES)
