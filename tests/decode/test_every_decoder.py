"""What is true of every decoder: log-probabilities are those of one uncached run over the finished text, under the same edits.

Every decoder on families of every kind of layer, with the cache and without, plain and under edits by row, by token and of
generated positions, on prompts of two lengths. The reference runs each text alone, whole, under its own prompt's edits, so that it
shares neither the cache, nor the widening and reordering of rows, nor the batch with what it checks.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import patchbay as pb
from patchbay.decode import _loop
from patchbay.edits.apply import for_prompts
from patchbay.knobs.knob import Knob
from patchbay.model.filling import edits_digest
from patchbay.tiny.twins import N_VOCAB, twin
from tests import given
from tests.shares import by_turns
from tests.tolerance import close

PROMPTS = [[5, 9, 7, 11], [8, 6, 7], [12, 5, 30, 9]]  # the first and the last run together
NEW = 4
CROPPED = ("gpt2", "llama", "gemma2", "mixtral", "gpt_neo", "bloom")  # whose caches can be wound back
FAMILIES = ("gpt2", "llama", "gemma2", "mixtral", "gpt_neo", "bloom", "mamba2", "qwen3_5_text")


@dataclass(frozen=True)
class Decoder:
    """One way to call a decoder on a model and prompts."""

    name: str
    call: Callable[..., pb.Result]
    label: str = ""
    on: tuple[str, ...] = FAMILIES  # the families that can
    waits: bool = (
        False  # whether a batch advances by what all of its rows keep, so that prompts alone take fewer passes
    )
    searches: bool = False  # whether what ends a text has a part in what is chosen before

    def __str__(self) -> str:
        return self.name + (f"-{self.label}" if self.label else "")


@functools.cache
def lent(name: str, seed: int = 0) -> pb.Model:
    return pb.load(twin(name, seed=seed)) if seed else given.lent(name)


def second(model: pb.Model) -> pb.Model:
    """Another model of the same family."""
    return lent(next(name for name in FAMILIES if lent(name) is model), 1)


def knob(model: pb.Model) -> Knob:
    return Knob("turned", [pb.scale(pb.Part(1, "attn").port(), 1.0)], -1.0)


def contrast(other: Callable[[pb.Model], Any], **chosen: Any) -> Callable[..., pb.Result]:
    return lambda m, p, **o: pb.decode.contrastive_decoding(m, other(m), p, **{**chosen, **o})


def ends_by_config(method: Callable[..., pb.Result], **chosen: Any) -> Callable[..., pb.Result]:
    """A decoder that takes what ends a text from the model's generation config."""

    def call(model: pb.Model, prompts: Any, ends: Any = None, **options: Any) -> pb.Result:
        with mock.patch.object(model.hf.generation_config, "eos_token_id", ends or None):
            return method(model, prompts, **{**chosen, **options})

    return call


STORES = Path(tempfile.mkdtemp(prefix="patchbay-stores-"))
KNOWN = [[5, 9, 7, 11, 40, 41, 42], [8, 6, 7, 30, 31], [12, 5, 30, 9, 60]]


def with_store(model: pb.Model, prompts: Any, **options: Any) -> pb.Result:
    """A store of the model as it stands, under the edits in force."""
    store = STORES / f"{model.fingerprint}-{edits_digest(model.active_edits())[:12]}"
    pb.run(model, KNOWN, taps=["L1.resid_out"], folder=store)
    return pb.decode.knn(model, str(store), prompts, weight=0.4, neighbours=6, **options)


DECODERS = [
    Decoder("best_of_n", ends_by_config(pb.decode.best_of_n, drafts=3, chain=["top_p(0.9)"]), searches=True),
    Decoder(
        "samplers",
        lambda m, p, **o: pb.decode.samplers(
            m, p, chain=["temperature(0.9)", "mirostat(tau=2.0)", "dry()"], drafts=2, **o
        ),
    ),
    Decoder("beam", lambda m, p, **o: pb.decode.beam(m, p, beams=3, **o), searches=True),
    Decoder(
        "dexperts", lambda m, p, **o: pb.decode.dexperts(m, second(m), knob(m), p, **{"alpha": 0.5, "top_p": 0.8, **o})
    ),
    Decoder("diverse_beam", lambda m, p, **o: pb.decode.diverse_beam(m, p, beams=4, groups=2, **o), searches=True),
    Decoder("knn", ends_by_config(with_store)),
    Decoder("longheads", lambda m, p, **o: pb.decode.longheads(m, p, window=4, chunks=4, **o), on=("llama", "mixtral")),
    Decoder("navigate", lambda m, p, **o: pb.decode.navigate(m, p, push=1.0, per_round=2, rounds=2, **o)),
    Decoder("rerank", ends_by_config(pb.decode.rerank, pool=[2, 2, 2]), searches=True),
    Decoder("rule_adapter", lambda m, p, **o: pb.decode.rule_adapter(m, p, **o), searches=True),
    Decoder(
        "speculative",
        ends_by_config(lambda m, p, **o: pb.decode.speculative(m, second(m), p, **o), chain=(), ahead=3),
        "drawn",
        on=CROPPED,
        waits=True,
    ),
    Decoder(
        "speculative",
        ends_by_config(lambda m, p, **o: pb.decode.speculative(m, knob(m), p, **o), ahead=2),
        "knob",
        on=CROPPED,
        waits=True,
    ),
    Decoder(
        "speculative",
        ends_by_config(lambda m, p, **o: pb.decode.speculative(m, "lookup", p, **o)),
        "lookup",
        on=CROPPED,
        waits=True,
    ),
    Decoder("superposed", ends_by_config(pb.decode.superposed, temperature=0.5), searches=True),
    Decoder("watermark", ends_by_config(pb.decode.watermark)),
    Decoder("contrastive_search", lambda m, p, **o: pb.decode.contrastive_search(m, p, k=3, **o)),
    Decoder("contrastive_decoding", contrast(second), "two models"),
    Decoder("contrastive_decoding", contrast(knob, beta=0.5), "knob"),
    Decoder("dola", lambda m, p, **o: pb.decode.dola(m, p, layers=[0, 1], **o)),
]


