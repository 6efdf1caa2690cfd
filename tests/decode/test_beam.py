"""Beam search: every text of a tiny vocabulary, transformers' own beams, greedy decoding with one beam."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import patchbay as pb
from patchbay.decode import _loop
from patchbay.results.method import seeded
from patchbay.tiny import twins
from tests.decode.shared_stories import new_tokens
from tests.tolerance import close

PROMPTS = [[5, 9, 7, 11], [8, 6, 7], [12, 5, 30, 9]]


def model_of(name: str = "llama") -> pb.Model:
    return pb.load(twins.twin(name))


def four() -> pb.Model:
    """A random model of four tokens."""
    with seeded(3):
        hf = GPT2LMHeadModel(GPT2Config(vocab_size=4, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()
        for weight in hf.parameters():
            torch.nn.init.normal_(weight, 0.0, 0.7)
    hf.generation_config.eos_token_id = None
    return pb.load(hf)


def by_force(
    model: pb.Model, prompt: list[int], length: int, end: int | None, power: float
) -> list[tuple[float, list[int]]]:
    """Every text of `length` tokens, or fewer where one ends, with its score; the best first."""
    found = {}
    for tokens in itertools.product(range(4), repeat=length):
        cut = list(tokens[: tokens.index(end) + 1]) if end in tokens else list(tokens)
        if tuple(cut) in found:
            continue
        with torch.no_grad():
            logits = model.hf(torch.tensor([prompt + cut])).logits[0, len(prompt) - 1 : -1].double()
        total = sum(float(torch.log_softmax(row, -1)[t]) for row, t in zip(logits, cut, strict=True))
        found[tuple(cut)] = total / len(cut) ** power
    return sorted(((score, list(tokens)) for tokens, score in found.items()), key=lambda one: -one[0])


@pytest.mark.parametrize(("end", "power"), [(None, 0.0), (2, 0.0), (2, 1.0)])
def test_planted(end: int | None, power: float) -> None:
    """With a beam for every prefix the best text is found, and those after it, whatever ends a text."""
    model, prompt = four(), [0, 3, 1]
    found = pb.decode.beam(
        model, [prompt], beams=64, length_penalty=power, max_new_tokens=4, ends=[] if end is None else [end]
    )
    truth = by_force(model, prompt, 4, end, power)
    assert new_tokens(found)[0][:5] == [tokens for _, tokens in truth[:5]]
    assert close(found["score"][0, :5], [score for score, _ in truth[:5]], of=10.0, dtype=torch.float32)
    assert math.isfinite(float(found["score"].min()))


def test_reference() -> None:
    """transformers' own beam search, all beams and their scores."""
    model = model_of()
    for beams, power in ((3, 0.0), (4, 1.0)):
        found = pb.decode.beam(model, PROMPTS, beams=beams, length_penalty=power, max_new_tokens=6, ends=[])
        for i, prompt in enumerate(PROMPTS):
            out = model.hf.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), num_beams=beams,
                num_return_sequences=beams, max_new_tokens=6, length_penalty=power, do_sample=False, pad_token_id=0,
                return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
            assert new_tokens(found)[i] == out.sequences[:, len(prompt) :].tolist()
            assert close(found["score"][i], out.sequences_scores, of=30.0)
            assert close(found["logp"][i].sum(-1), found["score"][i] * 6**power, of=30.0, dtype=torch.float32)


