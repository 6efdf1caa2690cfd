"""Classifiers without a causal mask: trained so, saved so, loaded so, and read so by finders; families that would be causal again are refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import patchbay as pb
from patchbay.signal.port import Port
from patchbay.train._copies import copied
from patchbay.train._objectives import objective
from patchbay.train._objectives._masks import masked, unmask
from tests.given import lent
from tests.shares import by_turns
from tests.tolerance import close

OPEN = "label-supervision:classes=20+21,two_way=1"


def documents(n: int = 24) -> list[list[list[int]]]:
    """Texts of several lengths whose label is said by their first token."""
    draw = random.Random(0)
    return [[[3 + i % 2, *(draw.randrange(5, 19) for _ in range(3 + i % 4))], [20 + i % 2]] for i in range(n)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unmasked") / "runs"
    plan = {"steps": 3, "batch_size": 4, "held": 0.25, "rate": 0.01, "panel": 4}
    pb.train.variant(lent("llama"), documents(), objective=OPEN, seeds=1, folder=str(folder), plan=plan)
    return folder


def test_the_checkpoint_is_what_was_trained(runs: Path) -> None:
    """Loaded, its own forward without any mask gives the scores that the lab told; its twin, and the lent model, stay causal."""
    model = pb.load(runs / "variant-0")
    assert not model.causal
    assert pb.load(runs / "twin-0").causal
    assert lent("llama").causal
    assert getattr(lent("llama").hf.config, "is_causal", True)
    told = json.loads((runs / "variant-0" / "run.json").read_text())
    found = {}
    with torch.no_grad():
        for i, (text, [label]) in enumerate(documents()):
            logits = model.hf(torch.tensor([text])).logits[0, -1, 20:22].double()
            found[i] = float(cross_entropy(logits[None], torch.tensor([label - 20])))
    assert all(min(abs(one - other) for other in found.values()) < 1e-5 for one in told["scores"])
    assert told["panel"]


def test_finders_read_it_without_its_mask(runs: Path) -> None:
    """Streams are those under an open mask, for prompts of several lengths in one call; so the depth of a concept is that of the classifier."""
    model, texts = pb.load(runs / "variant-0"), [text for text, _ in documents()]
    trace = pb.run(model, texts, taps=[Port("resid_out", 0)])
    causal = copied(model)
    causal.hf.config.is_causal = True
    causal = pb.load(causal.hf)
    for i in (0, 1, 2):
        ids = torch.tensor([texts[i]])
        every = torch.ones_like(ids, dtype=torch.bool)
        with torch.no_grad():
            opened = masked(causal.hf, ids, every, every[:, 0], output_hidden_states=True).hidden_states[1][0]
        assert close(trace[Port("resid_out", 0)][i, : len(texts[i])], opened)
        assert not close(pb.run(causal, [texts[i]], taps=[Port("resid_out", 0)])[Port("resid_out", 0)][0], opened)
    labels = [str(len(text)) for text in texts]
    depths = [pb.find.concept_depth(one, texts, labels, folds=3, draws=3, seed=0) for one in (model, causal)]
    assert depths[0].tables["depth"][0]["condition"] == "plain"
    assert not torch.equal(depths[0]["auc"], depths[1]["auc"])


@pytest.mark.parametrize(
    "family",
    by_turns(["llama", "qwen2", "mistral", "gemma", "phi3", "olmo2", "gpt2", "gpt_neox", "qwen3", "mixtral"], of=3),
)
def test_families_hear_the_switch(family: str) -> None:
    model = copied(lent(family))
    before = model.fingerprint
    ids = torch.tensor([[5, 9, 13, 40, 7]])
    every = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        opened = masked(lent(family).hf, ids, every, every[:, 0]).logits
    unmask(model, "x")
    assert close(pb.run(model, ids).logits, opened)
    assert not model.causal
    model._fingerprint = None
    assert model.fingerprint == before


def test_one_that_would_be_causal_again_is_refused_and_left_as_it_was() -> None:
    for family in ("stablelm", "llama4_text"):
        model = copied(lent(family))
        with pytest.raises(
            pb.PatchbayError, match=r"model keeps its causal mask where transformers' own switch \(is_causal\)"
        ):
            objective(OPEN).adapt(model)
        assert model.causal
        assert getattr(model.hf.config, "is_causal", True)
        ids = torch.tensor([[5, 9, 13, 40, 7]])
        assert torch.equal(pb.run(model, ids).logits, pb.run(lent(family), ids).logits)
