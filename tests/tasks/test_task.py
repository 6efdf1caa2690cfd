"""The Task noun: what it accepts, what it scores, and how it is cut, written down and read back."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from patchbay.model.tokens import start_ids, tokenize
from patchbay.signal.port import PatchbayError
from patchbay.tasks.answers import answer_ids
from patchbay.tasks.scoring import METRICS
from patchbay.tasks.task import Task
from tests.tolerance import close


def example(**changes: Any) -> Task:
    fields: dict[str, Any] = {
        "name": "colours",
        "clean": ((3, 1, 4), (1, 5), (9, 2, 6, 5)),
        "right": (7, 8, 9),
        "wrong": ((0,), (1, 2), (3, 4, 5)),
        "corrupted": ((3, 2, 4), (1, 6), (9, 2, 7, 5)),
        "options": {"depth": 2},
        "seed": 11,
        "texts": ("a", "b", "c"),
        "marks": {"subject": ((1,), (0, 1), ())},
        "labels": {"place": (0, "x", None)},
    }
    return Task(**{**fields, **changes})


# --- what it accepts ---


def test_lists_become_tuples_and_it_is_frozen():
    task = example(clean=[[3, 1, 4], [1, 5], [9, 2, 6, 5]], right=[7, 8, 9], marks={"subject": [[1], [0, 1], []]})
    assert task == example()
    with pytest.raises(FrozenInstanceError):
        task.seed = 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clean": ()}, "colours: no prompts"),
        ({"clean": ((1,), (), (2,)), "corrupted": None, "marks": {}}, "prompt 1 has no tokens"),
        ({"right": (7, 8)}, "3 prompts, but right has 2"),
        ({"wrong": ((0,),)}, "3 prompts, but wrong has 1"),
        ({"corrupted": ((3, 2, 4),)}, "3 prompts, but corrupted has 1"),
        ({"texts": ("a",)}, "3 prompts, but texts has 1"),
        ({"marks": {"subject": ((1,),)}}, "3 prompts, but subject has 1"),
        ({"labels": {"place": (1, 2)}}, "3 prompts, but place has 2"),
        ({"corrupted": ((3, 2), (1, 6), (9, 2, 7, 5))}, r"1 corrupted twins differ .* 0 \(3 and 2 tokens\)"),
        ({"marks": {"subject": ((1,), (2,), ())}}, r"'subject' is at \(2,\) in prompt 1, which has 2 tokens"),
        ({"marks": {"subject": ((1,), (-1,), ())}}, r"'subject' is at \(-1,\) in prompt 1"),
        ({"metric": "logit_dif"}, "no metric 'logit_dif'; metrics are .*did you mean 'logit_diff'"),
        ({"right": (7, -8, 9)}, "never negative, found -8"),
        ({"right": (7, 2, 9)}, r"also among the wrong ones in prompts \[1\]"),
        ({"wrong": ((0,), (), (3,))}, "1 have none .first: prompt 1.; possible without: probability"),
    ],
)
def test_what_is_wrong_is_said(changes, message):
    with pytest.raises(PatchbayError, match=message):
        example(**changes)


def test_twins_of_another_length_where_said():
    task = example(corrupted=((3,), (1, 6), (9,)), options={"aligned": False})
    assert task.corrupted == ((3,), (1, 6), (9,))


def test_wrong_answers_may_be_left_out_where_the_metric_needs_none():
    assert example(wrong=(), metric="rank").wrong == ((), (), ())


def test_check_finds_ids_outside_the_vocabulary():
    example().check(10)
    with pytest.raises(PatchbayError, match="token id 9 in clean, but the model has ids 0 to 8"):
        example().check(9)
    with pytest.raises(PatchbayError, match="id 12 in right"):
        example(right=(7, 12, 9)).check(12)
    with pytest.raises(PatchbayError, match="id 12 in corrupted"):
        example(corrupted=((3, 12, 4), (1, 6), (9, 2, 7, 5))).check(12)
    with pytest.raises(PatchbayError, match="id 12 in wrong"):
        example(wrong=((0,), (1,), (12,))).check(12)


# --- cutting ---


def test_slices_cut_every_field():
    task = example()[1:]
    assert len(task) == 2
    assert task == Task(
        name="colours",
        clean=((1, 5), (9, 2, 6, 5)),
        right=(8, 9),
        wrong=((1, 2), (3, 4, 5)),
        corrupted=((1, 6), (9, 2, 7, 5)),
        options={"depth": 2},
        seed=11,
        texts=("b", "c"),
        marks={"subject": ((0, 1), ())},
        labels={"place": ("x", None)},
    )
    assert example()[0].right == (7,)
    assert example()[-1].right == (9,)
    assert example()[[2, 0]].right == (9, 7)
    assert example(corrupted=None, texts=())[1:].corrupted is None
    assert [one.right[0] for one in example()] == [7, 8, 9]


def test_indices_outside_are_errors():
    with pytest.raises(IndexError, match="prompts 0 to 2"):
        example()[3]
    with pytest.raises(IndexError, match=r"asked for \[-4\]"):
        example()[-4]
    with pytest.raises(PatchbayError, match="picks none of the 3"):
        example()[3:]


def many(n: int = 40) -> Task:
    return Task(
        "many", tuple((i, i + 1) for i in range(n)), tuple(range(n)), metric="rank", labels={"i": tuple(range(n))}
    )


def test_split_is_a_partition_by_seed():
    dev, test = many().split(0.25, seed=3)
    assert (len(dev), len(test)) == (10, 30)
    assert sorted(dev.labels["i"] + test.labels["i"]) == list(range(40))
    assert dev.labels["i"] != tuple(range(10))
    again, other = many().split(0.25, seed=3)[0], many().split(0.25, seed=4)[0]
    assert again == dev
    assert other.clean != dev.clean
    assert (dev.options["split"], test.options["split"]) == (["dev", 0.25, 3], ["test", 0.25, 3])


@pytest.mark.parametrize("fraction", [0.0, 1.0, 0.001, -1.0])
def test_split_leaves_no_half_empty(fraction):
    with pytest.raises(PatchbayError, match="both halves need one"):
        many().split(fraction)


def test_split_leaves_the_global_random_state():
    random.seed(1)
    state = random.getstate()
    many().split()
    assert random.getstate() == state


# --- scoring: against plain loops ---


def by_loops(task: Task, logits: list[list[float]], reference: list[list[float]]) -> list[float]:
    def softmax(row: list[float]) -> list[float]:
        top = max(row)
        exps = [math.exp(x - top) for x in row]
        return [x / sum(exps) for x in exps]

    found = []
    for row, base, right, wrong in zip(logits, reference, task.right, task.wrong, strict=True):
        p, q = softmax(base), softmax(row)
        found.append(
            {
                "logit_diff": row[right] - sum(row[w] for w in wrong) / max(len(wrong), 1),
                "logit_diff_best": row[right] - max((row[w] for w in wrong), default=0.0),
                "option_accuracy": float(row[right] > max((row[w] for w in wrong), default=0.0)),
                "probability": q[right],
                "log_probability": math.log(q[right]),
                "rank": float(sum(x > row[right] for x in row)),
                "accuracy": float(max(range(len(row)), key=row.__getitem__) == right),
                "kl": sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)),
            }[task.metric]
        )
    return found


@pytest.mark.parametrize("metric", METRICS)
def test_score_equals_plain_loops(metric):
    logits, reference = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0))
    logits[1, 8] = 9.0  # one prompt that is answered right
    task = example().with_metric(metric)
    scored = task.score(logits, reference) if metric == "kl" else task.score(logits)
    expected = torch.tensor(by_loops(task, logits.tolist(), reference.tolist()))
    assert scored.shape == (3,)
    assert close(scored.float(), expected)
    assert len({round(x, 3) for x in expected.tolist()}) > 1


def test_units():
    found = {metric: example().with_metric(metric).unit for metric in METRICS}
    assert found["logit_diff"] == "logits"
    assert found["log_probability"] == found["kl"] == "nats"
    assert {metric for metric in METRICS if example().with_metric(metric).sign < 0} == {"rank", "kl"}


def test_kl_of_a_run_with_itself_is_zero_and_needs_a_reference():
    task, logits = example().with_metric("kl"), torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    assert close(task.score(logits, logits), 0.0, of=1.0)
    with pytest.raises(PatchbayError, match="reference="):
        task.score(logits)


@pytest.mark.parametrize("shape", [(2, 12), (3, 5, 12), (12,)])
def test_score_refuses_other_shapes(shape):
    with pytest.raises(PatchbayError, match=r"logits \[prompt, vocab\] of 3 prompts, got shape"):
        example().score(torch.zeros(shape))


def test_score_refuses_a_smaller_vocabulary():
    with pytest.raises(PatchbayError, match="token id 9 in clean"):
        example().score(torch.zeros(3, 9))


# --- text ---


@dataclass
class Fake:
    tokenizer: Any
    vocab_size: int
    max_positions: int | None = None


def tokenizer_with(start: bool = False, end: bool = False) -> PreTrainedTokenizerFast:
    """Words after a space, and letters where a word is not known whole."""
    words = ["the", "sky", "sea", "is", "blue", "green", "grey", "The", "a"]
    tokens = ["<s>", "</s>", "<unk>", *(f" {word}" for word in words), *words]
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate([*tokens, "##ish"])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_next")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    template = f"{'<s> ' * start}$A{' </s>' * end}"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def model_with(**options: bool) -> Fake:
    tokenizer = tokenizer_with(**options)
    return Fake(tokenizer, len(tokenizer))


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("end", [False, True])
def test_encode_keeps_the_start_token_and_drops_the_end_token(start, end):
    tokenizer = tokenizer_with(start=start, end=end)
    plain = tuple(tokenizer.convert_tokens_to_ids(["The", " sky", " is"]))
    assert tokenize(tokenizer, ["The sky is", "a"])[0] == (0,) * start + plain
    assert start_ids(tokenizer) == (0,) * start
    assert tokenize(tokenizer, []) == ()
    with pytest.raises(PatchbayError, match="a list of texts"):
        tokenize(tokenizer, "The sky")


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("end", [False, True])
def test_answers_are_the_token_after_the_prompt(start, end):
    tokenizer = tokenizer_with(start=start, end=end)
    pairs = [("The sky is", a) for a in (" blue", " blueish", " purple", "blue", "")]
    found = answer_ids(tokenizer, pairs)
    blue = tokenizer.convert_tokens_to_ids(" blue")
    # two tokens; unknown; glued to the last word of the prompt; nothing
    assert [found[pair] for pair in pairs] == [blue, None, None, None, None]


@pytest.mark.parametrize("options", [{}, {"start": True, "end": True}])
def test_from_prompts_spells_what_was_given(options):
    model = model_with(**options)
    task = Task.from_prompts(
        model,
        ["The sky is", "The sea is"],
        [" blue", " green"],
        wrong=[" grey", [" grey", " blue"]],
        corrupted=["The sea is", "The sky is"],
    )
    read = model.tokenizer.convert_ids_to_tokens
    assert read(task.clean[0]) == ["<s>"] * bool(options) + ["The", " sky", " is"]
    assert read(task.corrupted[0]) == read(task.clean[1])
    assert (read(task.right), [read(ids) for ids in task.wrong]) == (
        [" blue", " green"],
        [[" grey"], [" grey", " blue"]],
    )
    assert (task.metric, task.texts) == ("logit_diff", ("The sky is", "The sea is"))


def test_from_prompts_without_wrong_answers_scores_log_probability():
    assert Task.from_prompts(model_with(), ["The sky is"], [" blue"]).metric == "log_probability"
    with pytest.raises(PatchbayError, match="logit_diff needs a wrong answer"):
        Task.from_prompts(model_with(), ["The sky is"], [" blue"], metric="logit_diff")


def test_from_prompts_says_which_answers_do_not_follow_their_prompts_and_what_to_write():
    with pytest.raises(PatchbayError, match=r"1 of 4 are not: ' purple' .the tokenizer does not know ' purple'"):
        Task.from_prompts(
            model_with(), ["The sky is", "The sea is"], [" blueish", " green"], wrong=[" grey", " purple"]
        )
    with pytest.raises(PatchbayError, match="with a space in front each of them would be one token"):
        Task.from_prompts(model_with(), ["The sky is"], ["blue"])
    with pytest.raises(PatchbayError, match="drop the space at the prompt's end and let the answer begin with it"):
        Task.from_prompts(model_with(), ["The sky is "], ["blue"])


def test_from_prompts_other_errors():
    model = model_with()
    with pytest.raises(PatchbayError, match="this model has none"):
        Task.from_prompts(Fake(None, 10), ["The sky is"], [" blue"])
    with pytest.raises(PatchbayError, match="2 prompts, 1 right and 2 wrong"):
        Task.from_prompts(model, ["The sky is", "The sea is"], [" blue"])
    with pytest.raises(PatchbayError, match="twins differ .* or say aligned=False to Task.from_prompts"):
        Task.from_prompts(model, ["The sky is"], [" blue"], corrupted=["The sky is is"])
    loose = Task.from_prompts(model, ["The sky is"], [" blue"], corrupted=["The sky is is"], aligned=False)
    assert len(loose.corrupted[0]) == len(loose.clean[0]) + 1
    with pytest.raises(PatchbayError, match="token id"):
        Task.from_prompts(Fake(model.tokenizer, 5), ["The sky is"], [" blue"])


# --- writing ---


def test_json_there_and_back():
    text = json.dumps(example().to_json())
    assert Task.from_json(json.loads(text)) == example()
    assert Task.from_json(example(corrupted=None, texts=()).to_json()) == example(corrupted=None, texts=())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"lacks \['clean', 'name', 'right'\]"),
        ({**example().to_json(), "colour": 1}, r"unknown \['colour'\]"),
        ({**example().to_json(), "clean": [[1, 2], None, [3]]}, "not a task"),
        ({**example().to_json(), "right": [7, 8]}, "right has 2"),
    ],
)
def test_json_of_something_else(data, message):
    with pytest.raises(PatchbayError, match=message):
        Task.from_json(data)


def test_repr_is_one_line_that_says_what_it_is():
    line = repr(example())
    assert "\n" not in line
    assert line == "Task colours: 3 prompts of 2 to 4 tokens, corrupted twins, logit_diff, seed 11, depth=2"
    assert "no twins" in repr(replace(example(), corrupted=None))


def test_show_reads_for_people():
    model = model_with()
    task = Task.from_prompts(
        model, ["The sky is"] * 2, [" blue"] * 2, wrong=[" grey"] * 2, corrupted=["The sea is"] * 2
    )
    task = replace(task, marks={"subject": ((1,), (1,))}, labels={"place": ("up", "down")})
    shown = task.show(model.tokenizer, n=1)
    for piece in ("'The sky is'", "'The sea is'", "' blue'", "' grey'", "subject    at 1: ' sky'", "place      up"):
        assert piece in shown
    assert "down" not in shown
    assert "3 1 4" in example().show()


def test_importing_and_making_tasks_needs_no_torch():
    code = "import sys, patchbay.tasks; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_joined_tasks_keep_what_all_have() -> None:
    a = Task(
        "a", [[1, 2], [3, 4]], [5, 6], [[7], [8]], [[1, 9], [3, 9]], marks={"x": [[0], [1]], "y": [[1], [0]]}, seed=1
    )
    b = Task("b", [[1, 2, 3]], [5], [[7]], [[1, 2, 9]], options={"length": 3}, marks={"x": [[2]]}, labels={"z": [1]})
    both = Task.joined([a, b])
    assert both.clean == (*a.clean, *b.clean)
    assert both.corrupted == ((1, 9), (3, 9), (1, 2, 9))
    assert (both.right, both.wrong) == ((5, 6, 5), ((7,), (8,), (7,)))
    assert both.marks == {"x": ((0,), (1,), (2,))}
    assert both.labels == {"task": (0, 0, 1)}
    assert [one["options"] for one in both.options["joined"]] == [{}, {"length": 3}]
    assert Task.from_json(both.to_json()) == both
    assert Task.joined([a, Task("c", [[1]], [2], [[3]])]).corrupted is None
    uneven = Task("u", [[1, 2]], [5], [[7]], [[1]], options={"aligned": False})
    assert Task.joined([a, uneven]).options["aligned"] is False


def test_a_joined_task_is_scored_sliced_and_joined_like_any_other() -> None:
    a = Task("a", [[1, 2], [3, 4]], [5, 6], [[7], [8]], texts=["one", "two"])
    b = Task("b", [[1, 2, 3]], [4], [[7, 8]], texts=["three"], seed=3)
    both = Task.joined([a, b])
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(both.score(logits), torch.cat([a.score(logits[:2]), b.score(logits[2:])]))
    assert both.texts == ("one", "two", "three")
    assert both[2].clean == b.clean
    assert both[2].labels == {"task": (1,)}
    assert Task.joined([b, both]).labels == {"task": (0, 1, 1, 1)}
    assert sorted(label for half in both.split(0.5) for label in half.labels["task"]) == [0, 0, 1]
    assert Task.joined([a]).options == {"joined": [{"name": "a", "options": {}, "seed": 0}]}


def test_tasks_that_cannot_be_joined() -> None:
    a = Task("a", [[1]], [2], [[3]])
    with pytest.raises(PatchbayError, match="no tasks to join"):
        Task.joined([])
    with pytest.raises(PatchbayError, match="logit_diff and rank"):
        Task.joined([a, a.with_metric("rank")])
