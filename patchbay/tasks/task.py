"""Task: prompts with right and wrong answers, a corrupted twin of each, and a metric. Data only; it never runs a model.

A task asks one thing of a model: at the last position of each prompt, which token comes next? `score` turns the logits
there into one number per prompt, by one of `METRICS`. The corrupted twin of a prompt is the same text with the one
thing changed that decides the answer; `marks` name the token positions that matter (subject, needle, ...), and `labels`
hold what else is known of each prompt. A score says how a model answers these prompts, in these words, as these tokens:
nothing of other wordings, and nothing of how the model does it.

Text becomes ids as the tokenizer does it by default: where it puts a start token in front by itself, so does the task,
and where it does not, neither does the task. An end token that a tokenizer would append is left off.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from patchbay.model.tokens import as_texts, tokenize
from patchbay.signal.port import PatchbayError, suggest

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from patchbay.model.model import Model

METRICS = {
    "logit_diff": "logits",
    "probability": "probability",
    "log_probability": "nats",
    "rank": "rank",
    "accuracy": "share of prompts",
    "kl": "nats",
}
"""Metric -> unit. All but rank and kl are better when higher; rank is 0 at the top."""

Prompts = tuple[tuple[int, ...], ...]
Marks = Mapping[str, Sequence[Sequence[int]]]


@dataclass(frozen=True, repr=False)
class Task:
    """Prompts as token ids, each with one right answer, any number of wrong ones and, mostly, a corrupted twin.

    A twin has as many tokens as its prompt, unless `options["aligned"]` is False. `marks` maps a name to the positions
    of that group in every prompt (of the twin too, where aligned); `labels` maps a name to one value per prompt.
    `task[2:5]` is the task of some prompts, `split` draws two halves, `Task.joined` puts several tasks together.
    """

    name: str
    clean: Prompts
    right: tuple[int, ...]
    wrong: Prompts = ()
    corrupted: Prompts | None = None
    metric: str = "logit_diff"
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    texts: tuple[str, ...] = ()
    marks: Marks = field(default_factory=dict)
    labels: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        plain = {
            "clean": _prompts(self.clean),
            "right": tuple(int(token) for token in self.right),
            "wrong": _prompts(self.wrong) or ((),) * len(self.clean),
            "corrupted": None if self.corrupted is None else _prompts(self.corrupted),
            "texts": tuple(self.texts),
            "marks": {name: _prompts(groups) for name, groups in self.marks.items()},
            "labels": {name: tuple(values) for name, values in self.labels.items()},
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        self._check_counts()
        self._check_answers()

    def _check_counts(self) -> None:
        if not self.clean or not all(self.clean):
            at = next((i for i, prompt in enumerate(self.clean) if not prompt), None)
            raise PatchbayError(f"task {self.name}: {'no prompts' if at is None else f'prompt {at} has no tokens'}")
        rows = {"right": self.right, "wrong": self.wrong, **self.marks, **self.labels}
        rows |= {"corrupted": self.corrupted} if self.corrupted is not None else {}
        rows |= {"texts": self.texts} if self.texts else {}
        uneven = {name: len(values) for name, values in rows.items() if len(values) != len(self.clean)}
        if uneven:
            found = ", ".join(f"{name} has {count}" for name, count in uneven.items())
            raise PatchbayError(f"task {self.name}: {len(self.clean)} prompts, but {found}; each needs one per prompt")
        if self.corrupted is not None and self.options.get("aligned", True):
            pairs = enumerate(zip(self.clean, self.corrupted, strict=True))
            other = [f"{i} ({len(a)} and {len(b)} tokens)" for i, (a, b) in pairs if len(a) != len(b)]
            if other:
                raise PatchbayError(
                    f"task {self.name}: {len(other)} corrupted twins differ from their prompts in length: "
                    f"{', '.join(other[:5])}; give twins of equal length, or say options={{'aligned': False}}"
                )
        for name, groups in self.marks.items():
            for i, (positions, prompt) in enumerate(zip(groups, self.clean, strict=True)):
                if any(not 0 <= position < len(prompt) for position in positions):
                    raise PatchbayError(
                        f"task {self.name}: mark {name!r} is at {positions} in prompt {i}, which has {len(prompt)} tokens"
                    )

    def _check_answers(self) -> None:
        if self.metric not in METRICS:
            known = f"metrics are {', '.join(METRICS)}"
            raise PatchbayError(
                f"task {self.name}: no metric {self.metric!r}; {known}{suggest(self.metric, list(METRICS))}"
            )
        every = [*self.clean, *(self.corrupted or ()), self.right, *self.wrong]
        lowest = min(token for ids in every for token in ids)
        if lowest < 0:
            raise PatchbayError(f"task {self.name}: token ids are never negative, found {lowest}")
        both = [i for i, (right, wrong) in enumerate(zip(self.right, self.wrong, strict=True)) if right in wrong]
        if both:
            raise PatchbayError(
                f"task {self.name}: the right answer is also among the wrong ones in prompts {both[:5]}"
            )
        none = [i for i, wrong in enumerate(self.wrong) if not wrong]
        if self.metric == "logit_diff" and none:
            raise PatchbayError(
                f"task {self.name}: logit_diff needs a wrong answer for every prompt, {len(none)} have none "
                f"(first: prompt {none[0]}); possible without: {', '.join(m for m in METRICS if m != 'logit_diff')}"
            )

    def check(self, vocab_size: int) -> None:
        """Raise PatchbayError where a prompt or an answer holds an id that a vocabulary of this size lacks."""
        named = {"clean": self.clean, "corrupted": self.corrupted or (), "right": (self.right,), "wrong": self.wrong}
        for name, rows in named.items():
            high = max((token for ids in rows for token in ids), default=-1)
            if high >= vocab_size:
                raise PatchbayError(
                    f"task {self.name}: token id {high} in {name}, but the model has ids 0 to {vocab_size - 1}; "
                    "was the task made with another model's tokenizer?"
                )

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, which: int | slice | Sequence[int]) -> Task:
        """The task of some of the prompts: one index, a slice, or a sequence of indices."""
        if isinstance(which, slice):
            chosen = list(range(len(self)))[which]
        else:
            chosen = [which] if isinstance(which, int) else list(which)
        outside = [i for i in chosen if not -len(self) <= i < len(self)]
        if outside:
            raise IndexError(f"task {self.name} has prompts 0 to {len(self) - 1}, asked for {outside}")
        if not chosen:
            raise PatchbayError(f"task {self.name}: {which} picks none of the {len(self)} prompts")
        return replace(
            self,
            clean=_pick(self.clean, chosen),
            right=_pick(self.right, chosen),
            wrong=_pick(self.wrong, chosen),
            corrupted=None if self.corrupted is None else _pick(self.corrupted, chosen),
            texts=_pick(self.texts, chosen) if self.texts else (),
            marks={name: _pick(groups, chosen) for name, groups in self.marks.items()},
            labels={name: _pick(values, chosen) for name, values in self.labels.items()},
        )

    def split(self, fraction: float = 0.5, seed: int = 0) -> tuple[Task, Task]:
        """Two tasks, drawn at random without a prompt in common: to choose on (`fraction` of all) and to test on."""
        n_dev = round(fraction * len(self))
        if not 0 < n_dev < len(self):
            raise PatchbayError(
                f"task {self.name}: fraction {fraction} of {len(self)} prompts gives {n_dev} and {len(self) - n_dev}; "
                "both halves need one"
            )
        order = list(range(len(self)))
        random.Random(f"split-{seed}").shuffle(order)
        halves = zip(("dev", "test"), (sorted(order[:n_dev]), sorted(order[n_dev:])), strict=True)
        dev, test = (
            replace(self[ids], options={**self.options, "split": [half, fraction, seed]}) for half, ids in halves
        )
        return dev, test

    @classmethod
    def joined(cls, tasks: Sequence[Task]) -> Task:
        """The prompts of several tasks in one, such as one question in several wordings or at several lengths.

        They need the same metric. Kept are the marks and labels that all have; the label `task` says which of them each
        prompt is from (0, 1, ...), and `options["joined"]` their names, options and seeds. Twins and texts where all have
        them. A task that was joined itself counts as one: its own label `task` gives way.
        """
        if not tasks:
            raise PatchbayError("no tasks to join were given")
        first = tasks[0]
        other = next((task for task in tasks if task.metric != first.metric), None)
        if other is not None:
            raise PatchbayError(f"tasks of one metric can be joined; got {first.metric} and {other.metric}")
        marks = [mark for mark in first.marks if all(mark in task.marks for task in tasks)]
        labels = [label for label in first.labels if all(label in task.labels for task in tasks)]
        options = {"joined": [{"name": task.name, "options": task.options, "seed": task.seed} for task in tasks]}
        twins = [task.corrupted for task in tasks]
        return cls(
            name=first.name,
            clean=tuple(ids for task in tasks for ids in task.clean),
            right=tuple(token for task in tasks for token in task.right),
            wrong=tuple(ids for task in tasks for ids in task.wrong),
            corrupted=None if None in twins else tuple(ids for rows in twins for ids in rows or ()),
            metric=first.metric,
            options=options | ({} if all(t.options.get("aligned", True) for t in tasks) else {"aligned": False}),
            texts=tuple(text for task in tasks for text in task.texts) if all(task.texts for task in tasks) else (),
            marks={mark: tuple(row for task in tasks for row in task.marks[mark]) for mark in marks},
            labels={label: tuple(value for task in tasks for value in task.labels[label]) for label in labels}
            | {"task": tuple(place for place, task in enumerate(tasks) for _ in task.clean)},
        )

    def with_metric(self, metric: str) -> Task:
        """The same prompts under another metric."""
        return replace(self, metric=metric)

    @property
    def sign(self) -> float:
        """1 where a higher score is better, -1 for rank and kl."""
        return -1.0 if self.metric in ("rank", "kl") else 1.0

    @property
    def unit(self) -> str:
        """Unit of `score`."""
        return METRICS[self.metric]

    def score(
        self, logits: Float[Tensor, "prompt vocab"], reference: Float[Tensor, "prompt vocab"] | None = None
    ) -> Float[Tensor, prompt]:
        """The metric at each prompt's last position, in `unit`.

        accuracy is 1 where no other token of the whole vocabulary has a logit as high as the right one. kl is the
        divergence of `logits` from `reference` (the unedited run), KL(reference || logits); only it needs `reference`.
        """
        import torch

        from patchbay import maths

        if logits.ndim != 2 or len(logits) != len(self):
            raise PatchbayError(
                f"task {self.name}: needs logits [prompt, vocab] of {len(self)} prompts, got shape {tuple(logits.shape)}"
            )
        self.check(logits.shape[1])
        if self.metric == "kl":
            if reference is None:
                raise PatchbayError(
                    f"task {self.name}: kl compares two runs; pass the unedited run's logits as reference="
                )
            return maths.kl(reference, logits)
        right = torch.tensor(self.right, device=logits.device)
        if self.metric == "logit_diff":
            widest = max(len(ids) for ids in self.wrong)
            padded = [ids + (-1,) * (widest - len(ids)) for ids in self.wrong]
            return maths.logit_diff(
                logits, right, torch.tensor(padded, device=logits.device)
            )  # wrong: [prompt, n_wrong]
        if self.metric == "accuracy":
            return maths.accuracy(logits, right)
        measure = {"probability": maths.probability, "log_probability": maths.log_probability, "rank": maths.rank}
        return measure[self.metric](logits, right)

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types, from which `from_json` makes an equal task."""
        listed = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: _jsonable(value) for name, value in listed.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Task:
        """The task that `to_json` described."""
        known = {f.name for f in fields(cls)}
        missing, extra = {"name", "clean", "right"} - set(data), set(data) - known
        if missing or extra:
            raise PatchbayError(
                f"not a task: lacks {sorted(missing) or 'nothing'}, has unknown {sorted(extra) or 'nothing'}"
            )
        try:
            return cls(**data)
        except (TypeError, AttributeError) as error:
            raise PatchbayError(f"not a task: {error}") from error

    def __repr__(self) -> str:
        lengths = sorted(len(prompt) for prompt in self.clean)
        span = f"{lengths[0]}" if lengths[0] == lengths[-1] else f"{lengths[0]} to {lengths[-1]}"
        twins = "corrupted twins" if self.corrupted is not None else "no twins"
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        return (
            f"Task {self.name}: {len(self)} prompts of {span} tokens, {twins}, {self.metric}, seed {self.seed}{options}"
        )

    def show(self, tokenizer: Any = None, n: int = 3) -> str:
        """The first `n` prompts for people: text (ids without a tokenizer), twin, answers and marks."""

        def read(ids: Sequence[int]) -> str:
            return repr(tokenizer.decode(list(ids))) if tokenizer is not None else " ".join(map(str, ids))

        lines = [repr(self)]
        for i in range(min(n, len(self))):
            lines.append(f"[{i}] clean      {read(self.clean[i])}")
            if self.corrupted is not None:
                lines.append(f"    corrupted  {read(self.corrupted[i])}")
            lines.append(f"    right      {read(self.right[i : i + 1])}")
            if self.wrong[i]:
                lines.append(f"    wrong      {', '.join(read((token,)) for token in self.wrong[i])}")
            for name, groups in self.marks.items():
                tokens = ", ".join(read((self.clean[i][at],)) for at in groups[i])
                lines.append(f"    {name:<10} at {', '.join(map(str, groups[i])) or 'no position'}: {tokens}")
            lines += [f"    {name:<10} {values[i]}" for name, values in self.labels.items()]
        return "\n".join(lines)

    @classmethod
    def from_prompts(
        cls,
        model: Model,
        clean: Sequence[str],
        right: Sequence[str],
        wrong: Sequence[str | Sequence[str]] | None = None,
        corrupted: Sequence[str] | None = None,
        metric: str | None = None,
        *,
        name: str = "own",
        aligned: bool = True,
    ) -> Task:
        """A task of your own texts. An answer is what follows its prompt, as written (mostly with a leading space).

        Every answer must be a single token there. The metric is logit_diff where wrong answers are given, else
        log_probability. `aligned=False` accepts twins of another length.
        """
        tokenizer = model.tokenizer
        if tokenizer is None:
            raise PatchbayError("Task.from_prompts needs a tokenizer and this model has none; make a Task of token ids")
        clean = as_texts(tokenizer, clean)
        wrongs = [() if wrong is None else (w,) if isinstance(w, str) else tuple(w) for w in wrong or [()] * len(clean)]
        if not len(clean) == len(right) == len(wrongs):
            raise PatchbayError(
                f"{len(clean)} prompts, {len(right)} right and {len(wrongs)} wrong answers: one per prompt"
            )
        asked = [(text, a) for text, r, ws in zip(clean, right, wrongs, strict=True) for a in (r, *ws)]
        tried = answer_ids(tokenizer, asked)
        found = {pair: token for pair, token in tried.items() if token is not None}
        failed = [pair for pair in tried if pair not in found]
        if failed:
            raise PatchbayError(_not_single(tokenizer, failed, len(tried)))
        task = cls(
            name=name,
            clean=tuple(tokenize(tokenizer, clean)),
            right=tuple(found[text, a] for text, a in zip(clean, right, strict=True)),
            wrong=tuple(tuple(found[text, a] for a in ws) for text, ws in zip(clean, wrongs, strict=True)),
            corrupted=None if corrupted is None else tuple(tokenize(tokenizer, corrupted)),
            metric=metric or ("logit_diff" if wrong is not None else "log_probability"),
            options={} if aligned else {"aligned": False},
            texts=tuple(clean),
        )
        task.check(model.vocab_size)
        return task


