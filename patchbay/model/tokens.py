"""Tokens: text as ids by a model's tokenizer, and what it does to a text without being asked.

Text becomes ids as its tokenizer does it by default: a start token is put in front where the tokenizer puts one, and never a
second one where the text brings its own; an end token that a tokenizer would append is left off. Chat messages go through the
tokenizer's own template, which writes all of its special tokens itself.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from patchbay.errors import said
from patchbay.model import chats
from patchbay.signal.port import PatchbayError


class Chat(str):
    """What a chat template wrote: its special tokens are in the text, and none is added. `messages`: of what, where that is all of it."""

    messages: Sequence[Mapping[str, Any]] = ()


def is_chat(item: Any) -> bool:
    """Whether this is a list of messages."""
    return (
        isinstance(item, Sequence) and not isinstance(item, str | bytes) and bool(item) and isinstance(item[0], Mapping)
    )


def template_digest(tokenizer: Any) -> str:
    """SHA-256 of the template that writes a tokenizer's chats, 16 hex digits."""
    written = json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True)
    return hashlib.sha256(written.encode()).hexdigest()[:16]


def decoded(tokenizer: Any, ids: Any) -> str:
    """The text of token ids."""
    try:
        return str(tokenizer.decode(ids))
    except (TypeError, KeyError):
        raise PatchbayError(f"decode takes token ids, got {said(ids)}") from None


def as_texts(tokenizer: Any, items: Sequence[Any]) -> list[str]:
    """Texts as they are, and conversations as the tokenizer's template writes them."""
    return [chat_text(tokenizer, item) if is_chat(item) else item for item in items]


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> Chat:
    """A conversation as its tokenizer's template writes it, up to where the assistant speaks next; whole where it spoke last."""
    for at, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise PatchbayError(f"message {at} of a chat has 'role' and 'content', got {message!r}")
    if not getattr(tokenizer, "chat_template", None):
        raise PatchbayError(
            "chat messages need a tokenizer with a chat template and this one has none: set tokenizer.chat_template, or "
            "write the text that the model was trained on"
        )
    ask = messages[-1]["role"] != "assistant"
    try:
        written = Chat(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask))
        written.messages = [dict(message) for message in messages]
        return written
    except Exception as error:  # whatever a template raises, in its own words
        raise PatchbayError(f"the tokenizer's chat template refuses these messages: {error}") from error


def tokenize(tokenizer: Any, texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Ids of each text as the tokenizer gives them by default, but for a second start token and an end token that it would
    append; of `Chat`, as they stand in it."""
    if isinstance(texts, str):
        raise PatchbayError(f"expected a list of texts, got the one text {texts[:40]!r}")
    if not texts:
        return ()
    start, n_end = _added(tokenizer)
    n_start = len(start)
    found = [tuple(ids[: len(ids) - n_end]) for ids in tokenizer([str(text) for text in texts])["input_ids"]]
    for i, text in enumerate(texts):
        own = found[i][n_start:]
        if n_start and (isinstance(text, Chat) or own[:n_start] == start):
            found[i] = own if own[:n_start] == start else _bare(tokenizer, text)
        if isinstance(text, Chat) and text.messages:
            chats.note(tokenizer, text.messages, found[i])
    return tuple(found)


def _bare(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(str(text), add_special_tokens=False)["input_ids"])


def start_ids(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that the tokenizer puts in front of every text by default: none, or a start token."""
    return _added(tokenizer)[0]


def _added(tokenizer: Any) -> tuple[tuple[int, ...], int]:
    """Ids in front of, and the number of ids after, those of a text itself."""
    bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    n_start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return tuple(whole[:n_start]), len(whole) - len(bare) - n_start


def n_unknown(tokenizer: Any, text: str, ids: Sequence[int]) -> int:
    """How many tokens of a text stand for characters that the tokenizer does not know; unknown tokens that the text itself
    spells are meant."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or unknown not in ids:
        return 0
    spelled = str(text).count(str(tokenizer.unk_token)) + start_ids(tokenizer).count(unknown)
    return max(0, list(ids).count(unknown) - spelled)


def warn_of_unknown(tokenizer: Any, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> None:
    counts = [n_unknown(tokenizer, text, row) for text, row in zip(texts, ids, strict=True)]
    if any(counts):
        at = next(i for i, count in enumerate(counts) if count)
        warnings.warn(
            f"prompt {at} holds {counts[at]} tokens {tokenizer.unk_token!r}, which stand for text that the tokenizer does not "
            f"know: {unknown_pieces(tokenizer, texts[at])}",
            stacklevel=5,
        )


def unknown_pieces(tokenizer: Any, text: str) -> str:
    """The pieces of a text that its tokenizer does not know, as far as it tells."""
    try:
        found = tokenizer(str(text), add_special_tokens=False, return_offsets_mapping=True)
    except NotImplementedError:
        return repr(str(text)[:60])
    pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
    pieces = dict.fromkeys(str(text)[a:b] for token, (a, b) in pairs if token == tokenizer.unk_token_id)
    return ", ".join(map(repr, list(pieces)[:5]))


def token_id(tokenizer: Any, text: str) -> int:
    """What `Model.token_id` documents."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if n_unknown(tokenizer, text, ids):
        raise PatchbayError(f"the tokenizer does not know {unknown_pieces(tokenizer, text)} of {text!r}")
    if len(ids) == 1:
        return int(ids[0])
    pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(list(ids))]
    known = tokenizer.get_vocab()
    stripped = text.strip()
    alike = {form: known[form] for form in (stripped, "\u2581" + stripped, "\u0120" + stripped) if form in known}
    hint = ", ".join(f"{form!r} is {number}" for form, number in alike.items())
    raise PatchbayError(
        f"{text!r} is {len(ids)} tokens in this tokenizer ({' '.join(map(repr, pieces))}), a single one is needed"
        + (f"; pieces of its vocabulary that can be named by their ids: {hint}" if hint else "")
    )
