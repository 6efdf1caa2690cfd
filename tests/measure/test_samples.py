"""Samples: from the model's own distribution, each by itself whatever runs beside it; scorers that a record can hold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.measure._samples import Words, checked_scorer, samples, scored
from patchbay.tiny import twins
from tests.measure.words import reader


def test_samples_follow_the_softmax_and_top_p() -> None:
    """2,000 samples of one token against the model's probabilities: chi-square; with top_p none outside the likeliest."""
    model = pb.load(twins.twin("gpt2"))
    p = pb.run(model, [[5, 6]]).last_logits[0].double().softmax(-1)
    [rows] = samples(model, [[5, 6]], 2000, max_new_tokens=1, batch_size=500)
    counts = torch.bincount(torch.tensor([row[0] for row in rows]), minlength=96).double()
    often = p * 2000 >= 5
    chi = float(((counts - 2000 * p)[often].square() / (2000 * p)[often]).sum())
    assert chi < float(often.sum()) + 5 * math.sqrt(2 * float(often.sum()))
    order = p.argsort(descending=True)
    nucleus = set(order[: int((p[order].cumsum(0) < 0.5).sum()) + 1].tolist())
    [rows] = samples(model, [[5, 6]], 200, max_new_tokens=1, top_p=0.5)
    assert {row[0] for row in rows} <= nucleus
    assert len({row[0] for row in rows}) > 1
    [cold] = samples(model, [[5, 6]], 20, max_new_tokens=1, temperature=1e-4)
    assert {row[0] for row in cold} == {int(p.argmax())}


def test_a_sample_depends_on_seed_prompt_and_number_alone() -> None:
    model = pb.load(twins.twin("llama"))
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12]]
    how: dict[str, Any] = {"max_new_tokens": 6, "top_p": 0.9}
    found = samples(model, prompts, 3, **how)
    assert samples(model, prompts[1:2], 3, **how)[0] == found[1]
    assert samples(model, prompts, 3, batch_size=2, **how) == found
    assert samples(model, prompts, 3, use_cache=False, **how) == found
    assert [rows[:2] for rows in found] == samples(model, prompts, 2, **how)
    assert samples(model, prompts, 3, seed=1, **how) != found
    assert len({tuple(row) for rows in found for row in rows}) > 5
    state = torch.get_rng_state()
    samples(model, prompts, 1, **how)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_prompt_that_comes_twice_is_sampled_anew() -> None:
    model = pb.load(twins.twin("llama"))
    [one, other] = samples(model, [[5, 6, 7], [5, 6, 7]], 2, max_new_tokens=6)
    assert one == samples(model, [[5, 6, 7]], 2, max_new_tokens=6)[0]
    assert one + other == samples(model, [[5, 6, 7]], 4, max_new_tokens=6)[0]


@pytest.mark.parametrize(
    "config",
    [{"repetition_penalty": 9.0}, {"no_repeat_ngram_size": 1}, {"suppress_tokens": list(range(60))}, {"bad_words_ids": [[t] for t in range(60)]},
     {"sequence_bias": [[[12], 50.0]]}, {"forced_eos_token_id": 5}, {"min_new_tokens": 6, "eos_token_id": list(range(48))}],
    ids=lambda config: next(iter(config)),
)  # fmt: skip
def test_what_a_generation_config_does_to_the_law_is_left_out(config: dict[str, Any]) -> None:
    """Of the law, not of how a model is deployed: penalties, bans and forced tokens change nothing, end tokens end."""
    model = pb.load(twins.twin("llama"))
    own = model.hf.generation_config
    own.eos_token_id = config.pop("eos_token_id", None)
    plain = samples(model, [[5, 6, 7]], 4, max_new_tokens=6)
    own.update(**config)
    if "min_new_tokens" not in config:
        assert model.generate([[5, 6, 7]], 6) != pb.load(twins.twin("llama")).generate([[5, 6, 7]], 6)
    assert samples(model, [[5, 6, 7]], 4, max_new_tokens=6) == plain


@pytest.mark.filterwarnings("ignore::patchbay.errors.EditNeverMade")  # what is refused is not run
def test_edits_act_on_samples_and_those_by_row_are_refused() -> None:
    model = pb.load(twins.twin("llama"))
    plain = samples(model, [[5, 6, 7]], 4, max_new_tokens=5)
    with model.edited(pb.scale(pb.Port("attn.out", 1), -3.0)):
        assert samples(model, [[5, 6, 7]], 4, max_new_tokens=5) != plain
    with (
        model.edited(pb.scale(pb.Port("attn.out", 1), -3.0, rows=[0])),
        pytest.raises(pb.PatchbayError, match="batches of its own"),
    ):
        samples(model, [[5, 6, 7]], 1)


def test_words_are_whole_and_in_lower_case() -> None:
    texts = ["The lead was misleading.", "LEAD, lead; don't", "", "pb-lead"]
    assert Words(["lead"])(texts) == [1.0, 1.0, 0.0, 0.0]
    assert Words(["Lead"], "count")(texts) == [1.0, 2.0, 0.0, 0.0]
    assert Words(["lead", "don't"], "rate")(texts) == [0.25, 1.0, 0.0, 0.0]
    for wrong in ([], "lead"):
        with pytest.raises(pb.PatchbayError, match="a word list is some words"):
            Words(wrong)
    with pytest.raises(pb.PatchbayError, match="possible are any, rate, count"):
        Words(["a"], "most")


def test_a_scorer_is_an_object_and_gives_finite_numbers() -> None:
    words = Words(["a"])
    assert checked_scorer(words) is words
    with pytest.raises(pb.PatchbayError, match=r"an object with __call__\(texts\) and to_json\(\)"):
        checked_scorer(lambda texts: [0.0 for _ in texts])
    with pytest.raises(pb.PatchbayError, match="2 numbers for 1 texts"):
        scored(lambda texts: [1.0, 2.0], ["a"])
    with pytest.raises(pb.PatchbayError, match="gave nan for the text 'b'"):
        scored(lambda texts: [1.0, float("nan")], ["a", "b"])


def test_numbers_that_cannot_be_are_refused() -> None:
    model = reader("characters")
    for wrong in ({"n": 0}, {"n": 1, "temperature": 0.0}, {"n": 1, "top_p": 0.0}, {"n": 1, "max_new_tokens": 0}):
        with pytest.raises(pb.PatchbayError, match=r"\(1 or more\), temperature="):
            samples(model, ["a"], **wrong)
