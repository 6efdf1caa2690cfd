"""What a store gains, part by part: lines by loops over every key, a language that only the store knows, and a store that knows nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import patchbay as pb
from bench import decoders
from patchbay.decode.knn_parts import HEATS, SCALES, WEIGHTS, Read, by_token, tuned
from patchbay.tiny.twins import twin
from tests.tolerance import close

SITE, OTHER = "L1.mlp.in", "L1.resid_out"


def model_of() -> pb.Model:
    return pb.load(twin("llama"))


def cycles(n: int, seed: int, step: int = 7) -> list[list[int]]:
    """A language of one rule, the next token is so many more, that no random model knows."""
    starts = torch.randperm(96, generator=torch.Generator().manual_seed(seed))[:n].tolist()
    return [[(start + step * at) % 96 for at in range(8)] for start in starts]


def noise(n: int, seed: int, length: int = 8) -> list[list[int]]:
    return torch.randint(96, (n, length), generator=torch.Generator().manual_seed(seed)).tolist()


def store_in(folder: Path, model: pb.Model, texts: list[list[int]], taps: list[str]) -> str:
    pb.run(model, texts, taps=taps, folder=folder)
    return str(folder)


def test_planted(tmp_path: Path) -> None:
    """Of a language that only the store knows nearly all loss goes, and neither temperature nor unigrams do that."""
    model = model_of()
    store = store_in(tmp_path / "store", model, cycles(60, 0), [SITE, OTHER])
    held = [text for text in cycles(96, 1) if text not in cycles(60, 0)][:24]
    found = pb.decode.knn_parts(model, store, held, neighbours=20, cells=(8, 2))
    names = [row["line"] for row in found.tables["lines"]]
    assert names == [
        "model",
        SITE,
        OTHER,
        f"{SITE}, temperature 1",
        f"{SITE}, cells",
        "one mean a token",
        "temperature",
        "unigram",
    ]
    gain = dict(zip(names, found["gain"].tolist(), strict=True))
    low = dict(zip(names, found["low"].tolist(), strict=True))
    assert gain["model"] == 0.0
    assert low[SITE] > 1.0
    assert gain[SITE] >= gain[f"{SITE}, temperature 1"] - 0.05
    assert gain[SITE] > 2 * max(gain["temperature"], gain["unigram"])
    assert "gains" in found.notes[0]


def test_reference(tmp_path: Path) -> None:
    """Every line in loops: each key's distance, each temperature and weight, chosen on the first half and told of the second."""
    model, k = model_of(), 12
    known, texts = cycles(10, 0) + noise(4, 3), cycles(10, 5)[4:] + noise(4, 4)
    store = store_in(tmp_path / "store", model, known, [SITE])
    found = pb.decode.knn_parts(model, store, texts, neighbours=k, cells=(1, 1))
    assert decoders.gained(found).startswith(f"{found.labels_of('condition')[1]} {float(found['gain'][1]):.3f} (")
    keys: list[tuple[torch.Tensor, int]] = []
    for text in known:
        states = pb.run(model, [text], taps=[SITE])[SITE][0].double()
        keys += [(states[at], text[at + 1]) for at in range(len(text) - 1)]
    tokens: list[tuple[int, torch.Tensor, int, list[tuple[float, int]]]] = []
    for at, text in enumerate(texts):
        seen = pb.run(model, [text], taps=[SITE])
        for place in range(len(text) - 1):
            query = seen[SITE][0, place].double()
            near = sorted((float((key - query).square().sum()), value) for key, value in keys)[:k]
            tokens.append((at, seen.logits[0, place].double(), text[place + 1], near))
    mean = sum(apart for *_, near in tokens for apart, _ in near) / (k * len(tokens))
    half = len(texts) // 2

    def told(losses: list[float]) -> tuple[float, float]:
        """The mean over the tokens that choose, and over the texts that are told of."""
        chooses = [loss for loss, (at, *_) in zip(losses, tokens, strict=True) if at < half]
        own = [
            [loss for loss, (where, *_) in zip(losses, tokens, strict=True) if where == at]
            for at in range(half, len(texts))
        ]
        return sum(chooses) / len(chooses), sum(sum(one) / len(one) for one in own) / len(own)

    def losses(weight: float, temperature: float) -> list[float]:
        out = []
        for _, logits, target, near in tokens:
            total = sum(math.exp(-apart / temperature) for apart, _ in near)
            q = sum(math.exp(-apart / temperature) for apart, value in near if value == target) / total
            out.append(-math.log(weight * q + (1 - weight) * float(logits.softmax(-1)[target])))
        return out

    ways = {(w, mean * s): told(losses(w, mean * s)) for w in WEIGHTS for s in SCALES}
    best = min(ways, key=lambda way: ways[way][0])
    assert close(found["loss"][1], ways[best][1], of=5.0, dtype=torch.float32)
    assert float(found["weight"][1]) == best[0]
    assert close(found["temperature"][1], best[1], dtype=torch.float32)
    plain = told(losses(0.0, 1.0))[1]
    assert close(found["loss"][0], plain, of=5.0, dtype=torch.float32)
    assert close(found["gain"][1], plain - ways[best][1], of=5.0, dtype=torch.float32)
    one = min((told(losses(w, 1.0)) for w in WEIGHTS), key=lambda pair: pair[0])
    assert close(found["loss"][2], one[1], of=5.0, dtype=torch.float32)
    assert close(found["loss"][3], found["loss"][1], of=5.0, dtype=torch.float32), "one cell is the whole store"
    heats = [told([-float(torch.log_softmax(z / heat, -1)[v]) for _, z, v, _ in tokens]) for heat in HEATS]
    assert close(found["loss"][5], min(heats)[1], of=5.0, dtype=torch.float32)
    often = [sum(value == v for _, value in keys) / len(keys) for v in range(96)]
    mixed = [
        told([-math.log(w * often[v] + (1 - w) * float(z.softmax(-1)[v])) for _, z, v, _ in tokens]) for w in WEIGHTS
    ]
    assert close(found["loss"][6], min(mixed)[1], of=5.0, dtype=torch.float32)
    gained = [a - b for a, b in zip(losses(0.0, 1.0), losses(*best), strict=True)]
    late = [(token[2], gain) for token, gain in zip(tokens, gained, strict=True) if token[0] >= half]
    top = max({v for v, _ in late}, key=lambda v: sum(gain for value, gain in late if value == v))
    assert found.tables["tokens"][0]["token"] == str(top)
    assert found.tables["tokens"][0]["times"] == sum(value == top for value, _ in late)
    share = sum(gain for value, gain in late if value == top) / sum(gain for _, gain in late)
    assert close(found.tables["tokens"][0]["share"], share, of=1.0, dtype=torch.float32)


