"""Bars that finders and provers hold on compiled programs, and the failures that are known of some; docs/truth.md has the whole table."""

from __future__ import annotations

import functools
import importlib
import math
import re
from pathlib import Path

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


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ("find.head_importance", ["AP"]),
        ("prove.desiderata_mask", ["AP", "precision", "recall"]),
    ],
)
def test_what_a_method_says_of_itself_stands_in_the_table(row: str, columns: list[str]) -> None:
    told = table()[row]
    for column in columns:
        assert told[column].split()[0] in known(row), (column, told[column])


def test_what_attribution_patching_is_said_to_be_blind_to_stands_in_the_table() -> None:
    told = table()["prove.attribution_patching"]
    numbers = [float(number) for number in re.findall(r"\d\.\d\d", known("prove.attribution_patching"))]
    blind = ["exclusive_or", "histogram", "more_open"]
    assert numbers[0] == max(float(told[name]) for name in blind)
    rest = [
        float(told[name]) for name in told if name in compiled.PROGRAMS and name not in (*blind, "recall")
    ]  # a column of that name is the share
    assert numbers[1] == min(rest)


def known(method: str) -> str:
    """What the file of a method says of it where the truth is known."""
    text: str = importlib.import_module(f"patchbay.{method}").KNOWN
    return text


def table() -> dict[str, dict[str, str]]:
    """The first table of docs/truth.md by method and column; the first of two columns of one name counts."""
    lines = (Path(__file__).parents[2] / "docs" / "truth.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    names, *body = rows
    found: dict[str, dict[str, str]] = {}
    for row in body:
        if row[0].startswith(("find.", "prove.")) and row[0] not in found:
            found[row[0]] = {}
            for name, cell in zip(names, row, strict=False):
                found[row[0]].setdefault(name, cell)
    return found
