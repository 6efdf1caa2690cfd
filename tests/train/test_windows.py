"""Windows: the gradient of a whole backward pass, whatever the window; fewer bytes are held; what keeps more than keys and values is refused."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import patchbay as pb
from patchbay.train._objectives._objective import collated, learned
from patchbay.train._plan import Arm, plan_of
from patchbay.train._runs import Lab, ended
from patchbay.train._windows import backward
from tests.given import lent
from tests.tolerance import close

ROWS = [[5 + (7 * i + 3 * t * t) % 60 for t in range(n)] for i, n in enumerate((11, 7, 11))]


def slopes(
    model: pb.Model, run: Callable[[Any, dict[str, Tensor], Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss and what it leaves as the gradient of each parameter."""
    batch = collated([(ids, ids) for ids in ROWS])
    weights = dict(model.hf.named_parameters())
    for one in weights.values():
        one.requires_grad_()
    with torch.enable_grad():
        loss = run(model.hf, batch, learned(batch["labels"]))
    found = {name: one.grad for name, one in weights.items() if one.grad is not None}
    for one in weights.values():
        one.grad = None
        one.requires_grad_(False)
    return loss.detach(), found


def whole(hf: Any, batch: dict[str, Tensor], n: Tensor) -> Tensor:
    logits = hf(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    logp = torch.log_softmax(logits[:, :-1], -1)
    said = batch["labels"][:, 1:]
    loss = -sum(logp[i, t, said[i, t]] for i in range(len(said)) for t in range(said.shape[1]) if said[i, t] >= 0) / n
    loss.backward()
    return loss


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # keys shared by heads, and positions that are learned
@pytest.mark.parametrize("window", [1, 4, 11])
def test_the_gradient_is_that_of_whole_rows(name: str, window: int) -> None:
    model = lent(name)
    loss, expected = slopes(model, whole)
    found, by_windows = slopes(model, lambda hf, batch, n: backward(hf, batch, n, window, Tensor.backward))
    assert close(found, loss, of=10.0)
    assert set(by_windows) == set(expected)
    size = max(float(one.abs().max()) for one in expected.values())
    for key, one in expected.items():
        assert close(by_windows[key], one, of=size, noise=512), key  # summed in another order
    assert float(by_windows[min(expected)].abs().max()) > 0


def test_a_window_holds_fewer_bytes() -> None:
    model, held = lent("llama"), {"now": 0, "most": 0}

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor, size = tensor, tensor.nbytes
            held["now"] += size
            held["most"] = max(held["most"], held["now"])
            weakref.finalize(self, lambda: held.update(now=held["now"] - size))

    def most(run: Callable[[Any, dict[str, Tensor], Tensor], Tensor]) -> int:
        held["now"] = held["most"] = 0
        weights = {one.data_ptr() for one in model.hf.parameters()}
        pack = lambda one: one if one.data_ptr() in weights else Kept(one)  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor if isinstance(one, Kept) else one):
            slopes(model, run)
        return held["most"]

    one, other = most(whole), most(lambda hf, batch, n: backward(hf, batch, n, 2, Tensor.backward))
    assert other < 0.6 * one


def test_a_run_by_windows_ends_with_the_same_weights() -> None:
    documents = [[ids] for ids in ROWS]
    lab = [
        Lab(lent("llama"), documents, documents, plan_of({"steps": 2, "batch_size": 3, "window": w})) for w in (0, 4)
    ]
    plain, other = (ended(one, Arm(), 0).hf.state_dict() for one in lab)
    moved = [name for name, value in plain.items() if not torch.equal(value, lent("llama").hf.state_dict()[name])]
    assert moved
    assert all(float((other[name] - plain[name]).abs().max()) < 1e-3 for name in moved)  # a step of Adam is 3e-3
    with pytest.raises(pb.PatchbayError, match="window: the objective BiCo does more with a row"):
        ended(Lab(lent("llama"), documents, documents, plan_of({"steps": 1, "window": 4})), Arm("bico"), 0)
    for name in ("mamba", "gemma3_text"):
        with pytest.raises(pb.PatchbayError, match="window: this .* model keeps more than keys and values"):
            ended(Lab(lent(name), documents, documents, plan_of({"steps": 1, "window": 4})), Arm(), 0)
    with pytest.raises(
        pb.PatchbayError, match="0 or more documents for the panel, steps between readings and tokens for a window"
    ):
        plan_of({"window": -1})
