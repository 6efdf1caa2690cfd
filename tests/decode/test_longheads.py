"""LongHeads: the choice and the reading as loops, a chunk that was planted, plain attention where all is read, no position too far."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.decode import _loop
from patchbay.decode._chunks import Chunks
from patchbay.tiny import twins
from tests.decode.shared_stories import new_tokens
from tests.tolerance import close

D, WINDOW, N = 4, 3, 4


def rotation(positions: int = WINDOW * N) -> torch.Tensor:
    """Two pairs of dimensions that turn at two speeds [position, d, d]."""
    out = torch.zeros(positions, D, D, dtype=torch.float64)
    for t in range(positions):
        for pair, speed in ((0, 1.0), (2, 0.1)):
            c, s = math.cos(t * speed), math.sin(t * speed)
            out[t, pair : pair + 2, pair : pair + 2] = torch.tensor([[c, s], [-s, c]], dtype=out.dtype)
    return out


def signals(total: int, heads: int = 2, seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(1, n, total, D, generator=draw, dtype=torch.float64) for n in (heads, 1, 1)]


def naive(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, list[list[list[int]]]]:
    """One head, query by query: [position, d] each -> the output and the chunks of each query."""
    turn, total = rotation(), len(q)
    keys = []
    for chunk in range(total // WINDOW):
        inside = range(chunk * WINDOW, (chunk + 1) * WINDOW)
        kk = [k[j] @ turn[j % WINDOW] for j in inside]
        outs = []
        for i in inside:
            qq = q[i] @ turn[i % WINDOW]
            weights = torch.stack([qq @ one * scale for one in kk]).softmax(0)
            outs.append(sum(w * v[j] for w, j in zip(weights, inside, strict=True)))
        mean = sum(outs) / WINDOW
        weights = torch.stack([mean @ one * scale for one in kk]).softmax(0)
        keys.append(sum(w * one for w, one in zip(weights, kk, strict=True)))
    found, chosen = [], []
    for i in range(total):
        own = i // WINDOW
        if own < N:
            mine = list(range(own + 1))
        else:
            others = sorted(range(1, own - 1), key=lambda c: -float(q[i] @ keys[c]))[: N - 3]
            mine = sorted([0, own - 1, own, *others])
        at = (len(mine) - 1) * WINDOW + i % WINDOW
        qq = q[i] @ turn[at]
        seen = [(rank * WINDOW + o, c * WINDOW + o) for rank, c in enumerate(mine) for o in range(WINDOW)]
        seen = [(place, j) for place, j in seen if j <= i]
        assert max(place for place, _ in seen) == at < WINDOW * N
        weights = torch.stack([qq @ (k[j] @ turn[place]) * scale for place, j in seen]).softmax(0)
        found.append(sum(w * v[j] for w, (_, j) in zip(weights, seen, strict=True)))
        chosen.append(mine)
    return torch.stack(found), chosen


def attend(q: Any, k: Any, v: Any, pieces: list[int]) -> tuple[torch.Tensor, Chunks]:
    """All positions, in calls of so many each."""
    held, out, at = Chunks(WINDOW, N, {0: rotation()}), [], 0
    for n in pieces:
        until = at + n
        out.append(held.attend(0, q[:, :, at:until], k[:, :, :until], v[:, :, :until], 0.5))
        at = until
    return torch.cat(out, 1), held


def test_reference() -> None:
    """In the prompt and token by token: what loops give, and the chunks that they choose."""
    q, k, v = signals(25)
    for pieces in ([25], [13, *[1] * 12]):
        out, held = attend(q, k, v, pieces)
        for head in range(2):
            expected, chosen = naive(q[0, head], k[0, 0], v[0, 0], 0.5)
            assert close(out[0, :, head], expected, dtype=torch.float64)
            assert held.chosen[0][0, head].tolist() == chosen[-1]


def test_planted() -> None:
    """A chunk whose keys point where a head's last query does is chosen by that head, and its values come out."""
    q, k, v = signals(27)
    k[:, :, 9:12] = torch.tensor([0.0, 0.0, 0.0, 9.0])  # chunk 3; a pair that hardly turns
    q[:, 0, -1] = torch.tensor([0.0, 0.0, 0.0, 9.0])
    q[:, 1, -1] = torch.tensor([0.0, 0.0, 0.0, -9.0])
    v[:, :, 9:12] = 7.0
    out, held = attend(q, k, v, [27])
    assert held.chosen[0][0, 0].tolist() == [0, 3, 7, 8]
    assert 3 not in held.chosen[0][0, 1].tolist()
    assert close(
        out[0, -1, 0], torch.full((D,), 7.0, dtype=torch.float64), noise=1e12
    )  # but for what little the others get
    v2 = v.clone()
    v2[:, :, 9:12] = -50.0
    assert torch.equal(attend(q, k, v2, [27])[0][0, -1, 1], out[0, -1, 1])


