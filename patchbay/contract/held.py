"""What holds, what is refused, and what is left as it was: the words in which the checks of the contract are written."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

import patchbay as pb
from patchbay.jacks.session import attention


class ContractError(AssertionError):
    """What a method does not keep of the contract."""


def hold(true: Any, says: str) -> None:
    if not true:
        raise ContractError(says)


@contextmanager
def refused(*says: str, kind: type[Exception] = pb.PatchbayError) -> Iterator[None]:
    """The block raises that error, and its message has these words."""
    try:
        yield
    except kind as error:
        missing = [word for word in says if word not in str(error)]
        hold(not missing, f"the refusal lacks {missing}: {error}")
    else:
        raise ContractError(f"nothing was refused; a {kind.__name__} with {list(says)} was due")


def state_of(model: pb.Model) -> dict[str, Any]:
    """Everything that a method must leave alone, as comparable values."""
    hf = model.hf
    modules = dict(hf.named_modules())
    return {
        "weights": {name: tensor.detach().clone() for name, tensor in hf.state_dict().items()},
        "pointers": {name: tensor.data_ptr() for name, tensor in hf.state_dict().items()},
        "hooks": {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), len(m._backward_pre_hooks))
            for name, m in modules.items()
        },
        "forwards": [name for name, m in modules.items() if "forward" in m.__dict__],
        "attention": [m.config._attn_implementation for m in modules.values() if hasattr(m, "config")],
        "training": {name: m.training for name, m in modules.items()},
        "requires_grad": {name: (p.requires_grad, p.grad is None) for name, p in hf.named_parameters()},
        "grad mode": torch.is_grad_enabled(),
        "torch": torch.get_rng_state(),
        "numpy": [value.tolist() if hasattr(value, "tolist") else value for value in np.random.get_state()],
        "random": random.getstate(),
        "listening": dict(attention._ACTIVE),
        "session": model._session,
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        return bool(a == b)

    return [name for name in before if not same(before[name], after[name])]


@contextmanager
def untouched(model: pb.Model, prompts: pb.Task) -> Iterator[None]:
    """Weights, logits, hooks, modes, random states and the task are after the block what they were before."""
    ids = torch.tensor([[5, 9, 5, 9, 11, 3]])
    with torch.no_grad():
        logits = model.hf(ids).logits
    before, record = state_of(model), json.dumps(prompts.to_json())
    yield
    changed = differences(before, state_of(model))
    hold(not changed, f"it left changed: {', '.join(changed)}")
    hold(json.dumps(prompts.to_json()) == record, "it changed the task")
    with torch.no_grad():
        hold(torch.equal(model.hf(ids).logits, logits), "the model gives other logits afterwards")
