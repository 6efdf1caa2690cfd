"""The contract's statistics: twins that compute the same function must give the same Result, seeds matter where they should,
p values and intervals mean what they say, controls hold nothing that is tested, and halves that choose are not those that report."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import itertools
import random
import re
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import patchbay as pb
from patchbay import maths
from patchbay.find.relation_neurons import Trial
from patchbay.knobs.knob import Knob
from patchbay.prove.attention_knockout import _control, _edges
from patchbay.prove.channel import _other_sets
from patchbay.tiny import planted, twins
from patchbay.tiny.planted_context import context
from tests.find.test_inhibition_heads import with_twins
from tests.measure.words import tokenizer
from tests.shares import WHOLE, by_turns
from tests.test_contract import CASES, METHODS, NAMES, Case, drawn_for, lent, marked, returned, task, turns, twinned
from tests.tolerance import close

ALONE = {  # a network with new weights is another one for another form
    "find.concept_neurons": {"control": "none"},
    "measure.predictive_geometry": {"twin": False},
}


# --- the same function in another form --------------------------------------------------------------


def ungrouped(hf: Any) -> Any:
    """The same network with a key and value head of its own for every query head."""
    config = copy.deepcopy(hf.config)
    each = config.num_attention_heads // config.num_key_value_heads
    config.num_key_value_heads = config.num_attention_heads
    made, state = type(hf)(config), hf.state_dict()
    for name, tensor in state.items():
        if "k_proj" in name or "v_proj" in name:
            heads = tensor.unflatten(0, (-1, config.hidden_size // config.num_attention_heads))
            state[name] = heads.repeat_interleave(each, 0).flatten(0, 1)
    made.load_state_dict(state)
    made.generation_config = copy.deepcopy(hf.generation_config)  # where a text ends is the model's too
    return made.eval()


def unscaled(hf: Any) -> Any:
    """The same network with its residual multiplier inside the weights that write to the stream."""
    made, rate = copy.deepcopy(hf), hf.config.residual_multiplier
    made.config.residual_multiplier = 1.0
    with torch.no_grad():
        for layer in made.model.layers:
            layer.residual_multiplier = 1.0
            for proj in (layer.self_attn.o_proj, layer.mlp.down_proj):
                proj.weight *= rate
    return made


FORMS = {"llama": ungrouped, "granite": unscaled}


@functools.cache
def both(name: str) -> tuple[pb.Model, pb.Model]:
    """A model, and one of another form that computes the same; the second of a pair of models is the same for both."""
    words = tokenizer("characters")
    found = pb.load(twins.twin(name), words), pb.load(FORMS[name](twins.twin(name)), words)
    for model in found:
        NAMES[id(model)] = name
    return found


@pytest.mark.parametrize("name", FORMS)
def test_the_other_form_computes_the_same(name: str) -> None:
    one, same = both(name)
    ids = torch.tensor([[5, 9, 5, 9, 11, 3]])
    with torch.no_grad():
        assert close(one.hf(ids).logits, same.hf(ids).logits)


FORM_MATTERS = {  # what the form changes rightly
    ("llama", "prove.cross_model_patching"): "the second model is of the first form",
    ("llama", "prove.path_patching-receiver"): "keys and values of a receiver are its whole group's",
    ("llama", "prove.acdc"): "there is an edge for each key and value that is read",
    ("llama", "prove.edge_attribution"): "there is an edge for each key and value that is read",
    ("llama", "find.tree_probe"): "its untrained network is drawn in the model's form",
    ("llama", "turn.cut"): "keys and values of their own are more parameters",
    ("llama", "train.response_tuning"): "shared weights learn from all that share them",
    ("granite", "train.response_tuning"): "a step in scaled weights is another step",
    ("llama", "train.subspace_fusion"): "the second model is of the first form",
    ("granite", "train.subspace_fusion"): "the second model is of the first form",
    ("llama", "train.tune_parts-heads"): "shared weights learn from all that share them",
    ("granite", "train.tune_parts-heads"): "a step in scaled weights is another step",
    ("llama", "train.variant"): "shared weights learn from all that share them",
    ("granite", "train.variant"): "a step in scaled weights is another step",
    ("llama", "train.tune_parts-layer"): "shared weights learn from all that share them",
    ("granite", "train.tune_parts-layer"): "a step in scaled weights is another step",
}
SAME = [
    pytest.param(case, name, id=f"{case}-{name}")
    for case in CASES
    for name in FORMS
    if case.needs != "experts.out" and (name, str(case)) not in FORM_MATTERS
]


@pytest.mark.parametrize(("case", "name"), by_turns(turns(SAME, 2), of=4))
def test_a_method_says_the_same_of_the_same_function(case: Case, name: str) -> None:
    """Heads that share keys, and a stream that is scaled, are the model's form and no finding."""
    one, same = (case(model, task("llama"), **ALONE.get(case.method, {})) for model in both(name))
    if isinstance(one, Knob):
        assert [str(edit.port) for edit in one.edits] == [str(edit.port) for edit in same.edits]
        for a, b in zip(one.edits, same.edits, strict=True):
            if isinstance(a.value, torch.Tensor):
                assert close(a.value, b.value, noise=256)  # of two forms of one function
        return
    assert one.agrees(same, 1e-4), one.differences(same, rtol=1e-4)