def by_row(model: pb.Model) -> list[pb.Edit]:
    """Edits of every kind that a moved row could lose, the last by a token."""
    push = torch.linspace(-1.0, 1.0, model.d_model)
    return [
        pb.scale("L0.attn.out", -2.0, rows=(0,)),
        pb.add("L1.resid_out", torch.stack([push, -push])[:, None], positions="generated", rows=(1, 2)),
        pb.scale("L1.attn.out", -1.0, positions=-1, rows=(2,)),
        pb.scale("L1.attn.out", 3.0, positions=pb.Token(7)),
    ]


def logp_of(model: pb.Model, prompt: list[int], new: list[int], edits: list[pb.Edit]) -> torch.Tensor:
    """Log-probability of each new token from one run over the finished text."""
    text = torch.tensor([prompt + new])
    with model.session(edits=edits, prompt_length=len(prompt)), torch.no_grad():
        logits = model.hf(text, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.double(), -1)[torch.arange(len(new)), torch.tensor(new)]


def drafts_of(found: pb.Result, prompt: int) -> list[tuple[list[int], torch.Tensor]]:
    """Tokens and log-probabilities of each draft of a prompt, what comes after the end left out."""
    pairs = []
    for tokens, logp in zip(found["tokens"][prompt], found["logp"][prompt], strict=True):
        real = tokens >= 0
        assert torch.equal(real, ~logp.isnan())
        if real.any():
            pairs.append((tokens[real].tolist(), logp[real]))
    return pairs


def holds(model: pb.Model, found: pb.Result, edits: list[pb.Edit]) -> None:
    """The law of this room."""
    for i, prompt in enumerate(PROMPTS):
        own = [for_prompts(edit, [i], len(PROMPTS), len(prompt) + NEW) for edit in edits]
        drafts = drafts_of(found, i)
        assert drafts
        for tokens, logp in drafts:
            expected = logp_of(model, prompt, tokens, [edit for edit in own if edit is not None])
            assert close(logp, expected, of=max(float(-expected.min()), 10.0), dtype=torch.float32), (i, tokens)


def cells() -> list[Any]:
    """Every decoder on every family; by default those that move rows each in their own way on half of them, the others on one or two,
    by turns."""
    core = ("beam", "contrastive_decoding-two models", "contrastive_search", "superposed")
    return [
        pytest.param(decoder, name, id=f"{decoder}-{name}")
        for i, decoder in enumerate(DECODERS)
        for name in by_turns(decoder.on, of=min(2 if str(decoder) in core else 5, len(decoder.on)), start=i)
    ]


