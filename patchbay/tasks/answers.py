"""Answers: what follows a prompt, as one token or several, and what a whole answer scores.

A prompt and its answer are tokenised as one text, once, and the answer is what follows the prompt's own tokens. An answer of
several tokens has the log-probability

    log p(answer) = sum over k of log p(token k | prompt, tokens before k),

each term read at the last position of a `continuation`: the prompt followed by the answer's first k tokens. Sums are of answers
as they are, or divided (`normalise`) by their number of tokens, of bytes or of characters, the space in front not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from patchbay.errors import PatchbayError
from patchbay.model.tokens import n_unknown, tokenize, unknown_pieces

if TYPE_CHECKING:
    from torch import Tensor

Ids = tuple[int, ...]
NORMALISATIONS = ("none", "token", "byte", "character")


class Absent(Sequence[Any]):
    """Stands where answers of one token would, and says so to whoever reads them."""

    def __init__(self, why: str) -> None:
        self.why = why

    def _refuse(self) -> NoReturn:
        raise PatchbayError(self.why)

    def __len__(self) -> int:  # noqa: PLE0303
        self._refuse()

    def __iter__(self) -> Iterator[Any]:
        self._refuse()

    def __getitem__(self, which: Any) -> Any:
        self._refuse()

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Absent) and other.why == self.why

    def __hash__(self) -> int:
        return hash(self.why)


# --- from text ----------------------------------------------------------------------------------------


def whole_answers(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Ids | None]:
    """(prompt, answer) -> the ids that follow the prompt's own; None where there are none, where the tokens of the two are not
    apart, or where the tokenizer does not know a part of the answer."""
    unique = list(dict.fromkeys(pairs))
    prompts = tokenize(tokenizer, [prompt for prompt, _ in unique])
    wholes = tokenize(tokenizer, [type(prompt)(prompt + answer) for prompt, answer in unique])
    special = set(tokenizer.all_special_ids)
    found: dict[tuple[str, str], Ids | None] = {}
    for pair, prompt, whole in zip(unique, prompts, wholes, strict=True):
        after = whole[len(prompt) :]
        apart = whole[: len(prompt)] == prompt and len(after) > 0
        found[pair] = after if apart and special.isdisjoint(after) else None
    return found


def answer_ids(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], int | None]:
    """(prompt, answer) -> the id that follows the prompt's own ids; None where the answer is not one known token."""
    whole = whole_answers(tokenizer, pairs)
    return {pair: ids[0] if ids is not None and len(ids) == 1 else None for pair, ids in whole.items()}


def not_spelled(tokenizer: Any, failed: Sequence[tuple[str, str]], n_asked: int) -> str:
    """Why answers do not follow their prompts, and what to write instead."""
    shown = [f"{answer!r} ({_why(tokenizer, prompt, answer)})" for prompt, answer in failed[:5]]
    hint = ""
    if any(prompt[-1:].isspace() for prompt, _ in failed):
        hint = "; drop the space at the prompt's end and let the answer begin with it"
    elif None not in answer_ids(tokenizer, [(prompt, " " + answer) for prompt, answer in failed]).values():
        hint = "; with a space in front each of them would be one token"
    return (
        f"an answer is made of known tokens that follow its prompt's own; {len(failed)} of {n_asked} are not: "
        f"{', '.join(shown)}{', ...' if len(failed) > 5 else ''}{hint}"
    )


def _why(tokenizer: Any, prompt: str, answer: str) -> str:
    alone, whole = tokenize(tokenizer, [prompt, type(prompt)(prompt + answer)])
    if whole[: len(alone)] != alone:
        return f"the tokenizer joins it with the end of {prompt[-20:]!r}"
    if n_unknown(tokenizer, answer, whole[len(alone) :]):
        return f"the tokenizer does not know {unknown_pieces(tokenizer, answer)}"
    return "it is no token" if len(whole) == len(alone) else "it holds a special token"


# --- scores -------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One token of one answer: read at the last position of `ids`, a prompt and the answer's tokens before it."""

    prompt: int
    answer: int  # among the prompt's answers, 0 the right one
    place: int  # in the answer
    ids: Ids
    target: int


def steps_of(prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]]) -> list[Step]:
    """Every token of every answer."""
    return [
        Step(i, a, k, (*prompt, *answer[:k]), answer[k])
        for i, (prompt, each) in enumerate(zip(prompts, answers, strict=True))
        for a, answer in enumerate(each)
        for k in range(len(answer))
    ]


def continuations(steps: Sequence[Step]) -> tuple[tuple[Ids, ...], list[int]]:
    """The different prompts that the steps are read in, and for each step which: answers that begin alike share theirs."""
    seen: dict[tuple[int, Ids], int] = {}
    at = [seen.setdefault((step.prompt, step.ids), len(seen)) for step in steps]
    return tuple(ids for _, ids in seen), at


def sizes(answers: Sequence[Sequence[Ids]], texts: Sequence[Sequence[str]], normalise: str) -> list[list[float]]:
    """What the log-probability of each answer is divided by."""
    if normalise == "token":
        return [[float(len(ids)) for ids in each] for each in answers]
    if normalise == "none":
        return [[1.0] * len(each) for each in answers]
    length = (lambda text: len(text.encode())) if normalise == "byte" else len
    return [[float(max(1, length(text.lstrip()))) for text in each] for each in texts]


def totals(values: Tensor, steps: Sequence[Step], divisors: Sequence[Sequence[float]]) -> Tensor:
    """Log-probability of every answer, [..., prompt, answer], NaN where a prompt has fewer, from that of every step [..., step]."""
    import torch

    widest = max(map(len, divisors))
    flat = torch.tensor([step.prompt * widest + step.answer for step in steps], device=values.device)
    summed = values.new_zeros(*values.shape[:-1], len(divisors) * widest).index_add(-1, flat, values)
    filled = [[*each, *[float("nan")] * (widest - len(each))] for each in divisors]
    return summed.unflatten(-1, (len(divisors), widest)) / torch.tensor(
        filled, device=values.device, dtype=values.dtype
    )


def compared(metric: str, answers: Tensor) -> Tensor:
    """A metric of whole answers, [..., prompt], from their log-probabilities [..., prompt, answer], the right one first."""
    right, wrong = answers[..., 0], answers[..., 1:]
    if metric == "log_probability":
        return right
    if metric == "probability":
        return right.exp()
    if metric == "logit_diff":
        return right - wrong.nanmean(-1)
    best = wrong.nan_to_num(nan=float("-inf")).amax(-1)
    return right - best if metric == "logit_diff_best" else (right > best).to(answers.dtype)
