"""Whose words the tokens of a chat are: found by writing the conversation with another content in the place of each message.

A token belongs to a message where its letters are among those that change with the message's content: what the template writes
between messages (headers, end marks, dates, the header after which the assistant answers) belongs to nobody. So a message that spells
the template's own marks stays its author's. Tokens after the prompt are the assistant's.

Token ids alone do not say who wrote what: known are the conversations that came as messages, in this process, by their ids. They are
kept for as long as the tokenizer, the latest `MOST` tokens of them.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

from patchbay.signal.port import PatchbayError

MOST = 8_000_000  # tokens of conversations that are kept
STAND_INS = ("x1q", "0 9")  # contents that begin and end unlike one another
Messages = Sequence[Mapping[str, Any]]


class Told:
    """The conversations that one tokenizer wrote, the oldest first."""

    def __init__(self) -> None:
        self.lock, self.n_tokens = threading.Lock(), 0
        self.held: OrderedDict[bytes, Messages | tuple[str | None, ...]] = OrderedDict()  # roles once they were asked


_TOLD: WeakKeyDictionary[Any, Told] = WeakKeyDictionary()


def note(tokenizer: Any, messages: Messages, ids: Sequence[int]) -> None:
    """Remember that these ids are this conversation."""
    told, key = _TOLD.setdefault(tokenizer, Told()), _key(ids)
    with told.lock:
        if key not in told.held:
            told.n_tokens += len(ids)
            told.held[key] = messages
        told.held.move_to_end(key)
        while told.n_tokens > MOST and len(told.held) > 1:
            oldest, _ = told.held.popitem(last=False)
            told.n_tokens -= len(oldest) // 4


def roles_of(tokenizer: Any, ids: Sequence[int], length: int) -> tuple[str | None, ...]:
    """The role of each token of a conversation, None for the template's own; of one of `length` tokens the first of which are `ids`.

    Raises PatchbayError for ids that did not come as messages."""
    told, key = _TOLD.get(tokenizer), _key(ids)
    if told is not None:
        with told.lock:
            pieces = (
                [key] if len(ids) == length else [k for k in told.held if k.startswith(key) and len(k) == 4 * length]
            )
            found = [(piece, told.held[piece]) for piece in pieces if piece in told.held]
        roles = {_worked_out(tokenizer, told, piece, held)[: len(ids)] for piece, held in found}
        if len(roles) == 1:
            return roles.pop()
    raise PatchbayError(
        f"whose words these {len(ids)} tokens are is not known: they are no conversation that came as messages to this model. Give the "
        'messages, [{"role": "user", "content": ...}, ...], to the run, or once to model.encode'
    )


def _key(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()


def _worked_out(tokenizer: Any, told: Told, key: bytes, held: Any) -> tuple[str | None, ...]:
    """Roles that were asked before, or now from the messages."""
    if not held or not isinstance(held[0], Mapping):
        return tuple(held)
    roles = tuple(_roles(tokenizer, held, array("i", key).tolist()))
    with told.lock:
        told.held[key] = roles
    return roles


def _roles(tokenizer: Any, messages: Messages, ids: list[int]) -> list[str | None]:
    asks = messages[-1]["role"] != "assistant"

    def write(some: Messages) -> str:
        return str(tokenizer.apply_chat_template(list(some), tokenize=False, add_generation_prompt=asks))

    text = write(messages)
    try:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except NotImplementedError as error:
        raise PatchbayError(
            "the roles of a chat need a fast tokenizer, which says which letters each token has"
        ) from error
    if list(found["input_ids"]) != ids:
        raise PatchbayError(
            "the roles of this chat are not known: its template writes it otherwise now than when it was read"
        )
    spans = [_span(write, messages, i, text) for i in range(len(messages))]
    for (_, end, one), (start, _, other) in pairwise(sorted((a, b, i) for i, (a, b) in enumerate(spans) if b > a)):
        if start < end:
            raise PatchbayError(
                f"the chat template writes message {one} in several places, or among message {other}: whose words are where is not known"
            )
    roles: list[str | None] = [None] * len(ids)
    for at, (a, b) in enumerate(found["offset_mapping"]):
        roles[at] = next(
            (
                str(m["role"])
                for m, (start, end) in zip(messages, spans, strict=True)
                if a < end and b > start and b > a
            ),
            None,
        )
    return roles


def _span(write: Callable[[Messages], str], messages: Messages, i: int, text: str) -> tuple[int, int]:
    """Where in the text the content of message i stands: what changes with it."""
    content = messages[i].get("content")
    if content is not None and not isinstance(content, str):
        raise PatchbayError(
            f"message {i} of the chat holds {type(content).__name__}, not text: whose words are where is not known"
        )
    if not content:
        return 0, 0
    before, behind = len(text), len(text)
    for word in STAND_INS:
        try:
            other = write([*messages[:i], {**messages[i], "content": word}, *messages[i + 1 :]])
        except Exception as error:  # whatever a template raises, in its own words
            raise PatchbayError(f"the chat template refuses another content of message {i}: {error}") from error
        before = min(before, _common(text, other))
        behind = min(behind, _common(text[::-1], other[::-1]))
    return before, len(text) - behind


def _common(one: str, other: str) -> int:
    """How many letters two texts begin with together."""
    least = min(len(one), len(other))
    return next((i for i in range(least) if one[i] != other[i]), least)
