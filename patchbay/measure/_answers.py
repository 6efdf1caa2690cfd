"""Answers: the log-probability, in nats, of each of many texts after each of many prompts.

    log p(answer | prompt) = sum over the answer's tokens of log p(token | prompt, tokens before it)

Prompt and answer are tokenised as one text; the answer is what follows the prompt's own tokens, and where a tokenizer joins the two
the pair is refused, or with boundary="back_up" all answers of that prompt are scored from the last token that they share with it.
A space at a prompt's end moves to its answers. Whole sequences are scored: the first tokens of several answers may be one
token, and the sum of first-token probabilities over answers can then exceed 1. Of answers none of which begins another, the
sum of probabilities never does.

A row that is run is a prompt with as much of an answer as scores it, without its last token: answers of one token cost nothing
beyond their prompt, those that begin alike share a row, and so do equal prompts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchbay.measure._runs import token_logprobs
from patchbay.model.model import Model
from patchbay.model.tokens import n_unknown, tokenize, unknown_pieces
from patchbay.signal.port import PatchbayError

Ids = tuple[int, ...]
NORMS = ("sum", "token", "char", "byte")
BOUNDARIES = ("refuse", "back_up")


@dataclass(frozen=True)
class Spelled:
    """Prompts and their answers as ids; `where` names each prompt in messages."""

    prompts: list[Ids]
    answers: list[list[Ids]]
    texts: list[list[str | None]]  # of the answers; None where they were given as ids
    where: list[str]


@dataclass(frozen=True)
class Scores:
    """`logp` [prompt, choice] in nats and `n_tokens` [prompt, choice]; NaN and 0 where a prompt has fewer answers. `greedy` [prompt,
    choice]: whether no token is likelier than the answer's, at any of its places."""

    logp: Tensor
    n_tokens: Tensor
    greedy: Tensor
    spelled: Spelled

    @property
    def mass(self) -> Tensor:
        """The probability of all choices together, [prompt]."""
        return self.logp.exp().nansum(1)

    def normed(self, norm: str) -> Tensor:
        """Log-probabilities as they are ("sum"), or by token, character or byte of the answer, the space in front not counted."""
        if norm not in NORMS:
            raise PatchbayError(f"norm={norm!r}; possible are {', '.join(NORMS)}")
        if norm == "sum":
            return self.logp
        if norm == "token":
            return self.logp / self.n_tokens
        return self.logp / self._lengths(norm)

    def _lengths(self, norm: str) -> Tensor:
        sizes = torch.ones_like(self.logp)
        for i, texts in enumerate(self.spelled.texts):
            for j, text in enumerate(texts):
                if text is None:
                    raise PatchbayError(
                        f"norm={norm!r}: {self.spelled.where[i]} has answers given as ids, which have no {norm}s"
                    )
                sizes[i, j] = max(1, len(text.lstrip().encode() if norm == "byte" else text.lstrip()))
        return sizes


def scores(
    model: Model,
    prompts: Sequence[Any],
    answers: Sequence[Sequence[Any]],
    *,
    where: Sequence[str] | None = None,
    boundary: str = "refuse",
    batch_size: int = 32,
) -> Scores:
    """log p of every answer of every prompt; prompts and answers are texts, or ids. Raises PatchbayError for what cannot be scored."""
    spelled = spell(model, prompts, answers, where=where, boundary=boundary)
    return score(model, spelled, batch_size=batch_size)


def outcomes(
    model: Model,
    prompts: Sequence[Any],
    choices: Sequence[Sequence[Any]],
    *,
    where: Sequence[str] | None = None,
    boundary: str = "refuse",
    batch_size: int = 32,
) -> Scores:
    """`scores` of choices that are different outcomes: before anything runs, `refuse_unclear` says by item where they are not."""
    spelled = spell(model, prompts, choices, where=where, boundary=boundary)
    refuse_unclear(spelled)
    return score(model, spelled, batch_size=batch_size)


