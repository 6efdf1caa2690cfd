"""Two-way attention: a query sees what its mask opens, later keys too, and these as if they stood as far before it.

    s_ij = q_i . k_j, turned by i - j, for j <= i;   turned by j - i for j > i

Below the diagonal it is the model's own attention. A query and a key come turned by their places, and are turned back twice, by what the model itself does at each place
(`model.rotary`), whatever the layout of its channels. Only for a while: `two_way(model)` names the implementation in the config of the model, and takes it away.

Lv et al. 2023, "Are We Falling in a Middle-Intelligence Trap? An Analysis and Mitigation of the Reversal Curse", which trains decoders so.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from patchbay.blocks.kinds import UNHEARD
from patchbay.errors import PatchbayError
from patchbay.jacks.attention import implement
from patchbay.jacks.patterns import additive_mask, to_heads
from patchbay.model.model import Model
from patchbay.model.rotary import turns
from patchbay.model.weights import head_weights

NAME = "two-way"
Backs = dict[
    int, Tensor
]  # of each layer [position, d_head, d_head]: what turns a query or key of that place the other way
_NOW: ContextVar[Backs | None] = ContextVar("two_way", default=None)
_FOUND: weakref.WeakKeyDictionary[nn.Module, Backs] = weakref.WeakKeyDictionary()


def backs(model: Model, length: int) -> Backs:
    """For each layer the map [position, d_head, d_head] from what was turned by a place to what is turned by its negative."""
    found = _FOUND.get(model.hf)
    if found is None or len(next(iter(found.values()))) < length:
        many = min(model.max_positions or length, 1 << (length - 1).bit_length())
        layers = range(model.n_layers)
        folded = {
            i: head_weights(
                model.family, model.modules[i], model.n_heads(i), model.n_groups(i), model.d_head(i), fold_norm=True
            )
            for i in layers
        }
        made = {i: turn.rotation for i, turn in turns(model, range(many), folded).items()}
        if (still := [i for i, one in made.items() if one is None]) or not made:
            raise PatchbayError(
                f"two-way attention: positions do not turn queries and keys in layers {still} of this {model.family.name} model (they are "
                "learned, or distances), so that there is no later key as if it stood before; possible: a model with rotary positions"
            )
        # row vectors, q_t = q_0 R[t]: the inverse of a turn is its transpose
        found = {i: one.mT @ one.mT for i, one in made.items() if one is not None}
        _FOUND[model.hf] = found
    return found


@contextlib.contextmanager
def two_way(model: Model, length: int) -> Iterator[None]:
    """Runs of this thread inside the block attend two ways, on rows of at most `length` tokens."""
    turned, config = backs(model, length), model.hf.config
    implement(NAME, attend, lambda module: show)
    before = config._attn_implementation_internal
    config._attn_implementation_internal, token = NAME, _NOW.set(turned)
    try:
        yield
    finally:
        _NOW.reset(token)
        config._attn_implementation_internal = before


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """z [prompt, query, head, d], and no weights: the table gives them where they are asked."""
    return show(module, query, key, value, additive_mask(mask, query, key.shape[2]), **options)[0], None


def show(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, numbers: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """z, and the pattern [prompt, head, query, key]."""
    known = _NOW.get()
    if known is None:
        raise PatchbayError("two-way attention outside of blocks.two_way.two_way(model): what turns back is not known")
    _refuse(key.shape[2], options)
    scaling = options.get("scaling")
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    keys = to_heads(key, query.shape[1])
    back = known[int(module.layer_idx)][: query.shape[2]].to(query)  # type: ignore[arg-type]
    behind, ahead = (torch.einsum("bhti,tij->bhtj", x, back) for x in (query, keys))
    later = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool, device=query.device).triu(1)
    scores = torch.where(later, behind @ ahead.mT, query @ keys.mT) + numbers
    pattern = torch.softmax(scores, -1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return (pattern @ to_heads(value, query.shape[1])).transpose(1, 2), pattern


def _refuse(n_keys: int, options: dict[str, Any]) -> None:
    lost = [name for name in UNHEARD if options.get(name) is not None]
    window = options.get("sliding_window")
    if lost or (window is not None and n_keys > window):
        raise PatchbayError(
            f"two-way attention has no {', '.join(lost) or f'window of {window} tokens for rows of {n_keys}'}, which this family's own attention has; "
            "possible: a family without (llama, qwen2), shorter rows"
        )