def loops(model: pb.Model, prompt: list[int], beams: int, power: float, end: int, n: int) -> list[list[int]]:
    """Few beams of texts that may end, by loops and to the last token: what ends among the best is kept aside, others fill up."""
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    kept: list[tuple[float, list[int]]] = []
    for step in range(n):
        found = []
        for score, tokens in live:
            with torch.no_grad():
                logits = model.hf(torch.tensor([prompt + tokens])).logits[0, -1].double()
            found += [(score + x, [*tokens, v]) for v, x in enumerate(torch.log_softmax(logits, -1).tolist())]
        found.sort(key=lambda one: -one[0])
        last = step == n - 1
        kept += [(score / len(t) ** power, t) for score, t in found[:beams] if t[-1] == end and not last]
        live = [one for one in found if one[1][-1] != end or last][:beams]
    kept += [(score / len(t) ** power, t) for score, t in live]
    return [tokens for _, tokens in sorted(kept, key=lambda one: -one[0])[:beams]]


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_a_search_that_stops_early_has_found_what_the_whole_search_finds(power: float) -> None:
    """Two beams on all prompts of two tokens of a model of four, some of which stop early."""
    model, calls = four(), []
    for prompt in ([a, b] for a in range(4) for b in range(4)):
        found = pb.decode.beam(model, [prompt], beams=2, length_penalty=power, max_new_tokens=6, ends=[2])
        assert new_tokens(found)[0] == loops(model, prompt, 2, power, 2, 6)
        calls.append(int(found["calls"]))
    assert (min(calls) < 6) == (power < 2.0)


def test_null() -> None:
    """One beam is greedy decoding, and the search costs a pass for a token."""
    model = model_of()
    found = pb.decode.beam(model, PROMPTS, beams=1, max_new_tokens=5)
    assert [drafts[0] for drafts in new_tokens(found)] == model.generate(PROMPTS, 5, new_only=True)
    found = pb.decode.beam(model, [PROMPTS[0]], beams=3, max_new_tokens=5)
    assert (int(found["calls"]), int(found["fed"])) == (5, 4 + 3 * 4)


def test_the_search_goes_on_only_while_something_can_come_before_what_has_ended() -> None:
    """Where all that is likely ends at once, it stops: the passes say so, and the texts are those of the whole search."""
    model = model_of("gpt2")
    with model.edited(pb.add("logits", 30.0 * torch.nn.functional.one_hot(torch.tensor(2), 96).float())):
        found = pb.decode.beam(model, [PROMPTS[0]], beams=1, max_new_tokens=8, ends=[2])
    assert new_tokens(found) == [[[2]]]
    assert int(found["calls"]) == 1


@pytest.mark.parametrize(
    ("options", "says"), [({"beams": 0}, "beams=0: one or more"), ({"length_penalty": math.inf}, "length_penalty=inf")]
)
def test_refusals(options: dict[str, float], says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        pb.decode.beam(model_of(), PROMPTS, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("asked", ["beam", "diverse_beam"])
def test_more_beams_than_a_first_step_can_tell_apart_are_refused(asked: str) -> None:
    with pytest.raises(
        pb.PatchbayError,
        match="beams=900000: up to 4,096; the first step of a search has one text for each of 96 tokens",
    ):
        getattr(pb.decode, asked)(model_of(), PROMPTS, beams=900_000)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda model: pb.decode.beam(model, PROMPTS[:1] * 4, beams=30), "beams=30: the logits of one step alone take 0.0 GB .* up to 26 texts of each prompt fit, more with"),
        (lambda model: pb.decode.diverse_beam(model, PROMPTS[:1] * 4, beams=30, groups=2, batch_size=1), None),
        (lambda model: pb.decode.best_of_n(model, PROMPTS[:1], drafts=105), "drafts=105: .* up to 104 texts of each prompt fit$"),
        (lambda model: pb.decode.best_of_n(model, PROMPTS[:1], drafts=104, max_new_tokens=1), None),
        (lambda model: pb.decode.rerank(model, PROMPTS, pool=(15, 7, 2)), r"pool=\[15, 7, 2\]: .* up to 104 texts"),
    ],
)  # fmt: skip
def test_more_texts_than_memory_holds_are_refused(call: Any, says: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device of 40,000 bytes, where the logits of a text are 384."""
    monkeypatch.setattr(_loop, "memory_of", lambda device: 40_000)
    model = model_of()
    assert 4 * model.vocab_size == 384
    if says is None:
        call(model)
    else:
        with pytest.raises(pb.PatchbayError, match=says):
            call(model)


def test_memory_is_the_machine_s() -> None:
    assert 2**28 < _loop.memory_of(torch.device("cpu")) < 2**50