def score(model: Model, spelled: Spelled, *, batch_size: int = 32) -> Scores:
    """log p of answers that are spelled already."""
    rows: dict[tuple[Ids, int], dict[tuple[int, int], int]] = {}  # (row, length of its prompt) -> what is read in it
    at: list[list[list[tuple[tuple[Ids, int], int]]]] = []  # [prompt][answer] -> where each token's number will be
    for prompt, each in zip(spelled.prompts, spelled.answers, strict=True):
        row_of = _rows([ids[:-1] for ids in each])
        places = []
        for ids in each:
            key = (prompt + row_of[ids[:-1]], len(prompt))
            reads = rows.setdefault(key, {})
            places.append(
                [(key, reads.setdefault((len(prompt) - 1 + k, token), len(reads))) for k, token in enumerate(ids)]
            )
        at.append(places)
    keys = list(rows)
    rows_of, starts = [key[0] for key in keys], [key[1] for key in keys]
    values = token_logprobs(model, rows_of, [list(rows[key]) for key in keys], starts, best=True, batch_size=batch_size)
    found = {key: value.tolist() for key, value in zip(keys, values, strict=True)}
    width = max(map(len, spelled.answers))
    logp = torch.full((len(at), width), torch.nan, dtype=torch.float64)
    n_tokens, greedy = torch.zeros(len(at), width, dtype=torch.long), torch.zeros(len(at), width, dtype=torch.bool)
    for i, places in enumerate(at):
        for j, read in enumerate(places):
            pairs = [found[key][k] for key, k in read]  # (own, the likeliest token's) of each token
            logp[i, j], greedy[i, j] = sum(own for own, _ in pairs), all(own == best for own, best in pairs)
            n_tokens[i, j] = len(read)
    return Scores(logp, n_tokens, greedy, spelled)


def _rows(heads: Sequence[Ids]) -> dict[Ids, Ids]:
    """The row in which each beginning of an answer stands: of beginnings that begin others, the longest."""
    row_of: dict[Ids, Ids] = {}
    for head in sorted(set(heads), key=len, reverse=True):
        if head not in row_of:
            row_of |= {head[:n]: head for n in range(len(head) + 1) if head[:n] not in row_of}
    return row_of


# --- from text to ids ---------------------------------------------------------------------------------


def spell(
    model: Model,
    prompts: Sequence[Any],
    answers: Sequence[Sequence[Any]],
    *,
    where: Sequence[str] | None = None,
    boundary: str = "refuse",
) -> Spelled:
    """Ids of prompts and answers; refuses, by item, what has no tokens, unknown ones, or no place in the model's context."""
    if boundary not in BOUNDARIES:
        raise PatchbayError(f"boundary={boundary!r}; possible are {', '.join(BOUNDARIES)}")
    names = [f"item {i}" for i in range(len(prompts))] if where is None else list(where)
    if len(prompts) != len(answers) or not len(prompts):
        raise PatchbayError(f"{len(prompts)} prompts and {len(answers)} lists of answers: one list for each prompt")
    found: list[tuple[Ids, list[Ids]]] = []
    texts: list[list[str | None]] = []
    known = _tokenized(model, prompts, answers)
    for prompt, each, name in zip(prompts, answers, names, strict=True):
        if isinstance(each, str) or not len(each):
            raise PatchbayError(f"{name} has no list of answers: got {each!r:.40}")
        if isinstance(prompt, str):
            found.append(_joined(model, prompt, each, known, name, boundary))
        else:
            found.append((tuple(map(int, prompt)), [tuple(map(int, ids)) for ids in each]))
        texts.append([text if isinstance(text, str) else None for text in each])
        _check(model, *found[-1], each, name)
    return Spelled([p for p, _ in found], [a for _, a in found], texts, names)


def _moved(prompt: str, answer: str) -> tuple[str, str]:
    """Spaces at a prompt's end belong to its answers."""
    bare = prompt.rstrip(" ")
    return bare, prompt[len(bare) :] + answer.lstrip(" ") if len(bare) < len(prompt) else answer


