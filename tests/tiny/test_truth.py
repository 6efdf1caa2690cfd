"""Bars that finders and provers hold on compiled programs, and the failures that are known of some; docs/truth.md has the whole table."""

from __future__ import annotations

import functools
import math

import pytest

import patchbay as pb
from bench import truth
from patchbay.tiny import compiled


@functools.cache
def found(name: str, method: str) -> truth.Score:
    made = compiled.make(name, superposed=0.9)
    model, task = pb.load(made.model), compiled.task(name, made, 24)
    if method in truth.HEAD_METHODS:
        return truth.score(truth.HEAD_METHODS[method](model, task), truth.true_heads(made))
    return truth.score(truth.EDGE_METHODS[method](model, task), truth.true_edges(made))


@pytest.mark.parametrize("name", ["histogram", "two_hop"])
@pytest.mark.parametrize("method", ["prove.ablation by=mean", "prove.activation_patching denoising"])
def test_exact_effects_rank_the_heads_that_compute_first(name: str, method: str) -> None:
    assert found(name, method).precise == 1.0
    assert found(name, method).recall == 1.0


@pytest.mark.parametrize("name", ["induction", "recall", "two_hop"])
def test_integrated_gradients_rank_the_edges_of_copying_circuits(name: str) -> None:
    assert found(name, "prove.edge_attribution steps=8 (EAP-IG)").precise > 0.95


def test_the_smallest_circuit_holds_the_true_edges() -> None:
    assert found("recall", "prove.circuit, its smallest").recall > 0.9
    assert found("recall", "prove.circuit, its smallest").precision > 0.6


def test_gradients_do_not_see_a_count_through_its_steps() -> None:
    """Known: neurons that read a count are flat at both twins, so no first-order effect passes them; exact ones do."""
    assert found("histogram", "prove.attribution_patching").precise < 0.3
    assert found("histogram", "prove.path_patching to the logits").precise == 1.0


def test_size_says_nothing_of_use() -> None:
    assert found("induction", "find.head_importance").precise < 0.3


def test_the_direct_effect_misses_what_works_through_others() -> None:
    assert found("two_hop", "find.direct_logit_attribution").precise < 0.9


def test_scores_by_hand() -> None:
    said = truth.Said(["a", "x", "b", "y"], {"a", "x"})
    assert truth.score(said, {"a", "b"}) == truth.Score((1 + 2 / 3) / 2, 0.5, 0.5)
    nothing = truth.score(truth.Said(["x", "a"], set()), {"a"})
    assert math.isnan(nothing.precision)
    assert (nothing.precise, nothing.recall) == (0.5, 0.0)
    assert truth.interval([1.0, 1.0]) == "1.00"
    assert truth.interval([float("nan")]) == ""
