"""Context compression: the sentence that the answer needs is kept, equals leave-one-out by loops, all kept is the context."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import patchbay as pb
from tests.measure.test_text_loss import constant
from tests.measure.words import NAMES, by_hand, reader
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.measure.context_compression")
CONTEXT = "A cat sat. It was red! No dog? The sun"
ITEMS = [{"context": CONTEXT, "question": f" {x}:", "choices": [" a", " be"], "answer": i % 2} for i, x in enumerate(("on", "in", "up"))]  # fmt: skip


def test_planted() -> None:
    """Sentences by their ends, which together are the text; the ones worth most stay in their own order."""
    parts = module.sentences(CONTEXT)
    assert parts == ["A cat sat. ", "It was red! ", "No dog? ", "The sun"]
    assert module.sentences("Wait... what?! ") == ["Wait... ", "what?! "]
    assert module._kept(parts, [0.1, 3.0, 0.2, 5.0], 0.5) == "It was red! The sun"
    assert module._kept(parts, [1.0, 1.0, 1.0, 1.0], 0.01) == "A cat sat. "
    whole = pb.measure.context_compression(reader("characters"), ITEMS, keep=1.0)
    assert torch.equal(whole["logp"], whole["logp_full"])
    assert whole["kept"].tolist() == [1.0] * 3
    assert [row["context"] for row in whole.tables["contexts"]] == [CONTEXT] * 3


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    model = reader(name)
    found = pb.measure.context_compression(model, ITEMS, keep=0.25)
    parts = module.sentences(CONTEXT)

    def logp(context: str, row: dict[str, Any]) -> list[float]:
        [own] = model.encode([context + row["question"]])
        return [by_hand(model, model.encode([context + row["question"] + c])[0], len(own)) for c in row["choices"]]

    for i, row in enumerate(ITEMS):
        full = logp(CONTEXT, row)[row["answer"]]
        falls = [full - logp("".join(parts[:k] + parts[k + 1 :]), row)[row["answer"]] for k in range(4)]
        best = parts[falls.index(max(falls))]
        assert found.tables["contexts"][i]["context"] == best
        kept = logp(best, row)
        assert close(float(found["logp"][i]), kept[row["answer"]], of=10.0)
        assert float(found["per_item"][i]) == float(kept.index(max(kept)) == row["answer"])
        assert float(found["kept"][i]) == pytest.approx(len(best) / len(CONTEXT))
    surprising = pb.measure.context_compression(model, ITEMS[:1], keep=0.25, critic="surprisal")
    start = model.tokenizer.bos_token_id
    nats = []
    for part in parts:
        ids = [start, *model.tokenizer(part, add_special_tokens=False)["input_ids"]]
        nats.append(-by_hand(model, ids, 1) / (len(ids) - 1))
    assert surprising.tables["contexts"][0]["context"] == parts[nats.index(max(nats))]


def test_null() -> None:
    """A model that does not read its context is as right with any sentences: no critic is better than random."""
    model = constant({" ": 2.0, "a": 1.0, "b": 0.0, "e": 0.0})
    found = pb.measure.context_compression(model, ITEMS)
    assert float(found.values) == float(found["null"]) == float(found["full"])
    assert float(found["p"]) == 1.0
    alone = pb.measure.context_compression(reader("characters"), ITEMS, critic="random", keep=0.5)
    assert "null" not in alone
    assert close(float(alone["kept"].max()), max(len(row["context"]) for row in alone.tables["contexts"]) / len(CONTEXT), dtype=torch.float32)  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"keep": 0.0}, r"keep=0.0 lies in \(0, 1\]"),
        ({"critic": "attention"}, "critic='attention': "),
        ({"items": [{**ITEMS[0], "context": ""}]}, "items, row 0: the context '' has no sentence"),
    ],
)
def test_bad_input_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(pb.PatchbayError, match=said):
        pb.measure.context_compression(reader("characters"), **{"items": ITEMS, **given})