# --- seeds ------------------------------------------------------------------------------------------

STILL = {  # where the case leaves a seed nothing to choose
    "decode.knn_parts": "two texts that are told of have few means, and their ends stay",
    "measure.benchmark_signal": "two checkpoints give each benchmark 1 or -1, p over all orders, and the ends stay",
    "measure.side_effects": "two layers have one other part each, and the ends over so few texts stay",
    "measure.concurrence": "six items with few values, and their ends stay",
    "measure.context_compression": "a random model answers alike whatever sentences stay",
    "measure.judge_network": "items that are right or wrong, and their ends stay",
    "measure.word_types": "four words with few values, and their ends stay",
    "find.binding_heads": "deals of four prompts give few values, and their ends stay",
    "find.expert_specialisation": "deals of four prompts give few values, and their ends stay",
    "find.retrieval_heads": "so few places of the needle are all dealt",
    "measure.minimal_pairs": "four pairs that are all won or lost alike have one end",
    "turn.set_prompt": "means of four prompts have few values, and their ends stay",
}
CHOOSES = {  # methods whose own numbers are of prompts, sets, clusters or texts that the seed draws
    "decode.best_of_n",
    "decode.dexperts",
    "decode.rerank",
    "decode.samplers",
    "decode.speculative",
    "decode.watermark",
    "measure.dial_response",
    "measure.boolean_functions",
    "measure.cross_task",
    "measure.graph_planning",
    "measure.novel_word",
    "measure.routing",
    "measure.score_convergence",
    "measure.self_consistency",
    "find.function_vectors",
    "prove.acdc",
    "prove.causal_scrubbing",
    "prove.causal_tracing",
    "measure.style_detection",
    "measure.worst_of_k",
    "find.activation_sparsity",
    "find.concept_depth",
    "find.feature_names",
    "find.key_clusters",
    "find.mod_features",
    "find.relation_embedding",
    "find.relation_neurons",
    "find.tree_probe",
    "prove.channel",
    "prove.mean_mask",
    "prove.fit_mechanisms",
}


@functools.cache
def seeded(case: Case, seed: int) -> Any:
    """What the case returns with this seed, on the family that all tests of seeds take."""
    name = "mixtral" if case.needs in ("experts.out", "attn.turn") else "gpt2"
    return case(lent(name), task(name), seed=seed)


@pytest.mark.parametrize(
    "case", by_turns([c for c in CASES if "seed" in inspect.signature(METHODS[c.method]).parameters], of=4), ids=str
)
def test_a_seed_matters_where_something_is_drawn_and_only_there(case: Case) -> None:
    """Some of three other seeds moves something; the number that ranks moves only where the seed draws what it is made of."""
    first, moved = seeded(case, 0), False
    for seed in (3, 1, 2):
        other = seeded(case, seed)
        if (
            case.method not in CHOOSES
            and not isinstance(first, Knob)
            and not case.method.startswith(("train.", "turn."))
        ):
            assert torch.equal(other.values.nan_to_num(), first.values.nan_to_num())
        moved = other != first if isinstance(first, Knob) else not other.equal(first)
        if moved:
            break
    assert moved == (case.method not in STILL)


