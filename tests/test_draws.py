"""What is drawn, in every method that draws: a p is a rank among the draws, and a seed moves what it is said to move alone.

The calls are those of the contract, on a random GPT-2 or Mixtral. A p of n draws is k / (1 + n) with k from 1: without the call
itself among the draws it would be 0 or no such fraction. What stands in `MOVED` comes from draws and differs between two
seeds; what stands in `KEPT` is measured, and does not.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay import maths
from tests.test_contract import CASES, Case, lent, task
from tests.tolerance import close

BY_NAME = {str(case): case for case in CASES}
RANKED = [  # case, variable, draws
    ("find.communities", "p", 3),
    ("find.concept_depth", "p", 3),
    ("find.language_similarity", "p", 5),
    ("find.mod_features", "p", 5),
    ("find.neuron_vocabulary", "p", 50),
    ("find.neuron_vocabulary-agreement", "agreement_p", 50),
    ("find.prior_layers", "probe_p", 5),
    ("find.retrieval_heads", "p", 1000),
    ("find.spectrum", "p", 3),
    ("find.successor_heads", "p", 5),
    ("find.token_rewards", "p", 5),
    ("find.token_rewards", "term_p", 5),
    ("find.tree_probe", "p", 1),
    ("prove.ablation-zero", "p", 3),
    ("prove.cross_model_patching", "p_joint", 1),
    ("prove.knockout_curve", "p", 3),
]
ADJUSTED = [
    ("find.channel_content", "p", 3),
    ("find.word_classes", "p", 5),
]  # over layers: no rank, and no less than one
MOVED = {
    "find.channel_content": ["null_mean"],
    "find.communities": ["null_mean"],
    "find.concept_neurons": ["held_out"],
    "find.copy_suppression_heads": ["null_mean"],
    "find.inhibition_heads": ["random"],
    "find.isotropy": ["low"],
    "find.latent_language": ["null_mean"],
    "find.mod_features": ["null_mean"],
    "find.neuron_vocabulary": ["null_high"],
    "find.spectrum": ["null_mean"],
    "find.successor_heads": ["null_mean"],
    "find.token_rewards": ["null_low", "term_null"],
    "find.word_classes": ["null_mean"],
    "prove.ablation-zero": ["random"],
    "prove.attention_knockout": ["control"],
    "prove.circuit": ["null_mean"],
    "prove.cross_model_patching": ["random"],
    "prove.channel-key": ["removed_random"],
    "prove.knockout_curve": ["null_mean"],
    "turn.steer": ["null_mean", "random"],
}
KEPT = {
    "find.communities": ["modularity", "weight"],
    "find.concept_neurons": ["t", "difference"],
    "find.copy_suppression_heads": ["suppression"],
    "find.inhibition_heads": ["inhibition", "effect"],
    "find.isotropy": ["isotropy"],
    "find.neuron_vocabulary": ["margin"],
    "find.spectrum": ["effective", "first"],
    "find.successor_heads": ["score", "chance"],
    "find.token_rewards": ["reward", "beyond", "share", "slope", "term"],
    "prove.ablation-zero": ["effect", "joint"],
    "prove.attention_knockout": ["relative"],
    "prove.channel-key": ["removed", "edge"],
    "prove.cross_model_patching": ["effect", "joint"],
    "prove.knockout_curve": ["effect"],
}


@functools.cache
def made(name: str, seed: int) -> Any:
    case: Case = BY_NAME[name]
    return case(lent("gpt2"), task("gpt2"), seed=seed)


@pytest.mark.parametrize(("name", "variable", "draws"), RANKED, ids=lambda value: str(value))
def test_a_p_is_a_rank_among_the_draws(name: str, variable: str, draws: int) -> None:
    p = torch.cat([made(name, seed)[variable].double().flatten() for seed in (0, 1)])
    rank = p[p.isfinite()] * (1 + draws)
    assert len(rank)
    assert close(rank, rank.round(), of=1.0 + draws), "the draws and the call itself"
    assert set(rank.round().tolist()) <= set(range(1, draws + 2))


@pytest.mark.parametrize(("name", "variable", "draws"), ADJUSTED, ids=lambda value: str(value))
def test_an_adjusted_p_is_no_less_than_the_first_rank(name: str, variable: str, draws: int) -> None:
    p = torch.cat([made(name, seed)[variable].double().flatten() for seed in (0, 1)])
    least = p[p.isfinite()].min()
    assert float(least) > 1 / (1 + draws) or close(least, 1 / (1 + draws))


@pytest.mark.parametrize("name", MOVED)
def test_a_seed_moves_what_is_drawn_and_nothing_else(name: str) -> None:
    first, second = made(name, 0), made(name, 1)
    if not isinstance(first, pb.Result):
        first, second = (
            next(v for v in each.evidence.values() if isinstance(v, pb.Result)) for each in (first, second)
        )
    for variable in MOVED[name]:
        assert not torch.equal(first[variable].nan_to_num(9.0), second[variable].nan_to_num(9.0)), variable
    for variable in KEPT.get(name, ()):
        assert torch.equal(first[variable].nan_to_num(9.0), second[variable].nan_to_num(9.0)), variable


@pytest.mark.parametrize("name", ["find.latent_language", "find.mod_features", "find.successor_heads"])
def test_draws_differ_from_one_another(name: str) -> None:
    found = made(name, 0)
    assert bool((found["null_high"] > found["null_mean"] + 1e-6).any())


def test_a_null_has_two_ends() -> None:
    found = made("prove.circuit", 0)
    assert bool((found["null_low"] < found["null_mean"]).any())
    assert bool((found["null_low"] <= found["null_mean"]).all())
    assert bool((found["null_high"] >= found["null_mean"]).all())


HELD = {  # case: the variable of each prompt that chooses the head, and what is told of it on the other prompts
    "find.arithmetic_heads": "effect",
    "find.attention_sinks": "rate",
    "find.binding_heads": "score",
    "find.duplicate_token_heads": "score",
    "find.ngram_heads": "excess",
}
FLIPPED = {  # case: what of each prompt has its signs flipped, and below which size it is rounding
    "find.arithmetic_heads": (lambda one: one["effect"], 1e-5),
    "find.duplicate_token_heads": (lambda one: one["excess"], 1e-6),
    "find.inhibition_heads": (lambda one: one["inhibition"], 1e-6),
    "find.name_mover_heads": (lambda one: one["moved"] - one["elsewhere"], 1e-6),
    "find.ngram_heads": (lambda one: one["excess"], 1e-6),
}


@functools.cache
def alone(name: str) -> list[pb.Result]:
    """The Result of every prompt by itself."""
    prompts = task("gpt2", 6)
    return [BY_NAME[name](lent("gpt2"), prompts[i]) for i in range(len(prompts))]


@pytest.mark.parametrize("name", HELD)
def test_what_is_held_out_is_of_other_prompts_than_those_that_chose(name: str) -> None:
    """The head that is highest on the even prompts, and its mean on the odd ones."""
    each = torch.stack([one[HELD[name]] for one in alone(name)]).double()  # [prompt, layer, head]
    chosen, other = each[::2].nanmean(0).flatten(), each[1::2].nanmean(0).flatten()
    expected = other[int(chosen.nan_to_num(-torch.inf).argmax())]
    assert not close(expected, chosen.nan_to_num(-torch.inf).max()), "the prompts differ"
    found = BY_NAME[name](lent("gpt2"), task("gpt2", 6))
    assert close(found["held_out"], expected, of=each)


@pytest.mark.parametrize("name", FLIPPED)
def test_p_flips_the_signs_of_what_the_prompts_have(name: str) -> None:
    of, floor = FLIPPED[name]
    each = torch.stack([of(one) for one in alone(name)]).double()
    found = BY_NAME[name](lent("gpt2"), task("gpt2", 6))
    p = maths.sign_flip_p(each, floor=floor)
    assert len(p.unique()) > 2
    assert close(found["p"], p, equal_nan=True)
    assert close(found["p_adjusted"], maths.benjamini_hochberg(p), equal_nan=True)


SPREAD = {  # case: the variable whose standard error is given
    "find.copy_suppression_heads": "suppression",
    "find.induction_heads": "score",
    "find.name_mover_heads": "moved",
    "find.previous_token_heads": "score",
}
ENDS = {  # case: the variable whose ends are given
    "find.arithmetic_heads": "effect",
    "find.attention_sinks": "rate",
    "find.binding_heads": "score",
    "find.duplicate_token_heads": "score",
    "find.ngram_heads": "excess",
    "find.retrieval_heads": "score",
    "prove.edge_attribution": "effect",
}


@pytest.mark.parametrize("name", SPREAD)
def test_a_standard_error_is_that_of_the_prompts(name: str) -> None:
    each = torch.stack([one[SPREAD[name]] for one in alone(name)]).double()
    found = BY_NAME[name](lent("gpt2"), task("gpt2", 6))["standard_error"].double()
    assert close(found, each.std(0) / 6**0.5, of=each, equal_nan=True)


@pytest.mark.parametrize("name", ENDS)
def test_ends_are_those_of_prompts_drawn_anew(name: str) -> None:
    each = torch.stack([one[ENDS[name]] for one in alone(name)]).double()
    found = BY_NAME[name](lent("gpt2"), task("gpt2", 6))
    for end, expected in zip(("low", "high"), maths.intervals(each)[1:], strict=True):
        assert close(found[end], expected, of=each, equal_nan=True), end
