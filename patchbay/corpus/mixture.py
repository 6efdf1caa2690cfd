"""Mixture: from the order of a tokenizer's merges, how much of which kind of text it was trained on.

A byte-pair encoding merges what was commonest. With c_ip the count of pair p per pair of text of kind i, after the merges so far, and m the pair merged next:

    sum_i a_i (c_ip - c_im) <= v_t + v_p   for every other pair p of step t;      a >= 0, sum a = 1, v >= 0;      least sum v

A linear program (scipy's HiGHS) over the `competitors` commonest pairs of each kind at each of the first `merges` steps. a are shares of pairs of symbols, which
is nearly the share of letters. What the samples leave open is shown: `least` and `most` are the ends of each share over all mixtures of that slack, `low`
and `high` those of 95 % of samples drawn again. `slack` is how far the best mixture is from having made the tokenizer (0: it could have), `shuffled` the same of
its merges in another order, the null. A kind that is missing from the list leaves its share to those like it, and slack.

Hayase et al. 2024, "Data Mixture Inference: What do BPE Tokenizers Reveal about their Training Data?", who solve it by Gurobi with rows added as needed.
"""

from __future__ import annotations

import heapq
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from patchbay.errors import PatchbayError

Pair = tuple[str, str]
Array = np.ndarray[Any, Any]
SAME = 1e-7  # how much more slack still counts as the same


@dataclass(frozen=True)
class Mixture:
    """Shares of kinds of text, by kind; slacks are sums of shares of pairs, over `rows` comparisons of `merges` steps."""

    shares: dict[str, float]
    least: dict[str, float]
    most: dict[str, float]
    low: dict[str, float] | None
    high: dict[str, float] | None
    slack: float
    shuffled: float
    merges: int
    rows: int


