"""Rule adapter: the odds change by what the rules say and by nothing else; tokens by text; off it is not there."""

from __future__ import annotations

import math

import pytest
import torch

import patchbay as pb
from patchbay.decode._rules import BIAS, Rules, by_text
from patchbay.tiny import twins
from tests.decode.shared_stories import FIVE, new_tokens, stories
from tests.tolerance import close

PROMPTS = [[5, 9, 7, 11], [8, 6, 7], [12, 5, 30, 9]]
NEW = 6


def model_of() -> pb.Model:
    return pb.load(twins.twin("llama"))


def odds(rules: Rules, ids: list[int], a: int, b: int) -> float:
    """How much the log odds of two tokens change."""
    scores = torch.randn(1, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    law = torch.log_softmax(rules(torch.tensor([ids]), scores), -1)[0]
    return float(law[a] - law[b]) - float(scores[0, a] - scores[0, b])


def test_planted() -> None:
    """An end comes nearer by e^.06 with every token; what is there already loses e^1.5, once; a constant is a constant."""
    for t in (1, 2, 100, 249):
        ids = [50] * (3 + t)
        assert close(odds(Rules(3, [2], penalty=0.0), ids, 2, 9), 0.06 * t, of=1.0, dtype=torch.float64)
    assert close(odds(Rules(3, [2], penalty=0.0), [50] * (3 + 250), 2, 9), 0.0, of=1.0, dtype=torch.float64)
    assert close(odds(Rules(3, [2], penalty=0.0, mode="capped"), [50] * 300, 2, 9), 15.0, of=1.0, dtype=torch.float64)
    assert close(odds(Rules(3, [], penalty=1.5), [4, 4, 4, 7], 4, 9), -1.5, of=1.0, dtype=torch.float64)
    assert close(odds(Rules(1, [], penalty=1.5, since=1), [4, 5, 7], 4, 9), 0.0, of=1.0, dtype=torch.float64)
    assert close(odds(Rules(1, [], penalty=0.0, bias={8: -4.0}), [5, 6], 8, 9), -4.0, of=1.0, dtype=torch.float64)


def test_reference() -> None:
    """The texts by loops: the rules added to the logits of whole runs, the likeliest taken."""
    model = model_of()
    found = pb.decode.rule_adapter(model, PROMPTS, penalty=2.5, ends=[2], max_new_tokens=NEW)
    for i, prompt in enumerate(PROMPTS):
        text, total = list(prompt), 0.0
        while len(text) < len(prompt) + NEW and text[-1] != 2:
            with torch.no_grad():
                z = model.hf(torch.tensor([text])).logits[0, -1].double().tolist()
            t = len(text) - len(prompt)
            raised = [
                x + (15 * t / 250 if v == 2 and t else 0.0) - (2.5 if v in text else 0.0) for v, x in enumerate(z)
            ]
            token = max(range(96), key=lambda v: raised[v])
            total += raised[token] - math.log(sum(math.exp(x) for x in raised))
            text.append(token)
        assert new_tokens(found)[i][0] == text[len(prompt) :]
        assert close(found["score"][i, 0], total, of=30.0, dtype=torch.float32)


def test_null() -> None:
    """All rules off: greedy decoding, and the logits to the last bit."""
    model = model_of()
    found = pb.decode.rule_adapter(model, PROMPTS, eos="off", penalty=0.0, bias={}, max_new_tokens=NEW)
    assert [drafts[0] for drafts in new_tokens(found)] == model.generate(PROMPTS, NEW, new_only=True)
    scores = torch.randn(2, 96)
    assert torch.equal(Rules(3, [2], mode="off", penalty=0.0)(torch.ones(2, 5, dtype=torch.long), scores), scores)
    changed = pb.decode.rule_adapter(model, PROMPTS, penalty=9.0, max_new_tokens=NEW)
    for i, prompt in enumerate(PROMPTS):
        text = prompt + new_tokens(changed)[i][0]
        assert len(set(text)) == len(text) - (len(prompt) - len(set(prompt)))


def test_tokens_are_named_by_their_text() -> None:
    model = stories()
    tokenizer = model.tokenizer
    assert tokenizer is not None
    found = by_text(tokenizer, BIAS, missing=True)
    assert {tokenizer.decode([token]) for token in found} <= {text.strip() or text for text in BIAS} | set(BIAS)
    with pytest.raises(pb.PatchbayError, match=r"bias: ' zebra' is no single token here but \["):
        by_text(tokenizer, {" zebra": 1.0})
    told = pb.decode.rule_adapter(model, FIVE[:1], max_new_tokens=2, ends=[])
    assert (
        f"{len(found)} of the 15 published constants are of single tokens here; the others are left out" in told.notes
    )
    banned = new_tokens(told)[0][0][0]
    barred = {tokenizer.decode([banned]): -50.0}
    other = pb.decode.rule_adapter(model, FIVE[:1], bias=barred, max_new_tokens=1, ends=[])
    assert new_tokens(other)[0][0][0] != banned


def test_plain_transformers_users_have_the_rules() -> None:
    model = model_of()
    prompt = torch.tensor([PROMPTS[0]])
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    out = model.hf.generate(prompt, logits_processor=[pb.decode.rule_adapter.processor(4, [], penalty=2.5)], **given)  # type: ignore[attr-defined]
    found = pb.decode.rule_adapter(model, [PROMPTS[0]], penalty=2.5, max_new_tokens=NEW)
    assert out[0, 4:].tolist() == new_tokens(found)[0][0]
    custom = model.hf.generate(prompt, custom_generate=pb.decode.rule_adapter.generate, penalty=2.5, **given)  # type: ignore[attr-defined]
    assert torch.equal(custom, out)


def test_refusals() -> None:
    with pytest.raises(pb.PatchbayError, match="eos='on': 'as published', 'capped' or 'off'"):
        pb.decode.rule_adapter(model_of(), PROMPTS, eos="on")  # type: ignore[arg-type]
    with pytest.raises(pb.PatchbayError, match="penalty=nan, bias=None: finite numbers"):
        pb.decode.rule_adapter(model_of(), PROMPTS, penalty=float("nan"))
    with pytest.raises(
        pb.PatchbayError, match="bias names tokens by their text, and this model came without a tokenizer"
    ):
        pb.decode.rule_adapter(model_of(), PROMPTS, bias={"x": 1.0})
