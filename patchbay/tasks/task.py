"""Task: prompts with right and wrong answers, a corrupted twin of each, and a metric. Data only; it never runs a model.

A task asks one thing of a model: after each prompt, which token, or which text of several, comes next? `score` turns the logits
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchbay.errors import PatchbayError, by_kind
from patchbay.signal.card import card
from patchbay.tasks import checks, scoring
from patchbay.tasks.answers import Absent, compared, continuations, sizes, steps_of, totals
from patchbay.tasks.own import from_prompts
from patchbay.tasks.rows import Columns, task_of
from patchbay.tasks.scoring import METRICS, Metric
from patchbay.tasks.table import frame_table, read_table

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from patchbay.model.model import Model

Prompts = tuple[tuple[int, ...], ...]
Marks = Mapping[str, Sequence[Sequence[int]]]


@dataclass(frozen=True, repr=False)
class Task:
    """Prompts as token ids, each with one right answer, any number of wrong ones and, mostly, a corrupted twin.

    A twin has as many tokens as its prompt, unless `options["aligned"]` is False. `marks` maps a name to the positions
    of that group in every prompt (of the twin too, where aligned); `labels` maps a name to one value per prompt.
    Where answers are of several tokens, or divided by their lengths (`normalise`), they stand in `answers`, the right one of each
    prompt first, and `right` and `wrong` say so to whoever reads them; a task without answers has neither, and the metric kl or a
    function. `places` are the prompts' numbers for a metric that is a function. `task[2:5]` is the task of some prompts, `split` draws two halves, `Task.joined` puts several tasks together.
    """

    name: str
    clean: Prompts
    right: tuple[int, ...] = ()
    wrong: Prompts = ()
    corrupted: Prompts | None = None
    metric: Metric = "logit_diff"
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    texts: tuple[str, ...] = ()
    marks: Marks = field(default_factory=dict)
    labels: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    answers: tuple[Prompts, ...] = ()
    answer_texts: tuple[tuple[str, ...], ...] = ()
    normalise: str = "none"
    places: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        plain = {
            "clean": _prompts(self.clean),
            "right": self._right(),
            "wrong": self._wrong(),
            "answers": tuple(_prompts(each) for each in self.answers),
            "answer_texts": tuple(tuple(each) for each in self.answer_texts),
            "places": tuple(self.places) or (tuple(range(len(self.clean))) if callable(self.metric) else ()),
            "corrupted": None if self.corrupted is None else _prompts(self.corrupted),
            "texts": tuple(self.texts),
            "marks": {name: _prompts(groups) for name, groups in self.marks.items()},
            "labels": {name: tuple(values) for name, values in self.labels.items()},
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        checks.check(self)

    def _right(self) -> Any:
        """Right answers of one token, or what says why there are none."""
        if self.answers:
            return Absent(
                f"task {self.name} has answers of several tokens, or divided by their lengths; this reads answers of one token. "
                "Possible: task.steps(), every token of the right answers as a prompt of its own, or pb.sweep"
            )
        if isinstance(self.right, Absent) or not self.right:
            return Absent(f"task {self.name} has no answers, and this reads them: give right=")
        return tuple(int(token) for token in self.right)

    def _wrong(self) -> Any:
        return self._right() if self.answers else _prompts(self.wrong or ()) or ((),) * len(self.clean)

    @property
    def answered(self) -> bool:
        """Whether the prompts have answers."""
        return bool(self.right or self.answers)

    @property
    def whole_answers(self) -> tuple[Prompts, ...]:
        """The answers of each prompt as tokens, the right one first."""
        pairs = () if self.answers else zip(self.right, self.wrong, strict=True)
        return self.answers or tuple(((right,), *((token,) for token in wrong)) for right, wrong in pairs)

    def check(self, vocab_size: int) -> None:
        """Raise PatchbayError where a prompt or an answer holds an id that a vocabulary of this size lacks."""
        checks.check_vocabulary(self, vocab_size)

    def prompts(self, on: str = "clean") -> Prompts:
        """The "clean" prompts, or their "corrupted" twins."""
        if on not in ("clean", "corrupted"):
            raise PatchbayError(f"on={on!r}: 'clean' or 'corrupted'")
        if on == "clean":
            return self.clean
        if self.corrupted is None:
            raise PatchbayError(f"task {self.name} has no corrupted twins to run on")
        return self.corrupted

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, which: int | slice | Sequence[int]) -> Task:
        """The task of some of the prompts: one index, a slice, or a sequence of indices."""
        chosen = list(range(len(self)))[which] if isinstance(which, slice) else checks.indices(which)
        outside = [i for i in chosen if not -len(self) <= i < len(self)]
        if outside:
            raise IndexError(f"task {self.name} has prompts 0 to {len(self) - 1}, asked for {outside}")
        if not chosen:
            raise PatchbayError(f"task {self.name}: {which} picks none of the {len(self)} prompts")
        return replace(
            self,
            clean=_pick(self.clean, chosen),
            right=_pick(self.right, chosen) if self.right else (),
            wrong=() if self.answers else _pick(self.wrong, chosen),
            answers=_pick(self.answers, chosen) if self.answers else (),
            answer_texts=_pick(self.answer_texts, chosen) if self.answer_texts else (),
            places=_pick(self.places, chosen) if self.places else (),
            corrupted=None if self.corrupted is None else _pick(self.corrupted, chosen),
            texts=_pick(self.texts, chosen) if self.texts else (),
            marks={name: _pick(groups, chosen) for name, groups in self.marks.items()},
            labels={name: _pick(values, chosen) for name, values in self.labels.items()},
        )

    @by_kind
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
        checks.are_tasks(tasks, Task)
        first = tasks[0]
        other = next((task for task in tasks if task.metric != first.metric), None)
        if other is not None:
            raise PatchbayError(f"tasks of one metric can be joined; got {first.metric} and {other.metric}")
        if len({(task.normalise, task.answered) for task in tasks}) > 1:
            raise PatchbayError("tasks can be joined that are normalised alike, all with answers or all without")
        several = any(task.answers for task in tasks)
        marks = [mark for mark in first.marks if all(mark in task.marks for task in tasks)]
        labels = [label for label in first.labels if all(label in task.labels for task in tasks)]
        options = {"joined": [{"name": task.name, "options": task.options, "seed": task.seed} for task in tasks]}
        twins = [task.corrupted for task in tasks]
        return cls(
            name=first.name,
            clean=tuple(ids for task in tasks for ids in task.clean),
            right=() if several or not first.answered else tuple(token for task in tasks for token in task.right),
            wrong=() if several else tuple(ids for task in tasks for ids in task.wrong),
            answers=tuple(each for task in tasks for each in task.whole_answers) if several else (),
            answer_texts=tuple(each for task in tasks for each in task.answer_texts) if several else (),
            normalise=first.normalise,
            corrupted=None if None in twins else tuple(ids for rows in twins for ids in rows or ()),
            metric=first.metric,
            options=options | ({} if all(t.options.get("aligned", True) for t in tasks) else {"aligned": False}),
            texts=tuple(text for task in tasks for text in task.texts) if all(task.texts for task in tasks) else (),
            marks={mark: tuple(row for task in tasks for row in task.marks[mark]) for mark in marks},
            labels={label: tuple(value for task in tasks for value in task.labels[label]) for label in labels}
            | {"task": tuple(place for place, task in enumerate(tasks) for _ in task.clean)},
        )

    def with_metric(self, metric: Metric) -> Task:
        """The same prompts under another metric: a name of METRICS, or a function (see `Metric`)."""
        return replace(self, metric=metric)

    @property
    def metric_name(self) -> str:
        return self.metric if isinstance(self.metric, str) else getattr(self.metric, "__name__", "metric")

    @property
    def reads(self) -> str:
        """The logits that the metric needs, as `run(..., logits=)` takes it: of the "last" position, or of "all"."""
        return "all" if callable(self.metric) and getattr(self.metric, "positions", None) == "all" else "last"

    @property
    def sign(self) -> float:
        """1 where a higher score is better, -1 for rank and kl."""
        return -1.0 if self.metric in ("rank", "kl") else 1.0

    @property
    def unit(self) -> str:
        """Unit of `score`: nats where answers are compared by their log-probabilities."""
        if callable(self.metric):
            return str(getattr(self.metric, "unit", ""))
        unit = "nats" if self.answers and METRICS[self.metric] == "logits" else METRICS[self.metric]
        return f"{unit} per {self.normalise}" if unit == "nats" and self.normalise != "none" else unit

    @property
    def continuations(self) -> Prompts:
        """What is run to score whole answers: each prompt followed by the beginnings of its answers, each once; the prompts
        themselves where answers are of one token. `score` takes the logits at their last positions."""
        return continuations(steps_of(self.clean, self.answers))[0] if self.answers else self.clean

    def steps(self, on: str = "clean") -> Task:
        """Every token of every right answer as a prompt of its own, scored by its log-probability: a task of answers of one
        token, whose labels `prompt` and `step` say where each comes from. `on` the "clean" prompts or their "corrupted" twins."""
        found = [step for step in steps_of(self.prompts(on), self.whole_answers) if step.answer == 0]
        twins = None
        if on == "clean" and self.corrupted is not None:
            twins = tuple(step.ids for step in steps_of(self.corrupted, self.whole_answers) if step.answer == 0)
        return Task(
            name=self.name,
            clean=tuple(step.ids for step in found),
            right=tuple(step.target for step in found),
            corrupted=twins,
            metric="log_probability",
            options=self.options,
            seed=self.seed,
            labels={"prompt": tuple(step.prompt for step in found), "step": tuple(step.place for step in found)},
        )

    def score(
        self, logits: Float[Tensor, "prompt vocab"], reference: Float[Tensor, "prompt vocab"] | None = None
    ) -> Float[Tensor, prompt]:
        """The metric at each prompt's last position, in `unit`.

        accuracy is 1 where no other token of the whole vocabulary has a logit as high as the right one (of any of the right
        answer's tokens, where it has several); option_accuracy where none of the wrong answers has. kl is the divergence
        of `logits` from `reference` (the unedited run), KL(reference || logits); only it needs `reference`. Answers of
        several tokens are scored from the logits of `continuations`.
        """
        return scoring.score(self, logits, reference)

    def of_steps(self, values: Tensor) -> Tensor:
        """The metric [..., prompt] from the log-probability of every token of every answer [..., step]."""
        divisors = sizes(self.answers, self.answer_texts, self.normalise if self.metric != "probability" else "none")
        return compared(self.metric_name, totals(values, steps_of(self.clean, self.answers), divisors))

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types, from which `from_json` makes an equal task."""
        listed = {f.name: getattr(self, f.name) for f in fields(self)}
        listed |= {"right": () if not self.right else self.right, "wrong": () if self.answers else self.wrong}
        listed["metric"] = self.metric if isinstance(self.metric, str) else f"function {self.metric_name}"
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
        if str(data.get("metric", "")).startswith("function "):
            raise PatchbayError(
                f"a task scored by a {data['metric']} of the user's cannot be made from its record alone"
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
        return f"Task {self.name}: {len(self)} prompts of {span} tokens, {twins}, {self.metric_name}, seed {self.seed}{options}"

    def _repr_html_(self) -> str:
        return card(
            repr(self),
            [line.split(maxsplit=1) for line in self.show(n=1).splitlines()[1:]],
            below="task.show(model.tokenizer) shows text",
        )

    @by_kind
    def show(self, tokenizer: Any = None, n: int = 3) -> str:
        """The first `n` prompts for people: text (ids without a tokenizer), twin, answers and marks."""

        def read(ids: Sequence[int]) -> str:
            return repr(tokenizer.decode(list(ids))) if tokenizer is not None else " ".join(map(str, ids))

        lines = [repr(self)]
        for i in range(min(n, len(self))):
            lines.append(f"[{i}] clean      {read(self.clean[i])}")
            if self.corrupted is not None:
                lines.append(f"    corrupted  {read(self.corrupted[i])}")
            for which, ids in enumerate(self.whole_answers[i] if self.answered else ()):
                lines.append(f"    {'wrong' if which else 'right'}      {read(ids)}")
            for name, groups in self.marks.items():
                tokens = ", ".join(read((self.clean[i][at],)) for at in groups[i])
                lines.append(f"    {name:<10} at {', '.join(map(str, groups[i])) or 'no position'}: {tokens}")
            lines += [f"    {name:<10} {values[i]}" for name, values in self.labels.items()]
        return "\n".join(lines)

    @classmethod
    @by_kind
    def from_prompts(
        cls,
        model: Model,
        clean: Sequence[Any],
        right: Sequence[str] | None = None,
        wrong: Sequence[str | Sequence[str]] | None = None,
        corrupted: Sequence[Any] | None = None,
        metric: Metric | None = None,
        *,
        name: str = "own",
        aligned: bool = True,
        normalise: str = "none",
    ) -> Task:
        """A task of your own texts or chats. An answer is what follows its prompt, as written (mostly with a leading space).

        Answers of several tokens are scored by the sum of their tokens' log-probabilities, and with `normalise` by that over
        their number of tokens ("token"), bytes ("byte") or characters ("character"). The metric is logit_diff where wrong
        answers are given, else log_probability, and kl without answers. `aligned=False` accepts twins of another length.
        """
        return from_prompts(
            cls, model, clean, right, wrong, corrupted, metric, name=name, aligned=aligned, normalise=normalise
        )

    @classmethod
    @by_kind
    def from_file(
        cls,
        path: str | Path,
        model: Model,
        *,
        columns: Columns | None = None,
        form: str | None = None,
        encoding: str | None = None,
        **how: Any,
    ) -> Task:
        """A task of the prompts of a file: JSON lines, a JSON array, CSV or TSV with a header, or plain text, a prompt on each line.

        Columns are prompt and, where there are such, right, wrong (a text or a list), corrupted, labels {name: value} and marks
        {name: [positions]}; `columns` says which of the file's are meant, as in {"prompt": "question", "wrong": ["b", "c"]}, and leaves
        the rest out. `form`: "jsonl", "json", "csv", "tsv" or "text", without by suffix and content. `encoding`: where a file
        is not UTF-8 and has no byte order mark. Other options (metric, aligned, normalise, name) are those of `from_prompts`.
        """
        return task_of(  # type: ignore[no-any-return]
            cls, model, read_table(path, form=form, encoding=encoding), columns, **{"name": Path(path).stem, **how}
        )

    @classmethod
    @by_kind
    def from_frame(cls, frame: Any, model: Model, *, columns: Columns | None = None, **how: Any) -> Task:
        """A task of the rows of a table in memory: a DataFrame, a data set of mappings, or a list of them; else as `from_file`."""
        if hasattr(frame, "tokenizer"):
            raise PatchbayError("the table comes first: Task.from_frame(frame, model)")
        return task_of(cls, model, frame_table(frame), columns, **how)  # type: ignore[no-any-return]


def _prompts(rows: Sequence[Sequence[int]]) -> Prompts:
    return tuple(tuple(int(token) for token in ids) for ids in rows)


def _pick(values: Sequence[Any], chosen: Sequence[int]) -> tuple[Any, ...]:
    return tuple(values[i] for i in chosen)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _jsonable(inner) for name, inner in value.items()}
    return [_jsonable(inner) for inner in value] if isinstance(value, list | tuple) else value
