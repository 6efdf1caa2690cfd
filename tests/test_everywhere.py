"""Everywhere: every finder on every kind of model gives finite numbers, or says in a PatchbayError what is missing.

The calls are the contract's cases (`test_contract.CASES`), with its smallest prompts, on random twins, one model for each family.
Here runs a fifth of the pairs with the families of `KINDS`, one for each build that the contract's own families do not have: every
family and every finder by turns; all families, with the methods of every folder:

    PATCHBAY_EVERYWHERE=1 pytest tests/test_everywhere.py

A refusal is right when the model lacks the signal that the case needs (`Case.needs`) and the message names family and
signal, or when it stands in `REFUSED`, with what its message says. Any other refusal fails, and so does any other exception.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import pytest

import patchbay as pb
from patchbay.contract.every import TWINS
from patchbay.knobs.knob import Knob
from patchbay.tiny import twins
from tests.shares import WHOLE, by_turns
from tests.test_contract import CASES, lent, task

KINDS = {
    "gpt_neox": "attention and MLP side by side, biases",
    "gptj": "attention outside transformers' interface, rotary positions",
    "opt": "an MLP that is no module",
    "falcon": "one key and value for all heads",
    "falcon alibi": "distances in place of positions",
    "olmo2": "norms after the blocks alone, normed queries and keys",
    "cohere2": "sliding windows, scaled logits",
    "granite": "multipliers on stream, embedding and attention",
    "gpt_oss": "sinks, experts with biases",
    "deepseek_v3": "latent attention, shared experts, a dense layer before them",
    "qwen3_next": "linear attention and gated heads by turns, experts",
    "lfm2": "convolutions and heads by turns",
    "bamba": "states and heads by turns",
    "mamba": "no attention and no MLP",
}
FAMILIES = list(twins.FAMILY_CONFIGS) if WHOLE else list(KINDS)
CALLED = [case for case in CASES if WHOLE or case.method.startswith("find.")]
NO_HEAD_BEFORE = ("qwen3_next", "lfm2", "bamba")  # one layer of three has heads
LATENT = ("deepseek_v3", "deepseek_v2", "glm4_moe_lite")
REFUSED: dict[tuple[str, str], str] = {  # (case, family) -> what the message says
    ("find.observable_propagation-path", "opt"): "the MLP of layer 1 of this opt model is no module of its own",
    ("find.direct_logit_attribution-expert", "flex_olmo"): "a norm after the experts",
    ("find.copy_suppression_heads", "qwen3_next"): "a gate stands after it",
    ("find.observable_propagation", "qwen3_next"): "a gate, a norm or a scale stands between",
    ("find.observable_propagation-path", "qwen3_next"): "a gate, a norm or a scale stands between",
}
REFUSED |= {("find.inhibition_heads", name): "no head comes before the movers" for name in NO_HEAD_BEFORE}
REFUSED |= {("prove.path_patching-receiver", name): "no head comes before the receivers" for name in NO_HEAD_BEFORE}
REFUSED |= {
    (case, name): "layers [1] have it"
    for name in NO_HEAD_BEFORE
    for case in ("turn.channel", "prove.channel-key", "prove.channel-logits")
}
REFUSED |= {
    ("turn.set_prompt", name): "carry a state from token to token" for name in (*NO_HEAD_BEFORE, "mamba", "mamba2")
}
REFUSED |= {  # neurons of the first layer alone: the cases name one of the second
    (case, name): "offers"
    for name in (*LATENT, "dots1")
    for case in ("prove.activation_patching-neuron", "turn.clamp-neuron")
}
REFUSED |= {("turn.set_prompt", name): "ALiBi" for name in ("bloom", "falcon alibi")}
REFUSED |= {("turn.cut", name): "layer 0 offers" for name in ("mixtral", "mamba2")}
REFUSED[("turn.cut", "bloom")] = "does not name how many neurons"
REFUSED[("turn.set_prompt", "gpt_neo")] = "its local layers see 6 tokens back"
for name in LATENT:
    REFUSED |= {(f"find.observable_propagation{path}", name): "a compressed latent" for path in ("", "-path")}
    REFUSED |= {(f"prove.channel-{to}", name): "numbers of components, each 1 to 6" for to in ("key", "logits")}


SOME = {  # cases that families outside the contract's own may refuse, and what they say then, as a pattern
    "find.attribution_graph": "so that it is not affine in the stream|no neurons that are its parts",
    "find.feature_names": "layer 1 offers",
    "find.features": "so they run apart; give prompts of one length",
    "measure.benchmark_signal": "could not load",  # an earlier checkpoint is loaded by the class of causal models, which has no vision
    "prove.graph_ablation": "so that it is not affine in the stream|no neurons that are its parts",
    "turn.cut": r"pb.turn.scale\(parts, 0.0\)|layer [01] offers",
    "turn.rewrite": "have no down projection here",
}


@functools.cache
def signals(family: str) -> frozenset[str]:
    """The signals that some layer of the family's twin offers."""
    model = lent(family)
    return frozenset(signal for layer in range(model.n_layers) for signal in model.signals(layer))


def finite(result: pb.Result) -> None:
    """No infinity, a number in every variable, and nothing but numbers in what is ranked."""
    for name in result.variables:
        values = result[name]
        assert not values.isinf().any(), f"{name} is infinite"
        assert values.isfinite().any(), f"{name} has no value"
    if result.ranked:
        assert all(math.isfinite(row["value"]) for row in result.table(10))


@pytest.mark.parametrize(("family", "case"), by_turns(FAMILIES, CALLED, of=7), ids=str)
def test_finite_numbers_or_what_is_missing(family: str, case: Any) -> None:
    model, prompts = lent(family), task(family)
    try:
        returned = case(model, prompts)
    except pb.PatchbayError as error:
        said = str(error)
    else:
        said = ""
        assert isinstance(returned, pb.Result | Knob)
        if isinstance(returned, pb.Result):
            finite(returned)
    if case.needs and case.needs not in signals(family) | {"attn.mask"}:
        assert said, f"{case} ran on {family}, which lacks {case.needs}"
        assert model.family.name in said
        assert case.needs.split(".")[1] in said
        return
    if said and family not in TWINS and str(case) in SOME and re.search(SOME[str(case)], said):
        return
    expected = next((text for (method, name), text in REFUSED.items() if method == str(case) and name == family), "")
    assert bool(said) == bool(expected), said or f"{case} ran on {family}; it was to be refused: {expected}"
    assert expected in said


def test_the_families_here_and_in_the_contract_are_of_the_covered_ones() -> None:
    assert set(KINDS) <= set(twins.FAMILY_CONFIGS)
    assert not set(KINDS) & set(TWINS)
    assert {family for _, family in REFUSED} <= set(twins.FAMILY_CONFIGS)
