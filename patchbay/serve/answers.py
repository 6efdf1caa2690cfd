"""Answers as OpenAI's clients read them, made of the engine's events: whole, or piece by piece."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from patchbay.serve.asking import Asked
from patchbay.serve.choosing import Told
from patchbay.serve.work import End, Event, Piece, Prompt, Work

LEAST = -9999.0  # what stands for a log-probability of minus infinity, as OpenAI has it


@dataclass
class Choice:
    """One choice of an answer, as far as it has come."""

    text: str = ""
    tokens: list[Told] = field(default_factory=list)
    reason: str | None = None
    offset: int = 0  # letters of tokens that were told before


class Answer:
    """The answer to one request. `works`: its prompts, in order; choice j of prompt i has the index i * n + j."""

    def __init__(self, asked: Asked, works: Sequence[Work], tokenizer: Any, about: dict[str, Any]) -> None:
        self.asked, self.works, self.tokenizer = asked, list(works), tokenizer
        kind = "chat.completion" if asked.chat else "text_completion"
        prefix = "chatcmpl" if asked.chat else "cmpl"
        self.kind, self.id, self.created = kind, f"{prefix}-{secrets.token_hex(12)}", int(time.time())
        self.about = about
        self.choices = [Choice() for _ in range(len(works) * asked.n)]
        self.n_new = 0

    @property
    def over(self) -> bool:
        return all(choice.reason is not None for choice in self.choices)

    @property
    def usage(self) -> dict[str, int]:
        prompt = sum(len(work.ids) for work in self.works)
        return {"prompt_tokens": prompt, "completion_tokens": self.n_new, "total_tokens": prompt + self.n_new}

    def hear(self, place: int, event: Event) -> list[int]:
        """Take an event of the prompt at `place`; the indices of the choices that it is about."""
        first = place * self.asked.n
        if isinstance(event, Prompt):
            told = self._prompt_text(place)
            for choice in self.choices[first : first + self.asked.n]:
                choice.text, choice.tokens = told, list(event.tokens)
            return list(range(first, first + self.asked.n))
        assert isinstance(event, Piece | End)
        choice = self.choices[first + event.choice]
        if isinstance(event, Piece):
            choice.text, choice.tokens = choice.text + event.text, choice.tokens + list(event.tokens)
        else:
            choice.reason, self.n_new = event.reason, self.n_new + event.n
        return [first + event.choice]

    # ---- whole ----

    def whole(self) -> dict[str, Any]:
        rows = []
        for index, choice in enumerate(self.choices):
            said: dict[str, Any] = {"index": index, "logprobs": self._logprobs(choice), "finish_reason": choice.reason}
            if self.asked.chat:
                said["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
            else:
                said["text"] = choice.text
            rows.append(said)
        return self._head(self.kind) | {"choices": rows, "usage": self.usage, "patchbay": self.about}

    # ---- piece by piece ----

    def begin(self) -> Iterator[dict[str, Any]]:
        """What a stream begins with."""
        if self.asked.chat:
            for index in range(len(self.choices)):
                yield self._chunk(index, {"role": "assistant", "content": ""})

    def pieces(self, place: int, event: Event) -> Iterator[dict[str, Any]]:
        """What of an event is told at once."""
        for index in self.hear(place, event):
            choice = self.choices[index]
            fresh, tokens = choice.text, choice.tokens
            if fresh or tokens or choice.reason:
                content = {"content": fresh} if fresh or tokens else {}
                yield self._chunk(index, content, Choice(fresh, tokens, choice.reason, choice.offset))
                choice.offset += sum(len(self._shown(one.token)) for one in tokens)
                choice.text, choice.tokens = "", []

    def last(self) -> Iterator[dict[str, Any]]:
        if self.asked.usage:
            yield self._head(self._stream_kind) | {"choices": [], "usage": self.usage, "patchbay": self.about}

    @property
    def _stream_kind(self) -> str:
        return "chat.completion.chunk" if self.asked.chat else self.kind

    def _chunk(self, index: int, delta: dict[str, Any], choice: Choice | None = None) -> dict[str, Any]:
        choice = choice or Choice()
        said: dict[str, Any] = {"index": index, "logprobs": self._logprobs(choice) if choice.tokens else None}
        said["finish_reason"] = choice.reason
        said |= {"delta": delta} if self.asked.chat else {"text": delta.get("content", "")}
        return self._head(self._stream_kind) | {"choices": [said]} | ({"usage": None} if self.asked.usage else {})

    # ---- parts ----

    def _head(self, kind: str) -> dict[str, Any]:
        fingerprint = self.about.get("fingerprint")
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.asked.model,
            "system_fingerprint": fingerprint,
        }

    def _prompt_text(self, place: int) -> str:
        given = self.asked.prompts[place]
        return given if isinstance(given, str) else str(self.tokenizer.decode(given))

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        if self.asked.logprobs is None:
            return None
        return self._of_chat(choice.tokens) if self.asked.chat else self._of_completion(choice)

    def _of_chat(self, tokens: Sequence[Told]) -> dict[str, Any]:
        rows = []
        for one in tokens:
            top = [self._entry(token, logp) for token, logp in one.top]
            rows.append(self._entry(one.token, one.logp) | {"top_logprobs": top})
        return {"content": rows, "refusal": None}

    def _entry(self, token: int, logp: float | None) -> dict[str, Any]:
        text = self._shown(token)
        whole = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": _finite(logp), "bytes": whole}

    def _of_completion(self, choice: Choice) -> dict[str, Any]:
        texts = [self._shown(one.token) for one in choice.tokens]
        offsets, at = [], choice.offset
        for text in texts:
            offsets.append(at)
            at += len(text)
        tops = [self._top(one) for one in choice.tokens]
        logps = [_finite(one.logp) for one in choice.tokens]
        told = bool(self.asked.logprobs)
        return {
            "tokens": texts,
            "token_logprobs": logps,
            "top_logprobs": tops if told else None,
            "text_offset": offsets,
        }

    def _top(self, one: Told) -> dict[str, float] | None:
        """The likeliest tokens by their texts, and the one that stands there; of two with one text the likelier."""
        if one.logp is None:
            return None
        found: dict[str, float] = {}
        for token, logp in (*one.top, (one.token, one.logp)):
            text = self._shown(token)
            found[text] = max(found.get(text, LEAST), _finite(logp) or 0.0)
        return found

    def _shown(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))


def _finite(logp: float | None) -> float | None:
    return None if logp is None else max(logp, LEAST)
