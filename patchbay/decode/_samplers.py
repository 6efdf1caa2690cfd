"""What transformers lacks among samplers, as LogitsProcessors: mirostat v2, top-n-sigma, DRY, XTC; and chains of steps by name.

top_n_sigma    tokens with z >= max z - n std z, the standard deviation over the whole vocabulary
dry            z minus multiplier * base^(L - allowed) for a token that would extend a suffix of length L >= allowed that stood in the text
               before, L the longest such; a breaker ends a suffix
xtc            with a chance of its own at each step: of the tokens with p >= threshold, where they are two or more, all but the least likely go
mirostat       tokens with a surprise -log p <= mu, the likeliest always; after each draw mu -= eta * (surprise under that CUT law - tau), mu 2 tau at
               first. tau in nats; llama.cpp takes bits (tau 5 there is 3.47 here)
regex, json, lark   what a grammar allows (`_constrained.py`); watermark(ratio, bias, key) is transformers' own

Each is of one text at a time (`row`), since what it knows of the text so far is its own. Order is as written: min_p(0.1) after
temperature(0.8) reads the tempered law.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation import logits_process as theirs

from patchbay.decode._constrained import KINDS, Grammar
from patchbay.decode._loop import Call
from patchbay.decode._spoken import spoken
from patchbay.signal.port import PatchbayError

TAU, ETA = 3.0, 0.1


class TopNSigma(LogitsProcessor):  # type: ignore[misc]
    """Tokens within n standard deviations of the largest logit; does not depend on the temperature before it."""

    def __init__(self, n: float = 1.0) -> None:
        _check(n > 0, f"top_n_sigma({n:g}): above 0")
        self.n = n

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        held = scores.isfinite()
        mean = scores.masked_fill(~held, 0.0).sum(-1, keepdim=True) / held.sum(-1, keepdim=True)
        apart = (scores - mean).masked_fill(~held, 0.0).square().sum(-1, keepdim=True) / held.sum(-1, keepdim=True)
        return scores.masked_fill(scores < scores.amax(-1, keepdim=True) - self.n * apart.sqrt(), -math.inf)


class Dry(LogitsProcessor):  # type: ignore[misc]
    """Tokens that would extend a repeated suffix lose, the more the longer it is; `breakers` are tokens across which none is one."""

    def __init__(
        self, multiplier: float = 0.8, base: float = 1.75, allowed: int = 2, breakers: Sequence[int] = ()
    ) -> None:
        _check(
            multiplier >= 0 and base >= 1 and allowed >= 1,
            f"dry(multiplier={multiplier:g}, base={base:g}, allowed={allowed}): 0 or more, 1 or more, 1 or more",
        )
        self.multiplier, self.base, self.allowed, self.breakers = multiplier, base, allowed, frozenset(breakers)

    def lengths(self, text: Sequence[int]) -> dict[int, int]:
        """For each token that followed an earlier copy of the text's end, the length of the longest copy."""
        found: dict[int, int] = {}
        for end in range(1, len(text)):  # text[end] followed text[:end]
            length = 0
            while length < end and text[end - 1 - length] == text[-1 - length] not in self.breakers:
                length += 1
            if length and text[end] not in self.breakers:
                found[text[end]] = max(found.get(text[end], 0), length)
        return found

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        taken = torch.zeros_like(scores)
        for row, text in enumerate(input_ids.tolist()):
            for token, length in self.lengths(text).items():
                if length >= self.allowed:
                    taken[row, token] = self.multiplier * self.base ** min(length - self.allowed, 256)
        return scores - taken


class Xtc(LogitsProcessor):  # type: ignore[misc]
    """Leaves of the tokens above a threshold only the least likely, now and then; draws from `chance`."""

    def __init__(self, threshold: float = 0.1, probability: float = 0.5, chance: torch.Generator | None = None) -> None:
        _check(
            0 < threshold <= 1 and 0 <= probability <= 1,
            f"xtc(threshold={threshold:g}, probability={probability:g}): both between 0 and 1, the threshold above 0",
        )
        self.threshold, self.probability, self.chance = threshold, probability, chance

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        law = scores.softmax(-1)
        turns = torch.rand(len(scores), 1, generator=self.chance, dtype=torch.float64).to(law.device) < self.probability
        high = law >= self.threshold
        least = law.masked_fill(~high, math.inf).argmin(-1, keepdim=True)
        gone = high.scatter(1, least, False) & turns  # of one alone none goes
        return scores.masked_fill(gone, -math.inf)


