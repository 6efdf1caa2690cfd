"""Watermark: z by loops over pairs of tokens, a mark that is found, and text without one as the null."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from transformers import WatermarkingConfig
from transformers.generation.logits_process import WatermarkLogitsProcessor

import patchbay as pb
from patchbay.tiny.twins import twin
from tests.tolerance import close

PROMPTS = [[5, 9, 7, 11], [8, 6, 7], [12, 5, 30, 9]]
NEW = 12


def model_of() -> pb.Model:
    return pb.load(twin("llama"))


def green(vocab: int, ratio: float, key: int, token: int) -> set[int]:
    """The tokens that are favoured after one token: the first of a permutation drawn with a seed of key times token."""
    draw = torch.Generator().manual_seed(key * token % (2**64 - 1))
    return set(torch.randperm(vocab, generator=draw)[: int(vocab * ratio)].tolist())


def test_reference() -> None:
    """z, its form without repeated pairs, and the law that was drawn from, in loops."""
    model, ratio, bias, key = model_of(), 0.4, 1.5, 77
    found = pb.decode.watermark(model, PROMPTS, ratio=ratio, bias=bias, key=key, max_new_tokens=NEW)
    for i, prompt in enumerate(PROMPTS):
        for draft in range(2):
            text = [prompt[-1], *found["tokens"][i, draft].tolist()]
            pairs = list(itertools.pairwise(text))
            for name, some in (("z", pairs), ("z_once", sorted(set(pairs)))):
                hits = sum(after in green(96, ratio, key, before) for before, after in some)
                z = (hits - ratio * len(some)) / math.sqrt(len(some) * ratio * (1 - ratio))
                assert close(found[name][i, draft], z, of=10.0, dtype=torch.float32)
            hits = sum(after in green(96, ratio, key, before) for before, after in pairs)
            assert close(found["green"][i, draft], hits / len(pairs), dtype=torch.float32)
        text = [*prompt, *found["tokens"][i, 0].tolist()]
        with torch.no_grad():
            logits = model.hf(torch.tensor([text])).logits[0].double()
        for at in range(NEW):
            law = logits[len(prompt) - 1 + at].clone()
            law[sorted(green(96, ratio, key, text[len(prompt) - 1 + at]))] += bias
            said = torch.log_softmax(law, -1)[text[len(prompt) + at]]
            assert close(found["logq"][i, 0, at], said, of=10.0, dtype=torch.float32)


def test_planted() -> None:
    """With so large a bias every token is green, and is found; the logits are those of transformers' own processor."""
    model = model_of()
    found = pb.decode.watermark(model, PROMPTS, ratio=0.25, bias=50.0, max_new_tokens=NEW)
    assert close(found["green"][:, 0], torch.ones(3))
    assert close(found["z"][:, 0], [math.sqrt(NEW * 3)] * 3, dtype=torch.float32)
    assert found["rate"].tolist()[0] == 1.0
    assert float(found["gap_low"]) > 0
    config = WatermarkingConfig(greenlist_ratio=0.25, bias=50.0)
    own = WatermarkLogitsProcessor(vocab_size=96, device="cpu", **config.to_dict())
    out = own(torch.tensor([PROMPTS[0]]), torch.zeros(1, 96))
    assert set((out[0] == 50.0).nonzero()[:, 0].tolist()) == green(96, 0.25, config.hashing_key, PROMPTS[0][-1])


def test_null() -> None:
    """Without a bias both drafts are one text; z of 60 texts without a mark is spread as it should be, and rarely above 3."""
    model = model_of()
    same = pb.decode.watermark(model, PROMPTS, bias=0.0, max_new_tokens=NEW)
    assert torch.equal(same["tokens"][:, 0], same["tokens"][:, 1])
    assert float(same["gap"]) == 0.0
    plain = pb.decode.samplers(model, PROMPTS, chain=[], max_new_tokens=NEW, ends=[])
    assert torch.equal(same["tokens"][:, 0], plain["tokens"][:, 0]), "the same chance as without"
    found = pb.decode.watermark(model, [[token, 7, 11] for token in range(20, 80)], max_new_tokens=NEW)
    z = found["z"][:, 1]
    assert abs(float(found["null_mean"])) < 4 * 1 / 60**0.5
    assert 0.7 < float(found["null_spread"]) < 1.3
    assert close(found["null_mean"], z.mean())
    assert close(found["null_spread"], z.std())
    assert found["rate"].tolist()[1] <= 2 / 60
    assert float(found["gap_low"]) > 0
    assert close(found["rate"], (found["z"] > 3).double().mean(0))
    assert close(found["gap"], (found["z"][:, 0] - z).mean())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ratio": 0.0}, "ratio=0.0: the share of green tokens"),
        ({"ratio": 1.0}, "ratio=1.0: the share"),
        ({"ratio": 0.001}, "no token of 96 is green"),
        ({"bias": float("nan")}, "bias=nan: a finite number"),
    ],
)
def test_refusals(options: dict[str, Any], says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        pb.decode.watermark(model_of(), PROMPTS, **options)