def answer_ids(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], int | None]:
    """(prompt, answer) -> the id that follows the prompt's own ids; None where the answer is not one known token."""
    unique = list(dict.fromkeys(pairs))
    prompts = tokenize(tokenizer, [prompt for prompt, _ in unique])
    wholes = tokenize(tokenizer, [type(prompt)(prompt + answer) for prompt, answer in unique])
    special = set(tokenizer.all_special_ids)
    found: dict[tuple[str, str], int | None] = {}
    for pair, prompt, whole in zip(unique, prompts, wholes, strict=True):
        found[pair] = whole[-1] if whole[:-1] == prompt and whole[-1] not in special else None
    return found


def _not_single(tokenizer: Any, failed: list[tuple[str, str]], n_asked: int) -> str:
    spaced = answer_ids(tokenizer, [(prompt, " " + answer) for prompt, answer in failed])
    hint = "" if None in spaced.values() else "; with a space in front each of them would be one token"
    shown = []
    for prompt, answer in failed[:5]:
        own = tokenize(tokenizer, [prompt, prompt + answer])
        shown.append(f"{answer!r} ({len(own[1]) - len(own[0])} tokens more after {prompt[-20:]!r})")
    return (
        f"an answer must be one known token after its prompt in the model's tokenizer; {len(failed)} of {n_asked} "
        f"are not: {', '.join(shown)}{', ...' if len(failed) > 5 else ''}{hint}"
    )


def _prompts(rows: Sequence[Sequence[int]]) -> Prompts:
    return tuple(tuple(int(token) for token in ids) for ids in rows)


def _pick(values: Sequence[Any], chosen: Sequence[int]) -> tuple[Any, ...]:
    return tuple(values[i] for i in chosen)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _jsonable(inner) for name, inner in value.items()}
    return [_jsonable(inner) for inner in value] if isinstance(value, list | tuple) else value
