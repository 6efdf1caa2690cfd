"""Generation: prompts continued by transformers' own generate, under edits, prompts of one length at a time."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch

from patchbay.edits.apply import for_prompts
from patchbay.edits.edit import Edit
from patchbay.model.given import flat_edits
from patchbay.signal.port import PatchbayError
from patchbay.signal.positions import Token

if TYPE_CHECKING:
    from patchbay.model.model import Model


@torch.no_grad()
def generate(model: Model, prompts: Any, max_new_tokens: int = 20, *, edits: Sequence[Any] = (), **options: Any) -> Any:
    """What `Model.generate` documents."""
    encoded = model.encode(prompts)
    as_text = isinstance(prompts, str) or (isinstance(prompts, list | tuple) and isinstance(prompts[0], str))
    given = flat_edits(edits, model=model)
    outer = next((edit for edit in model.active_edits() if edit.by_row), None)
    lengths = sorted({len(ids) for ids in encoded})
    if model.max_positions is not None and lengths[-1] + max_new_tokens > model.max_positions:
        raise PatchbayError(
            f"{max_new_tokens} new tokens asked after a prompt of {lengths[-1]}: the model takes {model.max_positions} in all"
        )
    if outer is not None and len(lengths) > 1:
        raise PatchbayError(
            f"{outer} is on for a batch that is run whole, and prompts of lengths {lengths} are continued length by length: "
            "give it as edits= of this call"
        )
    _check_options(options, model.active_edits(given))
    out: list[list[int]] = [[] for _ in encoded]
    options = {"do_sample": False} | options
    for length in lengths:
        members = [i for i, ids in enumerate(encoded) if len(ids) == length]
        ids = torch.tensor([encoded[i] for i in members], device=model.device)
        shares = (for_prompts(edit, members, len(encoded), length + max_new_tokens) for edit in given)
        with model.session(edits=[share for share in shares if share is not None], prompt_length=length):
            grown = model.hf.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                pad_token_id=_pad_id(model),
                **options,
            )
        for i, row in zip(members, grown.tolist(), strict=True):
            out[i] = row
    if not as_text:
        return out[0] if isinstance(prompts, list | tuple) and isinstance(prompts[0], Integral) else out
    texts = [str(model._need_tokenizer().decode(row, skip_special_tokens=True)) for row in out]
    return texts[0] if isinstance(prompts, str) else texts


def _pad_id(model: Model) -> int:
    for owner in (model.hf.generation_config, model.hf.config):
        for name in ("pad_token_id", "eos_token_id"):
            found = getattr(owner, name, None)
            if found is not None:
                return int(found[0] if isinstance(found, list) else found)
    return 0


def _check_options(options: dict[str, Any], edits: Sequence[Edit]) -> None:
    """Refuse options of transformers' generate under which rows or tokens would no longer be those that were meant."""
    for name in ("num_return_sequences", "return_dict_in_generate"):
        if options.get(name) not in (None, False, 1):
            raise PatchbayError(
                f"{name} asked: Model.generate returns one continuation for each prompt; repeat the prompt instead"
            )
    moved = next((edit for edit in edits if edit.by_row or isinstance(edit.positions, Token)), None)
    if options.get("num_beams", 1) > 1 and moved is not None:
        raise PatchbayError(f"{moved}: beam search reorders the batch, so edits by row or by token do not hold there")
