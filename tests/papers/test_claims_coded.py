"""Claims of coded text: rows are what a window and the coder say, characters are counted, and what is saved is beside what frequencies cost."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from patchbay.corpus.compression import Decoder, decode_windows, whole_numbers
from patchbay.papers.claims import coded
from patchbay.tiny import lab
from tests.tolerance import close

FIRST = len(lab.ALPHABET)


def compressor() -> Any:
    return lab.small(FIRST + 1, layers=1, width=16, heads=2, mlp=8, positions=coded.LENGTH + 1)


def test_rows_hold_the_texts_that_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coded, "TEXTS", 5)
    texts, network = lab.characters(6, 0, coded.LENGTH), compressor()
    rows, sizes = coded.written(texts, network, 0)
    assert all(len(some) == coded.ROW for way in rows.values() for some in way)
    for ids, window, turned, n in zip(texts, rows["windows"], rows["shuffled"], sizes["windows"], strict=True):
        told = decode_windows(network, window, coded.BITS, FIRST)[1:]
        assert told == ids[: len(told)]
        assert n == len(told) - len(decode_windows(network, window[:1], coded.BITS, FIRST)[1:])
        assert sorted(turned) == sorted(window)
    assert rows["shuffled"] != rows["windows"]
    assert sizes["characters"] == [coded.ROW - 1.0] * 6
    said = ["".join(lab.ALPHABET[i] for i in ids) for ids in texts]
    assert all(0 < n < len(one) for n, one in zip(sizes["pieces"], said, strict=True))


def test_plain_bits_are_the_coders() -> None:
    """They decode to the characters that are counted, but for those that more bits would tell."""
    rows = torch.randn(FIRST + 1, FIRST + 1, generator=torch.Generator().manual_seed(0))
    fake: Any = SimpleNamespace(hf=lambda input_ids: SimpleNamespace(logits=rows[input_ids]))
    texts = lab.characters(60, 1, 100)  # more than are run at once
    found, sizes = coded.coded(texts, fake)
    assert len(found) == len(sizes) == 60
    for ids, row, size in zip(texts, found, sizes, strict=True):
        assert len(row) == coded.ROW
        n, decoder, last, told = round(size * coded.ROW / (coded.ROW - 1)), Decoder(bytes(row)), FIRST, list[int]()
        for _ in range(n - 8):
            table = whole_numbers(rows[last])
            last = int(np.searchsorted(table, decoder.place(), side="right")) - 1
            decoder.read(int(table[last]), int(table[last + 1]))
            told.append(last)
        assert len(told) > 8
        assert told == ids[: n - 8]


@pytest.mark.parametrize(("gain", "verdict"), [(0.5, "confirmed"), (0.0, "not confirmed")])
def test_what_is_saved_is_beside_frequencies(monkeypatch: pytest.MonkeyPatch, gain: float, verdict: str) -> None:
    """Training is stood in for by networks that know of windows what frequencies say, and `gain` nats more."""
    from patchbay.corpus import diachronic
    from patchbay.papers.claims._grown import nats_by_frequency

    rng = random.Random(0)
    monkeypatch.setattr(coded, "TEXTS", 40)
    monkeypatch.setattr(coded, "HELD", 20)
    rows = {
        name: [[rng.randrange(256) for _ in range(coded.ROW)] for _ in range(60)]
        for name in ("windows", "plain", "shuffled", "characters", "pieces")
    }
    monkeypatch.setattr(coded, "_compressor", lambda *_: None)
    monkeypatch.setattr(coded, "written", lambda *_: (rows, {name: [30.0] * 60 for name in rows}))
    monkeypatch.setattr(coded, "trained", lambda _, data, of, *__, **___: {"one": of(data)})

    def surprisals(data: Any, held: Any) -> torch.Tensor:
        often = nats_by_frequency(torch.tensor(data), held, 256)
        return (often - (gain if data == rows["windows"][:40] else 0.0)).flatten()

    monkeypatch.setattr(diachronic, "surprisals", surprisals)
    monkeypatch.setattr(coded, "_read", coded._read.__wrapped__)
    claim = coded.lester2024(None, 0)  # type: ignore[arg-type]
    assert claim.verdict == verdict
    assert close(claim.value, gain, of=10.0)
    found = coded._read(0)["plain"]
    often = nats_by_frequency(torch.tensor(rows["plain"][:40]), rows["plain"][40:], 256)
    assert close(found["bits"], float(often.sum()) / math.log(2) / (20 * 30.0), of=10.0)
    assert float(found["saved"].abs().max()) == 0.0
