import re

import pytest

from patchbay.signal.port import PatchbayError
from patchbay.tasks import needle_retrieval

SECRET = re.compile(r"The secret of (\w+) is ([\w ]+)\.")


def said(model, ids):
    return model.tokenizer.decode(list(ids), skip_special_tokens=True)


def solve(text):
    """All secrets of the text and the one that is asked for."""
    secrets = {name: words.split() for name, words in SECRET.findall(text)}
    return secrets, secrets[re.search(r"The secret of (\w+) is$", text).group(1)]


@pytest.mark.parametrize("decoy", [True, False])
@pytest.mark.parametrize("secret_words", [1, 3])
def test_right_and_twin_by_an_independent_reading(model, decoy, secret_words):
    task = needle_retrieval(model, 30, decoy=decoy, secret_words=secret_words)
    for i in range(len(task)):
        secrets, answer = solve(said(model, task.clean[i]))
        twins, twin_answer = solve(said(model, task.corrupted[i]))
        assert len(secrets) == 1 + decoy
        assert len(answer) == secret_words
        assert said(model, task.right[i : i + 1]) == f" {answer[0]}"
        assert said(model, task.wrong[i]) == f" {twin_answer[0]}"
        assert not set(answer) & set(twin_answer)
        if decoy:
            assert list(secrets) == list(twins)
            assert list(secrets.values()) == list(reversed(twins.values()))
        differ = [
            at for at, pair in enumerate(zip(task.clean[i], task.corrupted[i], strict=True)) if len(set(pair)) > 1
        ]
        assert differ == sorted(task.marks["needle"][i] + task.marks["decoy"][i])
        read = {mark: said(model, [task.clean[i][at] for at in groups[i]]) for mark, groups in task.marks.items()}
        assert read["needle"].split() == answer
        assert read["decoy"].split() == (twin_answer if decoy else [])
        assert read["name"] == read["query"]
        assert task.marks["name"][i] < task.marks["needle"][i] < task.marks["query"][i]


@pytest.mark.parametrize("length", [0, 20, 100])
def test_length_bounds_the_filler(gpt2, length):
    task = needle_retrieval(gpt2, 20, length=length, decoy=False)
    for i, text in enumerate(task.texts):
        filler = SECRET.sub("", text).rsplit("The secret of", 1)[0]
        assert filler.count(".") == task.labels["sentences"][i]
        assert length - 15 < len(filler.split()) <= length or not length


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_depth_is_the_share_of_filler_in_front(gpt2, depth, place):
    for text in needle_retrieval(gpt2, 20, length=150, depth=depth, decoy=False).texts:
        before, after = re.split(SECRET, text.rsplit("The secret of", 1)[0])[::3]
        share = len(before.split()) / (len(before.split()) + len(after.split()))
        assert abs(share - place) < 0.1


def test_any_depth_without_one(gpt2):
    depths = needle_retrieval(gpt2, 100, length=100).labels["depth"]
    assert min(depths) == 0.0
    assert max(depths) == 1.0
    assert 0.35 < sum(depths) / len(depths) < 0.65


def test_the_other_secret_stands_on_either_side(plain):
    task = needle_retrieval(plain, 60)
    before = sum(decoy < needle for decoy, needle in zip(task.marks["decoy"], task.marks["needle"], strict=True))
    assert 15 < before < 45


def test_too_long_for_the_model(plain, make_model):
    short = make_model(plain.tokenizer, plain.vocab_size, 50)
    with pytest.raises(PatchbayError, match=r"asked for 100 different prompts, found 0 with length=200.*50 positions"):
        needle_retrieval(short, length=200)


def test_bad_options(plain):
    for options, message in (
        ({"depth": 1.5}, r"depth=1.5; possible: 0.0"),
        ({"length": -1}, r"length=-1; possible: 0 and more"),
        ({"secret_words": 9}, r"secret_words=9; possible: 1 to 8"),
    ):
        with pytest.raises(PatchbayError, match=message):
            needle_retrieval(plain, **options)
