"""What is true of every task, for every tokenizer."""

from __future__ import annotations

import inspect
import json
import random
from pathlib import Path

import pytest

from patchbay import tasks
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

SMALL = 25


@pytest.fixture(params=tasks.__all__)
def name(request):
    return request.param


def make(name, model, n=SMALL, **options):
    return getattr(tasks, name)(model, n, **options)


MADE = {}  # by task and model


def made(name, model):
    """The task of a model that lasts as long as the tests, made once for all that only read it."""
    if (name, id(model)) not in MADE:
        MADE[name, id(model)] = make(name, model)
    return MADE[name, id(model)]


def test_same_seed_same_task_other_seed_other_task(name, model):
    first, other = made(name, model), make(name, model, seed=1)
    assert make(name, model) == first
    assert first.clean != other.clean
    assert first.seed == 0
    assert other.seed == 1


def test_global_random_state_is_neither_read_nor_moved(name, plain):
    random.seed(5)
    state = random.getstate()
    first = make(name, plain)
    assert random.getstate() == state
    random.seed(6)
    assert make(name, plain) == first


def test_prompts_are_different_and_as_many_as_asked(name, model):
    task = made(name, model)
    assert len(task) == SMALL == len(set(task.clean))


def test_twins_have_equal_length_and_say_something_else(name, model):
    task = made(name, model)
    for clean, twin in zip(task.clean, task.corrupted, strict=True):
        assert len(clean) == len(twin)
        assert clean != twin


def test_ids_are_what_the_tokenizer_says_of_text_and_answer(name, model):
    if name == "repeated_tokens":
        pytest.skip("made of ids: its text need not be spelled by the same ones")
    task, tokenizer = made(name, model), model.tokenizer
    n_end = int(tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id)
    for clean, text, right, wrong in zip(task.clean, task.texts, task.right, task.wrong, strict=True):
        for answer in (right, *wrong):
            whole = tokenizer(text + tokenizer.decode([answer]))["input_ids"]
            assert tuple(whole[: len(whole) - n_end]) == (*clean, answer)


def test_start_token_where_the_tokenizer_adds_one_and_never_an_end_token(name, wrapped, plain):
    for clean, twin in zip(*(getattr(made(name, wrapped), field) for field in ("clean", "corrupted")), strict=True):
        for ids in (clean, twin):
            assert ids[0] == wrapped.tokenizer.bos_token_id
            assert wrapped.tokenizer.eos_token_id not in ids
    assert all(plain.tokenizer.bos_token_id not in clean for clean in made(name, plain).clean)


def test_marks_move_with_the_start_token(name, wrapped, plain):
    if name == "repeated_tokens":
        pytest.skip("a start token changes the room and so the draw")
    bare, shifted = made(name, plain), made(name, wrapped)
    assert bare.texts == shifted.texts
    for mark, groups in bare.marks.items():
        assert tuple(tuple(at + 1 for at in group) for group in groups) == shifted.marks[mark]


def test_no_answer_is_tied_to_a_place(name, plain):
    """Where the right answer has stood in the prompt before, it has done so at different places from both ends."""
    task = make(name, plain, 60)
    places = [
        (ids.index(right), len(ids) - ids.index(right))
        for ids, right in zip(task.clean, task.right, strict=True)
        if right in ids
    ]
    if len(places) > 10:
        for from_start_or_end in zip(*places, strict=True):
            common = max(from_start_or_end.count(place) for place in set(from_start_or_end))
            assert common <= 0.7 * len(places)


def test_survives_json(name, model):
    task = made(name, model)
    again = Task.from_json(json.loads(json.dumps(task.to_json())))
    assert again.clean == task.clean
    assert again == Task.from_json(task.to_json())
    assert again.to_json() == task.to_json()


def test_too_few_positions_is_an_error_that_says_so(name, plain, make_model):
    short = make_model(plain.tokenizer, plain.vocab_size, 2)
    with pytest.raises(PatchbayError, match="2 positions") as error:
        make(name, short)
    assert "possible" in str(error.value)


def test_without_a_tokenizer_only_repeated_tokens(name, make_model):
    blind = make_model(None, 100)
    if name == "repeated_tokens":
        assert make(name, blind).texts == ()
        return
    with pytest.raises(PatchbayError, match=rf"{name} is made of words.*no tokenizer.*repeated_tokens"):
        make(name, blind)


def test_no_prompts_is_an_error(name, plain):
    with pytest.raises(PatchbayError, match="n=0"):
        make(name, plain, 0)


def test_a_vocabulary_smaller_than_the_tokenizer_is_an_error_or_respected(name, plain, make_model):
    cut = make_model(plain.tokenizer, 60, 256)
    if name == "repeated_tokens":
        assert max(token for ids in make(name, cut).clean for token in ids) < 60
        return
    with pytest.raises(PatchbayError, match="ids 0 to 59"):
        make(name, cut)


@pytest.mark.parametrize("small", ["stories", "characters"])
def test_a_tokenizer_without_words_is_a_clear_error_or_a_task(name, small, request):
    model = request.getfixturevalue(small)
    if name in ("repeated_tokens", "successor", "arithmetic"):
        task = make(name, model)
        assert len(task) == SMALL
        return
    with pytest.raises(
        PatchbayError, match=rf"^{name}: asked for \d+ [a-z ]+, found \d+ .* tried \('\w+' is '.*possible:"
    ):
        make(name, model)


@pytest.mark.parametrize("small", ["stories", "characters"])
@pytest.mark.parametrize("name", ["successor", "arithmetic"])
def test_a_space_of_its_own_ends_the_prompt(name, small, request):
    model = request.getfixturevalue(small)
    task = make(name, model)
    for clean, text, right in zip(task.clean, task.texts, task.right, strict=True):
        assert text.endswith(" ")
        assert not model.tokenizer.decode([clean[-1]]).strip()
        answer = model.tokenizer.decode([right])
        assert tuple(model.tokenizer(text.rstrip() + " " + answer)["input_ids"]) == (*clean, right)


def test_the_list_of_tasks_is_the_folder():
    folder = Path(tasks.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {
        "__init__",
        "answers",
        "checks",
        "rows",
        "table",
        "own",
        "scoring",
        "task",
        "words",
        "spell",
    }
    assert files == {getattr(tasks, name).__module__.rsplit(".", 1)[1] for name in tasks.__all__}
    assert tasks.__all__ == sorted(tasks.__all__)
    for name in tasks.__all__:
        assert getattr(tasks, name).__name__ == name
        assert f"\n{name} " in tasks.__doc__


def test_signatures_and_first_lines(name):
    function = getattr(tasks, name)
    parameters = list(inspect.signature(function).parameters.values())
    assert [p.name for p in parameters[:2]] == ["model", "n"]
    assert parameters[1].default == 100
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters[2:])
    assert parameters[-1].name == "seed"
    assert function.__doc__.splitlines()[0].endswith(".")
