"""Prompts in all the forms that users have, as token ids of one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchbay.model.tokens import as_texts, is_chat, tokenize, warn_of_unknown
from patchbay.signal.port import PatchbayError

if TYPE_CHECKING:
    from patchbay.jacks.modelled import Modelled as Model

FORMS = "a text, texts, chat messages, token ids, lists of ids, a tensor [prompt, position], what a tokenizer returns, or a Task"


@dataclass(frozen=True)
class Prompts:
    """Prompts as ids; whether they came as a single one, and as text or messages."""

    ids: list[list[int]]
    single: bool
    text: bool


def read(model: Model, prompts: Any) -> Prompts:
    """Prompts of any form, checked against the model. Raises PatchbayError for what is none, and for ids out of range."""
    if hasattr(prompts, "clean"):  # a task
        return _checked(model, Prompts([list(ids) for ids in prompts.clean], False, False), prompts.clean)
    if isinstance(prompts, Mapping) and "input_ids" not in prompts:
        raise PatchbayError(f"prompts are {FORMS}; got a mapping with {', '.join(map(str, prompts)) or 'nothing'}")
    if isinstance(prompts, Mapping) or hasattr(prompts, "input_ids"):
        ids, single = _unpadded(prompts["input_ids"], prompts.get("attention_mask"))
        return _checked(model, Prompts(ids, single, False), ids)
    rectangular = hasattr(prompts, "tolist")  # tensors and arrays need padding; lists of ids do not
    prompts = _listed(prompts)
    if isinstance(prompts, bytes) or not isinstance(prompts, str | Sequence):
        raise PatchbayError(f"prompts are {FORMS}; got {type(prompts).__name__}")
    if not prompts:
        raise PatchbayError("prompt 0 is empty: ''" if isinstance(prompts, str) else "no prompts were given")
    single = isinstance(prompts, str) or isinstance(prompts[0], Integral | float | Mapping)
    items = [prompts] if single else [_listed(item) for item in prompts]
    as_text = [isinstance(item, str) or is_chat(item) for item in items]
    if any(as_text) and not all(as_text):
        raise PatchbayError("prompts are texts or messages, or ids: not some of each in one batch")
    if not all(as_text):
        ids = [_row(item, i) for i, item in enumerate(items)]
        ids = _without_padding(model, ids) if rectangular else ids
    else:
        tokenizer = model._need_tokenizer()
        texts = as_texts(tokenizer, items)
        ids = [list(row) for row in tokenize(tokenizer, texts)]
        warn_of_unknown(tokenizer, texts, ids)
    return _checked(model, Prompts(ids, single, as_text[0]), items)


def encode(model: Model, prompts: Any) -> list[list[int]]:
    """What `Model.encode` documents."""
    return read(model, prompts).ids


def batch(model: Model, prompts: Any) -> tuple[Tensor, Tensor, bool]:
    """What `Model.batch` documents."""
    if isinstance(prompts, Tensor) and prompts.ndim == 2 and prompts.dtype in (torch.int64, torch.int32):
        whole = _whole(model, prompts)
        if whole is not None:
            return whole, torch.full((len(whole),), whole.shape[1]), False
    encoded = encode(model, prompts)  # other forms, and what is to be refused
    lengths = [len(ids) for ids in encoded]
    width = max(lengths)
    filled = torch.tensor([ids + [0] * (width - len(ids)) for ids in encoded], device=model.device)
    return filled, torch.tensor(lengths), min(lengths) < width


def _whole(model: Model, ids: Tensor) -> Tensor | None:
    """A copy of ids that are good as they stand, without a look at each; None where they are to be looked at."""
    embedding, longest = model.hf.get_input_embeddings().weight, model.longest_prompt
    if not ids.numel() or ids.shape[1] > (longest or ids.shape[1]):
        return None
    low, high = ids.aminmax()
    pad = getattr(model.tokenizer, "pad_token_id", None)
    if int(low) < 0 or int(high) >= len(embedding) or (pad is not None and bool((ids[:, [0, -1]] == pad).any())):
        return None
    return ids.to(model.device, torch.int64, copy=True)


# --- ids ----------------------------------------------------------------------------------------------


def _listed(value: Any) -> Any:
    """Tensors, arrays and columns as lists; a table has no one column that is meant."""
    if hasattr(value, "columns") and hasattr(value, "iloc"):
        raise PatchbayError(f"prompts are {FORMS}; got a table: name the column, one of {', '.join(value.columns)}")
    if isinstance(value, Tensor) and value.is_floating_point():
        raise PatchbayError(f"token ids are whole numbers, got a tensor of {value.dtype}")
    return value.tolist() if hasattr(value, "tolist") else value


def _row(item: Any, at: int) -> list[int]:
    """One prompt's ids."""
    if isinstance(item, Sequence) and not isinstance(item, str | bytes):
        values = [value.item() if isinstance(value, Tensor) and value.ndim == 0 else value for value in item]
        if all(isinstance(value, Integral) and not isinstance(value, bool) for value in values):
            return [int(value) for value in values]
        found = next(value for value in values if not isinstance(value, Integral) or isinstance(value, bool))
        raise PatchbayError(f"prompt {at}: token ids are whole numbers, got {found!r} ({type(found).__name__})")
    raise PatchbayError(f"prompts are {FORMS}; prompt {at} is {type(item).__name__}: {str(item)[:40]!r}")


