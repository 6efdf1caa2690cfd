"""Texts as trees in one row: the logits of whole texts where that is proved, and no proof where tokens meet otherwise or see less."""

from __future__ import annotations

import pytest
import torch

import patchbay as pb
from patchbay.jacks.session import Session
from patchbay.model import packed
from patchbay.model.packed import Tree, packs, proving_length, tree_logits
from patchbay.tiny import twins
from tests import given
from tests.tolerance import close

TEXTS = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 3, 2, 1], [11, 12]]
TREE = Tree([5, 6, 7, 8, 9, 3, 2, 1, 11, 12], [-1, 0, 1, 2, 1, 2, 5, 6, -1, 8], [0, 1, 2, 3, 2, 3, 4, 5, 0, 1])
NODES = [[0, 1, 2, 3], [0, 1, 4], [0, 1, 2, 5, 6, 7], [8, 9]]


def test_a_tree_grows_by_what_is_new() -> None:
    tree = Tree([], [], [])
    assert tree.add(-1, [5, 6, 7, 8]) == [0, 1, 2, 3]
    assert tree.add(1, [9]) == [4]
    assert tree.add(2, [3, 2, 1]) == [5, 6, 7]
    assert tree.add(-1, [11, 12]) == [8, 9]
    assert tree.add(3, []) == []
    assert tree == TREE


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])  # learned places, turned ones, experts
def test_a_tree_has_the_logits_of_its_texts(name: str) -> None:
    """Plain and under edits everywhere; of some nodes alone, and beside a smaller tree."""
    model = given.lent(name)
    assert packs(model, 6)
    for edits in ([], [pb.scale("L1.attn.out", -2.0), pb.scale("logits", 0.5)]):
        with torch.no_grad(), Session(model, (), edits, whole=True):
            seen = tree_logits(model, [TREE, Tree([4, 4], [-1, 0], [0, 1])])
            few = tree_logits(model, [TREE], torch.tensor([3, 9]))
        assert seen.shape == (2, 10, model.vocab_size)
        for text, nodes in zip(TEXTS, NODES, strict=True):
            assert close(seen[0, nodes], pb.run(model, [text], edits=edits).logits[0], of=10.0)
        assert close(seen[1, :2], pb.run(model, [[4, 4]], edits=edits).logits[0], of=10.0)
        assert close(few[0], seen[0, [3, 9]], of=10.0)


@pytest.mark.parametrize("name", ["falcon alibi", "lfm2", "mamba", "gpt_neo"])
def test_models_whose_tokens_meet_otherwise_are_not_believed(name: str) -> None:
    """Distances read off a mask, convolutions, states, local attention of its own: no proof, and no exception."""
    assert not packs(given.lent(name), 6)


def test_a_window_is_seen_at_the_length_of_the_texts() -> None:
    """Texts no longer than the window a tree gets right; of longer ones it would show what the model does not see."""
    hf = twins.twin("mistral")
    hf.config.sliding_window = 16
    model = pb.load(hf)
    assert packs(model, 13)
    assert not packs(model, 17)


def test_half_precision_is_not_believed_and_a_proof_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pb.load(twins.twin("gpt2"))
    asked = []
    inner = packed._proved
    monkeypatch.setattr(packed, "_proved", lambda m, n: asked.append(n) or inner(m, n))
    assert packs(model, 17)
    assert packs(model, 30)
    assert packs(model, 5), "what holds of longer texts holds of shorter ones"
    assert asked == [32]
    assert proving_length(model, 40) == 64
    assert not packs(pb.load(twins.twin("gpt2").to(torch.bfloat16)), 6)