class Mirostat(LogitsProcessor):  # type: ignore[misc]
    """Mirostat v2. What was drawn is read from the text of the next call, so that rows are to stay the same from call to call."""

    def __init__(self, tau: float = TAU, eta: float = ETA) -> None:
        _check(tau > 0 and eta >= 0, f"mirostat(tau={tau:g}, eta={eta:g}): above 0, and 0 or more; in nats")
        self.tau, self.eta = tau, eta
        self.mu: Tensor | None = None  # [row]
        self.law: Tensor | None = None  # the cut law of the call before, log [row, vocab]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.mu is None or self.law is None:
            self.mu = torch.full((len(scores),), 2 * self.tau, dtype=torch.float64, device=scores.device)
        else:
            observed = -self.law.gather(1, input_ids[:, -1:])[:, 0].double()
            self.mu = self.mu - self.eta * (observed - self.tau)
        surprise = -torch.log_softmax(scores.double(), -1)
        kept = surprise <= self.mu[:, None]
        kept = kept.scatter(1, scores.argmax(-1, keepdim=True), True)
        cut = scores.masked_fill(~kept, -math.inf)
        self.law = torch.log_softmax(cut.double(), -1)
        return cut


OURS: dict[str, Callable[..., Any]] = {"top_n_sigma": TopNSigma, "dry": Dry, "xtc": Xtc, "mirostat": Mirostat}
THEIRS: dict[str, Callable[..., Any]] = {
    "temperature": theirs.TemperatureLogitsWarper,
    "top_k": theirs.TopKLogitsWarper,
    "top_p": theirs.TopPLogitsWarper,
    "min_p": theirs.MinPLogitsWarper,
    "top_h": theirs.TopHLogitsWarper,
    "typical": theirs.TypicalLogitsWarper,
    "epsilon": theirs.EpsilonLogitsWarper,
    "eta": theirs.EtaLogitsWarper,
    "repetition_penalty": theirs.RepetitionPenaltyLogitsProcessor,
    "no_repeat_ngram": theirs.NoRepeatNGramLogitsProcessor,
}


def _check(true: bool, says: str) -> None:
    if not true:
        raise PatchbayError(says)


def chain_of(steps: Sequence[str], call: Call) -> Callable[[torch.Generator], list[LogitsProcessor]]:
    """What makes the processors of one text from its stream of chance; refuses what is no step, and what a step does not take."""
    said = [(text, *spoken(text, "chain")) for text in steps]
    shared: dict[str, LogitsProcessor] = {}  # of all texts, since it costs a table and has no state

    def one(
        text: str, name: str, values: list[Any], options: dict[str, Any], chance: torch.Generator
    ) -> LogitsProcessor:
        if name in KINDS:
            return Grammar(call, name, *values, **options)
        if name == "watermark":
            if text not in shared:
                size = int(call.model.hf.config.get_text_config().vocab_size)
                shared[text] = theirs.WatermarkLogitsProcessor(size, str(call.model.device), *values, **options)
            return shared[text]
        known = OURS.get(name) or THEIRS.get(name)
        if known is None:
            raise PatchbayError(f"chain: {name!r} is none of {', '.join([*OURS, *THEIRS, 'watermark', *KINDS])}")
        if name == "xtc":  # apart from the draws
            options = {**options, "chance": torch.Generator().manual_seed(chance.initial_seed() + 1)}
        step: LogitsProcessor = known(*values, **options)
        return step

    def made(chance: torch.Generator) -> list[LogitsProcessor]:
        found = []
        for text, name, values, options in said:
            try:
                found.append(one(text, name, values, options, chance))
            except (TypeError, ValueError) as error:
                raise PatchbayError(f"chain: {text}: {error}") from error
        return found

    made(torch.Generator())  # what cannot be meant is refused before anything runs
    return made
