"""Whole texts: every token scored once, in windows or whole; start tokens are no text."""

from __future__ import annotations

import pytest
import torch

import patchbay as pb
from patchbay.measure._texts import losses, whole_texts
from patchbay.tiny import twins
from tests.measure.words import NAMES, by_hand, reader
from tests.tolerance import close

TEXTS = ["the cat sat on the mat.", "it ran", "a"]


@pytest.mark.parametrize("name", NAMES)
def test_a_text_is_scored_after_the_start_token_and_counts_its_own_bytes(name: str) -> None:
    model = reader(name)
    texts = whole_texts(model, TEXTS)
    for text, given, loss in zip(texts, TEXTS, losses(model, texts, batch_size=2), strict=True):
        assert text.before == (model.tokenizer.bos_token_id,)
        assert (text.n_bytes, text.n_chars) == (len(given.encode()), len(given))
        assert model.decode(list(text.ids)) == given
        assert close(float(loss.sum()), -by_hand(model, [*text.before, *text.ids], 1), of=10.0)
    again = whole_texts(model, model.encode(TEXTS))  # as ids, with or without the start token
    assert [t.ids for t in again] == [t.ids for t in texts]
    assert [t.n_bytes for t in again] == [t.n_bytes for t in texts]


def test_without_any_start_token_the_first_token_is_left_out_with_its_bytes() -> None:
    model = pb.load(twins.twin("gpt2"), reader("pairs").tokenizer.__class__(tokenizer_object=reader("pairs").tokenizer.backend_tokenizer))  # fmt: skip
    [text] = whole_texts(model, ["he sat"])
    [ids] = model.encode(["he sat"])
    assert text.before == (ids[0],)
    assert text.ids == tuple(ids[1:])
    assert text.n_bytes == len("he sat") - len(model.decode(ids[:1]))


@pytest.mark.parametrize(("window", "context"), [(5, 0), (5, 2), (9, 3), (60, 0)])
def test_windows_score_every_token_once(window: int, context: int) -> None:
    model = reader("characters")
    [text] = whole_texts(model, TEXTS[:1])
    [found] = losses(model, [text], window=window, context=context)
    assert len(found) == len(text.ids)
    at, expected = 0, []
    while at < len(text.ids):
        back = min(context, at)
        end = min(len(text.ids), at + window - 1 - back)
        row = [*text.before, *text.ids[at - back : end]]
        expected += [-by_hand(model, row[: k + 1], k) for k in range(1 + back, len(row))]
        at = end
    assert close(found, torch.tensor(expected).double(), dtype=torch.float32)
    if window >= len(text.ids) + 1:
        assert torch.equal(found, losses(model, [text])[0])


def test_what_has_nothing_to_score_is_refused() -> None:
    model = reader("pairs")
    for given, said in (([""], "text 0 has no token to score"), (["the k\u00e4se"], "does not know '\u00e4'"), ([], "no texts were given"), ([[5, 400]], "outside 0..95")):  # fmt: skip
        with pytest.raises(pb.PatchbayError, match=said):
            whole_texts(model, given)
    with pytest.raises(pb.PatchbayError, match="a window holds the start token, the context and one token"):
        losses(model, whole_texts(model, ["the"]), window=3, context=2)
    with pytest.raises(pb.PatchbayError, match="the model reads"):
        losses(model, whole_texts(model, ["the"]), window=10_000)
