"""Grammars in a chain: what is written is in the language, what is left of the law is the law given the mask, and what cannot end is named."""

from __future__ import annotations

import copy
import functools
import json
import re
import sys
from typing import Any

import pytest
import torch
from tokenizers import decoders

import patchbay as pb
from patchbay.tiny.twins import twin
from tests.decode.shared_stories import stories
from tests.measure.words import tokenizer
from tests.tolerance import close

PROMPTS = ["the cat ", "on a dog "]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"enum": ["cat", "dog"]}, "a": {"type": "boolean"}},
    "required": ["n", "a"],
    "additionalProperties": False,
}


@functools.cache
def model_of() -> pb.Model:
    """A random model of single characters, whose tokens are decoded as those of most checkpoints are, which the library asks for."""
    words = copy.deepcopy(tokenizer("characters"))
    words.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return pb.load(twin("llama"), words)


def drawn(chain: list[str], end: int = 1, **options: Any) -> pb.Result:
    given: dict[str, Any] = {"drafts": 3, "max_new_tokens": 40, "ends": [end], **options}
    return pb.decode.samplers(model_of(), PROMPTS, chain=chain, **given)


def written(found: pb.Result, end: int = 1) -> list[str]:
    model = model_of()
    rows = [[int(t) for t in row if t >= 0 and t != end] for drafts in found["tokens"] for row in drafts]
    return [str(model.tokenizer.decode(row)) for row in rows]  # type: ignore[union-attr]


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(pb.PatchbayError, match=r"needs llguidance: pip install 'patchbay-lm\[constrained\]'"):
        drawn(["regex(r'[a-c]+')"])


def test_a_grammar_without_an_end_is_refused() -> None:
    with pytest.raises(pb.PatchbayError, match="regex: a grammar ends its text with an end token, and none is known"):
        drawn(["regex(r'[a-c]+')"], ends=[])


def test_speculation_refuses_a_grammar() -> None:
    model = model_of()
    with pytest.raises(pb.PatchbayError, match="regex remembers what was drawn"):
        pb.decode.speculative(model, model, PROMPTS, chain=["regex(r'a+')"])


def test_planted() -> None:
    """Every draft that ended is in the language; others are the beginning of it."""
    pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'patchbay-lm[constrained]'")
    for chain, pattern in (
        ("regex(r'(cat|dog) [a-c]{2,4}')", r"(cat|dog) [a-c]{2,4}"),
        ('lark(\'start: "a" start "b" | "c"\')', r"a*cb*"),
    ):
        found = drawn([chain])
        rows = found.tables["texts"]
        for text, row in zip(written(found), rows, strict=True):
            if row["finished"]:
                assert re.fullmatch(pattern, text), text
    with pytest.raises(pb.PatchbayError, match="lacks a letter of the language"):
        drawn([f"json('{json.dumps(SCHEMA)}')"])
    model = stories()
    found = pb.decode.samplers(
        model, ["Once upon a time"], chain=[f"json('{json.dumps(SCHEMA)}')"], drafts=4, max_new_tokens=60
    )
    for row in found.tables["texts"]:
        assert row["finished"]
        assert set(json.loads(row["text"])) == {"n", "a"}


def test_reference() -> None:
    """The law of each token is the model's over the tokens that may come, found by trying every one against a pattern of beginnings."""
    pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'patchbay-lm[constrained]'")
    model, language = model_of(), ["ab", "ac", "bba"]
    found = drawn(["regex(r'ab|ac|bba')"])
    assert {row["finished"] for row in found.tables["texts"]} == {True}
    letters = {v: str(model.tokenizer.decode([v])) for v in range(model.vocab_size)}  # type: ignore[union-attr]
    prompts = model.encode(PROMPTS)
    for i, prompt in enumerate(prompts):
        for tokens, logq in zip(found["tokens"][i].tolist(), found["logq"][i], strict=True):
            said, ids = "", list(prompt)
            for at, token in enumerate([t for t in tokens if t >= 0]):
                may = [
                    v
                    for v in range(model.vocab_size)
                    if v != 1 and letters[v] and any(w.startswith(said + letters[v]) for w in language)
                ]
                may += [1] if said in language else []
                logits = pb.run(model, [ids]).last_logits[0].double()
                law = torch.log_softmax(logits[may], -1)
                assert token in may
                assert close(logq[at], law[may.index(token)], of=10.0, dtype=torch.float32)
                said, ids = said + letters[token] * (token != 1), [*ids, token]


def test_weights_give_the_law_of_valid_text() -> None:
    """The mean of exp(logp - logq) over drafts is how likely the model says a text of the language: by adding up its three words."""
    pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'patchbay-lm[constrained]'")
    model = model_of()
    found = pb.decode.samplers(
        model, PROMPTS[:1], chain=["regex(r'a|b|c')"], drafts=400, max_new_tokens=2, ends=[1], batch_size=400
    )
    weights = (found["logp"][0] - found["logq"][0]).sum(1).exp()
    [prompt] = model.encode(PROMPTS[:1])
    ids = [int(model.tokenizer.encode(letter, add_special_tokens=False)[0]) for letter in "abc"]  # type: ignore[union-attr]
    exact = 0.0
    for token in ids:
        first = pb.run(model, [prompt]).last_logits[0].double().softmax(-1)[token]
        exact += float(first * pb.run(model, [[*prompt, token]]).last_logits[0].double().softmax(-1)[1])
    spread = float(weights.std()) / len(weights) ** 0.5
    assert abs(float(weights.mean()) - exact) < 4 * spread


def test_null() -> None:
    """A language of all texts changes nothing."""
    pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'patchbay-lm[constrained]'")
    model = stories()
    free = pb.decode.samplers(model, ["Once upon a time"], chain=["top_k(1)"], max_new_tokens=12)
    any_text = pb.decode.samplers(
        model, ["Once upon a time"], chain=[r"regex(r'(?s:.*)')", "top_k(1)"], max_new_tokens=12
    )
    assert torch.equal(any_text["tokens"], free["tokens"])


@pytest.mark.parametrize(
    ("chain", "says"),
    [
        (["regex(r'[')"], "chain: regex"),
        (["json('{')"], "is no JSON schema"),
        (["lark('start: 5')"], "chain: lark"),
        (["regex(5)"], "the grammar is a text"),
        (["top_k(1)", "regex(r'zq9')"], "no token that may come after"),
    ],
)
def test_refusals(chain: list[str], says: str) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'patchbay-lm[constrained]'")
    with pytest.raises(pb.PatchbayError, match=says):
        drawn(chain)
