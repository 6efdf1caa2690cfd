"""Documents for training: texts, ids, lists of units, or a file, as lists of units of token ids; long texts are cut into rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from patchbay.corpus.reading import documents_of, whole
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError
from patchbay.train._objectives._objective import Document


def read(model: Model, data: Any, length: int) -> list[Document]:
    """Every document as units of ids, none longer than `length` tokens; PatchbayError names the document that cannot be."""
    return read_whose(model, data, length)[0]


def read_whose(model: Model, data: Any, length: int) -> tuple[list[Document], list[int]]:
    """The same, and of which of the given documents each is a piece."""
    given = documents_of(data) if isinstance(data, str) else data
    if isinstance(given, Mapping) or not hasattr(given, "__iter__"):
        raise PatchbayError(f"data: documents are a list or a file, got {type(data).__name__}")
    found: list[Document] = []
    whose: list[int] = []
    for number, one in enumerate(given):
        units = [list(unit) for unit in _units(model, one, number)]
        total = sum(map(len, units))
        if total < 2:
            raise PatchbayError(
                f"document {number} has {total} tokens: two or more, so that one can be told from another"
            )
        if len(units) > 1 and total > length:
            raise PatchbayError(
                f"document {number} has {total} tokens in {len(units)} units, and a row holds length={length}"
            )
        found += [units] if total <= length else [[units[0][i : i + length]] for i in range(0, total - 1, length)]
        whose += [number] * (len(found) - len(whose))
    if not found:
        raise PatchbayError("data: no documents")
    limit = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
    longest = max(sum(map(len, one)) for one in found)
    if limit and longest > limit:
        raise PatchbayError(f"rows of {longest} tokens; this model reads at most {limit}: give a smaller length")
    return found, whose


def _units(model: Model, one: Any, number: int) -> Sequence[Sequence[int]]:
    if isinstance(one, str):
        return [_ids(model, one, number)]
    if not isinstance(one, list | tuple) or not one:
        raise PatchbayError(
            f"document {number}: a text, token ids, or a list of units, got {type(one).__name__} {one!r:.40}"
        )
    if all(isinstance(unit, int) and not isinstance(unit, bool) for unit in one):
        return [_ids(model, one, number)]
    if all(isinstance(unit, str) or (isinstance(unit, list | tuple) and unit) for unit in one):
        return [_ids(model, unit, number) for unit in one]
    raise PatchbayError(f"document {number}: units are texts or lists of token ids, each with a token or more")


def _ids(model: Model, one: Any, number: int) -> list[int]:
    """A text of any length, or ids, as ids that the model has."""
    if isinstance(one, str):
        if model.tokenizer is None:
            raise PatchbayError(f"document {number} is a text, and this model has no tokenizer: give token ids")
        ids = list(model.tokenizer(whole(one, f"document {number}"))["input_ids"])
        unknown = _unknown(model.tokenizer)
        if unknown in ids:
            raise PatchbayError(
                f"document {number}: its token {ids.index(unknown)} is unknown to this tokenizer: {one!r:.60}"
            )
        one = ids
    wrong = next(
        (
            token
            for token in one
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < model.vocab_size
        ),
        None,
    )
    if wrong is not None:
        raise PatchbayError(f"document {number}: {wrong!r} is no token; this model has 0..{model.vocab_size - 1}")
    return list(one)


def _unknown(tokenizer: Any) -> int | None:
    """The token that stands for what a tokenizer does not know; None where it has none, or gives the same one another use, as OPT begins every text with it."""
    found: int | None = getattr(tokenizer, "unk_token_id", None)
    others = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "cls", "sep"))
    return None if found in others else found


def digest_of(documents: Sequence[Document], whose: Sequence[int]) -> str:
    """Of all tokens, and of which document each piece is."""
    told = [[list(unit) for unit in one] for one in documents]
    return hashlib.sha256(json.dumps([told, list(whose)]).encode()).hexdigest()
