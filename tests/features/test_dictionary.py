"""Forms of a dictionary against their formulas as loops; what does not fit is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.features.dictionary import gated, placed
from tests.features.given import random
from tests.tolerance import close


def by_hand(it: pb.Dictionary, x: torch.Tensor) -> list[float]:
    """Activations of one token, feature by feature."""
    seen = [float(v) - (float(it.b_dec[j]) if it.subtract else 0.0) for j, v in enumerate(x)]
    pre = [
        sum(v * float(it.W_enc[j, i]) for j, v in enumerate(seen)) + float(it.b_enc[i]) for i in range(it.n_features)
    ]
    if it.form == "relu":
        return [max(p, 0.0) for p in pre]
    if it.form == "jumprelu":
        assert it.threshold is not None
        thetas = it.threshold.expand(it.n_features).tolist()
        return [max(p, 0.0) if p > theta else 0.0 for p, theta in zip(pre, thetas, strict=True)]
    assert it.k is not None
    if it.form == "topk":
        kept = sorted(range(len(pre)), key=lambda i: -pre[i])[: it.k]
        return [max(p, 0.0) if i in kept else 0.0 for i, p in enumerate(pre)]
    size = len(pre) // it.k
    groups = [range(g * size, (g + 1) * size) for g in range(it.k)]
    best = {max(group, key=lambda i: pre[i]) for group in groups}
    return [max(p, 0.0) if i in best else 0.0 for i, p in enumerate(pre)]


@pytest.mark.parametrize(
    "more",
    [
        {"form": "relu"},
        {"form": "relu", "subtract": True},
        {"form": "jumprelu"},
        {"form": "jumprelu", "threshold": torch.tensor(0.4)},
        {"form": "topk", "k": 3},
        {"form": "groupmax", "k": 5},
    ],
)
def test_activations_are_the_formula(more: dict[str, Any]) -> None:
    it = random(**more)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    found = it.encode(x)
    for row, token in zip(found, x, strict=True):
        assert close(row, torch.tensor(by_hand(it, token)))
    by_rows = torch.stack([sum((z[i] * it.W_dec[i] for i in range(10)), it.b_dec) for z in found])
    assert close(it.decode(found, x), by_rows)


def test_a_gated_encoder_is_a_jumprelu_one() -> None:
    draw = torch.Generator().manual_seed(0)
    W = torch.randn(6, 10, generator=draw, dtype=torch.float64)
    b_gate, b_mag, r = torch.randn(3, 10, generator=draw, dtype=torch.float64)
    it = random().double()
    jump = pb.Dictionary(W_dec=it.W_dec, b_dec=it.b_dec, **gated(b_gate, b_mag, r, W))
    x = torch.randn(50, 6, generator=draw, dtype=torch.float64)
    u = x @ W
    expected = torch.where(u + b_gate > 0, torch.relu(r.exp() * u + b_mag), 0.0)
    assert close(jump.encode(x), expected, dtype=torch.float64)
    assert bool((jump.encode(x) > 0).any())


def test_tokens_are_normalised_and_put_back() -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2)) * 3 + 1
    plain = random()
    layer = random(normalise="layer_norm")
    x[0] = x[0] / 1e4  # where SAELens's 1e-5, which is added when a token is read and not when it is put back, counts
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    z = plain.encode((x - mean) / (std + 1e-5))
    assert close(layer.encode(x), z)
    for token, expected in zip(layer.decode(z, x), plain.decode(z, x) * std + mean, strict=True):
        assert close(token, expected)
    rescaled = random(normalise="constant_norm_rescale")
    s = 6**0.5 / x.norm(dim=-1, keepdim=True)
    assert close(rescaled.encode(x), plain.encode(x * s))
    assert close(rescaled.decode(z, x), plain.decode(z, x) / s)


def test_a_skip_passes_on_what_is_read() -> None:
    skip = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    it = random(6, 4, W_skip=skip, reads="mlp.in", writes="mlp.out")
    x = torch.randn(3, 6)
    z = it.encode(x)
    assert close(it.decode(z, x), z @ it.W_dec + it.b_dec + x @ skip)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"W_enc": torch.randn(10, 6)}, r"W_enc \[10, 6\], W_dec \[10, 6\]"),
        ({"b_enc": torch.randn(6)}, r"b_enc has shape \[6\], not \[10\]"),
        ({"W_dec": torch.full((10, 6), float("nan"))}, "W_dec holds 60 numbers that are NaN"),
        ({"form": "topk"}, "topk with k=None"),
        ({"form": "topk", "k": 11}, "k=11, of 10 features"),
        ({"form": "groupmax", "k": 3}, "do not make 3 groups"),
        ({"form": "jumprelu", "threshold": None}, "jumprelu needs threshold"),
        ({"threshold": torch.ones(10)}, "relu has no threshold"),
        ({"form": "jumprelu", "threshold": torch.ones(3)}, "3 thresholds for 10 features"),
        ({"form": "jumprelu", "threshold": torch.ones(10, 1)}, r"of shape \[10, 1\] and not \[10\]"),
        ({"form": "jumprelu", "threshold": torch.full((10,), torch.nan)}, "threshold holds 10 numbers that are NaN"),
        ({"W_skip": torch.full((6, 6), torch.inf)}, "W_skip holds 36 numbers that are NaN or infinite"),
        ({"form": "batchtopk"}, "of form 'batchtopk'; possible are relu"),
        ({"normalise": "whitened"}, "normalise='whitened'"),
    ],
)
def test_what_does_not_fit_is_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(pb.PatchbayError, match=said):
        random(**more)


def test_a_dictionary_is_placed_by_a_ports_text() -> None:
    it = placed(random(), "L3.mlp.in to L3.mlp.out")
    assert (it.layer, it.reads, it.writes, it.transcodes) == (3, "mlp.in", "mlp.out", True)
    assert it.digest != random().digest
    assert random().digest == random().digest != random(seed=1).digest
    with pytest.raises(pb.PatchbayError, match="one signal of a layer"):
        placed(random(), "logits")
