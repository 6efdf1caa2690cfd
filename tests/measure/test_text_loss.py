"""Text loss: a planted probability is read back in bits; equals Hugging Face's loss by loops; uniform logits cost log2 of the vocabulary."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import patchbay as pb
from patchbay.tiny import twins
from tests.measure.words import LETTERS, NAMES, by_hand, reader
from tests.tolerance import close

TEXTS = ["the cat sat on the mat.", "it ran", "a dog and a cat", "on"]


def constant(logits: dict[str, float]) -> pb.Model:
    """A reader whose logits are these, whatever it reads."""
    model = pb.load(twins.twin("llama"), reader("characters").tokenizer)
    head = model.hf.get_output_embeddings()
    head.weight.data.zero_()
    head.bias = torch.nn.Parameter(torch.full((96,), -30.0))
    for token, value in logits.items():
        head.bias.data[model.tokenizer.convert_tokens_to_ids(token)] = value
    return model


def test_planted() -> None:
    """Characters of probability 1/2, 1/4 and 1/4 cost 1, 2 and 2 bits."""
    model = constant({"a": math.log(2.0), "b": 0.0, "c": 0.0})
    found = pb.measure.text_loss(model, ["aab", "cb", "aaaa"])
    assert close(found["per_item"], torch.tensor([4.0, 4.0, 4.0]).double(), dtype=torch.float32)
    assert close(float(found.values), 12 / 9)
    assert found.unit == "bits per byte"
    groups = pb.measure.text_loss(
        model, [{"text": "aa", "group": "x"}, {"text": "bb", "group": "y"}, {"text": "a", "group": "x"}]
    )
    assert [(row["group"], row["n"], round(row["value"], 4)) for row in groups.tables["groups"]] == [
        ("x", 2, 1.0),
        ("y", 1, 2.0),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    """Sums of -log p after the start token, by loops, over the texts' bytes; the unigram by counting."""
    model = reader(name)
    found = pb.measure.text_loss(model, TEXTS, batch_size=3)
    rows = [
        [model.tokenizer.bos_token_id, *model.tokenizer(text, add_special_tokens=False)["input_ids"]] for text in TEXTS
    ]
    nats = [-by_hand(model, row, 1) for row in rows]
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    assert close(float(found.values), sum(nats) / math.log(2) / n_bytes)
    assert close(found["per_item"], torch.tensor(nats).double() / math.log(2), dtype=torch.float32)
    tokens = [token for row in rows for token in row[1:]]
    unigram = -sum(math.log(tokens.count(token) / len(tokens)) for token in tokens)
    assert close(float(found["null"]), unigram / math.log(2) / n_bytes)
    assert close(float(found["uniform"]), len(tokens) * math.log2(96) / n_bytes)
    per_token = pb.measure.text_loss(model, TEXTS, unit="token")
    assert close(float(per_token.values), sum(nats) / len(tokens))
    assert float(found["low"]) < float(found.values) < float(found["high"])


def test_null() -> None:
    """Logits that are all equal cost log2(vocabulary) a token: as much as `uniform` says, and more than the unigram."""
    model = constant(dict.fromkeys(LETTERS, -30.0))
    found = pb.measure.text_loss(model, TEXTS * 3)
    assert close(float(found.values), float(found["uniform"]))
    assert float(found.values) > float(found["null"])
    assert float(found["p"]) < 0.01
    assert close(float(found.values), math.log2(96))


def test_a_text_twice_changes_no_value_and_a_planted_knob_raises_it() -> None:
    model = reader("characters")
    once, twice = pb.measure.text_loss(model, TEXTS), pb.measure.text_loss(model, TEXTS * 2)
    assert close(float(once.values), float(twice.values))
    assert float(twice["high"] - twice["low"]) < float(once["high"] - once["low"])
    sharp = constant({"a": math.log(2.0), "b": 0.0, "c": 0.0})
    with sharp.edited(pb.scale(sharp.logits, 3.0)):  # half of the mass on "a" becomes 8 of 10
        turned = pb.measure.text_loss(sharp, ["aab"])
    assert close(float(turned.values), -math.log2(0.8 * 0.8 * 0.1) / 3)


def test_files_and_bad_input(tmp_path: Path) -> None:
    model = reader("characters")
    lines = [json.dumps({"body": text, "kind": "x"}) for text in TEXTS]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    found = pb.measure.text_loss(model, f"{tmp_path}/texts.jsonl:text=body,group=kind")
    assert torch.equal(found["per_item"], pb.measure.text_loss(model, TEXTS)["per_item"])
    assert any("SHA-256" in note for note in found.notes)
    with pytest.raises(pb.PatchbayError, match=r"texts\.jsonl, line 1 lacks the field 'text'; it has body, kind"):
        pb.measure.text_loss(model, str(tmp_path / "texts.jsonl"))
    with pytest.raises(pb.PatchbayError, match="fields are written text=NAME, got 'txt=body'"):
        pb.measure.text_loss(model, f"{tmp_path}/texts.jsonl:txt=body")
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(pb.PatchbayError, match="line 1 is not utf-8"):
        pb.measure.text_loss(model, str(tmp_path / "bad.jsonl"))
    with pytest.raises(pb.PatchbayError, match="bits per byte need the texts' bytes"):
        pb.measure.text_loss(pb.load(twins.twin("gpt2")), [[5, 6, 7], [8, 9]])
    one = pb.measure.text_loss(model, ["the cat"])
    assert "low" not in one
    assert any("no interval" in note for note in one.notes)
