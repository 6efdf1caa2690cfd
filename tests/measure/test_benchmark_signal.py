"""Benchmark signal: a benchmark that follows training has 1, a constant one none; scores equal loops over checkpoints."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch

import patchbay as pb
from tests.measure.test_text_loss import constant
from tests.measure.words import NAMES, by_hand, reader
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.measure.benchmark_signal")
ITEMS = [{"prompt": f"{x}:", "choices": ["a", "b"], "answer": answer, "group": group} for group, answer in (("up", 0), ("down", 1)) for x in ("he", "it", "we")]  # fmt: skip


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str | None], pb.Model]:
    """Checkpoints by name and revision, in place of what is loaded."""
    held: dict[tuple[str, str | None], pb.Model] = {}
    monkeypatch.setattr(module, "load", lambda name, revision=None: held[name, revision])
    return held


def test_planted(shelf: dict[tuple[str, str | None], pb.Model]) -> None:
    """Checkpoints that come to prefer "a": the benchmark of a rises with tokens, that of b falls, one that asks for neither stays,
    and one against "e", which has a bump, rises but for one step: p by all orders, adjusted over benchmarks that have one."""
    for step in range(3):
        shelf["run", f"step{step}"] = constant(
            {"a": 0.5 * step, "b": 1.0, "c": -20.0, "d": -20.0, "e": float(step == 1)}
        )
    last = constant({"a": 2.0, "b": 1.0, "c": -20.0, "d": -20.0, "e": 0.0})
    flat = [{"prompt": "x:", "choices": ["c", "d"], "answer": 0, "group": "flat"}]
    bump = [{"prompt": "x:", "choices": ["a", "e"], "answer": 0, "group": "bump"}]
    names, tokens = [f"run@step{step}" for step in range(3)], [1.0, 2.0, 4.0, 8.0]
    found = pb.measure.benchmark_signal(last, [*ITEMS, *flat, *bump], names, tokens, read="log_probability")
    assert found["per_item"].tolist()[:2] == pytest.approx([1.0, -1.0])
    assert math.isnan(float(found["per_item"][2]))
    assert float(found.values) == pytest.approx(0.8 / 3)
    rows = {row["benchmark"]: row for row in found.tables["benchmarks"]}
    assert {name: row["p"] * 24 for name, row in rows.items() if name != "flat"} == pytest.approx(
        {"up": 2, "down": 2, "bump": 8}
    )
    assert {name: row["q"] * 24 for name, row in rows.items() if name != "flat"} == pytest.approx(
        {"up": 3, "down": 3, "bump": 8}
    )
    assert any("no score of flat changes" in note for note in found.notes)
    back = pb.measure.benchmark_signal(last, ITEMS, names, tokens[::-1], read="log_probability")
    assert back["per_item"].tolist() == pytest.approx([-1.0, 1.0])


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str, shelf: dict[tuple[str, str | None], pb.Model]) -> None:
    shelf["first", None] = reader(name, "gpt2", 1)
    found = pb.measure.benchmark_signal(reader(name), ITEMS, ["first"], [1.0, 5.0])
    sure = pb.measure.benchmark_signal(reader(name), ITEMS, ["first"], [1.0, 5.0], read="log_probability")
    means = {row["benchmark"]: row for row in sure.tables["benchmarks"]}
    for row in found.tables["benchmarks"]:
        for model, key in ((shelf["first", None], "first"), (reader(name), "last")):
            hits, logs = [], []
            for item in (item for item in ITEMS if item["group"] == row["benchmark"]):
                [own] = model.encode([item["prompt"]])
                logp = [by_hand(model, model.encode([item["prompt"] + c])[0], len(own)) for c in item["choices"]]
                hits.append(float(logp.index(max(logp)) == item["answer"]))
                logs.append(logp[item["answer"]] - math.log(sum(map(math.exp, logp))))
            assert row[key] == pytest.approx(sum(hits) / 3)
            assert close(means[row["benchmark"]][key], sum(logs) / 3, of=10.0, dtype=torch.float32)


def test_null(shelf: dict[tuple[str, str | None], pb.Model]) -> None:
    """Six checkpoints that say random things: no benchmark follows the tokens at an adjusted p of .05."""
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        shelf["run", str(step)] = constant({"a": float(torch.randn((), generator=generator)), "b": 0.0})
    order = [f"run@{step}" for step in range(5)]
    found = pb.measure.benchmark_signal(
        constant({"a": 0.1, "b": 0.0}), ITEMS, order, list(range(6)), read="log_probability"
    )
    assert all(row["q"] > 0.05 for row in found.tables["benchmarks"])


@pytest.mark.parametrize("tokens", [[1.0], [2.0, 2.0]])
def test_bad_input_is_named(tokens: list[float]) -> None:
    with pytest.raises(
        pb.PatchbayError, match=f"1 checkpoints and {len(tokens)} numbers of tokens: one for each and one for"
    ):
        pb.measure.benchmark_signal(reader("characters"), ITEMS, ["x"], tokens)
