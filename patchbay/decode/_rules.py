"""Rules on the output as a transformers LogitsProcessor: an end that comes nearer, tokens that were there, a few constants.

p(v) proportional to p_LM(v) exp(r(v)),   r = the sum of three rules, t the number of tokens of the response so far

ends        slope * t for 0 < t < 250, and nothing from 250 on as published (a larger push that the published code computes
            after 1,024 tokens is thrown away there); `capped` keeps slope * 250 instead
penalty     taken from every token that is in the text already, prompt included, each once
bias        a constant for a few tokens, each named by its text, never by its id
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor

from patchbay.signal.port import PatchbayError

SLOPE, UNTIL = 15.0 / 250.0, 250
PENALTY = 1.5
BIAS = {
    "<": -4.0, " <": -4.0, "|": -4.0, " I": -5.0, "I": -5.0, " We": -3.0, "What": -5.0, " should": -6.0, " *": 1.0, " -": 1.0,
    "    ": 1.0, " #": 1.0, " ##": 1.0, "\n": 1.0, "!": 1.0,
}  # fmt: skip
"""The published constants, by text."""
Mode = Literal["as published", "capped", "off"]


class Rules(LogitsProcessor):  # type: ignore[misc]
    """The three rules, for texts whose prompts are `start` tokens long: `hf.generate(ids, logits_processor=[Rules(...)])`.

    `ends`: the tokens that end a text. `bias`: token id -> constant (`by_text` makes it). `since`: the position from which tokens count as
    there already, after the padding of a row.
    """

    def __init__(
        self,
        start: int,
        ends: Sequence[int],
        *,
        mode: Mode = "as published",
        slope: float = SLOPE,
        penalty: float = PENALTY,
        bias: Mapping[int, float] | None = None,
        since: int = 0,
    ) -> None:
        self.start, self.ends, self.mode, self.slope = start, list(ends), mode, slope
        self.penalty, self.bias, self.since = penalty, dict(bias or {}), since

    def rise(self, t: int) -> float:
        """What an end gains after a response of t tokens."""
        if self.mode == "off" or t < 1:
            return 0.0
        return self.slope * min(t, UNTIL) if self.mode == "capped" or t < UNTIL else 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        added = torch.zeros_like(scores)
        if self.ends:
            added[:, self.ends] += self.rise(input_ids.shape[1] - self.start)
        if self.bias:
            added[:, list(self.bias)] += torch.tensor(list(self.bias.values())).to(added)
        if self.penalty:
            there = torch.zeros_like(scores, dtype=torch.bool).scatter(1, input_ids[:, self.since :], True)
            added -= self.penalty * there
        return scores + added


def by_text(tokenizer: Any, bias: Mapping[str, float], *, missing: bool = False) -> dict[int, float]:
    """Constants by token id, of tokens named by their text. A text of several tokens is refused with its pieces, or with `missing` left out."""
    found = {}
    for text, value in bias.items():
        ids = _pieces(tokenizer, text)
        if len(ids) == 1:
            found[ids[0]] = float(value)
        elif not missing:
            pieces = [tokenizer.convert_ids_to_tokens(one) for one in ids]
            raise PatchbayError(f"bias: {text!r} is no single token here but {pieces}; name a text that is one")
    return found


def _pieces(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text as it stands inside another one, so that no start of a text is added to it."""
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer(f"a{text}", add_special_tokens=False)["input_ids"]
    return (
        list(whole[len(before) :])
        if whole[: len(before)] == before
        else list(tokenizer(text, add_special_tokens=False)["input_ids"])
    )