@pytest.mark.parametrize(("decoder", "name"), cells())
def test_logp_is_that_of_one_uncached_run_under_the_same_edits(
    decoder: Decoder, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lent(name)
    options: dict[str, Any] = {"max_new_tokens": NEW}
    edits = by_row(model)[: -1 if decoder.name == "superposed" else None]  # a mixture holds no token
    assert _loop.serves(model, 4, 8), "the cache of this twin is believed"
    plain = decoder.call(model, PROMPTS, **options)
    with model.edited(*edits):
        edited = decoder.call(model, PROMPTS, **options)
    assert not torch.equal(plain["tokens"], edited["tokens"]), "the edits change nothing"
    holds(model, plain, [])
    holds(model, edited, edits)
    monkeypatch.setattr(_loop, "serves", lambda *_: False)
    with model.edited(*edits):
        uncached = decoder.call(model, PROMPTS, **options)
    holds(model, uncached, edits)
    assert torch.equal(uncached["tokens"], edited["tokens"])
    assert float(uncached["fed"]) > float(edited["fed"])


@pytest.mark.parametrize("decoder", DECODERS, ids=str)
def test_a_batch_is_its_prompts_one_by_one(decoder: Decoder) -> None:
    model = lent("llama")
    whole = decoder.call(model, PROMPTS, max_new_tokens=NEW)
    assert decoder.call(model, PROMPTS, max_new_tokens=NEW, batch_size=1)["tokens"].equal(whole["tokens"])
    alone = [decoder.call(model, [prompt], max_new_tokens=NEW) for prompt in PROMPTS]
    assert all(torch.equal(one["tokens"][0], whole["tokens"][i]) for i, one in enumerate(alone))
    assert close([one["score"][0] for one in alone], [*whole["score"]], of=10.0, dtype=torch.float32)
    fed = sum(float(one["fed"]) for one in alone)
    assert fed <= float(whole["fed"]) if decoder.waits else fed == float(whole["fed"])


@pytest.mark.parametrize("decoder", DECODERS, ids=str)
def test_a_text_ends_at_an_end_token(decoder: Decoder) -> None:
    """The same texts, cut after the first token that ends them; those that go on are as they were."""
    model = lent("gpt2" if "gpt2" in decoder.on else "llama")
    free = decoder.call(model, PROMPTS, max_new_tokens=NEW, ends=[])
    first = drafts_of(free, 0)[0][0]
    ended = decoder.call(model, PROMPTS, max_new_tokens=NEW, ends=[first[1]])
    rows = {(row["prompt"], row["draft"]): row for row in ended.tables["texts"]}
    if not decoder.searches:
        assert rows[0, 0]["finished"]
        assert drafts_of(ended, 0)[0][0] == first[: first.index(first[1]) + 1]
    for place, row in rows.items():
        tokens = drafts_of(ended, place[0])[place[1]][0]
        assert row["finished"] == (tokens[-1] == first[1])
        assert first[1] not in tokens[:-1]


@pytest.mark.parametrize("decoder", DECODERS, ids=str)
@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        ([[5, 6]], {"max_new_tokens": 0}, "max_new_tokens=0: one or more"),
        ([[5, 6]], {"max_new_tokens": 63}, "63 new tokens asked after a prompt of 2: the model takes 64"),
        ([[5, 6]], {"ends": [N_VOCAB]}, "ends=.96.: 96 is no token, the vocabulary is 0..95"),
        ([[5, 6], []], {}, "prompt 1 is empty"),
    ],
)
def test_what_cannot_be_decoded_is_refused(decoder: Decoder, prompts: Any, options: dict[str, Any], says: str) -> None:
    if decoder.name == "longheads" and "the model takes 64" in says:
        pytest.skip("longheads takes texts of any length")
    with pytest.raises(pb.PatchbayError, match=says):
        decoder.call(lent("gpt2" if "gpt2" in decoder.on else "llama"), prompts, **options)


@pytest.mark.parametrize("decoder", DECODERS, ids=str)
def test_a_text_that_ends_with_the_last_token_asked_has_ended(decoder: Decoder) -> None:
    """Whoever keeps several texts side by side too: the end is the last token's, not that of the loop."""
    model = lent("gpt2" if "gpt2" in decoder.on else "llama")
    [[end], *_] = [tokens for tokens, _ in drafts_of(decoder.call(model, PROMPTS[:1], max_new_tokens=1, ends=[]), 0)]
    found = decoder.call(model, PROMPTS[:1], max_new_tokens=1, ends=[end])
    said = [row["finished"] for row in found.tables["texts"]]
    assert said == [tokens[-1] == end for tokens, _ in drafts_of(found, 0)]
    assert any(said) or decoder.searches


@pytest.mark.parametrize("decoder", DECODERS, ids=str)
def test_logits_that_are_no_numbers_are_refused(decoder: Decoder) -> None:
    """A largest token of NaN is some token, and a draw from it the last one: neither is a text of the model."""
    model = lent("gpt2" if "gpt2" in decoder.on else "llama")
    too_far = pb.scale("L1.resid_out", 3e38)
    refused = (
        "holds other states" if decoder.name == "knn" else r"prompt \d: the model gives logits that are no numbers"
    )
    with model.edited(too_far), pytest.raises(pb.PatchbayError, match=refused):
        decoder.call(model, PROMPTS, max_new_tokens=2)


@pytest.mark.parametrize(
    ("name", "way"), [("mamba", "plain"), ("nemotron_h", "none"), ("bamba", "none"), ("llama", "mask")]
)
def test_a_cache_is_believed_only_where_it_repeats_whole_runs(name: str, way: str) -> None:
    """Under a mask of the whole text a state-space model's cache computes something else, and some caches round too far: the texts and
    their log-probabilities are right all the same."""
    model = pb.load(twin(name))
    found = pb.decode.beam(model, PROMPTS, beams=2, max_new_tokens=NEW)
    assert model.__dict__["_cache_way"] == way
    holds(model, found, [])


def test_a_model_whose_tokens_see_those_after_them_is_refused() -> None:
    with pytest.raises(pb.PatchbayError, match="tokens of this .* model see those after them"):
        pb.decode.beam(pb.load(twin("paligemma")), PROMPTS, max_new_tokens=NEW)


def test_every_decoder_is_here() -> None:
    assert {decoder.name for decoder in DECODERS} == set(pb.decode.__all__) - {
        "compare",
        "knn_parts",
    }  # which decode nothing by themselves