# --- where less is better ---------------------------------------------------------------------------


def more(logits: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    return logits[:, 7] - logits[:, 11] + 0.1 * prompt


def less(logits: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    return -more(logits, prompt)


TURNED = {  # case: what is told in the direction of the better score
    "find.inhibition_heads": ["effect"],
    "prove.ablation-zero": ["effect", "joint", "difference", "p"],
    "prove.activation_patching-head": ["effect", "share"],
    "prove.attribution_patching": ["effect", "exact"],
    "prove.channel-key": ["removed", "edge"],
    "prove.circuit": ["faithfulness"],
    "prove.cross_model_patching": ["effect", "joint", "gap"],
    "prove.edge_attribution": ["effect", "gap", "exact"],
    "prove.knockout_curve": ["effect", "p"],
    "prove.path_patching": ["effect", "joint", "relative", "share"],
    "train.tune_parts-heads": ["gain"],
}


@pytest.mark.parametrize("name", TURNED)
def test_a_score_that_is_better_when_lower_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A metric and its negative, of which less is better: what helps, helps as much."""
    case = next(one for one in CASES if str(one) == name)
    options = {"exact": 3} if name == "prove.edge_attribution" else {}
    higher = case(lent("gpt2"), task("gpt2").with_metric(more), **options)
    monkeypatch.setattr(pb.Task, "sign", property(lambda one: -1.0 if one.metric is less else 1.0))
    lower = case(lent("gpt2"), task("gpt2").with_metric(less), **options)
    for variable in TURNED[name]:
        assert float(higher[variable].double().nan_to_num().abs().max()) > 0, variable
        assert close(higher[variable], lower[variable], equal_nan=True), variable


# --- p values and intervals -------------------------------------------------------------------------

RUNS = 200  # of a method, half as many in `make test`


def too_small(ps: list[float]) -> float:
    """How far the share of p values below some level passes that level, at most."""
    ordered = torch.tensor(sorted(ps), dtype=torch.float64)
    reached = torch.arange(1, len(ps) + 1).double() / len(ps)
    return float((reached - ordered).max())


def uniform(ps: list[float], step: float = 0.0) -> bool:
    """Kolmogorov and Smirnov's test at .001, of p values in steps."""
    ordered = torch.tensor(sorted(ps), dtype=torch.float64)
    below = float((ordered - step - torch.arange(len(ps)).double() / len(ps)).max())
    return max(too_small(ps), below) < 1.95 / len(ps) ** 0.5


def test_p_of_draws_is_a_rank_and_uniform_where_nothing_is_there() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(RUNS, 100, generator=generator)
    for two_sided in (False, True):
        ps = [maths.draws_p(float(row[0]), row[1:], two_sided=two_sided) for row in values]
        assert min(ps) >= 1 / 100
        assert uniform(ps, 0.01)
    assert maths.draws_p(9.0, torch.zeros(19)) == 1 / 20


def test_p_of_flipped_signs_is_uniform_where_nothing_is_there() -> None:
    values = torch.randn(RUNS, 30, generator=torch.Generator().manual_seed(1)).double()
    assert uniform([maths.permutation_p(row, torch.zeros(30), n=500) for row in values], 1 / 500)
    assert uniform(maths.sign_flip_p(values.T, n=2000).tolist(), 1 / 2000)


@functools.cache
def heads16(n_neurons: int = 256) -> pb.Model:
    """One layer of sixteen heads: a random one among fifteen like it."""
    config = GPT2Config(
        vocab_size=96,
        n_embd=32,
        n_inner=n_neurons,
        n_layer=1,
        n_head=16,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf = GPT2LMHeadModel(config).eval()
        for parameter in hf.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return pb.load(hf)


def drawn(seed: int, n: int = 6, length: int = 8) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 96, (n, length), generator=generator).tolist()


def asked(seed: int, n: int = 6, length: int = 8, **given: Any) -> pb.Task:
    """Random prompts, random answers."""
    clean, other_ = drawn(seed, n, length), drawn(10**6 + seed, n, length)
    ends = drawn(2 * 10**6 + seed, n, 2)
    return pb.Task("random", clean, [a for a, _ in ends], [[b + (a == b)] for a, b in ends], other_, **given)


def null_ablation(seed: int) -> float:
    head = pb.Part(0, "head", seed * 7 % 16)
    return float(pb.prove.ablation(heads16(), asked(seed), head, by="zero", draws=15, seed=seed)["p"])


def null_curve(seed: int) -> float:
    head = pb.Part(0, "head", seed * 7 % 16)
    return float(pb.prove.knockout_curve(heads16(), asked(seed), [head], by="zero", draws=15, seed=seed)["p"][0])


def dealt(seed: int, n: int) -> list[int]:
    """Two labels, half each, dealt out at random."""
    return (torch.randperm(n, generator=torch.Generator().manual_seed(seed)) % 2).tolist()


def null_concept(seed: int) -> float:
    task_ = asked(0, 24, labels={"side": dealt(seed, 24)})
    found = pb.find.concept_neurons(heads16(32), task_, label="side", control="none", seed=seed)
    return float(found["p"][0, 3])


def null_relation(seed: int) -> float:
    task_ = asked(0, 24, labels={"relation": dealt(seed, 24), "subject": list(range(24))})
    found = pb.find.relation_neurons(heads16(32), task_, relation="0", shares=[], seed=seed)
    return float(found["p"][0, 3])


def null_prior(seed: int) -> float:
    prior = torch.randn(24, generator=torch.Generator().manual_seed(seed)).tolist()
    task_ = pb.Task("random", drawn(0, 24), list(range(30, 54)), metric="log_probability")
    return float(pb.find.prior_layers(heads16(), task_, prior=prior, draws=99, folds=2, seed=seed)["p"].min())


NULLS = {  # method -> one null run, the step of its p, and whether it is uniform (else only never too small)
    "prove.ablation": (null_ablation, 1 / 16, True),
    "prove.knockout_curve": (null_curve, 1 / 16, True),
    "find.concept_neurons": (null_concept, 0.0, True),
    "find.relation_neurons": (
        null_relation,
        0.0,
        False,
    ),  # of a relation that is given: the best of several is the smallest of as many
    "find.prior_layers": (null_prior, 0.0, False),  # adjusted over layers
}


@pytest.mark.parametrize("name", NULLS)
def test_a_method_finds_nothing_where_nothing_is_more_often_than_it_says(name: str) -> None:
    run, step, whole = NULLS[name]
    ps = [run(seed) for seed in range(RUNS if WHOLE else RUNS // 2)]
    assert too_small(ps) < 1.95 / len(ps) ** 0.5
    assert not whole or uniform(ps, step)


def covered(intervals: list[maths.Interval], truth: list[float]) -> float:
    return sum(one.low <= true <= one.high for one, true in zip(intervals, truth, strict=True)) / len(truth)


def test_intervals_hold_the_truth_in_95_of_100() -> None:
    """600 simulated data sets each; within 3 points."""
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 600, 100, generator=generator).double()
    assert abs(covered([maths.bootstrap_interval(row + 1.0, n=500) for row in a], [1.0] * 600) - 0.95) <= 0.03
    assert (
        abs(covered([maths.paired_interval(x, x + y, n=500) for x, y in zip(a, b, strict=True)], [0.0] * 600) - 0.95)
        <= 0.03
    )
    _, low, high = maths.intervals(a.T, n=500)
    assert abs(float(((low <= 0) & (high >= 0)).double().mean()) - 0.95) <= 0.03
    below = 2.0 + 0.3 * b[0]  # of a ratio, with a denominator that varies with it
    _, low, high = maths.intervals((3.0 * below)[:, None] + a.T, below, n=500)
    assert abs(float(((low <= 3.0) & (high >= 3.0)).double().mean()) - 0.95) <= 0.03


@pytest.mark.parametrize(("draws", "noises"), by_turns([3, 5, 10, 20], [(1.0, 1.0), (0.05, 1.0), (0.3, 3.0)], of=2))
def test_the_difference_to_one_more_draw_lies_in_the_interval(draws: int, noises: tuple[float, float]) -> None:
    """Draws with means of their own, prompts that are hard for all, and noise of its own at each; 400 times, within 3 points, few or many."""
    spread, own_noise = noises
    generator = torch.Generator().manual_seed(3)
    held = 0
    for trial in range(400):
        means = spread * torch.randn(draws + 1, 1, generator=generator)
        hard = torch.randn(60, generator=generator)
        values = means + hard + torch.randn(draws + 1, 60, generator=generator)
        own = 2.0 + hard + own_noise * torch.randn(60, generator=generator)
        found = maths.beyond_draws(own, values[1:], n=100, seed=trial)
        held += found.low <= 2.0 - float(means[0]) <= found.high
    assert abs(held / 400 - 0.95) <= 0.03


RANKS = {  # case: what is ranked among which draws, its p, and whether of either sign
    "prove.ablation-zero": [("joint", "random", "p", False)],
    "prove.channel-key": [("removed", "removed_random", "p_removed", True), ("edge", "edge_random", "p_edge", True)],
    "prove.cross_model_patching": [("joint", "random", "p_joint", False)],
    "prove.desiderata_mask": [("gain", "random", "p", False)],
}


@pytest.mark.parametrize("name", RANKS)
def test_p_is_the_rank_of_what_is_told_among_the_draws_that_are_told(name: str) -> None:
    case = next(one for one in CASES if str(one) == name)
    for seed in range(3):
        found = case(lent("gpt2"), task("gpt2"), draws=5, seed=seed)
        for own, drawn, p, two_sided in RANKS[name]:
            expected = maths.draws_p(float(found[own]), found[drawn], two_sided=two_sided)
            assert close(float(found[p]), expected, of=1.0)


# --- controls ---------------------------------------------------------------------------------------


def test_random_sets_hold_nothing_that_is_tested() -> None:
    model = heads16()
    chosen = [pb.Part(0, "head", i) for i in (1, 4, 9)]
    sets = {str(part) for part in chosen}
    for seed in range(20):
        tables = [pb.prove.ablation(model, asked(1), chosen, by="zero", draws=8, seed=seed).tables["random_parts"]]
        for rows in tables:
            assert all(not sets & set(row["parts"]) and len(set(row["parts"])) == 3 for row in rows)
    for seed in range(20):
        assert not [one for one in _other_sets(16, [0, 3], 8, random.Random(seed)) if {0, 3} & set(one)]


def test_keys_that_are_cut_as_a_control_are_not_the_edges_own() -> None:
    prompts = asked(2, marks={"said": [[1, 3]] * 6})
    [edge] = _edges(prompts, ["said"], None)
    for draw in range(50):
        control = _control(edge, prompts, draw, 0)
        for keys, own in zip(control.keys, edge.keys, strict=True):
            assert len(keys) == len(own)
            assert not set(keys) & set(own)


def test_neurons_that_are_switched_off_as_a_control_are_not_the_relations_own() -> None:
    found = pb.find.relation_neurons(
        heads16(), asked(0, 24, labels={"relation": dealt(0, 24), "subject": list(range(24))}), shares=[], seed=0
    )
    ranked = [(part.layer or 0, part.index or 0) for part in found.top(40)]
    trial = Trial(heads16(), asked(0), None, None, [ranked], [40], [0], 8, 0)  # type: ignore[arg-type]
    for draw in range(20):
        off = trial.random_set(ranked, draw)
        assert len(set(off)) == 40
        assert not set(off) & set(ranked)


# --- halves -----------------------------------------------------------------------------------------


def poisoned(prompts: pb.Task, places: set[int], n_vocab: int = 96) -> pb.Task:
    """Other tokens, in the same pattern, in some of the prompts and their twins."""

    def other_tokens(rows: Any) -> list[list[int]]:
        return [
            [3 + (token * 7 + 11) % (n_vocab - 6) for token in ids] if i in places else list(ids)
            for i, ids in enumerate(rows)
        ]

    right = [ids[0] for ids in other_tokens([[token] for token in prompts.right])]
    wrong = [
        [at + (at == answer) for at in ids] for ids, answer in zip(other_tokens(prompts.wrong), right, strict=True)
    ]
    corrupted = None if prompts.corrupted is None else tuple(map(tuple, other_tokens(prompts.corrupted)))
    clean = tuple(map(tuple, other_tokens(prompts.clean)))
    return dataclasses.replace(
        prompts, clean=clean, right=tuple(right), wrong=tuple(map(tuple, wrong)), corrupted=corrupted
    )


def said(result: pb.Result, pattern: str) -> str:
    return next(match.group(0) for note in result.notes if (match := re.search(pattern, note)))


def numbers(result: Any, *names: str) -> tuple[Any, ...]:
    return tuple(tuple(result[name].double().nan_to_num(-9.0).flatten().tolist()) for name in names)


def evens(find: Any, first: str = r"L\d+\.H\d+ is highest") -> Any:
    """A finder of heads: chosen on the even prompts, told of the odd ones."""

    def call(m: pb.Model, t: pb.Task) -> tuple[Any, Any]:
        found = find(m, marked(t))
        return said(found, first), numbers(found, "held_out")

    return call


def steered(m: pb.Model, t: pb.Task) -> tuple[Any, Any]:
    knob = pb.turn.steer(m, t)
    [made] = knob.edits
    return (str(made.port), tuple(made.value.tolist())), numbers(knob.evidence["steering"], "effect", "auc")


def circuited(m: pb.Model, t: pb.Task) -> tuple[Any, Any]:
    found = pb.prove.circuit(m, t, draws=1)
    return [str(row["unit"]) for row in found.tables["circuit"]][:20], numbers(found, "faithfulness")


def sparse(m: pb.Model, t: pb.Task) -> tuple[Any, Any]:
    found = pb.find.activation_sparsity(m, t, percent=5.0, baselines=False)
    return numbers(found, "threshold"), numbers(found, "ratio_held_out")


def conceived(m: pb.Model, t: pb.Task) -> tuple[Any, Any]:
    found = pb.find.concept_neurons(m, t, control="none")
    return numbers(found, "first"), numbers(found, "held_out")


def related(m: pb.Model, t: pb.Task) -> tuple[Any, Any]:
    labels = {"relation": [i % 2 for i in range(len(t))], "subject": [i // 2 for i in range(len(t))]}
    found = pb.find.relation_neurons(m, dataclasses.replace(t, labels=labels), shares=[])
    return numbers(found, "each"), numbers(found, "held_out")


def patched(m: pb.Model, t: pb.Task) -> tuple[Any, Any]:
    found = pb.prove.activation_patching(m, t, site="neuron", top=3)
    rows = sorted((row["part"], row["value"]) for row in found.table())  # whatever order they were tried in
    return [part for part, _ in rows], (tuple(value for _, value in rows),)


def curved(m: pb.Model, t: pb.Task) -> tuple[Any, Any]:
    parts = ["L0.H0", "L0.H1", "L1.H2", "L1.H3"]
    found = pb.prove.knockout_curve(m, t, parts, order="effect", by="zero", draws=2)  # type: ignore[arg-type]
    return [row["part"] for row in found.tables["ranking"]], numbers(found, "effect")


def inhibited(m: pb.Model, t: pb.Task) -> tuple[Any, Any]:
    found = pb.find.inhibition_heads(m, t, draws=1)
    return said(found, r"watched: .*, chosen on"), numbers(found, "inhibition", "effect")


def masked(m: pb.Model, t: pb.Task) -> tuple[Any, Any]:
    found = pb.prove.desiderata_mask(m, t, steps=6, draws=1)
    return numbers(found, "weight", "accuracy_validation"), numbers(found, "accuracy_base", "gain_all")


def mixed(m: pb.Model, t: pb.Task) -> tuple[Any, Any]:
    """Every prompt a triple of places of its own, whatever its tokens are."""
    places = [list(itertools.permutations(range(5), 4))[7 * i] for i in range(len(t))]
    wrong = [[3 + (right + step) % 90 for step in (1, 2, 3, 4)] for right in t.right]
    names = ("asked", "positional", "lexical", "reflexive")
    labels = {name: [row[at] for row in places] for at, name in enumerate(names)}
    own = dataclasses.replace(t, wrong=tuple(map(tuple, wrong)), labels=labels)
    found = pb.prove.fit_mechanisms(m, own, steps=10, draws=1)
    return numbers(found, "weight", "sigma", "lexical", "reflexive"), numbers(found, "jss")


def fed_back(m: pb.Model, t: pb.Task) -> tuple[Any, Any]:
    knob = pb.turn.neurofeedback(m, t, marks=([94], [95]), shots=[2])
    [made] = knob.edits
    return tuple(made.value.tolist()), numbers(knob.evidence["control"], "d")


def tuned(m: pb.Model, t: pb.Task) -> tuple[Any, Any]:
    found = pb.train.tune_parts(m, t, ["L1.H2"], steps=3)  # type: ignore[list-item]
    return [row["loss"] for row in found.tables["steps"]], numbers(found, "score", "gain")


def fused(m: pb.Model, t: pb.Task) -> tuple[Any, Any]:
    found = pb.train.subspace_fusion(m, pb.load(twins.twin("gpt2", seed=1)), t, steps=3, rate=1.0)
    return [row["loss"] for row in found.tables["steps"]], numbers(found, "score", "gain")


def switched(m: pb.Model, t: pb.Task) -> tuple[Any, Any]:
    knob = pb.turn.scale(list(SWITCH.truth["neurons"].values()), 1.0, model=m)
    found = pb.measure.dose_response(m, t, knob, strengths=[-4.0, -2.0, 2.0], draws=0)
    return numbers(found, "chosen"), numbers(found, "test_effect")


def intended(m: pb.Model, t: pb.Task) -> tuple[Any, Any]:
    found = pb.turn.context_knob(m, t, steps=2, layers=[0])
    search = found.evidence["search"] if isinstance(found, Knob) else found
    return numbers(search, "constant", "constant_other"), numbers(search, "iia", "towards", "away")


def random_prompts() -> tuple[pb.Model, pb.Task]:
    return lent("gpt2"), twinned(pb.tasks.repeated_tokens(drawn_for("gpt2"), 12, max_period=5, max_offset=2))


def switch_prompts() -> tuple[pb.Model, pb.Task]:
    """Neurons that answer, asked for the other answer."""
    model, truth = pb.load(SWITCH.model, SWITCH.tokenizer), SWITCH.truth
    prompts = pb.Task.from_prompts(model, truth["prompts"], truth["wrong"], truth["answers"])
    return model, prompts[[i % len(prompts) for i in range(12)]]


def intent_prompts() -> tuple[pb.Model, pb.Task]:
    """A model in which one direction says whether the text or memory is asked."""
    made = context(seed=1)
    truth = {key: made.truth[key][:12] for key in ("prompts", "answers", "wrong", "twins", "intents")}
    model = pb.load(made.model, made.tokenizer)
    prompts = pb.Task.from_prompts(model, truth["prompts"], truth["answers"], truth["wrong"], truth["twins"])
    return model, dataclasses.replace(prompts, labels={"intent": truth["intents"]})


SWITCH = planted.relation_neuron(seed=1)
MADE = {  # others: random prompts
    "find.inhibition_heads": lambda: with_twins("gpt2", 0, n=12)[:2],
    "measure.dose_response": switch_prompts,
    "turn.context_knob": intent_prompts,
}
HALVED = {
    "find.arithmetic_heads": evens(
        functools.partial(pb.find.arithmetic_heads, all_prompts=True), r"\S+ has the highest"
    ),
    "find.attention_sinks": evens(functools.partial(pb.find.attention_sinks, epsilon=0.3, length=8)),
    "find.binding_heads": evens(pb.find.binding_heads),
    "find.duplicate_token_heads": evens(pb.find.duplicate_token_heads),
    "find.inhibition_heads": inhibited,
    "find.ngram_heads": evens(pb.find.ngram_heads),
    "find.activation_sparsity": sparse,
    "find.concept_neurons": conceived,
    "find.relation_neurons": related,
    "measure.dose_response": switched,
    "prove.activation_patching": patched,
    "prove.circuit": circuited,
    "prove.desiderata_mask": masked,
    "prove.fit_mechanisms": mixed,
    "prove.knockout_curve": curved,
    "train.subspace_fusion": fused,
    "train.tune_parts": tuned,
    "turn.context_knob": intended,
    "turn.neurofeedback": fed_back,
    "turn.steer": steered,
}
NOT_HALVED = {  # methods that speak of what is held out, and have no half of prompts that could be changed alone
    "decode.knn_parts": "its own test adds up the half that chooses and the half that is told of by plain loops",
    "decode.compare": "halves of references and texts for one number, and nothing is chosen by either",
    "find.function_vectors": "its own test ranks on one half and adds the vector on the other by plain hooks",
    "prove.acdc": "its own test takes the KL of the held-out half by itself",
    "prove.mean_mask": "its own test tells the half that trained no mask by plain hooks",
    "turn.persona_vector": "its own test tells the half that did not choose by plain loops",
    "turn.refusal_direction": "its own test induces refusals on the held-out texts by a plain hook",
    "train.dictionary": "nothing is chosen by what is held out; its own test measures those texts by plain loops",
    "find.relation_embedding": "its own test tells the half that is held out by plain loops",
    "prove.das": "its own test tells the half that is held out by hooks of its own",
    "train.tuned_lens": "nothing is chosen by what is held out; its own test measures those texts by plain loops",
    "train.response_tuning": "its own test tells both halves by plain loops",
    "train.variant": "nothing is chosen by what is held out; its own test scores those documents by plain loops",
    "find.channel_content": "folds: every prompt is fitted on and told of in turn; its test counts by plain loops",
    "find.concept_depth": "folds, as channel_content",
    "find.feature_names": "its own test counts hits and misses by plain loops on the half of the texts that did not choose",
    "find.fact_heads": "the held-out value is `_attention.held_out`, as the other finders' here; on a random model no head turns the answer",
    "measure.minimal_pairs": "a threshold is fitted on half of the sentences: its own test gives labels at random",
    "find.tree_probe": "its own test tells the texts that are held out by plain loops",
    "find.mod_features": "halves of numbers, read from weights: no prompt",
    "find.retrieval_heads": "as fact_heads: on a random model no head copies a needle",
}


def test_every_method_that_holds_prompts_out_is_asked() -> None:
    """By its own words: `held out`, a split, halves."""
    spoken = {
        name
        for name, function in METHODS.items()
        if re.search(
            r"held.out|other half|\.split\((0|seed|\))|_halves\(",
            inspect.getsource(inspect.getmodule(inspect.unwrap(function))),
        )  # type: ignore[arg-type]
    }
    assert spoken == {*HALVED, *NOT_HALVED}


@pytest.mark.parametrize("name", HALVED)
def test_prompts_that_choose_are_not_those_that_report(name: str) -> None:
    """Which prompts move the report while the choice stays, tried until each number has moved and three have moved
    none: some of each. All of them changed at once, the choice stays too."""
    model, prompts = MADE.get(name, random_prompts)()
    call = HALVED[name]
    chosen, report = call(model, prompts)
    report_only, others, moved = set(), set(), set()
    for place in range(len(prompts)):
        now, told = call(model, poisoned(prompts, {place}, model.vocab_size))
        (report_only if now == chosen and told != report else others).add(place)
        moved |= {i for i, number in enumerate(told) if now == chosen and number != report[i]}
        if len(report_only) > 2 and len(others) > 2 and len(moved) == len(report):
            break
    assert report_only
    assert len(others) > 2, sorted(report_only)
    now, told = call(model, poisoned(prompts, report_only, model.vocab_size))
    assert now == chosen
    assert all(new != old for new, old in zip(told, report, strict=True))  # each number that is reported, by itself


# --- provenance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", by_turns(CASES, of=2), ids=str)
def test_provenance_holds_all_that_a_number_depends_on(case: Case) -> None:
    """Versions, the model's weights, every option with its value, and the prompts: nothing more is needed to make it again."""
    name = "mixtral" if case.needs in ("experts.out", "attn.turn") else "gpt2"
    drawn_from = "seed" in inspect.signature(METHODS[case.method]).parameters
    made = seeded(case, 3) if drawn_from else returned(case, name)
    provenance = made.provenance
    assert {"patchbay", "torch", "transformers"} <= set(provenance["versions"])
    assert not drawn_from or provenance["options"]["seed"] == 3
    for option in inspect.signature(METHODS[case.method]).parameters.values():
        if option.kind is option.KEYWORD_ONLY and option.name != "model":
            assert option.name in provenance["options"]
