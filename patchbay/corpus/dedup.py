"""Dedup: each text, or each paragraph, once, as a stream in memory that is said before.

Exact copies are known by 128 bits of BLAKE3, kept in a Bloom filter of m bits and k hashes:

    m = - n ln(rate) / (ln 2)^2,   k = (m / n) ln 2,   share of new texts dropped by chance after n of them = (1 - e^(-k n / m))^k = rate

No true copy survives; a share of at most `rate` of new texts is dropped for nothing, as long as no more than `capacity` were seen, and more are
refused. The first of equals stays, in order. Near copies are known by MinHash: `bands` bands of `rows` minima over shingles of `width` words, and two texts
of Jaccard similarity s meet in a band with probability 1 - (1 - s^rows)^bands, which has to be a half or more at `least`; a meeting is believed where the share of equal minima reaches
`least`. Kept are the minima of all texts, 4 bytes each.

Soldaini et al. 2024, "Dolma". Hashes are BLAKE3 and CRC-32, never Python's own, which is another in each process.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import numpy as np
from blake3 import blake3

from patchbay.corpus.reading import several
from patchbay.errors import PatchbayError

TOGETHER = 8192  # texts that are looked up at once
Unit = Literal["text", "paragraph"]


class Bloom:
    """A set of 128-bit digests that forgets none and takes a few others for members."""

    def __init__(self, capacity: int, rate: float = 1e-4) -> None:
        if capacity < 1 or not 0 < rate < 1:
            raise PatchbayError(f"capacity={capacity}, rate={rate}: a text or more, and a share between 0 and 1")
        self.capacity, self.rate, self.held = capacity, rate, 0
        self.n_bits = max(64, math.ceil(-capacity * math.log(rate) / math.log(2) ** 2))
        self.n_hashes = max(1, round(self.n_bits / capacity * math.log(2)))
        try:
            self.bits = np.zeros(-(-self.n_bits // 8), dtype=np.uint8)
        except (MemoryError, ValueError) as error:  # numpy's own for what no address reaches
            raise PatchbayError(
                f"capacity={capacity} at rate={rate:g} takes {self.n_bits / 8e9:,.1f} GB, which this machine has not got: give a smaller capacity, or a larger rate"
            ) from error

    @property
    def n_bytes(self) -> int:
        return int(self.bits.nbytes)

    def _places(self, digests: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Bits of digests [n, 2], by double hashing [n, hash]."""
        first, second = digests[:, :1], digests[:, 1:] | np.uint64(1)
        with np.errstate(over="ignore"):
            return (first + np.arange(self.n_hashes, dtype=np.uint64)[None] * second) % np.uint64(self.n_bits)

    def holds(self, digests: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Whether each digest [n, 2] was added, or is taken for one that was: bool [n]."""
        places = self._places(digests)
        found: np.ndarray[Any, Any] = (
            (self.bits[places >> np.uint64(3)] >> (places & np.uint64(7)).astype(np.uint8)) & 1
        ).all(1)
        return found

    def add(self, digests: np.ndarray[Any, Any]) -> None:
        self.held += len(digests)
        if self.held > self.capacity:
            raise PatchbayError(
                f"more than {self.capacity:,} different texts: beyond that more than {self.rate:g} of the new would be dropped; give a larger capacity"
            )
        places = self._places(digests).ravel()
        np.bitwise_or.at(self.bits, places >> np.uint64(3), np.uint8(1) << (places & np.uint64(7)).astype(np.uint8))

    def new(self, digests: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Which of the digests [n, 2] are met for the first time, here and ever; these are added. bool [n]."""
        fresh = ~self.holds(digests)
        _, first = np.unique(digests[fresh], axis=0, return_index=True)
        places = np.flatnonzero(fresh)[np.sort(first)]
        self.add(digests[places])
        found = np.zeros(len(digests), dtype=bool)
        found[places] = True
        return found


def digests(texts: Sequence[str | bytes]) -> np.ndarray[Any, Any]:
    """128 bits of each text without the white space around it, uint64 [n, 2]."""
    said = [(text.encode(errors="surrogatepass") if isinstance(text, str) else text).strip() for text in texts]
    return np.frombuffer(b"".join([blake3(one).digest(16) for one in said]), dtype=np.uint64).reshape(-1, 2)


def unique_by(
    records: Iterable[Mapping[str, Any]], field: str, *, capacity: int = 1_000_000, rate: float = 1e-4
) -> Iterator[Mapping[str, Any]]:
    """The first record of each value of a field, such as `url`; a record without it is refused by its number."""
    seen, stream, number = Bloom(capacity, rate), iter(records), 0
    while batch := list(islice(stream, TOGETHER)):
        for record in batch:
            number += 1
            if not isinstance(record.get(field), str) or not record[field].strip():
                raise PatchbayError(f"record {number} has no {field!r} that is a text; it has {', '.join(record)}")
        fresh = seen.new(digests([record[field] for record in batch]))
        yield from (record for record, new in zip(batch, fresh, strict=True) if new)


def unique(
    texts: Iterable[str], *, unit: Unit = "text", capacity: int = 1_000_000, rate: float = 1e-4
) -> Iterator[str]:
    """Each text once, or each text without the paragraphs (lines) that were met before; texts of which nothing is left go.

    Memory is the filter's, 2.4 bytes for each of `capacity` at the rate of 1e-4, and a batch of texts.
    """
    found = unique_records(({"text": text} for text in several(texts)), unit=unit, capacity=capacity, rate=rate)
    return (str(record["text"]) for record in found)


def unique_records(
    records: Iterable[Mapping[str, Any]], *, unit: Unit = "text", capacity: int = 1_000_000, rate: float = 1e-4
) -> Iterator[dict[str, Any]]:
    """The same of records, by their field `text`; what else they hold stays with what is left of it."""
    if unit not in ("text", "paragraph"):
        raise PatchbayError(f"unit={unit!r}: text or paragraph")
    return _unique(Bloom(capacity, rate), iter(records), unit)


def _unique(seen: Bloom, stream: Iterator[Mapping[str, Any]], unit: Unit) -> Iterator[dict[str, Any]]:
    while batch := list(islice(stream, TOGETHER)):
        pieces = [[one["text"]] if unit == "text" else one["text"].split("\n") for one in batch]
        flat = [piece for one in pieces for piece in one]
        empty = np.array([not piece.strip() for piece in flat])
        keep = empty.copy()  # an empty line is no copy of another
        keep[~empty] = seen.new(digests([piece for piece, gone in zip(flat, empty, strict=True) if not gone]))
        at = 0
        for record, one in zip(batch, pieces, strict=True):
            left = [piece for piece, stays in zip(one, keep[at : at + len(one)], strict=True) if stays]
            at += len(one)
            if any(piece.strip() for piece in left):
                yield {**record, "text": "\n".join(left)}


# --- near copies --------------------------------------------------------------------------------------


class MinHash:
    """Minima of `bands` x `rows` hashes over a text's shingles of `width` words."""

    def __init__(self, bands: int = 16, rows: int = 8, width: int = 5, seed: int = 0) -> None:
        if min(bands, rows, width) < 1:
            raise PatchbayError(f"bands={bands}, rows={rows}, width={width}: one or more of each")
        self.bands, self.rows, self.width = bands, rows, width
        draw = np.random.default_rng(seed)
        self.a = draw.integers(1, 2**61, bands * rows, dtype=np.uint64) | np.uint64(1)
        self.b = draw.integers(0, 2**61, bands * rows, dtype=np.uint64)

    def signature(self, text: str) -> np.ndarray[Any, Any]:
        """uint32 [bands * rows]; equal in a place with the probability of the texts' Jaccard similarity."""
        words = text.lower().split()
        last = max(1, len(words) - self.width + 1)
        shingles = {zlib.crc32(" ".join(words[i : i + self.width]).encode(errors="surrogatepass")) for i in range(last)}
        hashed = np.fromiter(shingles, dtype=np.uint64, count=len(shingles))
        hashed *= np.uint64(0x9E3779B97F4A7C15)  # a CRC is linear: mixed before it is multiplied
        hashed ^= hashed >> np.uint64(29)
        with np.errstate(over="ignore"):
            found: np.ndarray[Any, Any] = (
                ((hashed[:, None] * self.a + self.b) >> np.uint64(32)).min(0).astype(np.uint32)
            )
        return found


def near_unique(
    texts: Iterable[str], *, least: float = 0.8, bands: int = 16, rows: int = 8, width: int = 5
) -> Iterator[str]:
    """Each text of which no earlier one that stayed is a near copy, of estimated Jaccard similarity `least` or more."""
    if not 0 < least <= 1:
        raise PatchbayError(f"least={least}: a share above 0, to 1")
    if (chance := 1 - (1 - least**rows) ** bands) < 0.5:
        raise PatchbayError(
            f"texts of similarity {least} meet in one of {bands} bands of {rows} minima with probability {chance:.2g}: most would stay; give more bands or fewer rows"
        )
    hasher = MinHash(bands, rows, width)
    kept: list[np.ndarray[Any, Any]] = []
    tables: list[dict[bytes, list[int]]] = [{} for _ in range(bands)]
    for text in several(texts):
        own = hasher.signature(text)
        keys = [band.tobytes() for band in own.reshape(bands, rows)]
        met = {place for key, table in zip(keys, tables, strict=True) for place in table.get(key, ())}
        if any(float((kept[place] == own).mean()) >= least for place in met):
            continue
        for key, table in zip(keys, tables, strict=True):
            table.setdefault(key, []).append(len(kept))
        kept.append(own)
        yield text