def _unpadded(ids: Any, mask: Any) -> tuple[list[list[int]], bool]:
    """Ids without what the mask leaves out, and whether they are those of a single prompt."""
    ids, mask = _listed(ids), _listed(mask)
    if not len(ids):
        raise PatchbayError("no prompts were given")
    single = not isinstance(_listed(ids[0]), Sequence)
    rows = [_row(_listed(row), i) for i, row in enumerate([ids] if single else ids)]
    if mask is None:
        return rows, single
    masks = [_row(_listed(row), i) for i, row in enumerate([mask] if single else mask)]
    if [len(row) for row in masks] != [len(row) for row in rows]:
        raise PatchbayError("input_ids and attention_mask differ in shape")
    for i, row in enumerate(masks):
        seen = [at for at, flag in enumerate(row) if flag]
        if seen and seen[-1] - seen[0] + 1 != len(seen):
            raise PatchbayError(f"prompt {i}: its attention_mask leaves out tokens between others, not padding alone")
    return [
        [token for token, flag in zip(*pair, strict=True) if flag] for pair in zip(rows, masks, strict=True)
    ], single


def _without_padding(model: Model, rows: list[list[int]]) -> list[list[int]]:
    """Rows of one width without the tokenizer's padding tokens at their ends.

    Where that token has another use too, such as an end of text, rows that hold different numbers of it cannot be told from
    padded ones, and are refused.
    """
    if len({len(row) for row in rows}) > 1 or not rows[0]:
        return rows
    tokenizer = model.tokenizer
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None or not any(pad in (row[0], row[-1]) for row in rows):
        return rows
    edges = [_edges(row, pad) for row in rows]
    used = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk")}
    if pad not in used:
        return [row[left : len(row) - right] or row for row, (left, right) in zip(rows, edges, strict=True)]
    if len(set(edges)) > 1:
        at = next(i for i, edge in enumerate(edges) if edge == max(edges))
        raise PatchbayError(
            f"prompt {at} has {sum(edges[at])} tokens {pad} at its ends and others have fewer: padding, or part of the prompt? "
            "Give all that the tokenizer returns, with its attention_mask, or lists of ids without padding"
        )
    return rows


def _edges(row: list[int], pad: int) -> tuple[int, int]:
    """How many padding tokens a row begins and ends with."""
    left = next((i for i, token in enumerate(row) if token != pad), len(row))
    right = next((i for i, token in enumerate(reversed(row)) if token != pad), len(row))
    return left, right


def _checked(model: Model, prompts: Prompts, shown: Sequence[Any]) -> Prompts:
    """Refuse prompts that are empty, longer than the model takes, or of ids that it has not."""
    if not prompts.ids:
        raise PatchbayError("no prompts were given")
    longest, n_embedded = model.longest_prompt, model.hf.get_input_embeddings().weight.shape[0]
    for i, ids in enumerate(prompts.ids):
        if not ids:
            raise PatchbayError(f"prompt {i} is empty: {shown[i]!r}")
        if longest is not None and len(ids) > longest:
            raise PatchbayError(f"prompt {i} has {len(ids)} tokens, the model takes {longest}")
        if not 0 <= min(ids) <= max(ids) < n_embedded:
            raise PatchbayError(
                f"prompt {i} has token ids {min(ids)}..{max(ids)}, the vocabulary is 0..{model.vocab_size - 1}"
            )
    return prompts


# --- length -------------------------------------------------------------------------------------------


def longest_prompt(config: Any) -> int | None:
    """How many tokens a model takes: `max_position_embeddings`, and without end (None) where positions are scaled as a prompt
    grows (rotary positions of a type other than the default) or are distances (ALiBi), but for MPT, whose table of distances is
    made for `max_seq_len` tokens."""
    if _distances(config) and getattr(config, "max_seq_len", None):
        return int(config.max_seq_len)
    longest = getattr(config, "max_position_embeddings", None)
    if not longest or _distances(config) or _scaled(config):
        return None
    return int(longest)


def _distances(config: Any) -> bool:
    inner = getattr(config, "attn_config", None)
    return bool(
        getattr(config, "alibi", False)
        or getattr(inner, "alibi", False)
        or getattr(config, "position_embedding_type", None) == "alibi"
    )


def _scaled(config: Any) -> bool:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope, *rope.values()] if isinstance(rope, Mapping) else []
    named = [
        kind.get("rope_type", kind.get("type", "default")) or "default" for kind in kinds if isinstance(kind, Mapping)
    ]
    return any(name in ("linear", "dynamic", "yarn", "longrope", "llama3") for name in named)
