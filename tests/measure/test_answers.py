"""Answers after prompts: as products of probabilities, alone or in a batch, and what is refused."""

from __future__ import annotations

import itertools
import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.measure import _runs
from patchbay.measure._answers import refuse_unclear, scores, spell
from patchbay.measure._runs import shared, token_logprobs
from patchbay.tiny import twins
from tests.measure.words import NAMES, by_hand, reader
from tests.tolerance import close

PROMPTS = ["the cat", "a dog sat on", "On"]
ANSWERS = [[" sat", " ran away", "s"], [" it", " the mat", " a"], [" the", " that", " an"]]


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_scores_the_product_of_its_tokens(name: str) -> None:
    model = reader(name)
    found = scores(model, PROMPTS, ANSWERS, batch_size=2)
    for i, (prompt, each) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        for j, answer in enumerate(each):
            [own], [whole] = model.encode([prompt]), model.encode([prompt + answer])
            assert close(float(found.logp[i, j]), by_hand(model, whole, len(own)), of=10.0)
            assert int(found.n_tokens[i, j]) == len(whole) - len(own)


def test_answers_of_one_token_are_the_softmax_at_the_prompts_end() -> None:
    model = pb.load(twins.twin("gpt2"))
    prompts = [[5, 6, 7], [8, 9]]
    found = scores(model, prompts, [[[t] for t in range(96)]] * 2)
    expected = pb.run(model, prompts).last_logits.log_softmax(-1)
    assert close(found.logp, expected.double(), dtype=torch.float32)
    assert close(found.logp.exp().sum(1), torch.ones(2).double(), dtype=torch.float32)  # a complete set


def test_a_complete_prefix_free_set_has_a_mass_of_one() -> None:
    """All pairs that begin with token 3, and all other single tokens."""
    model = pb.load(twins.twin("llama"))
    answers = [[t] for t in range(96) if t != 3] + [[3, t] for t in range(96)]
    found = scores(model, [[5, 6, 7]], [answers])
    assert close(float(found.logp.exp().sum()), 1.0)


@pytest.mark.parametrize("form", ["gpt2", "gemma2", "mixtral", "mamba2", "falcon alibi"])
def test_a_batch_is_its_items_one_by_one(form: str) -> None:
    model = pb.load(twins.twin(form))
    prompts = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
    answers = [[[20, 21], [22]], [[23], [24, 25, 26]], [[27, 28], [27, 29]]]
    whole = scores(model, prompts, answers).logp
    alone = torch.cat([scores(model, [p], [a]).logp for p, a in zip(prompts, answers, strict=True)])
    assert close(whole, alone, dtype=torch.float32)
    assert close(scores(model, prompts, answers, batch_size=1).logp, whole, dtype=torch.float32)


