"""Whether a model's blocks add to the stream, or go on from its norm: asked where no family row holds, to say why none can.

In a post-norm block (BERT, GPT-1, BART) the norm stands on the stream itself, y = norm(x + block(x)); in MiniMax each block keeps
norm(x) in place of x. Either way nothing that was added before is left as it was, so that no sum of parts is the stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from patchbay.errors import PatchbayError
from patchbay.jacks.hooks import watched

NEAR = 1e-3


def refuse_normed(hf: Any) -> None:
    """Raise PatchbayError for a model whose blocks norm the stream itself; nothing where they add to it, or it cannot be run."""
    if _normed(hf):
        raise PatchbayError(
            f"{type(hf).__name__} goes on from the norm of its stream, not from the stream (post-norm blocks): nothing that was added "
            "before is left as it was, so that no sum of parts is the stream; the parts here are terms of such a sum, as models have "
            "whose blocks add to the stream (pre-norm)"
        )


@torch.no_grad()
def _normed(hf: Any) -> bool:
    layers = _layers(hf)
    inside = [module for layer in layers for module in layer.modules()]
    training = [module for module in hf.modules() if module.training]
    try:
        hf.eval()
        with watched(hf, inside) as calls:
            ids = torch.tensor([[1, 5, 3]], device=next(hf.parameters()).device) % max(int(hf.config.vocab_size), 1)
            hf(input_ids=ids)
    except Exception:  # others' code, on a model that is refused already: there is nothing to add
        return False
    finally:
        for module in training:
            module.training = True
    return bool(layers) and all(_goes_on_from_a_norm(layer, calls) for layer in layers)


def _layers(hf: nn.Module) -> list[nn.Module]:
    """The longest list of modules of one class."""
    lists = [[*module] for module in hf.modules() if isinstance(module, nn.ModuleList) and len(module)]
    alike = [found for found in lists if len({type(one) for one in found}) == 1]
    return max(alike, key=lambda found: sum(len([*one.modules()]) for one in found), default=[])


def _goes_on_from_a_norm(layer: nn.Module, calls: dict[nn.Module, list[tuple[Tensor | None, Tensor]]]) -> bool:
    if not calls.get(layer):
        return False
    out = calls[layer][-1][1]
    if not out.isfinite().all():
        return False  # what is no number is near nothing, and no fit of it ends
    normed = [
        y for module in layer.modules() if _is_norm(module) for _, y in calls.get(module, ()) if y.shape == out.shape
    ]
    if any(_off(y, out) <= NEAR for y in normed):
        return True
    added = [
        y
        for module in layer.children()
        for x, y in calls.get(module, ())
        if y.shape == out.shape and _is_one_of(x, normed) and y.isfinite().all()
    ]
    return any(_off(_fit(out, n, y), out) <= NEAR for n in normed for y in added)


def _is_norm(module: nn.Module) -> bool:
    """A leaf of such a name; families put it into the names of whole layers too."""
    return "norm" in type(module).__name__.lower() and next(module.children(), None) is None


def _is_one_of(x: Tensor | None, some: list[Tensor]) -> bool:
    return x is not None and any(x is one or (x.shape == one.shape and torch.equal(x, one)) for one in some)


def _fit(out: Tensor, *parts: Tensor) -> Tensor:
    """The nearest sum of the parts, each times one number."""
    columns = torch.stack([part.double().flatten() for part in parts], 1)
    times = torch.linalg.lstsq(columns, out.double().flatten()[:, None]).solution
    return (columns @ times).reshape(out.shape)


def _off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))
