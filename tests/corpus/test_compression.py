"""Compression: what was coded comes back, in no more than the bits that it is surprising, also under a knob; the coder alone on any shares."""

from __future__ import annotations

import math
import random

import pytest
import torch

import patchbay as pb
from patchbay.corpus.compression import PRECISION, Decoder, Encoder, bits, decode, encode, whole_numbers
from tests.given import lent


def texts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(5, 90) for _ in range(n)] for n in (2, 9, 25)]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_text_comes_back_in_the_bits_it_is_worth(name: str) -> None:
    model = lent(name)
    for ids in texts():
        data = encode(model, ids)
        assert decode(model, data, len(ids), ids[0]) == ids
        assert 8 * len(data) <= bits(model, ids) + 2 + 8
        logits = pb.run(model, [ids]).logits[0].double()
        own = -sum(float(torch.log_softmax(logits[t], -1)[ids[t + 1]]) for t in range(len(ids) - 1)) / math.log(2)
        assert bits(model, ids) == pytest.approx(
            own, rel=0.01
        )  # tokens of shares near 2^-24 are coded as the next whole number of it


def test_a_knob_changes_the_bits_and_not_the_text() -> None:
    model, ids = lent("llama"), texts()[2]
    plain, worth = encode(model, ids), bits(model, ids)
    with model.edited(pb.scale(model.layers[1].mlp.out, 0.0)):
        turned = encode(model, ids)
        assert decode(model, turned, len(ids), ids[0]) == ids
        assert abs(bits(model, ids) - worth) > 0.1
    assert turned != plain == encode(model, ids)


def test_bytes_that_are_not_of_this_text_are_refused() -> None:
    """Every bit turned, every cut, and another number of tokens: none gives a text, and no call goes on without end."""
    model, ids = lent("llama"), texts()[1]
    data = encode(model, ids)
    turned = [
        bytes(b ^ (1 << bit) * (at == i) for at, b in enumerate(data)) for i in range(len(data)) for bit in (0, 5)
    ]
    wrong = [(one, len(ids)) for one in (*turned, *(data[:i] for i in range(len(data))), data + b"\0", b"\xff" * 9)]
    for damaged, n in [*wrong, (data, len(ids) - 1), (data, len(ids) + 1)]:
        with pytest.raises(pb.PatchbayError, match=r"are not what \d+ tokens are coded to by this model"):
            decode(model, damaged, n, ids[0])
    for n in (1, 0, -3, 10**6):
        with pytest.raises(pb.PatchbayError, match=rf"n={n}: from 2 tokens"):
            decode(model, data, n, ids[0])
    with pytest.raises(pb.PatchbayError, match="give the bytes that encode wrote"):
        decode(model, "text", 5, ids[0])  # type: ignore[arg-type]
    for given in ("a text", [1.0, 2.0], [True, False]):
        with pytest.raises(pb.PatchbayError, match="token ids are coded"):
            encode(model, given)  # type: ignore[arg-type]
    assert encode(model, torch.tensor(ids)) == data  # type: ignore[arg-type]


def test_the_coder_alone() -> None:
    """Shares of 1 in 2^24 among others: at most two bits over their worth, and everything comes back."""
    rng, total = random.Random(0), 1 << PRECISION
    for n in (0, 1, 50, 400):
        said = []
        for _ in range(n):
            start = rng.randrange(total)
            said.append((start, min(total, start + 1 + int(rng.random() ** 8 * total))))
        coder = Encoder()
        for start, stop in said:
            coder.write(start, stop)
        data = coder.end()
        worth = sum(PRECISION - math.log2(stop - start) for start, stop in said)
        assert len(coder.out) <= worth + 2 + 1e-3 * n
        decoder = Decoder(data)
        for start, stop in said:
            assert start <= decoder.place() < stop
            decoder.read(start, stop)


def test_whole_numbers_leave_no_token_out() -> None:
    found = whole_numbers(torch.tensor([40.0, -40.0, 0.0, 39.0]))
    assert found[0] == 0
    assert (found[1:] > found[:-1]).all()
    assert found[-1] <= 1 << PRECISION
    with pytest.raises(pb.PatchbayError, match="are no numbers"):
        whole_numbers(torch.tensor([float("nan"), 0.0]))


def test_refusals() -> None:
    model = lent("llama")
    for ids, says in (([5], "two or more"), ([5] * 65, "reads at most 64"), ([5, 999], "999 is no token")):
        with pytest.raises(pb.PatchbayError, match=says):
            encode(model, ids)
