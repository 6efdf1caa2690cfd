"""Minimal pairs: planted preferences are found, equals sums over Hugging Face's logits, and length alone is seen for what it is."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.measure import _estimates as estimates
from tests.measure.test_text_loss import constant
from tests.measure.words import NAMES, by_hand, reader, shared_model
from tests.shared import SHARED
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.measure.minimal_pairs")
PAIRS = [
    {"good": "the cat sat", "bad": "cat the sat", "group": "order"},
    {"good": "it is a dog", "bad": "it are a dog", "group": "number"},
    {"good": "he ran", "bad": "he run on", "group": "number"},
]
LETTERS = {"a": 1.0, "b": 0.0, "c": -1.0}


def test_planted() -> None:
    """A model that likes "a" better than "b" and "c" whatever stands before it."""
    model = constant(LETTERS)
    rows = [
        {"good": "aab", "bad": "abb"},
        {"good": "ba", "bad": "ca"},
        {"good": "c", "bad": "b"},
        {"good": "ab", "bad": "ba"},
    ]
    found = pb.measure.minimal_pairs(model, rows)
    assert found["per_item"].tolist() == [1.0, 1.0, 0.0, 0.5]
    assert close(found["margin"], torch.tensor([1.0, 1.0, -1.0, 0.0]).double(), of=10.0)
    labels = [{"sentence": text, "label": int("c" not in text)} for text in ("ab", "bc", "aa", "cc", "ba", "ac")]
    single = pb.measure.minimal_pairs(model, labels)
    assert float(single.values) == 1.0
    assert float(single["null"]) == 0.5  # all of one length


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    model = reader(name)
    bos = model.tokenizer.bos_token_id

    def total(text: str) -> tuple[float, int]:
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        return by_hand(model, [bos, *ids], 1), len(ids)

    for score, size in (("sum", lambda n, c: 1.0), ("token", lambda n, c: n), ("char", lambda n, c: c), ("penlp", lambda n, c: ((5 + n) / 6) ** 0.8)):  # fmt: skip
        found = pb.measure.minimal_pairs(model, PAIRS, score=score)  # type: ignore[arg-type]
        for i, pair in enumerate(PAIRS):
            good, bad = ((p / size(n, len(text))) for text in (pair["good"], pair["bad"]) for p, n in [total(text)])
            assert close(float(found["margin"][i]), good - bad, of=found["margin"])
            assert float(found["per_item"][i]) == (good > bad)
    lengths = [(total(pair["good"])[1], total(pair["bad"])[1]) for pair in PAIRS]
    assert float(found["null"]) == pytest.approx(sum((a < b) + 0.5 * (a == b) for a, b in lengths) / 3)


def test_null() -> None:
    """Sentences of characters at random: the share follows length alone, as the null says, and p is not small."""
    generator = torch.Generator().manual_seed(0)

    def text() -> str:
        n = int(torch.randint(3, 12, (1,), generator=generator))
        return "".join("abcdefgh"[int(i)] for i in torch.randint(8, (n,), generator=generator))

    rows = [{"good": text(), "bad": text()} for _ in range(80)]
    found = pb.measure.minimal_pairs(reader("characters"), [row for row in rows if row["good"] != row["bad"]])
    assert abs(float(found.values) - float(found["null"])) < 0.1
    assert float(found["p"]) > 0.05
    by_length = {row["good is"]: row["value"] for row in found.tables["lengths"]}
    assert by_length["shorter"] > 0.8 > 0.2 > by_length["longer"]  # so the share alone says nothing


def test_good_and_bad_exchanged_give_one_less_the_share() -> None:
    model = reader("pairs")
    found = pb.measure.minimal_pairs(model, PAIRS)
    swapped = pb.measure.minimal_pairs(model, [{**row, "good": row["bad"], "bad": row["good"]} for row in PAIRS])
    assert float(swapped.values) == pytest.approx(1 - float(found.values))
    assert torch.equal(swapped["margin"], -found["margin"])
    assert [row["group"] for row in found.tables["groups"]] == ["order", "number"]


def test_the_threshold_is_fitted_on_sentences_that_are_not_scored() -> None:
    """Labels at random: a threshold that had seen the sentences would find some correlation in them."""
    values = torch.randn(40, generator=torch.Generator().manual_seed(0)).double()
    found, seen = [], []
    for seed in range(60):
        labels = (torch.rand(40, generator=torch.Generator().manual_seed(seed)) > 0.5).double()
        one = module._held_out(values, labels, seed)
        found += [one] if one == one else []
        cuts = [estimates.matthews(labels, (values >= cut).double()) for cut in values]
        seen.append(max(x for x in cuts if x == x))
    assert abs(sum(found) / len(found)) < 0.08
    assert sum(seen) / len(seen) > 0.2


def test_bad_items_are_named(tmp_path: Path) -> None:
    model = reader("characters")
    with pytest.raises(pb.PatchbayError, match=r"items, row 0: good and bad are the same sentence"):
        pb.measure.minimal_pairs(model, [{"good": "a", "bad": "a"}])
    pairs = [{"good": "he is", "bad": "is he", "group": "x"}, {"good": "she is", "bad": "is she"}]
    with pytest.raises(pb.PatchbayError, match=r"items, row 1 has no group and others have one: all pairs or none"):
        pb.measure.minimal_pairs(reader("pairs"), pairs)
    long = {"good": "he is", "bad": "a" * 100}
    with pytest.raises(pb.PatchbayError, match=r"items, row 0, bad has 101 tokens and the model reads 64"):
        pb.measure.minimal_pairs(reader("characters"), [long])
    with pytest.raises(pb.PatchbayError, match="label is 1"):
        pb.measure.minimal_pairs(model, [{"sentence": "a", "label": 2}])
    one_class = pb.measure.minimal_pairs(model, [{"sentence": text, "label": 1} for text in ("a", "ab", "abc")])
    assert math.isnan(float(one_class.values))
    assert any("labels of one class" in note for note in one_class.notes)
    (tmp_path / "pairs.csv").write_text("sentence_good,sentence_bad\nthe cat,cat the\nhe ran,he run\n")
    found = pb.measure.minimal_pairs(model, f"{tmp_path}/pairs.csv:good=sentence_good,bad=sentence_bad")
    assert len(found["per_item"]) == 2


@pytest.mark.skipif(
    not (SHARED / "data" / "blimp_60_per_paradigm.jsonl").is_file(), reason="BLiMP's pairs are not here"
)
def test_blimp_on_a_story_model_is_what_length_gives() -> None:
    """Four paradigms of BLiMP, as they were measured: the two extremes, and what the shorter sentence wins."""
    path = SHARED / "data" / "blimp_60_per_paradigm.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    chosen = [row for row in rows if row["UID"] in ("principle_A_case_1", "only_npi_licensor_present")]
    items = [{"good": row["sentence_good"], "bad": row["sentence_bad"], "group": row["UID"]} for row in chosen]
    found = pb.measure.minimal_pairs(shared_model("stories260K"), items)
    shares = {row["group"]: round(row["value"], 2) for row in found.tables["groups"]}
    assert shares == {"principle_A_case_1": 1.0, "only_npi_licensor_present": 0.03}
