"""Compression: a text as as many bits as a model finds it surprising, and back, without a loss.

An arithmetic coder over the model's next-token distribution. Each distribution is made of whole numbers first, of a total of 2^PRECISION,
every token at least 1, so that coder and decoder see the same; both run the model one token at a time on one cache, because sums of another shape
round otherwise. A text takes at most two bits more than - log2 of its probability under the whole numbers.

    data = encode(model, ids);  decode(model, data, len(ids)) == ids

Inside `model.edited(knob)` both are of the edited model: bits per byte of a text are what a knob costs there. Lester et al. 2024, "Training LLMs over
Neurally Compressed Text", train on such bits; a text coded like that looks random, and is not learned by a second model as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from patchbay.errors import PatchbayError
from patchbay.model.model import Model

PRECISION = 24  # bits of a distribution's total
WORD = 40  # bits of the coder's interval
HALF, QUARTER = 1 << (WORD - 1), 1 << (WORD - 2)


def encode(model: Model, ids: Sequence[int]) -> bytes:
    """The tokens after the first, as bytes. `ids` begin with a token that the decoder is given."""
    ids = _check(model, ids)
    coder = Encoder()
    for cumulative, token in zip(_distributions(model, ids[0], ids[1:]), ids[1:], strict=False):
        coder.write(int(cumulative[token]), int(cumulative[token + 1]))
    return coder.end()


def decode(model: Model, data: bytes, n: int, first: int) -> list[int]:
    """`n` tokens that begin with `first`, from the bytes that `encode` wrote.

    What was decoded is coded again beside it, from the same distributions. PatchbayError where that gives other bytes: those of a damaged or cut file, of
    another model or edits, or of other than n tokens; a few in so many such files give the same bytes and cannot be told.
    """
    _check(model, [first, first])
    if not isinstance(data, bytes | bytearray | memoryview):
        raise PatchbayError(f"data is a {type(data).__name__}: give the bytes that encode wrote")
    limit = model.max_positions
    if n < 2 or (limit is not None and n > limit):
        raise PatchbayError(
            f"n={n}: from 2 tokens, the first among them, to the {limit or 'many'} that this model reads"
        )
    ids, told, decoder, coder = [first], list[int](), Decoder(bytes(data)), Encoder()
    for cumulative in _distributions(model, first, told):
        place = decoder.place()
        if place >= cumulative[-1]:  # where rounding left room above the last token, which no text is coded by
            break
        token = int(np.searchsorted(cumulative, place, side="right")) - 1
        for one in (decoder.read, coder.write):
            one(int(cumulative[token]), int(cumulative[token + 1]))
        ids.append(token)
        if len(ids) == n:
            break
        told.append(token)
    if len(ids) < n or coder.end() != bytes(data):
        raise PatchbayError(
            f"these {len(data)} bytes are not what {n} tokens are coded to by this model: they are damaged or cut short, or of another model, other edits, or another number of tokens"
        )
    return ids


def bits(model: Model, ids: Sequence[int]) -> float:
    """- log2 of the probability of the tokens after the first, under the whole numbers that the coder uses."""
    ids = _check(model, ids)
    shares = [
        int(cumulative[token + 1]) - int(cumulative[token])
        for cumulative, token in zip(_distributions(model, ids[0], ids[1:]), ids[1:], strict=False)
    ]
    return sum(PRECISION - math.log2(share) for share in shares)


def _check(model: Model, given: Sequence[int]) -> list[int]:
    """The ids as a list, or a PatchbayError for those that cannot be coded."""
    ids = list(given.tolist() if hasattr(given, "tolist") else given)
    if any(not isinstance(token, int) or isinstance(token, bool) for token in ids):
        raise PatchbayError(f"{given!r:.60}: token ids are coded, as model.encode([text])[0] gives them")
    if len(ids) < 2:
        raise PatchbayError(f"{len(ids)} tokens: two or more, the first of which the decoder is given")
    limit = model.max_positions
    if limit is not None and len(ids) > limit:
        raise PatchbayError(f"{len(ids)} tokens; this model reads at most {limit}: code a long text in pieces")
    if model.vocab_size >= 1 << (PRECISION - 2):
        raise PatchbayError(
            f"{model.vocab_size} tokens: a distribution of {PRECISION} bits holds fewer than {1 << (PRECISION - 2)}"
        )
    wrong = next((token for token in ids if not 0 <= token < model.vocab_size), None)
    if wrong is not None:
        raise PatchbayError(f"{wrong} is no token; this model has 0..{model.vocab_size - 1}")
    return ids


@torch.no_grad()
def _distributions(model: Model, first: int, told: Sequence[int]) -> Iterator[np.ndarray]:  # type: ignore[type-arg]
    """Cumulative whole numbers [vocab + 1] after the first token, and after each of `told`, which may grow meanwhile."""
    cache, token, at = None, first, 0
    while True:
        output = model.hf(input_ids=torch.tensor([[token]], device=model.device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        if cache is None:
            raise PatchbayError(f"this {model.family.name} model writes no cache: a text cannot be read token by token")
        yield whole_numbers(output.logits[0, -1])
        if at >= len(told):
            return
        token, at = told[at], at + 1


def whole_numbers(logits: torch.Tensor) -> np.ndarray:  # type: ignore[type-arg]
    """A distribution as cumulative whole numbers, 0 to at most 2^PRECISION, each token's share at least 1; int64 [vocab + 1]."""
    p = torch.softmax(logits.double(), -1).cpu().numpy()
    if not np.isfinite(p).all():
        raise PatchbayError("the model's logits are no numbers: there is no distribution to code by")
    shares = np.floor(p * ((1 << PRECISION) - len(p))).astype(np.int64) + 1
    return np.concatenate([[0], shares.cumsum()])


