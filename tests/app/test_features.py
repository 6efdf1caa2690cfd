"""The page's features are the dictionary's: what is active where, and the contexts of one."""

from __future__ import annotations

import pytest
import torch

import patchbay as pb
from patchbay.app import features
from patchbay.errors import PatchbayError
from tests.tolerance import close

PROMPT = "The capital of Lolavia is Grerum. The capital of Lolavia is"


@pytest.fixture(scope="module")
def model(trained: pb.Model) -> pb.Model:
    g = torch.Generator().manual_seed(3)
    rows = torch.randn(40, 128, generator=g)
    rows = rows / rows.norm(dim=1, keepdim=True)
    return trained.with_dictionaries(
        pb.Dictionary(rows.T, rows, torch.full((40,), -0.5), torch.zeros(128), layer=1, reads="resid_out")
    )


def test_the_strongest_features_are_those_of_the_encoder(model: pb.Model) -> None:
    made = features.active(model, {"text": PROMPT, "place": "L1", "part": "L1.F7"})
    ((_, dictionary),) = model.dictionaries.items()
    stream = pb.run(model, PROMPT, taps=["L1.resid_out"])["L1.resid_out"][0]
    z = dictionary.encode(stream)
    heights = z[1:].amax(0)
    best = [f"L1.F{int(i)}" for i in heights.topk(24).indices if heights[i] > 0]
    assert [row["feature"] for row in made["rows"]][: len(best)] == best
    for row in made["rows"]:
        i = int(row["feature"].rpartition("F")[2])
        assert close(torch.tensor(row["values"]), z[:, i])
    assert "L1.F7" in [row["feature"] for row in made["rows"]], "one that is asked for is there, active or not"
    assert made["active"] == (z != 0).sum(-1).tolist()


def test_a_feature_has_its_card_and_the_contexts_where_it_is_active(model: pb.Model) -> None:
    part = features.active(model, {"text": PROMPT, "place": "L1"})["rows"][0]["feature"]
    made = features.feature(model, {"part": part, "texts": [PROMPT, "The cat"]})
    assert part in made["title"]
    contexts = next(section for section in made["sections"] if section["title"].startswith("highest"))
    assert contexts["rows"], contexts
    assert all(float(row["value"]) > 0 for row in contexts["rows"])
    alone = [section["title"] for section in features.feature(model, {"part": part})["sections"]]
    assert not any(title.startswith("highest") for title in alone), "without texts there are none"


def test_dictionaries_are_listed_with_where_they_read(model: pb.Model, trained: pb.Model) -> None:
    (one,) = features.dictionaries(model, {})["dictionaries"]
    assert (one["place"], one["n"], one["reads"], one["writes"]) == ("L1", 40, "resid_out", "resid_out")
    assert features.dictionaries(trained, {}) == {"dictionaries": []}


def test_what_is_not_there_is_refused_by_name(model: pb.Model, trained: pb.Model) -> None:
    with pytest.raises(PatchbayError, match="no dictionary at 'L0'; there are L1"):
        features.active(model, {"text": PROMPT, "place": "L0"})
    with pytest.raises(PatchbayError, match="there are none"):
        features.active(trained, {"text": PROMPT, "place": "L1"})
    with pytest.raises(PatchbayError, match="at most 64 texts"):
        features.feature(model, {"part": "L1.F0", "texts": ["a"] * 65})
    with pytest.raises(PatchbayError, match="F99"):
        features.feature(model, {"part": "L1.F99"})