def test_null(tmp_path: Path) -> None:
    """A store of noise: held-out noise is not foretold, whatever the half that chooses took for a gain."""
    model = model_of()
    store = store_in(tmp_path / "store", model, noise(40, 0), [SITE])
    found = pb.decode.knn_parts(model, store, noise(40, 1), neighbours=20)
    line = 1
    assert float(found["low"][line]) < 0.1
    assert float(found["gain"][line]) <= float(found["gain"][-2]) + 0.1, "no more than the model's own temperature"


def test_what_gains_nothing_is_the_model() -> None:
    logp = torch.full((6,), -1.0, dtype=torch.float64)
    line = tuned(
        logp,
        lambda _: torch.zeros(6, dtype=torch.float64),
        [1.0, 2.0],
        torch.tensor([True, True, True, False, False, False]),
    )
    assert line.weight == 0.0
    assert close(line.loss, -logp)
    near = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    chosen = tuned(logp, lambda _: near, [1.0], near.bool())
    assert chosen.weight == 0.9
    assert close(chosen.loss[3:], torch.full((3,), 1.0 - math.log(0.1))), "the half that is told of has no part in it"


def test_tokens_are_told_by_what_they_gain() -> None:
    """Those that lose too, and no share where nothing is gained."""
    seen = Read(torch.zeros(4, dtype=torch.long), torch.tensor([7, 3, 3, 9]), torch.zeros(4), torch.zeros(4, 8), {})
    rows = by_token(model_of(), seen, torch.tensor([2.0, 0.5, 0.5, -1.0], dtype=torch.float64))
    assert [(row["token"], row["times"], row["gain"], row["share"]) for row in rows] == [
        ("7", 1, 2.0, 1.0),
        ("3", 2, 1.0, 0.5),
        ("9", 1, -1.0, -0.5),
    ]
    rows = by_token(model_of(), seen, torch.tensor([-2.0, -0.5, -0.5, -1.0], dtype=torch.float64))
    assert [row["token"] for row in rows] == ["3", "9", "7"]
    assert all(math.isnan(row["share"]) for row in rows)


@pytest.mark.parametrize(
    ("texts", "options", "says"),
    [
        (noise(3, 1), {}, "texts: 3 texts"),
        ([*noise(4, 1), [5]], {}, "of at least 1 tokens"),
        ([*noise(4, 1), noise(9, 0)[3]], {}, "text 4 stands in the store"),
        (noise(6, 1), {"neighbours": 0}, "neighbours=0: from 1 to the 63 keys"),
        (noise(6, 1), {"neighbours": 64}, "neighbours=64: from 1 to the 63 keys"),
        (noise(6, 1), {"cells": [4, 5]}, r"cells=\[4, 5\]: how many cells"),
    ],
)
def test_refusals(texts: Any, options: dict[str, Any], says: str, tmp_path: Path) -> None:
    model = model_of()
    store = store_in(tmp_path / "store", model, noise(9, 0), [SITE])
    with pytest.raises(pb.PatchbayError, match=says):
        pb.decode.knn_parts(model, store, texts, **{"cells": (4, 2), **options})