class Encoder:
    """An interval of WORD bits, narrowed by shares, whose settled bits are written."""

    def __init__(self) -> None:
        self.low, self.high, self.waiting = 0, (1 << WORD) - 1, 0
        self.out: list[int] = []

    def write(self, start: int, stop: int) -> None:
        self.low, self.high = narrowed(self.low, self.high, start, stop)
        while True:
            if self.high < HALF:
                self._bit(0)
            elif self.low >= HALF:
                self._bit(1)
                self.low, self.high = self.low - HALF, self.high - HALF
            elif self.low >= QUARTER and self.high < HALF + QUARTER:
                self.waiting += 1
                self.low, self.high = self.low - QUARTER, self.high - QUARTER
            else:
                return
            self.low, self.high = 2 * self.low, 2 * self.high + 1

    def _bit(self, bit: int) -> None:
        self.out += [bit] + [1 - bit] * self.waiting
        self.waiting = 0

    def end(self) -> bytes:
        """All bits, and as many more as say which interval it was; filled with zeros to a byte."""
        self.waiting += 1
        self._bit(0 if self.low < QUARTER else 1)
        return np.packbits(np.array(self.out, dtype=np.uint8)).tobytes()


class Decoder:
    """The same interval, read from bits; beyond the end there are zeros."""

    def __init__(self, data: bytes) -> None:
        self.bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8)).tolist() if data else []
        self.at, self.low, self.high, self.value = 0, 0, (1 << WORD) - 1, 0
        for _ in range(WORD):
            self._next()

    def _next(self) -> None:
        bit = self.bits[self.at] if self.at < len(self.bits) else 0
        self.value, self.at = 2 * self.value + bit, self.at + 1

    def place(self) -> int:
        """Where in a total of 2^PRECISION the value lies."""
        return (((self.value - self.low + 1) << PRECISION) - 1) // (self.high - self.low + 1)

    def read(self, start: int, stop: int) -> None:
        self.low, self.high = narrowed(self.low, self.high, start, stop)
        while True:
            if self.low >= HALF:
                off = HALF
            elif self.low >= QUARTER and self.high < HALF + QUARTER:
                off = QUARTER
            elif self.high < HALF:
                off = 0
            else:
                return
            self.low, self.high, self.value = 2 * (self.low - off), 2 * (self.high - off) + 1, self.value - off
            self._next()


def narrowed(low: int, high: int, start: int, stop: int) -> tuple[int, int]:
    """The part of an interval that belongs to [start, stop) of 2^PRECISION."""
    size = high - low + 1
    return low + (size * start >> PRECISION), low + (size * stop >> PRECISION) - 1
