"""A grammar as a step of a chain: only tokens that can still end in a text of the language are left. The grammars are llguidance's.

    regex(r'[0-9]+ cats')      json('{"type": "object", ...}')      lark('start: "a" | "b" start')

The text after the prompt is in the language where it has ended; where the tokens ran out it is the beginning of one. Of JSON no space is
left but in strings, since a model may otherwise print newlines for ever. Masking is not conditioning: `logp` is what the model gives the
text, `logq` what the masked law does; exp(logp - logq) weighs drafts to the model's law given that the text is valid.

The step stands where it is written: what comes after it can only take more away. It ends a text by the model's end tokens.
"""

from __future__ import annotations

import json
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from patchbay.decode._loop import Call
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError

KINDS = ("regex", "json", "lark")
READ: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = (
    weakref.WeakKeyDictionary()
)  # tokenizers as the library has them


def library() -> Any:
    """llguidance, or what is to be done where it is not installed."""
    try:
        import llguidance
    except ImportError as error:
        raise PatchbayError("a grammar in a chain needs llguidance: pip install 'patchbay-lm[constrained]'") from error
    return llguidance


def grammar_of(kind: str, text: str) -> str:
    """A grammar as the library writes it."""
    matcher = library().LLMatcher
    if kind == "regex":
        return str(matcher.grammar_from_regex(text))
    if kind == "lark":
        return str(matcher.grammar_from_lark(text))
    try:
        schema = json.loads(text)
        return str(matcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False}))
    except ValueError as error:
        raise PatchbayError(f"chain: json({text!r:.60}) is no JSON schema: {error}") from error


def tokens_of(model: Model, ends: frozenset[int]) -> Any:
    """The model's tokenizer as the library reads it, made once for each set of end tokens."""
    library()
    from llguidance.hf import from_tokenizer

    tokenizer = model._need_tokenizer()
    made = READ.setdefault(tokenizer, {})
    key = (model.vocab_size, *sorted(ends))
    if key not in made:
        try:
            made[key] = from_tokenizer(tokenizer, n_vocab=model.vocab_size, eos_token=sorted(ends))
        except ValueError as error:
            raise PatchbayError(
                f"chain: a grammar reads the tokens of a fast tokenizer, and refuses {type(tokenizer).__name__}: {error}"
            ) from error
    return made[key]


class Grammar(LogitsProcessor):  # type: ignore[misc]
    """Tokens that the grammar allows after the text so far; of one text, which begins with its prompt."""

    def __init__(self, call: Call, kind: str, text: str) -> None:
        if not isinstance(text, str):
            raise PatchbayError(f"chain: {kind}({text!r:.60}): the grammar is a text")
        if not call.ends:
            raise PatchbayError(
                f"chain: {kind}: a grammar ends its text with an end token, and none is known: give ends=, or set model.hf.generation_config.eos_token_id"
            )
        self.kind, self.text, self.call = kind, text, call
        self.matcher = library().LLMatcher(tokens_of(call.model, call.ends), grammar_of(kind, text), log_level=0)
        if self.matcher.is_error():
            raise PatchbayError(f"chain: {kind}({text!r:.60}): {self.matcher.get_error().splitlines()[0]}")
        self.seen = -1  # tokens of the text, its prompt with it, that the grammar has been told of

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ids = input_ids[0].tolist()
        new = ids[self.seen :] if self.seen >= 0 else []
        self.seen = len(ids)
        if new and not self.matcher.consume_tokens(new):
            raise PatchbayError(
                f"chain: {self.kind}: {self.matcher.get_error().splitlines()[0]}; a tokenizer that lacks a letter of the language cannot write it"
            )
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: scores.shape[1]].astype(bool)).to(
            scores.device
        )
        left = scores.masked_fill(~allowed, -torch.inf)
        if not bool(left.isfinite().any()):
            said = self.call.model._need_tokenizer().decode(ids[-12:])
            raise PatchbayError(
                f"chain: {self.kind}: no token that may come after {said!r} is left by the grammar and the steps before it"
            )
        return left