def test_null() -> None:
    """Where all is read: the model's own greedy text and log-probabilities, also across the edge of chunks, without all and at once."""
    model = pb.load(twins.twin("llama"))
    prompts = [[5, 9, 7, 11, 3, 8, 20], [8, 6, 7]]
    found = pb.decode.longheads(model, prompts, window=2, chunks=16, max_new_tokens=6)
    assert [drafts[0] for drafts in new_tokens(found)] == model.generate(prompts, 6, new_only=True)
    text = torch.tensor([prompts[0] + new_tokens(found)[0][0]])
    said = torch.log_softmax(pb.run(model, text).logits[0, 6:-1], -1)[torch.arange(6), text[0, 7:]]
    assert close(found["logp"][0, 0], said, of=10.0, dtype=torch.float32)
    assert found["chosen"][0, -1, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, *[-1] * 10]


def test_texts_longer_than_the_model_was_made_for_have_no_position_that_it_was_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cached is uncached, prompts together are prompts alone, and the stream's edits act."""
    model = pb.load(twins.twin("llama"))
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 96, (2, 90), generator=draw).tolist()  # of 64 positions
    options: dict[str, Any] = {"window": 4, "chunks": 4, "max_new_tokens": 6}
    found = pb.decode.longheads(model, prompts, **options)
    alone = [pb.decode.longheads(model, [one], **options) for one in prompts]
    assert new_tokens(found) == [new_tokens(one)[0] for one in alone]
    ended = pb.decode.longheads(model, prompts, ends=[new_tokens(found)[0][0][1]], **options)
    assert new_tokens(ended)[1] == new_tokens(found)[1]
    with model.edited(pb.scale("L0.attn.out", -1.0, rows=(1,))):
        edited = pb.decode.longheads(model, prompts, **options)
    assert new_tokens(edited)[0] == new_tokens(found)[0]
    assert not torch.equal(edited["logp"][1], found["logp"][1])
    monkeypatch.setattr(_loop, "serves", lambda *_: False)
    whole = pb.decode.longheads(model, prompts, **options)
    assert new_tokens(whole) == new_tokens(found)
    assert close(whole["logp"], found["logp"], of=10.0, dtype=torch.float32)
    assert torch.equal(whole["chosen"], found["chosen"])


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("llama", {"window": 0}, "window=0, chunks=16: one token or more"),
        ("llama", {"chunks": 2}, "chunks=2: one token or more, and three chunks or more"),
        ("llama", {"window": 32, "chunks": 3}, "is 96 positions: the model was made for 64"),
        ("gpt2", {"window": 4, "chunks": 4}, "positions do not turn queries and keys of this gpt2 model"),
        ("gemma2", {"window": 4, "chunks": 4}, "this gemma2 model has sliding windows"),
        ("mamba2", {"window": 4, "chunks": 4}, "this mamba model has no attention"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(pb.PatchbayError, match=says):
        pb.decode.longheads(pb.load(twins.twin(name)), [[5, 6, 7]], **options)


def test_edits_inside_attention_are_refused() -> None:
    model = pb.load(twins.twin("llama"))
    with model.edited(pb.scale("L0.H1.q", 2.0)), pytest.raises(pb.PatchbayError, match="it acts inside attention"):
        pb.decode.longheads(model, [[5, 6, 7]], window=4, chunks=4)
