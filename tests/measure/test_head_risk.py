"""Head risk: the risk of noise follows the closed form, equals lstsq on random directions, noise is predicted no better than by the mean."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import patchbay as pb
from tests.measure.words import NAMES, reader
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.measure.head_risk")
TEXTS = [f"{a} {b}" for a in ("the cat", "a dog", "one hat", "it") for b in ("ran", "sat on", "is red", "sees the sun")]


def items(targets: Any) -> list[dict[str, Any]]:
    return [{"text": text, "target": target} for text, target in zip(TEXTS, targets, strict=True)]


def test_planted() -> None:
    """Isotropic states and targets of noise: 1 + p / (n - p - 1) below n and 1 + n / (p - n - 1) above, at n itself far higher."""
    generator = torch.Generator().manual_seed(0)
    n, d = 20, 60
    found: dict[int, float] = {}
    for size in (0, 5, 10, 20, 40, 60):
        each = []
        for seed in range(60):
            x, y = (torch.randn(400 + n, k, generator=generator, dtype=torch.float64) for k in (d, 1))
            each.append(module.risks(x[:n], y[:n, 0] - y[:n, 0].mean(), x[n:], y[n:, 0], size, 1, seed).mean())
        found[size] = float(torch.stack(each).mean())
    assert found[0] == pytest.approx(1.0, abs=0.02)
    assert found[5] == pytest.approx(1 + 5 / 14, rel=0.1)
    assert found[10] == pytest.approx(1 + 10 / 9, rel=0.15)
    assert found[40] == pytest.approx(1 + 20 / 19, rel=0.15)
    assert found[60] == pytest.approx(1 + 20 / 39, rel=0.1)
    assert found[20] > 5 * found[10]


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    """On all directions: numpy's least-norm fit of every other text's state at its last token, from Hugging Face."""
    model = reader(name)
    targets = [float(i * 5 % 7) for i in range(16)]
    found = pb.measure.head_risk(model, items(targets), sizes=[0, 32], draws=3)
    rows = []
    with torch.no_grad():
        for ids in model.encode(TEXTS):
            stream = {}
            layer = model.modules[-1].layer
            hook = layer.register_forward_hook(
                lambda m, i, out, s=stream: s.update(out=out[0] if isinstance(out, tuple) else out)
            )
            model.hf(torch.tensor([ids]))
            hook.remove()
            rows.append(stream["out"][0, -1].double())
    x, y = torch.stack(rows), torch.tensor(targets, dtype=torch.float64)
    fit = torch.linalg.lstsq(x[::2], y[::2] - y[::2].mean(), driver="gelsd").solution
    said = y[::2].mean() + x[1::2] @ fit
    expected = (y[1::2] - said) ** 2 / y[1::2].var(correction=0)
    assert torch.allclose(found["per_item"], expected, rtol=1e-3)
    plain = (y[1::2] - y[::2].mean()) ** 2 / y[1::2].var(correction=0)
    assert close(float(found["null"]), float(plain.mean()))
    rows_of = {row["size"]: row["risk"] for row in found.tables["sizes"]}
    assert rows_of[0] == pytest.approx(float(plain.mean()))
    assert close(rows_of[32], float(found.values))  # turned states, the same head


def test_null() -> None:
    """Targets that are noise: a head on all directions is no better than the mean, in most of the draws worse."""
    generator = torch.Generator().manual_seed(1)
    worse = 0
    for _ in range(8):
        found = pb.measure.head_risk(
            reader("characters"), items(torch.randn(16, generator=generator).tolist()), sizes=[0], draws=1
        )
        worse += float(found.values) > float(found["null"])
        assert float(found.values) > float(found["null"]) or float(found["p"]) > 0.05
    assert worse >= 6


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"items": items([1.0] * 16)}, "the targets of one half of the items are all alike"),
        ({"items": items(["x"] * 16)}, "items, row 0: target is a number, got 'x'"),
        ({"items": items([1.0] + [float("inf")] * 15)}, "items, row 1: target is a number, got inf"),
        ({"items": items(range(16))[:6]}, "6 items and draws=20: a head needs 8 items"),
        ({"sizes": [99]}, r"sizes=\[99\]: numbers of directions lie in 0 to 32"),
    ],
)
def test_bad_input_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(pb.PatchbayError, match=said):
        pb.measure.head_risk(reader("characters"), **{"items": items(range(16)), **given})
