"""What `why` was asked: one prompt, the token that is explained, and the one that it is held against."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.model.tokens import as_texts, is_chat, n_unknown, unknown_pieces
from patchbay.signal.port import PatchbayError
from patchbay.tasks.answers import whole_answers
from patchbay.tasks.task import Task


@dataclass(frozen=True)
class Asked:
    """A prompt's tokens, the two answers, and what the model says after it; `seconds` is what one run took."""

    model: Model
    ids: list[int]
    answer: int
    against: int
    logits: Tensor  # [vocab], float64
    seconds: float
    said: list[str] = field(default_factory=list)

    @property
    def task(self) -> Task:
        """The question as a task of one prompt, scored by the difference of the two answers' logits."""
        return Task(name="why", clean=(tuple(self.ids),), right=(self.answer,), wrong=((self.against,),))

    @property
    def difference(self) -> float:
        return float(self.logits[self.answer] - self.logits[self.against])

    def text(self, token: int) -> str:
        return token_text(self.model, token)

    @property
    def labels(self) -> list[str]:
        """Position and token of the prompt's tokens, as an axis names them."""
        return [f"{place} {self.text(token)}" for place, token in enumerate(self.ids)]


def token_text(model: Model, token: int) -> str:
    """A token between quotes, with the space that it begins with; its id where there is no tokenizer."""
    if model.tokenizer is None:
        return f"#{token}"
    text = model.decode([token])
    piece = str(model.tokenizer.convert_ids_to_tokens([token])[0])
    spaced = piece.startswith("\u2581") and not text.startswith(" ")  # decoding drops the space of a text's first token
    return repr(" " + text if spaced else text)


def asked(model: Model, prompt: Any, answer: str | int | None, against: str | int | None) -> Asked:
    """Read the question and run the prompt once. Raises PatchbayError for anything but one prompt, and for no token."""
    rows = model.encode(prompt)
    if len(rows) != 1:
        raise PatchbayError(f"why takes one prompt, got {len(rows)}: ask of each by itself, or compare them as a Task")
    ids, text = rows[0], _text(model, prompt)
    began = time.perf_counter()
    logits = run(model, [ids], logits="last").last_logits[0].double().cpu()
    seconds = time.perf_counter() - began
    if not bool(logits.isfinite().any()):
        raise PatchbayError("the model's logits after this prompt are not finite: there is no next token to explain")
    said: list[str] = []
    right = int(logits.argmax()) if answer is None else _token(model, text, answer, "answer", said)
    others = logits.clone()
    others[right] = -torch.inf
    wrong = int(others.argmax()) if against is None else _token(model, text, against, "against", said)
    if right == wrong:
        raise PatchbayError(
            f"answer and against are the same token, {token_text(model, right)}: nothing stands between them; leave against out for "
            "the most likely other token"
        )
    return Asked(model, ids, right, wrong, logits, seconds, said)


def _text(model: Model, prompt: Any) -> str | None:
    """The prompt as text, where it came as one; None for ids."""
    if isinstance(prompt, Sequence) and not isinstance(prompt, str) and len(prompt) == 1 and not is_chat(prompt):
        prompt = prompt[0]
    return as_texts(model.tokenizer, [prompt])[0] if isinstance(prompt, str) or is_chat(prompt) else None


def _token(model: Model, prompt: str | None, given: str | int, what: str, said: list[str]) -> int:
    """The id of an answer given as text or id: of its first token where it has several."""
    if not isinstance(given, str):
        if not 0 <= given < model.vocab_size:
            raise PatchbayError(f"{what}={given}: ids of this model are 0 to {model.vocab_size - 1}")
        return int(given)
    tokenizer = model._need_tokenizer()
    if not given:
        raise PatchbayError(f"{what}='' is no text; leave it out for the most likely token")
    follows = whole_answers(tokenizer, [(prompt, given)])[prompt, given] if prompt is not None else None
    ids = list(follows or tokenizer(given, add_special_tokens=False)["input_ids"])
    if not ids or n_unknown(tokenizer, given, ids):
        raise PatchbayError(f"{what}: the tokenizer does not know {unknown_pieces(tokenizer, given)} of {given!r}")
    if len(ids) > 1:
        pieces = ", ".join(token_text(model, token) for token in ids[:6])
        said.append(
            f"{what} {given!r} is {len(ids)} tokens ({pieces}): what is explained is the first, {token_text(model, ids[0])}"
        )
    return int(ids[0])
