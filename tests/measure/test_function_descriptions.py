"""Function descriptions: the truth scores 1, scores are plain loops, a constant explains nothing whatever it passes, and no text is run."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch

import patchbay as pb
from patchbay.measure import _string_boxes
from patchbay.measure._black_boxes import HIGH, LOW, Net, baselines, make, overlap, score
from patchbay.measure._expressions import FUNCTIONS, parse
from patchbay.measure._played import words_of
from patchbay.measure.function_descriptions import function_descriptions
from tests.measure.words import reader
from tests.tolerance import close


def truths(result: pb.Result, seed: int) -> list[str]:
    """The rules that were drawn, with their intervals, as answers."""
    values = [make("composed", 10_000 * seed + i, 0.0, 1.0).value for i in range(len(result.tables["functions"]))]
    return [
        f"{value} if {row['low']} <= x <= {row['high']} else {row['rule']}"
        for row, value in zip(result.tables["functions"], values, strict=True)
    ]


def test_planted() -> None:
    """The true rules explain all, also where an interval is corrupted; answers blind to it lose what is inside; a table stands between."""
    model = reader()
    how = {"kind": "composed", "functions": 6, "queries": 65, "corruption": 1.0, "seed": 3}
    drawn = function_descriptions(model, answers=["x"] * 6, **how)  # type: ignore[arg-type]
    told = function_descriptions(model, answers=truths(drawn, 3), **how)  # type: ignore[arg-type]
    assert float(told["per_item"].min()) > 0.99
    assert close(told["overlap"].min(), 1.0)
    assert float(told["official"].mean()) == 1.0
    blind = function_descriptions(model, answers=[row["rule"] for row in drawn.tables["functions"]], **how)  # type: ignore[arg-type]
    assert float(blind["overlap"].max()) == 0.0
    assert float(blind["corrupted"].mean()) < 0.3 < 0.9 < float(told["corrupted"].mean())
    assert float(blind["value"]) < float(told["null"]) < float(told["value"])


def test_reference() -> None:
    """One answer scored by plain loops: the published error at half integers, FVU and agreement at fresh points, the table of the same queries."""
    result = function_descriptions(reader(), answers=["0.5*x + 3"] * 2, functions=2, queries=5, corruption=0.5, seed=1)
    for i, row in enumerate(result.tables["functions"]):
        box = make("atomic", 10_000 + i, 0.0, 0.5)
        assert row["rule"] == box.rule.text
        truth = lambda x, box=box: float(box.clean(np.array([x]))[0])  # noqa: E731
        half = [k + 0.5 for k in range(-128, 128)]
        wrong, size = sum((truth(x) - 0.5 * x - 3) ** 2 for x in half), sum(truth(x) ** 2 for x in half)
        assert float(result["official"][i]) == float(wrong / size < 0.1)
        fresh = np.random.default_rng(1).uniform(-128, 128, 1000).tolist()
        mean = sum(map(truth, fresh)) / 1000
        spread = sum((truth(x) - mean) ** 2 for x in fresh)
        assert close(
            result["per_item"][i], max(0.0, 1 - sum((truth(x) - 0.5 * x - 3) ** 2 for x in fresh) / spread), of=1.0
        )
        near = sum(abs(truth(x) - 0.5 * x - 3) <= 0.1 * math.sqrt(spread / 1000) for x in fresh) / 1000
        assert float(result["agreement"][i]) == near
        xs = [-128.0, -64.0, 0.0, 64.0, 128.0]

        def table(x: float, xs: list[float] = xs, row: dict[str, list[float]] = row) -> float:
            at = min(int((x + 128) // 64), 3)
            low, high = row["values"][at], row["values"][at + 1]
            return low + (high - low) * (x - xs[at]) / 64

        explained = max(0.0, 1 - sum((truth(x) - table(x)) ** 2 for x in fresh) / spread)
        rival = score(box, baselines(np.array(xs), np.array(row["values"]))["table"], np.array(xs), None, 1)
        assert close(rival.explained, explained, of=1.0)
    assert close(
        result["null"],
        np.mean(
            [
                score(
                    make("atomic", 10_000 + i, 0.0, 0.5),
                    baselines(np.array(xs), np.array(row["values"]))["table"],
                    np.array(xs),
                    None,
                    1,
                ).explained
                for i, row in enumerate(result.tables["functions"])
            ]
        ),
    )
    assert overlap((0.0, 4.0), (2.0, 6.0)) == 2.0 / 6.0
    assert overlap((0.0, 1.0), (2.0, 6.0)) == overlap(None, (2.0, 6.0)) == 0.0
    assert math.isnan(overlap(None, None))


def test_null() -> None:
    """A constant explains nothing, though it passes the published score where functions stand far from 0; answers of other functions are at chance."""
    how = {"functions": 12, "queries": 9, "kind": "composed", "seed": 0}
    model = reader()
    drawn = function_descriptions(model, answers=["x"] * 12, **how)  # type: ignore[arg-type]
    constant = function_descriptions(
        model, answers=[f"{np.mean(row['values'])}" for row in drawn.tables["functions"]], **how
    )  # type: ignore[arg-type]
    assert float(constant["value"]) < 0.02
    assert float(constant["official"].mean()) > 0.05
    rules = [row["rule"] for row in drawn.tables["functions"]]
    shuffled = function_descriptions(model, answers=[*rules[1:], rules[0]], **how)  # type: ignore[arg-type]
    right = function_descriptions(model, answers=rules, **how)  # type: ignore[arg-type]
    assert float(shuffled["value"]) < 0.15 < 0.8 < float(right["value"])
    baseline = {row["baseline"]: row for row in drawn.tables["baselines"]}
    assert baseline["constant"]["official"] > baseline["constant"]["fvu_below_.1"]
    assert baseline["table"]["explained"] == pytest.approx(float(drawn["null"]))


def test_a_model_that_writes_no_expression_explains_nothing() -> None:
    result = function_descriptions(reader(), functions=3, queries=2)
    assert float(result["value"]) == 0.0
    assert "overlap" not in result or result["overlap"].isfinite().any()
    assert "0 of 3 answers are expressions" in result.notes[-1]
    assert result.tables["functions"][0]["prompt"].startswith("f(-128) is ")


def test_functions_are_drawn_by_their_seed_with_noise_and_corruption() -> None:
    first, second = (make("composed", 5, 0.0, 0.5) for _ in range(2))
    assert (first.rule.text, first.interval, first.value) == (second.rule.text, second.interval, second.value)
    boxes = [make("atomic", i, 0.0, 0.3) for i in range(300)]
    assert 60 < sum(box.interval is not None for box in boxes) < 120
    assert len({box.rule.text for box in boxes}) == 300
    noisy = make("atomic", 7, 0.2, 0.0)
    x = np.linspace(LOW, HIGH, 400)
    assert np.array_equal(noisy(x), noisy(x))
    spread = float(noisy.clean(np.linspace(LOW, HIGH, 257)).std())
    assert 0.16 * spread < float((noisy(x) - noisy.clean(x)).std()) < 0.24 * spread


def test_expressions_are_parsed_and_never_run() -> None:
    x = np.array([-2.0, 0.5, 4.0])
    for text, by_hand in {
        "2*x + 1": lambda at: 2 * at + 1,
        "-x**2 % 3": lambda at: -(at**2) % 3,
        "5 if 0 <= x < 1 else abs(x)": lambda at: 5 if 0 <= at < 1 else abs(at),
        "rect(x, -3, 1) + step(x)": lambda at: float(-3 <= at <= 1) + float(at >= 0),
        "max(x, 1) * (x > 0 and not x > 3)": lambda at: max(at, 1) * (at > 0 and not at > 3),
        "erf(x)": math.erf,
        "pi": lambda at: math.pi,
    }.items():
        assert close(parse(text)(x), [float(by_hand(float(at))) for at in x], of=1.0), text
    assert parse("1 + 2*x").length == 5
    assert parse("0 if 3 <= x <= 9 else x").interval == (3.0, 9.0)
    assert parse("0 if x < 9 else x").interval is None
    for text in (
        "__import__('os')",
        "x.real",
        "[x]",
        "lambda: x",
        "y",
        "f(x)",
        "(x := 3)",
        "x if x else 'a'",
        "abs(x, x)",
        "abs(*[x])",
        "x @ x",
        "True",
        "1e400",
        "print",
        "x;x",
        "",
    ):
        with pytest.raises(pb.PatchbayError):
            parse(text)
    with pytest.raises(pb.PatchbayError, match="at most 2000"):
        parse("x+" * 2000 + "x")
    with pytest.raises(pb.PatchbayError):
        parse("-" * 900 + "x")
    assert np.isfinite(np.nan_to_num(parse("9**9**9**9")(x))).all()
    rng = random.Random(0)
    for name, (n, _) in FUNCTIONS.items():
        assert parse(f"{name}({', '.join(['x'] * n)})")(np.array([rng.uniform(-3, 3)])).shape == (1,)


def test_bad_input() -> None:
    model = reader()
    with pytest.raises(pb.PatchbayError, match="2 answers for 20 functions"):
        function_descriptions(model, answers=["x", "x"])
    for wrong in ({"kind": "other"}, {"functions": 0}, {"queries": 1}, {"corruption": 1.5}):
        with pytest.raises(pb.PatchbayError, match=r"atomic|corruption"):
            function_descriptions(model, **wrong)  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="ask fewer queries"):
        function_descriptions(model, functions=1, queries=200)


def test_functions_of_words_are_edits_put_into_one_another() -> None:
    """The truth changes every word rightly; an answer blind to the lengths that are set apart loses them; the word itself explains nothing whatever it passes."""
    how: dict[str, Any] = {"kind": "strings", "functions": 8, "queries": 8, "corruption": 1.0, "seed": 2}
    model = reader()
    drawn = function_descriptions(model, answers=["x"] * 8, **how)
    assert float(drawn["value"]) == 0.0
    assert float(drawn["official"].mean()) > 0.05, "words that come back as they are"
    rows = drawn.tables["functions"]
    whole = [f"x if {row['low']:.0f} <= len(x) <= {row['high']:.0f} else {row['rule']}" for row in rows]
    told = function_descriptions(model, answers=whole, **how)
    assert float(told["value"]) == float(told["official"].min()) == float(told["overlap"].min()) == 1.0
    assert float(told["value"]) > float(told["null"])
    assert float(told["p"]) < 0.05
    blind = function_descriptions(model, answers=[row["rule"] for row in rows], **how)
    assert float(blind["value"]) == 1.0
    assert float(blind["overlap"].max()) == 0.0
    assert float(blind["corrupted"].mean()) < 0.3 < float(told["corrupted"].min())
    baseline = {row["baseline"]: row for row in drawn.tables["baselines"]}
    assert baseline["word"]["explained"] == 0.0 < baseline["word"]["official"]
    assert baseline["one edit"]["explained"] == pytest.approx(float(drawn["null"]))


def test_an_answer_of_words_is_scored_by_plain_loops() -> None:
    result = function_descriptions(
        reader(), answers=["reverse(x)"] * 3, functions=3, queries=4, kind="strings", corruption=0.5
    )
    for i, row in enumerate(result.tables["functions"]):
        box = _string_boxes.make(i, 0.5)
        assert row["rule"] == box.rule.text
        fresh = [one for one in _string_boxes.words(104, "fresh-0") if one not in row["asked"]][:100]
        exact = changed = right = 0
        for one in fresh:
            truth = box([one])[0]
            exact += truth == one[::-1]
            if truth != one:
                changed, right = changed + 1, right + (truth == one[::-1])
        assert close(result["official"][i], exact / 100)
        assert close(result["per_item"][i], right / changed, of=1.0)
        assert row["prompt"].endswith(f"f({row['asked'][-1]}) is {row['values'][-1]}. f(x) is")


def test_edits_of_words_are_parsed_and_never_run() -> None:
    for text, word, out in (
        ("reverse(x)", "abc", "cba"),
        ("double(shift(x, 2))", "xyz", "zabzab"),
        ("swap(x)", "abcd", "dbca"),
        ("odd(sort(x))", "dcba", "ac"),
        ("first(cut(x, 1), 2)", "abcd", "bc"),
        ("last(drop(x, 1), 2)", "abcd", "bc"),
        ("suffix(prefix(x, 'a'), 'b')", "x", "axb"),
        ("remove(replace(x, 'a', 'b'), 'c')", "abc", "bb"),
        ("x if 2 <= len(x) <= 3 else reverse(x)", "abc", "abc"),
        ("x if 2 <= len(x) <= 3 else reverse(x)", "abcd", "dcba"),
    ):
        assert _string_boxes.parse(text)(word) == out
    assert _string_boxes.parse("double(shift(x, 2))").length == 4
    for text in ("__import__('os')", "x.upper()", "x[::-1]", "reverse(x, 1)", "shift(x, 99)", "shift(x, True)", "replace(x, y, 'a')", "x if x else x",
                 "reverse(x if 1 <= len(x) <= 2 else x)", "prefix(x, 'abcdefghi')", "y", "'a'", "", "reverse(*x)"):  # fmt: skip
        with pytest.raises(pb.PatchbayError):
            _string_boxes.parse(text)
    for long in ("reverse(" * 70 + "x" + ")" * 70, "x" * 3000):
        with pytest.raises(pb.PatchbayError):
            _string_boxes.parse(long)
    assert len(_string_boxes.parse("double(" * 20 + "x" + ")" * 20)("abc")) == 400


def test_a_network_stands_in_for_a_rule() -> None:
    """It is near the rule where that is smooth, and is itself the truth that answers are held to."""
    line = parse("2*x + 3")
    net, x = Net.of(line, 0), np.linspace(-100, 100, 41)
    assert float(np.abs(net(x) - line(x)).max()) < 0.05 * float(np.abs(line(x)).max())
    box, rule = make("approximated", 4, 0.0, 0.0), make("composed", 4, 0.0, 0.0)
    assert box.rule.text == rule.rule.text
    assert box.net is not None
    assert np.array_equal(box.clean(x), np.nan_to_num(box.net(x)))
    assert not np.allclose(box.clean(x), rule.clean(x))


@pytest.mark.slow  # a trained model, and loops over its words
def test_neurons_that_a_model_plays_are_told_by_a_word() -> None:
    """The neuron's own word explains it whole; numbers of one answer by plain loops over the model's own probabilities; a word without a text plays none."""
    model = pb.load("tiny")
    how: dict[str, Any] = {"kind": "neurons", "functions": 4, "queries": 6, "seed": 1}
    drawn = function_descriptions(model, answers=[" "] * 4, **how)
    assert float(drawn["value"]) == float(drawn["official"].mean()) == 0.0
    rows = drawn.tables["functions"]
    told = function_descriptions(model, answers=[row["rule"] for row in rows], **how)
    assert close(told["per_item"], torch.ones(4))
    assert float(told["official"].min()) == 1.0
    assert float(told["value"]) > float(told["null"])
    words, pool = words_of(model, 120, 1), words_of(model, 28, 2)
    assert [row["rule"] for row in rows] == pool[:4]
    laws = {c: model_law(model, c) for c in pool}
    answer = pool[9]
    other = function_descriptions(model, answers=[answer] * 4, **how)
    for i, row in enumerate(rows):
        mean = {w: sum(float(laws[c][model.token_id(w)]) for c in pool) / 28 for w in words}
        f, g = ({w: float(laws[c][model.token_id(w)]) - mean[w] for w in words} for c in (row["rule"], answer))
        for word, value in zip(row["asked"], row["values"], strict=True):
            assert abs(f[word] - value) <= 0.0051
        fresh = [w for w in words if w not in row["asked"]]
        middle = sum(f[w] for w in fresh) / len(fresh)
        fvu = sum((f[w] - g[w]) ** 2 for w in fresh) / sum((f[w] - middle) ** 2 for w in fresh)
        assert close(other["per_item"][i], max(0.0, 1 - fvu), of=1.0)
    with pytest.raises(pb.PatchbayError, match="words that are one token each"):
        function_descriptions(model, kind="neurons", functions=5000, answers=["a"] * 5000)


def model_law(model: pb.Model, text: str) -> Any:
    """log p of the token after a text, from Hugging Face's logits."""
    with torch.no_grad():
        return model.hf(torch.tensor(model.encode([text]))).logits[0, -1].double().log_softmax(0)
