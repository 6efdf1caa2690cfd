"""Compiled programs: the interpreter by hand, the weights against the interpreter, the graph by taking parts away."""

from __future__ import annotations

import random

import pytest
import torch

import patchbay as pb
from bench import truth
from patchbay.signal.port import PatchbayError
from patchbay.tiny import compiled, toys
from patchbay.tiny.compiler import Compiled, compile_program
from patchbay.tiny.programs import count, mapped, pick, positions, same, tokens
from tests.shares import by_turns

NAMES = list(compiled.PROGRAMS)
BY_HAND = {
    "copy_previous": ("abcdefgh", "g"),
    "exclusive_or": ("cdacdef", "yes"),
    "histogram": ("abcaba", "3"),
    "indirect_object": (["a", "c", "c", "gave", "to"], "a"),
    "induction": ("abcdefghc", "d"),
    "last_first": ("fedcbahg", "f"),
    "modular_sum": ("7+5", "2"),
    "more_open": ("((x)x))", "no"),
    "pointer": ("abcdef2", "c"),
    "recall": ("a1b2c3d4b", "2"),
    "successor": ("aach", "a"),
    "two_hop": ("abbcdefgha", "c"),
}


def prompts(name: str, made: Compiled, n: int, seed: int = 0) -> list[list[str]]:
    rng, found = random.Random(seed), []
    while len(found) < n:
        words = compiled.PROGRAMS[name].draw(rng)
        found += [words] if made.expected(words) is not None else []
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_interpreter_by_hand(name: str) -> None:
    words, answer = BY_HAND[name]
    assert compiled.PROGRAMS[name].answer().at(list(words), len(words) - 1) == answer


@pytest.mark.parametrize(("name", "superposed"), by_turns(NAMES, [1.0, 0.9], of=2))
def test_weights_answer_as_the_program_does(name: str, superposed: float) -> None:
    made = compiled.make(name, superposed=superposed, seed=1)
    assert made.check(prompts(name, made, 150, 2)) == 1.0


def test_superposed_codes_overlap_and_plain_ones_do_not() -> None:
    for share, overlap in ((1.0, False), (0.9, True)):
        head = compiled.make("induction", superposed=share).model.lm_head.weight[1:]
        inner = torch.nn.functional.normalize(head, dim=1) @ torch.nn.functional.normalize(head, dim=1).T
        off = (inner - torch.eye(len(inner))).abs().max()
        assert bool(off > 0.02) is overlap


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_the_graph_are_needed_and_no_others(name: str) -> None:
    made = compiled.make(name)
    task = compiled.task(name, made, 24)
    model = pb.load(made.model)
    accurate = task.with_metric("accuracy")
    heads = {str(head.part): pb.zero(head.z) for layer in model.layers for head in layer.heads}
    layers = {f"L{i}.mlp": pb.zero(layer.mlp.out) for i, layer in enumerate(model.layers)}
    for part, edit in (heads | layers).items():
        right = float(accurate.score(pb.run(model, task, edits=[edit], logits="last").last_logits).mean())
        assert (right < 0.9) is (part in made.heads + made.mlps), (part, right)


def test_edges_carry_their_variable() -> None:
    made = compiled.make("induction")
    varies = {(edge.writer, edge.reader) for edge in made.edges if edge.varies}
    assert varies == {
        ("embed", "L0.KV0.v"), ("L0.H0", "L1.KV0.k"), ("embed", "L1.H0.q"), ("embed", "L1.KV0.v"), ("L1.H0", "logits"),
    }  # fmt: skip
    assert {(edge.writer, edge.reader) for edge in made.edges if not edge.varies} == {
        ("embed", "L0.H0.q"),
        ("embed", "L0.KV0.k"),
    }  # positions: the same in twins of one length


def test_a_task_has_twins_with_another_answer() -> None:
    made = compiled.make("recall")
    task = compiled.task("recall", made, 20, seed=3)
    assert task == compiled.task("recall", made, 20, seed=3)
    assert task.corrupted is not None
    for clean, twin, right, wrong in zip(task.clean, task.corrupted, task.right, task.wrong, strict=True):
        for ids, answer in ((clean, right), (twin, wrong[0])):
            assert made.words[answer] == made.expected([made.words[i] for i in ids[1:]])
        assert right != wrong[0]


def test_one_program_written_by_a_reader() -> None:
    """The parity of how often an a has stood, which none of the library's programs asks."""
    words = tokens(("a", "b", "odd", "even"))
    found = count("how many a", words, words, lambda key, query: bool(key == "a"), 5)
    made = compile_program(mapped("answer", lambda n: "odd" if n % 2 else "even", found), n_layers=2, n_heads=2)
    assert made.check([list(word) for word in ("a", "ab", "aab", "aaab", "babab", "aaaab")]) == 1.0
    assert [made.expected(list(word)) for word in ("ab", "aab")] == ["odd", "even"]


def test_what_has_no_single_match_has_no_value() -> None:
    words, places = tokens("ab"), positions(6)
    before = pick("before", places, places, lambda key, query: bool(key == query - 1), words)
    followed = pick("followed", before, words, same, words)
    assert followed.at(list("aba"), 2) == "b"
    assert followed.at(list("b"), 0) is None
    assert followed.at(list("abaca"), 4) is None


def test_an_unknown_program_is_refused() -> None:
    with pytest.raises(PatchbayError, match="no program 'inductoin'; programs are .*did you mean"):
        compiled.make("inductoin")


@pytest.mark.slow
def test_sorting_learns_to_look_at_the_next_larger_number() -> None:
    model, accuracy = toys.train("sorting")
    assert accuracy > 0.95
    assert toys.heads("sorting", model)["next larger"]
    untrained, chance = toys.train("sorting", steps=1)
    assert chance < 0.3
    assert not toys.heads("sorting", untrained)["next larger"]


@pytest.mark.slow
def test_modular_addition_learns_few_frequencies() -> None:
    model, accuracy = toys.train("modular")
    assert accuracy > 0.95
    assert toys.sparsity(model) > 0.5 > 0.3 > toys.sparsity(toys.train("modular", steps=1)[0])


@pytest.mark.slow
def test_induction_is_learned_by_heads_that_the_finders_find() -> None:
    """Every head that looks back, or at what followed, ranks first in its finder."""
    model, accuracy = toys.train("induction")
    assert accuracy > 0.95
    for many, score in truth.by_toy(model, 48).values():
        assert many
        assert score.precise > 0.9
    untrained, chance = toys.train("induction", steps=1)
    assert chance < 0.3
    assert not toys.heads("induction", untrained)["induction"]
