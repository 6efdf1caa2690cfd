import pytest

from patchbay.signal.port import PatchbayError
from patchbay.tasks import repeated_tokens


def follows(ids):
    """What followed the last token the first time that it stood there; None where it is new."""
    at = ids.index(ids[-1])
    return None if at == len(ids) - 1 else ids[at + 1]


@pytest.fixture(params=["bare", "wrapped", "gpt2"])
def any_model(request, make_model):
    return make_model(None, 60) if request.param == "bare" else request.getfixturevalue(request.param)


def test_right_is_what_followed_before(any_model):
    task = repeated_tokens(any_model, 60)
    for clean, twin, right, wrong in zip(task.clean, task.corrupted, task.right, task.wrong, strict=True):
        assert follows(clean) == right
        assert follows(twin) is None
        assert wrong[0] in clean
        assert wrong[0] != right


def test_twin_differs_in_the_second_part_only(any_model):
    task = repeated_tokens(any_model, 60)
    for i, (clean, twin) in enumerate(zip(task.clean, task.corrupted, strict=True)):
        assert [at for at in range(len(clean)) if clean[at] != twin[at]] == list(task.marks["second"][i])
        assert len(set(twin)) == len(twin)


def test_marks_and_labels(any_model):
    task = repeated_tokens(any_model, 60)
    n_start = int(any_model.tokenizer is not None and any_model.tokenizer("a")["input_ids"][0] == 0)
    for i, ids in enumerate(task.clean):
        first, second, source = (task.marks[mark][i] for mark in ("first", "second", "source"))
        period = task.labels["period"][i]
        assert [ids[at] for at in first] == [ids[at] for at in second]
        assert {b - a for a, b in zip(first, second, strict=True)} == {period}
        assert second[-1] == len(ids) - 1
        assert source == (first[-1] + 1,)
        assert ids[source[0]] == task.right[i]
        assert first[0] == n_start + task.labels["offset"][i]


def test_periods_offsets_and_cuts_vary(any_model):
    task = repeated_tokens(any_model, 200)
    assert set(task.labels["period"]) == set(range(5, 21))
    assert set(task.labels["offset"]) == set(range(9))
    assert len({len(first) for first in task.marks["first"]}) > 10


@pytest.mark.parametrize(("vocab_size", "max_positions"), [(12, None), (1000, 12), (3, None), (4, 4)])
def test_values_follow_what_the_model_allows(make_model, vocab_size, max_positions):
    task = repeated_tokens(make_model(None, vocab_size, max_positions), 5)
    assert max(map(len, task.clean)) <= (max_positions or vocab_size)
    assert all(follows(clean) == right for clean, right in zip(task.clean, task.right, strict=True))
    assert task.options["max_period"] == max(2, task.options["max_period"])


def test_asked_values_are_used_or_refused(make_model):
    model = make_model(None, 50, 30)
    assert set(repeated_tokens(model, 20, max_period=3, max_offset=0).labels["period"]) == {3}
    with pytest.raises(
        PatchbayError, match=r"period of 20 after 8 tokens needs 47 .*50 usable tokens and 30 positions"
    ):
        repeated_tokens(model, max_period=20, max_offset=8)
    with pytest.raises(PatchbayError, match="max_period from 2 to"):
        repeated_tokens(model, max_period=1)
    with pytest.raises(PatchbayError, match="max_offset 0 and more"):
        repeated_tokens(model, max_offset=-1)


def test_more_prompts_than_exist(make_model):
    with pytest.raises(PatchbayError, match=r"asked for 100 different prompts, found 6 of 3 tokens.*n up to 6"):
        repeated_tokens(make_model(None, 3), 100)


def test_no_special_tokens_are_drawn(stories):
    task = repeated_tokens(stories, 100)
    special = set(stories.tokenizer.all_special_ids)
    assert all(ids[0] == stories.tokenizer.bos_token_id for ids in task.clean)
    assert all(not special & set(ids[1:]) for ids in (*task.clean, *task.corrupted))
