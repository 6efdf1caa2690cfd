"""Equal: a plain network of as many weights as a variant has, or as many steps of it as cost the variant's operations.

Weights are matched by the width of the MLPs, which every family's config names, to the nearest that the family can have. Operations are those of
PyTorch's own count of one step, forward and backward, on the same rows.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from patchbay.model.model import Model
from patchbay.results.method import seeded
from patchbay.signal.port import PatchbayError
from patchbay.train._objectives import objective
from patchbay.train._objectives._objective import collated, learned

WIDTHS = ("intermediate_size", "n_inner", "ffn_dim")  # how configs name the width of an MLP
NEAR = 0.02  # of the weights: what a matched twin may differ by


def of_width(model: Model, width: int, plain: Model, seed: int) -> Model:
    """A network of this form with MLPs of another width, drawn by seed, whose other weights are those of `plain`."""
    config = copy.deepcopy(model.hf.config)
    setattr(config, _named(config), width)
    with seeded(seed):
        hf = type(model.hf)(config).to(device=model.device, dtype=model.dtype)
    own = hf.state_dict()
    same = {name: value for name, value in plain.hf.state_dict().items() if value.shape == own[name].shape}
    hf.load_state_dict(same, strict=False)
    return Model(hf.eval(), model.tokenizer or False, family=model.family, source="untrained")


def width(model: Model, weights: int) -> int:
    """The width of the MLPs at which a plain network has nearest to so many weights. PatchbayError where none is within 2 %."""

    def count(width: int) -> int:
        config = copy.deepcopy(model.hf.config)
        setattr(config, name, width)
        with torch.device("meta"):
            return sum(p.numel() for p in type(model.hf)(config).parameters())

    name = _named(model.hf.config)
    own = getattr(model.hf.config, name) or 4 * model.d_model
    each = count(own + 1) - count(own)
    found = max(1, own + round((weights - count(own)) / each)) if each > 0 else own
    if abs(count(found) - weights) > NEAR * weights:
        raise PatchbayError(
            f"no width of the MLPs gives a plain {model.hf.config.model_type} model of {weights:,} weights; the nearest has {count(found):,}"
        )
    return found


def _named(config: Any) -> str:
    name = next((one for one in WIDTHS if hasattr(config, one)), None)
    if name is None:
        raise PatchbayError(
            f"the config of {config.model_type} names no width of its MLPs ({', '.join(WIDTHS)}), by which weights could be made equal"
        )
    return name


def operations(model: Model, rows: Any, aim: str) -> int:
    """Floating point operations of one step, forward and backward, on the first rows."""
    from torch.utils.flop_counter import FlopCounterMode

    batch = collated([rows[i] for i in range(rows.plan.batch_size)])
    batch = {name: value.to(model.device) for name, value in batch.items()}
    learn = [p for p in model.hf.parameters() if p.is_floating_point()]
    for one in learn:
        one.requires_grad_()
    with FlopCounterMode(display=False) as counted:
        objective(aim).loss(model, model.hf, batch, learned(batch["labels"])).backward()  # type: ignore[no-untyped-call]
    for one in learn:
        one.grad = None
        one.requires_grad_(False)
    return int(counted.get_total_flops())
