"""ACDC: the planted chain of heads is kept, edge by edge what one pass by hand keeps, and nothing where nothing differs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import patchbay as pb
from patchbay.prove._graph import Graph, Mixed, outputs
from tests import given
from tests.tolerance import close


def test_planted() -> None:
    """Of a chain of two heads the edges between them and to the logits are kept, few others, and they are enough on other prompts."""
    model, truth, task = given.chain("gpt2", 8)
    found = pb.prove.acdc(model, task, threshold=0.2, draws=20)
    kept = {str(row["edge"]) for row in found.tables["circuit"]}
    assert f"{truth['induction']} -> logits" in kept
    assert any(edge.startswith(f"{truth['previous_token']} -> ") and edge.endswith(".k") for edge in kept)
    assert len(kept) < 0.3 * len(found["kept"])
    assert float(found["faithfulness"]) > 0.8
    assert float(found["p"]) < 0.05
    curve = pb.prove.circuit(model, task, scores=found, select="value", draws=2)
    assert float(curve["smallest"]) <= len(kept)


@pytest.mark.parametrize("threshold", [0.003, pytest.param(0.0, marks=pytest.mark.slow)])  # every edge twice
def test_reference(threshold: float) -> None:
    """One edge at a time, in the order that is stated, equals the growing batches; at 0 all are kept that are missed at all."""
    model, task = given.lent("gpt2"), given.pairs(4)
    dev = task.split(seed=0)[0]
    graph = Graph(model)
    mixed = Mixed(graph, dev.clean, outputs(graph, dev.corrupted or ()))
    place = {graph.label(edge): i for i, edge in enumerate(graph.edges)}

    def law(keep: torch.Tensor) -> torch.Tensor:
        return mixed.logits(keep[None])[0].double().log_softmax(-1)

    whole = law(graph.valid)
    found = pb.prove.acdc(model, task, threshold=threshold, draws=1)
    keep, now = graph.valid.clone(), 0.0
    readers = sorted(range(len(graph.readers)), key=lambda r: (-graph.read[r], r))
    for reader in readers:
        for group in sorted(graph.groups, key=lambda one: -one.sent):
            for writer in range(group.writers.start, group.writers.stop):
                if not keep[writer, reader]:
                    continue
                keep[writer, reader] = False
                kl = float((whole.exp() * (whole - law(keep))).sum(-1).mean())
                rise = kl - now if abs(kl - now) > 2e-6 else 0.0
                edge = place[graph.label((writer, reader))]
                assert close(float(found["rise"][edge]), rise, of=1.0)
                if rise >= threshold:
                    keep[writer, reader] = True
                else:
                    now = kl
    assert [bool(keep[edge]) for edge in graph.edges] == [bool(one) for one in found["kept"]]
    test = task.split(seed=0)[1]
    other = Mixed(graph, test.clean, outputs(graph, test.corrupted or ()))
    model_law, own = (other.logits(one[None])[0].double().log_softmax(-1) for one in (graph.valid, keep))
    assert close(float(found["kl"]), float((model_law.exp() * (model_law - own)).sum(-1).mean()), of=1.0)


def test_null() -> None:
    """Twins that are the prompts themselves: no edge is missed, none is kept, and random circuits lose as little."""
    task = given.pairs(4)
    found = pb.prove.acdc(given.lent("gpt2"), replace(task, corrupted=task.clean), threshold=1e-3, draws=3)
    assert float(found["n_kept"]) == 0.0
    assert float(found["p"]) == 1.0


def test_what_is_refused() -> None:
    with pytest.raises(pb.PatchbayError, match="threshold=-1"):
        pb.prove.acdc(given.lent("gpt2"), given.pairs(4), threshold=-1.0)