def test_prompts_that_are_shared_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in rows: labels of one or two tokens after a prompt cost one row; equal prompts share theirs."""
    model, rows = reader("pairs"), []
    inner = _runs.run_rows
    monkeypatch.setattr(_runs, "run_rows", lambda m, r, s: rows.extend(r) or inner(m, r, s))
    labels = [f" {letter}" for letter in "ABCDE"]
    scores(model, ["the cat:", "a dog:", "the cat:"], [labels] * 3)
    assert len(rows) == 2
    assert max(map(len, rows)) == max(len(ids) for ids in model.encode(["the cat:", "a dog:"])) + 1


@pytest.mark.parametrize("name", NAMES)
def test_the_mass_of_labels_is_at_most_one(name: str) -> None:
    model = reader(name)
    prompts = [f"Q: {question}?\nA. yes\nB. no\nA:" for question in ("is it", "was it", "can he see")]
    found = scores(model, prompts, [[f" {letter}" for letter in "ABCDEFGH"]] * 3)
    assert bool((found.logp.exp().sum(1) <= 1.0).all())


def test_first_tokens_of_labels_would_exceed_one() -> None:
    """Why whole sequences are scored: labels that share their first token."""
    model = reader("pairs")
    [prompt] = model.encode(["A:"])
    after = [model.encode([f"A: {letter}"])[0][len(prompt)] for letter in "BCDEFGHIJ"]
    assert len(set(after)) == 1
    first = pb.run(model, [prompt]).last_logits[0].softmax(-1)[after]
    assert float(first.sum()) == pytest.approx(9 * float(first[0]))


def test_a_space_at_the_end_moves_to_the_answer_and_a_joined_boundary_is_refused_or_backed_up() -> None:
    model = reader("pairs")
    assert close(
        scores(model, ["the cat "], [["sat", "ran"]]).logp, scores(model, ["the cat"], [[" sat", " ran"]]).logp
    )
    with pytest.raises(pb.PatchbayError, match=r"item 0: the tokenizer joins the prompt's end with 'ear'"):
        scores(model, ["the h"], [["ear", "at"]])
    backed = scores(model, ["the h"], [["ear", "at"]], boundary="back_up")
    [shared_ids] = model.encode(["the "])
    for j, text in enumerate(("the hear", "the hat")):
        assert close(float(backed.logp[0, j]), by_hand(model, model.encode([text])[0], len(shared_ids)), of=10.0)


def test_norms() -> None:
    found = scores(reader("pairs"), ["the"], [[" cat sat", " dog"]])
    texts = ["cat sat", "dog"]
    for name, sizes in {"sum": [1, 1], "token": found.n_tokens[0].tolist(), "char": [7, 3], "byte": [len(t.encode()) for t in texts]}.items():  # fmt: skip
        assert close(found.normed(name), found.logp / torch.tensor([sizes]).double(), dtype=torch.float64)
    with pytest.raises(pb.PatchbayError, match="answers given as ids"):
        scores(pb.load(twins.twin("gpt2")), [[5]], [[[6], [7]]]).normed("char")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompts": ["the"], "answers": [[""]]}, "item 0: the answer '' has no token"),
    ({"prompts": ["the"], "answers": [[" k\u00e4se"]]}, "the tokenizer does not know '\u00e4'"),
    ({"prompts": ["the", "a"], "answers": [[" cat"]]}, "2 prompts and 1 lists of answers"),
    ({"prompts": ["the"], "answers": [[[5]]]}, "texts with texts, ids with ids"),
    ({"prompts": ["the"], "answers": [" cat"]}, "item 0 has no list of answers"),
    ({"prompts": [[5]], "answers": [[[400]]]}, r"token ids \[400\] are outside 0..95"),
    ({"prompts": [[5] * 200], "answers": [[[6] * 200]]}, "have 400 tokens and the model reads"),
    ({"prompts": [[]], "answers": [[[5]]]}, "nothing stands before its answers"),
    ({"prompts": ["the"], "answers": [[" a"]], "boundary": "cut"}, "boundary='cut'; possible are refuse, back_up"),
]


@pytest.mark.parametrize(("given", "said"), WRONG, ids=[said[:24] for _, said in WRONG])
def test_what_cannot_be_scored_is_refused_by_name(given: dict[str, Any], said: str) -> None:
    with pytest.raises(pb.PatchbayError, match=said):
        scores(reader("pairs"), **given)
    with pytest.raises(pb.PatchbayError, match=re.escape("qa.jsonl, line 7")):
        scores(reader("pairs"), ["the"], [[""]], where=["qa.jsonl, line 7"])


@pytest.mark.parametrize(
    ("choices", "said"),
    [([[" New", " New York"]], "begins the choice ' New York'"), ([[" a", " b", " a"]], "the choice ' a' twice"), ([[" a"]], "one choice")],
)  # fmt: skip
def test_choices_that_are_not_different_outcomes_are_refused(choices: Any, said: str) -> None:
    with pytest.raises(pb.PatchbayError, match=said):
        refuse_unclear(spell(reader("pairs"), ["the"], choices))


def test_logits_that_are_no_numbers_are_refused() -> None:
    model = pb.load(twins.twin("gpt2", seed=5))
    model.hf.lm_head.weight.data[7] = float("nan")
    with pytest.raises(pb.PatchbayError, match=r"row 0: .* no numbers \(NaN\)"):
        scores(model, [[5]], [[[6]]])


@pytest.mark.filterwarnings("ignore::patchbay.errors.EditNeverMade")  # what is refused is not run
def test_edits_count_in_the_prompt_and_rows_are_refused() -> None:
    """An edit at the prompt's last token acts there, however long the answer is."""
    model = pb.load(twins.twin("llama"))
    knob = pb.add(pb.Port("resid_out", 0), torch.ones(model.d_model), positions="last")
    prompts, answers = [[5, 6, 7], [8]], [[[20, 21, 22], [23]], [[24, 25], [26, 27]]]
    with model.edited(knob):
        found = scores(model, prompts, answers).logp
    for i, prompt in enumerate(prompts):
        for j, answer in enumerate(answers[i]):
            at = pb.add(pb.Port("resid_out", 0), torch.ones(model.d_model), positions=len(prompt) - 1)
            logits = pb.run(model, [prompt + answer], edits=[at]).logits[0].double().log_softmax(-1)
            expected = sum(float(logits[len(prompt) - 1 + k, token]) for k, token in enumerate(answer))
            assert close(float(found[i, j]), expected, of=10.0)
    by_row = pb.add(pb.Port("resid_out", 0), torch.ones(model.d_model), rows=[1])
    with model.edited(by_row), pytest.raises(pb.PatchbayError, match="a meter runs its items in batches of its own"):
        scores(model, prompts, answers)


