"""Compression: a text as as many bits as a model finds it surprising, and back, without a loss.

An arithmetic coder over the model's next-token distribution. Each distribution is made of whole numbers first, of a total of 2^PRECISION,
every token at least 1, so that coder and decoder see the same; both run the model one token at a time on one cache, because sums of another shape
round otherwise. A text takes at most two bits more than - log2 of its probability under the whole numbers.

    data = encode(model, ids);  decode(model, data, len(ids), ids[0]) == ids

Inside `model.edited(knob)` both are of the edited model: bits per byte of a text are what a knob costs there. Lester et al. 2024, "Training LLMs over
Neurally Compressed Text", train on such bits; a text coded like that looks random, and is not learned by a second model as it stands. What is, are windows of equal
information: coder and context begin anew whenever W bits are full, so that a window says the same wherever it stands.

    windows = encode_windows(model, [ids], W)[0];  decode_windows(model, windows, W, ids[0]) == ids

A window is one of 2^W cells. The tokens that may begin it share them, in proportion to their whole numbers and each at least one; those that may follow share the cells of what is there so far but
its first, which says that the window ends there (Boncelet 1993, block arithmetic coding; the paper fills windows up with zeros, which do not say so). A token that is left no cell begins the
next window. So every number below 2^W is a window of one token or more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from patchbay.errors import PatchbayError
from patchbay.model.model import Model

PRECISION = 24  # bits of a distribution's total
WORD = 40  # bits of the coder's interval
HALF, QUARTER = 1 << (WORD - 1), 1 << (WORD - 2)
WIDEST = 62 - PRECISION  # bits of a window: its cells times a distribution's total are whole numbers of 64 bits
HELD = 1 << 28  # bytes of shared cells that are kept


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


def encode_windows(model: Model, texts: Sequence[Sequence[int]], bits: int) -> list[list[int]]:
    """The tokens of each text after its first as windows, whole numbers below 2^bits. Each is coded after the text's first token alone, and decodes alone.

    Texts may be longer than the model reads: what it reads is the window so far. The windows of texts that begin with one token are of one tree, which is asked of the model once.
    """
    wrong = next((ids for ids in texts if not hasattr(ids, "__iter__")), None)
    if wrong is not None:
        raise PatchbayError(f"texts: a list of texts, each a list of ids, got {wrong!r:.40} for a text")
    tree = _Tree(model, bits)
    return [tree.written(ids) for ids in [_check(model, ids, whole=False) for ids in texts]]


def decode_windows(model: Model, windows: Sequence[int], bits: int, first: int) -> list[int]:
    """The tokens, `first` before them, that `encode_windows` wrote as these windows; any others, in any order, are read likewise."""
    tree = _Tree(model, bits)
    _check(model, [first, first])
    ids = [first]
    for place, window in enumerate(windows):
        if not _is_whole(window) or not 0 <= window < 1 << bits:
            raise PatchbayError(f"window {place} is {window!r}: a whole number from 0 to {(1 << bits) - 1}")
        ids += tree.read(first, int(window))
    return ids


class _Tree:
    """What windows hold: the tokens so far have cells, of which the first says that the window ends there and the next tokens share the others."""

    def __init__(self, model: Model, bits: int) -> None:
        least = (model.vocab_size - 1).bit_length()
        if not _is_whole(bits) or not max(1, least) <= bits <= WIDEST:
            raise PatchbayError(
                f"bits={bits!r}: windows of {max(1, least)} to {WIDEST} bits; fewer are no cell for each of {model.vocab_size} tokens, more are no whole numbers of 64 bits"
            )
        self.model, self.n, self.limit = model, 1 << int(bits), model.max_positions or math.inf
        self.shared = functools.lru_cache(maxsize=max(1, HELD // (8 * model.vocab_size + 8)))(self._shared)

    def written(self, ids: Sequence[int]) -> list[int]:
        found, at = [], 1
        while at < len(ids):
            low, n = 0, self.n
            so_far: tuple[int, ...] = (ids[0],)
            while at < len(ids) and n > 1 and len(so_far) < self.limit:
                ends = self.shared(so_far, low, n)
                start, stop = int(ends[ids[at]]), int(ends[ids[at] + 1])
                if start == stop:
                    break
                so_far, low, n, at = (*so_far, ids[at]), start, stop - start, at + 1
            found.append(low)
        return found

    def read(self, first: int, window: int) -> list[int]:
        low, n = 0, self.n
        so_far: tuple[int, ...] = (first,)
        while len(so_far) == 1 or window > low:
            ends = self.shared(so_far, low, n)
            token = int(np.searchsorted(ends, window, side="right")) - 1
            so_far, low, n = (*so_far, token), int(ends[token]), int(ends[token + 1] - ends[token])
            if len(so_far) > self.limit:
                raise PatchbayError(f"window {window}: more than the {self.limit} tokens that this model reads")
        return list(so_far[1:])

    def _shared(self, so_far: tuple[int, ...], low: int, n: int) -> np.ndarray:  # type: ignore[type-arg]
        """Where among all cells those of each next token begin and the last one's end, int64 [vocab + 1], after tokens that have the `n` cells from `low` on."""
        with torch.no_grad():  # of this text alone, without a cache: sums of another shape round otherwise
            ids = torch.tensor([so_far], device=self.model.device)
            cumulative = whole_numbers(self.model.hf(input_ids=ids, use_cache=False).logits[0, -1])
        start = len(so_far) == 1
        free, least = (n, 1) if start else (n - 1, 0)
        rest = free - least * (len(cumulative) - 1)
        found: np.ndarray[Any, Any] = (
            low + n - free + cumulative * rest // cumulative[-1] + least * np.arange(len(cumulative))
        )
        return found


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check(model: Model, given: Sequence[int], *, whole: bool = True) -> list[int]:
    """The ids as a list, or a PatchbayError for those that cannot be coded."""
    ids = list(given.tolist() if hasattr(given, "tolist") else given)
    if any(not isinstance(token, int) or isinstance(token, bool) for token in ids):
        raise PatchbayError(f"{given!r:.60}: token ids are coded, as model.encode([text])[0] gives them")
    if len(ids) < 2:
        raise PatchbayError(f"{len(ids)} tokens: two or more, the first of which the decoder is given")
    limit = model.max_positions
    if whole and limit is not None and len(ids) > limit:
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
    """Distributions as cumulative whole numbers, 0 to at most 2^PRECISION, each token's share at least 1; int64 [..., vocab + 1]."""
    p = torch.softmax(logits.double(), -1).cpu().numpy()
    if not np.isfinite(p).all():
        raise PatchbayError("the model's logits are no numbers: there is no distribution to code by")
    shares = np.floor(p * ((1 << PRECISION) - p.shape[-1])).astype(np.int64) + 1
    return np.concatenate([np.zeros_like(shares[..., :1]), shares.cumsum(-1)], -1)


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