class Merges:
    """A byte-pair tokenizer from a `tokenizer.json`, a `tokenizers.Tokenizer` or a fast tokenizer of transformers: its merges, and how it cuts text first."""

    def __init__(self, tokenizer: Any) -> None:
        made = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if isinstance(made, str | Path):
            from tokenizers import Tokenizer

            if not Path(made).is_file():
                raise PatchbayError(f"{made} is no file: give a tokenizer.json, or a tokenizer")
            try:
                made = Tokenizer.from_file(str(made))
            except Exception as error:  # tokenizers raises no other kind
                raise PatchbayError(f"{made} is no tokenizer.json ({str(error)[:200]})") from error
        if not hasattr(made, "to_str"):
            raise PatchbayError(
                f"a {type(tokenizer).__name__} says no merges: give a fast tokenizer or its tokenizer.json"
            )
        model = json.loads(made.to_str())["model"]
        if model.get("type") != "BPE":
            raise PatchbayError(f"a tokenizer of the kind {model.get('type')} has no order of merges: only BPE has")
        marked = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
        if marked:
            raise PatchbayError(f"this tokenizer marks its pieces ({', '.join(marked)}): such merges are not read here")
        self.vocab: dict[str, int] = model["vocab"]
        self.pairs: list[Pair] = [
            (one[0], one[1]) for one in (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        ]
        self._normalizer, self._cutter = made.normalizer, made.pre_tokenizer

    def words(self, text: str) -> Iterator[str]:
        """Pieces of a text that merges stay inside of, in the tokenizer's own letters."""
        said = text if self._normalizer is None else self._normalizer.normalize_str(text)
        if self._cutter is None:  # as sentencepiece's, which are trained on words
            yield from re.findall("▁[^▁]*|[^▁]+", said)
        else:
            yield from (piece for piece, _ in self._cutter.pre_tokenize_str(said))

    def symbols(self, word: str) -> list[list[str]]:
        """A word as symbols, cut at those that the vocabulary has not got."""
        runs: list[list[str]] = [[]]
        for letter in word:
            if letter in self.vocab:
                runs[-1].append(letter)
            else:
                runs.append([])
        return [run for run in runs if len(run) > 1]


class Counts:
    """Pairs of one kind of text, as merges are made: `pairs` [draw] by pair, of the sample as it is first and then of samples drawn again."""

    def __init__(self, words: Mapping[str, Array], merges: Merges) -> None:
        self.runs: list[list[str]] = []
        self.weights: list[Array] = []
        self.pairs: dict[Pair, Array] = {}
        self.where: dict[Pair, set[int]] = defaultdict(set)
        for word, weight in words.items():
            for run in merges.symbols(word):
                self.runs.append(run)
                self.weights.append(weight)
                self._count(len(self.runs) - 1, 1)
        self.total: Array = sum(self.pairs.values(), np.zeros(1))

    def _count(self, at: int, sign: int) -> None:
        for pair in pairwise(self.runs[at]):
            if pair in self.pairs:
                self.pairs[pair] = self.pairs[pair] + sign * self.weights[at]
            else:
                self.pairs[pair] = sign * self.weights[at]
            self.where[pair].add(at)

    def merge(self, pair: Pair) -> None:
        """Make one symbol of the pair wherever it stands; only words that hold it are counted again."""
        for at in self.where.pop(pair, ()):
            self._count(at, -1)
            self.runs[at] = merged(self.runs[at], pair)
            self._count(at, 1)
        self.pairs.pop(pair, None)

    def commonest(self, n: int) -> list[Pair]:
        return heapq.nlargest(n, self.pairs, key=lambda pair: (float(self.pairs[pair][0]), pair))

    def share(self, pair: Pair) -> Array:
        """Of a pair, per pair of text at the start [draw]."""
        return self.pairs.get(pair, np.zeros_like(self.total)) / self.total


def merged(run: Sequence[str], pair: Pair) -> list[str]:
    """A word after one merge, from the left."""
    found, at = [], 0
    while at < len(run):
        both = at + 1 < len(run) and (run[at], run[at + 1]) == pair
        found.append(run[at] + run[at + 1] if both else run[at])
        at += 1 + both
    return found


def infer(
    tokenizer: Any,
    samples: Mapping[str, Iterable[str]],
    *,
    merges: int = 300,
    competitors: int = 15,
    draws: int = 0,
    seed: int = 0,
) -> Mixture:
    """The shares of kinds of text that best explain the order of a tokenizer's first merges.

    `samples`: texts of each kind, which are read once; a text is what is drawn again. `merges`: steps that are asked. `competitors`: commonest pairs of each
    kind that the merged one had to beat. `draws`: samples drawn again for `low` and `high`, 0 for none.
    """
    read = Merges(tokenizer)
    if len(samples) < 2 or min(merges, competitors) < 1 or draws < 0:
        raise PatchbayError(
            f"{len(samples)} kinds, merges={merges}, competitors={competitors}, draws={draws}: two kinds or more, one or more, 0 or more"
        )
    words = {kind: _words(read, kind, texts, draws, seed) for kind, texts in samples.items()}
    asked = read.pairs[:merges]
    steps, found = _compared(read, words, asked, competitors)
    solved = [_solved(steps, found[..., draw]) for draw in range(draws + 1)]
    shares, slack = solved[0]
    ends = _ends(steps, found[..., 0], slack)
    other = list(asked)
    random.Random(seed).shuffle(other)
    null_steps, null = _compared(
        read, {kind: {w: c[:1] for w, c in own.items()} for kind, own in words.items()}, other, competitors
    )
    again = np.array([one for one, _ in solved[1:]])
    kinds = list(samples)

    def named(values: Iterable[float]) -> dict[str, float]:
        return dict(zip(kinds, map(float, values), strict=True))

    return Mixture(
        named(shares), named(ends[:, 0]), named(ends[:, 1]), named(np.quantile(again, 0.025, 0)) if draws else None,
        named(np.quantile(again, 0.975, 0)) if draws else None, slack, _solved(null_steps, null[..., 0])[1], len(asked), len(steps),
    )  # fmt: skip


def made_by(
    tokenizer: Any,
    samples: Mapping[str, Iterable[str]],
    tokens: Iterable[int],
    *,
    shares: Mapping[str, float] | None = None,
) -> dict[int, dict[str, float]]:
    """Of each token, how much of the pair that it was merged from stands in which kind of text, at the step that merged it:

        a_i c_i / sum over kinds of a_j c_j,   c_i the pair's count per pair of text of kind i

    `tokens`: ids, such as those that `find.neuron_vocabulary` names. `shares`: a_i, as `infer` gives them; without, all kinds alike. A token whose pair stands
    in no sample then has NaN for every kind; one that no merge made (a letter, a special token) is refused.
    """
    read = Merges(tokenizer)
    if shares is not None and set(shares) != set(samples):
        raise PatchbayError(f"shares of {', '.join(shares)}, samples of {', '.join(samples)}: one share for each kind")
    made = {read.vocab[left + right]: step for step, (left, right) in reversed(list(enumerate(read.pairs)))}
    asked = list(tokens)
    if wrong := [token for token in asked if token not in made]:
        raise PatchbayError(f"token {wrong[0]} is made by no merge of this tokenizer")
    counts = {kind: Counts(_words(read, kind, texts, 0, 0), read) for kind, texts in samples.items()}
    at_step: dict[int, dict[str, float]] = {}
    for step, pair in enumerate(read.pairs[: 1 + max((made[token] for token in asked), default=-1)]):
        mine = {
            kind: float(own.share(pair)[0]) * (1.0 if shares is None else shares[kind]) for kind, own in counts.items()
        }
        total = sum(mine.values())
        at_step[step] = {kind: one / total if total else float("nan") for kind, one in mine.items()}
        for own in counts.values():
            own.merge(pair)
    return {token: at_step[made[token]] for token in asked}


def _words(read: Merges, kind: str, texts: Iterable[str], draws: int, seed: int) -> dict[str, Array]:
    """How often each word stands in the texts, and in samples in which each text comes as often as a Poisson number of mean 1 says [1 + draw]."""
    if isinstance(texts, str):
        raise PatchbayError(f"the texts of {kind!r} are one text: give a list of them, or corpus.texts_of(file)")
    draw = np.random.default_rng([seed, *kind.encode()])
    found: dict[str, Array] = defaultdict(lambda: np.zeros(1 + draws))
    for text in texts:
        often = np.concatenate([[1.0], draw.poisson(1.0, draws)])
        for word, count in Counter(read.words(text)).items():
            found[word] += count * often
    if not any(read.symbols(word) for word in found):
        raise PatchbayError(f"the texts of {kind!r} hold no pair of letters that this tokenizer has")
    if empty := sum(not any(found[word][draw] for word in found if read.symbols(word)) for draw in range(1 + draws)):
        raise PatchbayError(
            f"{empty} of {draws} samples of {kind!r} drawn again hold nothing: there are too few texts for an interval; give more, each a line, or draws=0"
        )
    return dict(found)


def _compared(
    read: Merges, words: Mapping[str, Mapping[str, Array]], asked: Sequence[Pair], competitors: int
) -> tuple[list[tuple[int, Pair]], Array]:
    """Rows of the program: (step, other pair) and c_ip - c_im [row, kind, draw]."""
    counts = [Counts(own, read) for own in words.values()]
    steps, rows = [], []
    for step, pair in enumerate(asked):
        others = dict.fromkeys(one for own in counts for one in own.commonest(competitors))
        base = [own.share(pair) for own in counts]
        for other in others:
            if other != pair:
                steps.append((step, other))
                rows.append(np.stack([own.share(other) - less for own, less in zip(counts, base, strict=True)]))
        for own in counts:
            own.merge(pair)
    if not rows:
        raise PatchbayError("no pair is left beside the merged one: give longer samples")
    return steps, np.stack(rows)


def _program(steps: Sequence[tuple[int, Pair]], rows: Array) -> dict[str, Any]:
    """Columns are the shares, a slack for each step, and one for each other pair."""
    try:
        from scipy.sparse import csr_array, hstack
    except ImportError as error:
        raise PatchbayError(
            f"mixtures are found by scipy, which is not installed: pip install 'patchbay-lm[mixture]' ({error})"
        ) from error
    n, kinds = rows.shape
    times, others = ({one: i for i, one in enumerate(dict.fromkeys(some))} for some in zip(*steps, strict=True))
    place = [(times[time], len(times) + others[other]) for time, other in steps]
    slacks = csr_array(
        (-np.ones(2 * n), (np.repeat(np.arange(n), 2), np.ravel(place))), shape=(n, len(times) + len(others))
    )
    sums = np.concatenate([np.ones(kinds), np.zeros(slacks.shape[1])])
    return {
        "A_ub": hstack([csr_array(rows), slacks], format="csr"),
        "b_ub": np.zeros(n),
        "A_eq": sums[None],
        "b_eq": [1.0],
        "method": "highs",
    }


def _run(cost: Array, **program: Any) -> Any:
    from scipy.optimize import linprog

    found = linprog(cost, **program)
    if not found.success:
        raise PatchbayError(f"the linear program was not solved: {found.message}")
    return found


def _solved(steps: Sequence[tuple[int, Pair]], rows: Array) -> tuple[Array, float]:
    """Shares [kind] and the least slack."""
    program = _program(steps, rows)
    found = _run(1.0 - program["A_eq"][0], **program)
    return found.x[: rows.shape[1]].clip(0.0, 1.0), max(0.0, float(found.fun))


def _ends(steps: Sequence[tuple[int, Pair]], rows: Array, slack: float) -> Array:
    """The least and the largest share of each kind among all mixtures of that slack [kind, 2]."""
    from scipy.sparse import csr_array, vstack

    program = _program(steps, rows)
    bound = csr_array(1.0 - program["A_eq"])
    program |= {"A_ub": vstack([program["A_ub"], bound]), "b_ub": np.append(program["b_ub"], slack * (1 + SAME) + 1e-9)}
    one = np.eye(rows.shape[1], bound.shape[1])
    ends = [[_run(sign * unit, **program).x[i] for sign in (1.0, -1.0)] for i, unit in enumerate(one)]
    return np.array(ends).clip(0.0, 1.0)  # the solver is exact to its tolerance, on either side