@pytest.mark.parametrize("form", ["gpt2", "llama", "gemma2", "mixtral", "bloom", "mamba2"])
def test_what_is_shared_between_runs_changes_no_number(form: str) -> None:
    """Under edits of the upper layer, of several, at the prompt's end and of the logits: as without sharing; layers below run once."""
    model = pb.load(twins.twin(form, num_hidden_layers=3) if form in ("gpt2", "llama") else twins.twin(form))
    rows, starts = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14]], [3, 3, 1]
    last = model.n_layers - 1
    noise = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    lists = [[], [pb.scale(pb.Port("attn.out", last), -1.5)], [pb.add(pb.Port("resid_in", last), noise, positions=-1), pb.scale(pb.Port("resid_out", 0), 0.5)], [pb.scale(pb.Port("logits"), 0.5)]]  # fmt: skip
    plain = []
    for edits in lists:
        with model.edited(*edits):
            plain.append(token_logprobs(model, rows, starts=starts))
    calls = [0] * model.n_layers
    hooks = [
        at.layer.register_forward_pre_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
        for i, at in enumerate(model.modules)
    ]
    with shared():
        for edits, expected in zip(lists, plain, strict=True):
            before = list(calls)
            with model.edited(*edits) if edits else nullcontext():
                found = token_logprobs(model, rows, starts=starts)
            assert all(close(a, b, of=10.0, dtype=torch.float32) for a, b in zip(found, expected, strict=True))
            if len(edits) == 1 and edits[0].port.layer == last and form in ("gpt2", "llama"):
                assert [b - a for a, b in zip(before, calls, strict=True)] == [0] * last + [1]
    for hook in hooks:
        hook.remove()


def test_a_table_stands_for_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """`token_logprobs` is the one place that runs a model: with a table in its place, scores are sums of the table."""
    table = {token: -float(token) for token in range(96)}
    from patchbay.measure import _answers

    def told(model: Any, rows: Any, reads: Any, starts: Any, **_: Any) -> list[torch.Tensor]:
        return [torch.tensor([[table[token], -1.0] for _, token in each], dtype=torch.float64) for each in reads]

    monkeypatch.setattr(_answers, "token_logprobs", told)
    found = scores(pb.load(twins.twin("gpt2")), [[5], [6]], [[[1, 2], [3]], [[4], [1, 1, 1]]])
    assert found.logp.tolist() == [[-3.0, -3.0], [-4.0, -3.0]]
    assert found.greedy.tolist() == [[False, False], [False, True]]


def test_chains_of_answers_share_rows() -> None:
    """Every subset of short sequences over two tokens, against one by one."""
    model = pb.load(twins.twin("gpt2"))
    all_ = [list(ids) for n in (1, 2, 3) for ids in itertools.product((20, 21), repeat=n)]
    found = scores(model, [[5, 6]], [all_]).logp[0]
    for value, ids in zip(found.tolist(), all_, strict=True):
        assert close(value, by_hand(model, [5, 6, *ids], 2), of=10.0)