def _tokenized(model: Model, prompts: Sequence[Any], answers: Sequence[Sequence[Any]]) -> dict[str, Ids]:
    """Ids of every text that is needed, each once."""
    wanted: dict[str, None] = {}
    for prompt, each in zip(prompts, answers, strict=True):
        if not isinstance(prompt, str):
            continue
        for answer in each:
            if not isinstance(answer, str):
                raise PatchbayError(
                    f"prompt {prompt[-40:]!r} is a text and its answer {answer!r:.40} is none: texts with texts, ids with ids"
                )
            bare, rest = _moved(prompt, answer)
            wanted[bare] = wanted[bare + rest] = None
    if not wanted:
        return {}
    tokenizer = model._need_tokenizer()
    return dict(zip(wanted, tokenize(tokenizer, list(wanted)), strict=True))


def _joined(
    model: Model, prompt: str, each: Sequence[str], known: dict[str, Ids], name: str, boundary: str
) -> tuple[Ids, list[Ids]]:
    """A prompt's ids and those that follow them in each of its answers."""
    pairs = [_moved(prompt, answer) for answer in each]
    bare = pairs[0][0]
    own, wholes = known[bare], [known[bare + rest] for _, rest in pairs]
    kept = min(_common(own, whole) for whole in wholes)
    if kept < len(own) and boundary == "refuse":
        at = next(i for i, whole in enumerate(wholes) if _common(own, whole) < len(own))
        spelled = model._need_tokenizer().convert_ids_to_tokens
        raise PatchbayError(
            f"{name}: the tokenizer joins the prompt's end with {each[at]!r}: {' '.join(spelled(list(own[-4:])))} became "
            f"{' '.join(spelled(list(wholes[at][max(0, len(own) - 4) :])))}; boundary='back_up' scores all its answers from before that"
        )
    tokenizer = model._need_tokenizer()
    for (_, rest), whole in zip(pairs, wholes, strict=True):
        if n_unknown(tokenizer, rest, whole[kept:]):
            raise PatchbayError(
                f"{name}: the tokenizer does not know {unknown_pieces(tokenizer, rest)} of {rest!r}, so all such answers would score alike"
            )
    return own[:kept], [whole[kept:] for whole in wholes]


def _common(a: Ids, b: Ids) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _check(model: Model, prompt: Ids, answers: Sequence[Ids], given: Sequence[Any], name: str) -> None:
    if not prompt:
        raise PatchbayError(
            f"{name}: the prompt has no token and the tokenizer puts no start token in front, so nothing stands before its answers"
        )
    for ids, answer in zip(answers, given, strict=True):
        if not ids:
            raise PatchbayError(f"{name}: the answer {answer!r} has no token")
        outside = [token for token in (*prompt, *ids) if not 0 <= token < model.vocab_size]
        if outside:
            raise PatchbayError(f"{name}: token ids {outside[:4]} are outside 0..{model.vocab_size - 1}")
        longest = model.longest_prompt
        if longest is not None and len(prompt) + len(ids) - 1 > longest:
            raise PatchbayError(
                f"{name}: prompt and answer have {len(prompt) + len(ids)} tokens and the model reads {longest}; nothing is cut off in silence: shorten it, or leave it out"
            )


def refuse_unclear(spelled: Spelled) -> None:
    """Raise PatchbayError where a prompt's answers are fewer than two, hold one twice, or one that begins another: their
    probabilities are then not those of different outcomes."""
    for name, answers, texts in zip(spelled.where, spelled.answers, spelled.texts, strict=True):
        if len(answers) < 2:
            raise PatchbayError(f"{name} has one choice: two or more are needed")
        ordered = sorted(range(len(answers)), key=lambda i: answers[i])
        for i, j in itertools.pairwise(ordered):
            if answers[i] == answers[j]:
                raise PatchbayError(f"{name} has the choice {texts[i] or answers[i]!r} twice")
            if answers[j][: len(answers[i])] == answers[i]:
                raise PatchbayError(
                    f"{name}: the choice {texts[i] or answers[i]!r} begins the choice {texts[j] or answers[j]!r}, so the first is counted in "
                    "the second; end both with the same mark, such as a full stop"
                )
