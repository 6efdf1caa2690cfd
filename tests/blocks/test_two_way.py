"""Two-way attention: later keys are seen as if they stood as far before, the model's own attention below the diagonal, and what it refuses."""

from __future__ import annotations

import pytest
import torch

import patchbay as pb
from patchbay.blocks import two_way as folder
from patchbay.blocks.two_way import show, two_way
from patchbay.train._objectives._masks import masked
from tests.given import lent
from tests.tolerance import close


def scores(model: pb.Model, ids: list[int]) -> torch.Tensor:
    """Layer 0's log weights [head, query, key] with nothing hidden: scores up to a constant for each query."""
    ports = [pb.Port(f"attn.{name}", 0) for name in "qkv"]
    trace = pb.run(model, [ids], taps=ports)
    q, k, v = (trace[port].double() for port in ports)
    with two_way(model, len(ids)):
        z, pattern = show(model.modules[0].attn, q, k, v, torch.zeros(1, 1, len(ids), len(ids)).double())
    assert close(z[0].transpose(0, 1), pattern[0] @ folder.to_heads(v, q.shape[1])[0])
    found, plain = pattern[0].log(), (q @ folder.to_heads(k, q.shape[1]).mT * q.shape[-1] ** -0.5)[0]
    for i in range(len(ids)):  # the model's own scores up to each token's place
        assert close(found[:, i, : i + 1] - found[:, i, i : i + 1], plain[:, i, : i + 1] - plain[:, i, i : i + 1])
    return found


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "cohere"])  # halves, a part of the head, neighbouring pairs
def test_a_later_key_is_scored_as_one_as_far_before(name: str) -> None:
    model, (a, b, x) = lent(name), (7, 11, 5)
    forth, back, same = scores(model, [a, x, x, b]), scores(model, [b, x, x, a]), scores(model, [a] * 4)
    # a looks at b three places on, or three back; the reference within each query is its own key
    assert close(forth[:, 0, 3] - forth[:, 0, 0], back[:, 3, 0] - back[:, 3, 3], of=10.0, dtype=torch.float32)
    for far in (1, 2, 3):
        ahead = torch.stack([same[:, i, i + far] - same[:, i, i] for i in range(4 - far)])
        behind = torch.stack([same[:, i, i - far] - same[:, i, i] for i in range(far, 4)])
        assert close(ahead, behind, of=10.0, dtype=torch.float32)


@torch.no_grad()
def test_closed_it_is_the_model_and_what_is_hidden_moves_nothing() -> None:
    model = lent("llama")
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 9, 8, 7, 6]])
    every, closed = torch.ones_like(ids, dtype=torch.bool), torch.tensor([False, False])
    with two_way(model, 5):
        assert close(masked(model.hf, ids, every, closed).logits, model.hf(ids).logits)
        seen, other = every.clone(), ids.clone()
        seen[:, 2], other[:, 2] = False, 30
        one, changed = (masked(model.hf, x, seen, ~closed).logits for x in (ids, other))
    rest = [0, 1, 3, 4]
    assert torch.equal(one[:, rest], changed[:, rest])
    assert not close(one[:, 2], changed[:, 2])
    assert model.hf.config._attn_implementation == "sdpa"


def test_what_it_refuses() -> None:
    with pytest.raises(pb.PatchbayError, match="positions do not turn queries and keys"), two_way(lent("gpt2"), 4):
        pass
    hidden = torch.zeros(1, 1, 3, 3)
    with pytest.raises(pb.PatchbayError, match="outside of blocks.two_way"):
        show(torch.nn.Identity(), hidden, hidden, hidden, hidden)
    with (
        two_way(lent("llama"), 4),
        pytest.raises(pb.PatchbayError, match="no window of 2 tokens for rows of 3"),
    ):
        show(lent("llama").modules[0].attn, hidden, hidden, hidden, hidden, sliding_window=2)
