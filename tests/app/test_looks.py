"""What the page says of a prompt is what the library says: surprise, the next tokens, patterns, cards."""

from __future__ import annotations

import base64
import json
import math

import numpy as np
import pytest
import torch

import patchbay as pb
from patchbay.app import asked, looks
from patchbay.errors import PatchbayError
from tests.tolerance import close

PROMPT = "The capital of Lolavia is Grerum. The capital of Lolavia is"


def array(doc: dict, name: str) -> torch.Tensor:
    (one,) = [variable for variable in doc["variables"] if variable["name"] == name]
    kind = {"float32": "<f4", "float64": "<f8"}[one["type"]]
    return torch.tensor(np.frombuffer(base64.b64decode(one["data"]), kind).reshape(one["shape"]).copy())


def test_surprise_and_next_tokens_are_those_of_the_logits(trained: pb.Model) -> None:
    made = json.loads(json.dumps(looks.prompt(trained, {"text": PROMPT}), allow_nan=False))
    ids = trained.encode(PROMPT)[0]
    logp = trained.hf(torch.tensor([ids])).logits[0].detach().double().log_softmax(-1)
    said = array(made["next"], "surprise")
    assert math.isnan(said[0])
    assert close(said[1:], torch.stack([-logp[i, token] for i, token in enumerate(ids[1:])]).float())
    rows = [row for row in made["next"]["tables"]["next"]["rows"] if row["position"] == len(ids) - 1]
    best = logp[-1].exp().topk(8)
    assert [row["token"] for row in rows] == [trained.decode([i]) for i in best.indices.tolist()]
    assert close(torch.tensor([row["probability"] for row in rows]), best.values.float())
    assert made["tokens"] == [trained.decode([i]) for i in ids]
    assert made["heads"] == [trained.n_heads(i) for i in range(trained.n_layers)]
    assert made["lens"]["main"] == "probability"


def test_what_comes_after_the_last_token_is_there_however_long_the_prompt(trained: pb.Model) -> None:
    made = looks.prompt(trained, {"text": "The capital of Lolavia is Grerum. " * 14})
    assert len(made["tokens"]) > 64
    assert made["next"]["tables"]["next"]["rows"][-1]["position"] == len(made["tokens"]) - 1


def test_a_pattern_and_its_thumbnail(trained: pb.Model) -> None:
    port = trained.port("L1.attn.pattern")
    pattern = pb.run(trained, PROMPT, taps=[port])[port][0]
    made = looks.pattern(trained, {"text": PROMPT, "layer": 1, "head": 3})
    assert torch.equal(array(made, "attention"), pattern[3])
    small = looks.heads(trained, {"text": PROMPT, "layer": 1})
    assert small["side"] == min(looks.THUMB, pattern.shape[-1])
    for one in small["heads"]:
        assert abs(max(one["data"]) - float(pattern[one["head"]].max())) < 1e-4, "a thumbnail keeps the largest"


def test_cards_are_the_models(trained: pb.Model) -> None:
    assert looks.card(trained, {})["source"] == "tiny"
    made = looks.part(trained, {"part": "L1.H3"})
    assert {row["port"] for row in made["sections"][0]["rows"]} >= {"L1.H3.q", "L1.H3.pattern"}


@pytest.mark.parametrize(
    ("look", "asked", "said"),
    [("prompt", {"text": ""}, "one letter"), ("prompt", {"text": "The capital of " * 900}, "the model takes 128"), ("pattern", {"text": "The", "layer": 9, "head": 0}, "layers 0..2"),
     ("pattern", {"text": "The", "layer": 0, "head": 99}, "L0"), ("heads", {"text": "The"}, "layer None"), ("part", {"part": "nonsense"}, "nonsense")],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(look: str, asked: dict, said: str, trained: pb.Model) -> None:
    with pytest.raises(PatchbayError, match=said):
        looks.LOOKS[look](trained, asked)


def test_a_prompt_that_would_be_too_much_is_refused(trained: pb.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked, "MOST_TOKENS", 3)
    with pytest.raises(PatchbayError, match="up to 3 tokens, this one has 12"):
        looks.prompt(trained, {"text": PROMPT})
