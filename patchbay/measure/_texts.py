"""Whole texts: their log-probability in nats, token by token, each token scored once.

A text begins after the start token: the one that its tokenizer puts in front, or where it puts none the tokenizer's bos_token. A start token is
no text and is not scored. Where there is neither, nothing stands before the first token, and it is left out with its bytes.
Longer texts are cut into windows, each with the start token in front and `context` tokens before those that are scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchbay.measure._items import rows_of, texts_only
from patchbay.measure._runs import token_logprobs
from patchbay.model.model import Model
from patchbay.model.tokens import n_unknown, start_ids, tokenize, unknown_pieces
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Text:
    """The scored tokens of a text, what stands before them, their UTF-8 bytes (None without a tokenizer), and how messages name it."""

    ids: Ids
    before: Ids
    n_bytes: int | None
    n_chars: int | None
    where: str


def whole_texts(model: Model, texts: Sequence[Any], where: Sequence[str] | None = None) -> list[Text]:
    """Texts, or lists of ids, as what is scored. Raises PatchbayError for one with nothing to score, or with unknown characters."""
    names = [f"text {i}" for i in range(len(texts))] if where is None else list(where)
    if not len(texts):
        raise PatchbayError("no texts were given")
    tokenizer = model.tokenizer
    if tokenizer is None and any(isinstance(text, str) for text in texts):
        tokenizer = model._need_tokenizer()
    added = () if tokenizer is None else start_ids(tokenizer)
    first = added or _bos(tokenizer)
    spelled = iter(
        tokenize(tokenizer, [text for text in texts if isinstance(text, str)]) if tokenizer is not None else ()
    )
    return [_text(model, tokenizer, text, next(spelled) if isinstance(text, str) else tuple(map(int, text)), added, first, name) for text, name in zip(texts, names, strict=True)]  # fmt: skip


def _bos(tokenizer: Any) -> Ids:
    found = None if tokenizer is None else tokenizer.bos_token_id
    return () if found is None else (int(found),)


def _text(model: Model, tokenizer: Any, given: Any, ids: Ids, added: Ids, first: Ids, name: str) -> Text:
    before, own = first, ids
    if first and ids[: len(first)] == first:
        own = ids[len(first) :]
    if not first:
        before, own = ids[:1], ids[1:]
    if not own:
        raise PatchbayError(
            f"{name} has no token to score{'' if first else ' after its first, before which nothing stands'}"
        )
    outside = [token for token in ids if not 0 <= token < model.vocab_size]
    if outside:
        raise PatchbayError(f"{name}: token ids {outside[:4]} are outside 0..{model.vocab_size - 1}")
    if tokenizer is None:
        return Text(own, before, None, None, name)
    if isinstance(given, str) and n_unknown(tokenizer, given, own):
        raise PatchbayError(
            f"{name}: the tokenizer does not know {unknown_pieces(tokenizer, given)}, so what stands there has no probability of its own"
        )
    text = given if isinstance(given, str) and first else str(tokenizer.decode(list(own)))
    return Text(own, before, len(text.encode()), len(text), name)


def losses(
    model: Model, texts: Sequence[Text], *, window: int | None = None, context: int = 0, batch_size: int = 32
) -> list[Tensor]:
    """-log p of every scored token of each text, [token] in nats."""
    rows: list[Ids] = []
    reads: list[list[tuple[int, int]]] = []
    of: list[int] = []
    for i, text in enumerate(texts):
        for row, start in _windows(text, _width(model, window, context, text), context):
            rows.append(row)
            reads.append([(at, row[at + 1]) for at in range(start - 1, len(row) - 1)])
            of.append(i)
    found = token_logprobs(model, rows, reads, batch_size=batch_size)
    return [-torch.cat([found[k] for k in range(len(rows)) if of[k] == i]) for i in range(len(texts))] if len(rows) < 200 else _joined(found, of, len(texts))  # fmt: skip


def _joined(found: Sequence[Tensor], of: Sequence[int], n: int) -> list[Tensor]:
    pieces: list[list[Tensor]] = [[] for _ in range(n)]
    for values, i in zip(found, of, strict=True):
        pieces[i].append(-values)
    return [torch.cat(each) for each in pieces]


def _width(model: Model, window: int | None, context: int, text: Text) -> int:
    longest = model.longest_prompt
    width = window if window is not None else longest if longest is not None else len(text.before) + len(text.ids)
    if longest is not None and width > longest:
        raise PatchbayError(f"window={width}: the model reads {longest} tokens")
    if not 0 <= context < width - len(text.before):
        raise PatchbayError(
            f"window={width} and context={context}: a window holds the start token, the context and one token or more"
        )
    return width


def _windows(text: Text, width: int, context: int) -> list[tuple[Ids, int]]:
    """Rows, and the place in each of the first token that is scored."""
    found, at, n_before = [], 0, len(text.before)
    while at < len(text.ids):
        back = min(context, at)
        end = min(len(text.ids), at + width - n_before - back)
        found.append((text.before + text.ids[at - back : end], n_before + back))
        at = end
    return found


def given_texts(
    items: Any, field: str = "text", beside: str = "group"
) -> tuple[list[Any], list[str], list[Any], list[str]]:
    """Texts of items: a Task's prompts, a list of texts or of ids, or rows with the field; with their names, what stands in the field
    `beside` (nothing where no row has it) and what is to be said."""
    if isinstance(items, Task):
        return list(items.clean), [f"prompt {i}" for i in range(len(items))], [], []
    plain = (
        isinstance(items, list | tuple) and len(items) and all(isinstance(item, str | list | tuple) for item in items)
    )
    if plain:
        return list(items), [f"text {i}" for i in range(len(items))], [], []
    rows, said = rows_of(items, (field,), (beside,))
    texts_only(rows, (field,))
    groups = [row.values.get(beside) for row in rows]
    return [row.values[field] for row in rows], [row.where for row in rows], groups if any(g is not None for g in groups) else [], said  # fmt: skip
