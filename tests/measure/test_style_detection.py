"""Style detection: planted styles are told apart, one draw equals loops, texts of a support's source are not scored."""

from __future__ import annotations

import importlib
import random
from typing import Any

import pytest
import torch

import patchbay as pb
from tests.measure.words import NAMES, reader
from tests.tolerance import close

module: Any = importlib.import_module("patchbay.measure.style_detection")
TEXTS = {"calm": ["the cat sat on the mat", "a hen is on a mat", "it is a red hat", "the man is on it"], "loud": ["RAN! RAN! 99", "SEE 88 DOGS!", "GO! GO! 77", "HATS! 66 NOW!"]}  # fmt: skip
ITEMS = [{"text": text, "author": author} for author, each in TEXTS.items() for text in each]


def test_planted() -> None:
    """Capitals and marks against small letters, of a random network; and clouds of states apart."""
    found = pb.measure.style_detection(reader("characters"), ITEMS, support=2)
    assert float(found.values) > 0.8
    assert float(found["accuracy"]) >= 0.75
    assert float(found["p"]) < 0.05
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    states[:20, 0] += 3.0
    scores = module.scored(states, [0] * 20 + [1] * 20, [str(i) for i in range(40)], 5, True, 8, 0)
    assert float((scores.argmax(1) == torch.tensor([0] * 20 + [1] * 20)).double().mean()) > 0.7


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    """One draw: mean unit states of two texts each, cosines of all others, by loops."""
    model = reader(name)
    found = pb.measure.style_detection(model, ITEMS, support=2, draws=1, centred=False, layer=0)
    unit = []
    for row in ITEMS:
        trace = pb.run(model, [row["text"]], taps=[model.layers[0].resid_out])
        mean = trace[model.layers[0].resid_out][0].double().mean(0)
        unit.append(mean / mean.norm())
    chance, chosen = random.Random("style-0-0"), []
    for author in (0, 1):
        order = sorted(f"text {i}" for i in range(4 * author, 4 * author + 4))
        chance.shuffle(order)
        chosen.append([int(text.removeprefix("text ")) for text in order[:2]])
    expected = []
    for i in range(8):
        if i not in [*chosen[0], *chosen[1]]:
            for each in chosen:
                prototype = (unit[each[0]] + unit[each[1]]) / 2
                expected.append(float(unit[i] @ prototype / prototype.norm()))
    assert close(found["score"], torch.tensor(expected).double(), dtype=torch.float32, noise=256)
    own = [x for x, label in zip(expected, found["label"].tolist(), strict=True) if label]
    others = [x for x, label in zip(expected, found["label"].tolist(), strict=True) if not label]
    wins = [(a > b) + 0.5 * (a == b) for a in own for b in others]
    assert float(found.values) == pytest.approx(sum(wins) / len(wins))


def test_null() -> None:
    """Clouds that are one: p of dealt authors is small as often as it says, and shared sources are left out."""
    generator, flagged = torch.Generator().manual_seed(1), 0
    of = [0] * 8 + [1] * 8
    for seed in range(20):
        states = torch.randn(16, 5, generator=generator, dtype=torch.float64)
        scores = module.scored(states, of, [str(i) for i in range(16)], 3, True, 4, seed)
        own = torch.nn.functional.one_hot(torch.tensor(of), 2).double()
        kept = ~scores.isnan().any(1)
        area = module._area(torch.stack([scores[kept].flatten(), own[kept].flatten()], 1))
        flagged += pb.maths.draws_p(area, module._dealt(scores[kept], own[kept], seed)[:100]) <= 0.05
    assert flagged <= 5
    shared = [{**row, "source": str(i % 4)} for i, row in enumerate(ITEMS)]  # four prompts, each answered by both
    found = pb.measure.style_detection(reader("characters"), shared, support=1, draws=1)
    assert len(found["score"]) in (8, 12)  # scores of the texts of two or three prompts
    states = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    scores = module.scored(states, [0] * 4 + [1] * 4, [str(i % 4) for i in range(8)], 4, True, 3, 0)
    assert bool(scores.isnan().all())  # every source is a support's


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"support": 4}, "2 authors, the least of them with 4 texts, support=4"),
        ({"items": ITEMS[:4]}, "1 authors"),
        ({"layer": 5}, "layer=5: this model has 2"),
        ({"items": [{**row, "source": "one"} for row in ITEMS], "support": 1}, "no two texts are left that no support's source has"),
    ],
)  # fmt: skip
def test_bad_input_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(pb.PatchbayError, match=said):
        pb.measure.style_detection(reader("characters"), **{"items": ITEMS, "support": 2, **given})
