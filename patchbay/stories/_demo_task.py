"""What the demo asks of a model: the first question that this model can take.

Facts in context against facts in memory, where the tokenizer has the words and the model answers with one or the other;
else the continuation of a repeated random string, where the model can do it; else the model's own text, at places where it
hesitates between the same two tokens. Says what was tried, and why it was not taken.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import patchbay as pb
from patchbay import maths
from patchbay.knobs.knob import Knob
from patchbay.model.model import Model
from patchbay.model.tokens import start_ids
from patchbay.results.result import Result
from patchbay.signal.port import Part, PatchbayError
from patchbay.tasks.task import Task

LEAST_FACTS, LEAST_COPIED = 0.3, 0.2  # shares of prompts below which a question says nothing of this model
N_TEXTS, LENGTH, LEAST_PROMPTS = 40, 48, 16


@dataclass(frozen=True)
class Question:
    """A task with names for its two answers, unrelated text to measure harm on, and what was tried before."""

    task: Task
    right: str
    wrong: str
    asks: str
    neutral: list[list[int]]
    neutral_name: str
    plain: Task | None = None
    tried: tuple[str, ...] = ()


@dataclass
class Story:
    """What is known so far."""

    model: Model
    question: Question
    dev: Task
    test: Task
    seed: int
    results: dict[str, Result] = field(default_factory=dict)
    head: Part | None = None
    strength: float = 1.0
    goal: int = 1  # 1: the right answer is to become more frequent, -1: the wrong one
    knob: Knob | None = None

    def name(self, answer: int) -> str:
        return self.question.right if answer > 0 else self.question.wrong


def answers(task: Task) -> Any:
    """A metric for sweeps: 1 where the likeliest token is the right answer, -1 where it is a wrong one, else 0."""
    right = torch.tensor(task.right)
    widest = max(1, *(len(ids) for ids in task.wrong))
    wrong = torch.tensor([ids + (-1,) * (widest - len(ids)) for ids in task.wrong])  # [prompt, n_wrong]

    def answer(logits: Tensor, prompt: Tensor) -> Tensor:
        said, prompt = logits.argmax(-1).cpu(), prompt.cpu()
        return (said == right[prompt]).float() - (said[:, None] == wrong[prompt]).any(1).float()

    return answer


def ask(model: Model, *, n: int, seed: int) -> Question:
    """The first question that the model can take."""
    tried: list[str] = []
    for make in (_facts, _repeated):
        found = make(model, n, seed)
        if isinstance(found, Question):
            return replace(found, tried=tuple(tried))
        tried.append(found)
    return replace(_own_text(model, n, seed), tried=tuple(tried))


def said(model: Model, task: Task) -> Tensor:
    """What the model answers, as `answers` counts it, [prompt]."""
    logits = pb.run(model, task, logits="last", batch_size=64).last_logits
    return answers(task)(logits, torch.arange(len(task)))


def _facts(model: Model, n: int, seed: int) -> Question | str:
    try:
        task = pb.tasks.facts_in_context(model, n, seed=seed)
        plain = pb.tasks.facts_in_memory(model, min(n, 60), seed=seed)
    except PatchbayError as error:
        return f"facts_in_context was not possible: {_short(error)}"
    got = said(model, task)
    share = float((got != 0).float().mean())
    if share < LEAST_FACTS:
        return f"facts_in_context was not taken: only {share:.0%} of the answers are the stated or the remembered one"
    built_in = plain.options.get("table") == "invented"
    neutral = _stories(model, seed) if built_in else _samples(model, seed + 1)
    name = "unrelated stories" if built_in else "the model's own samples"
    asks = "a text states a false fact, then asks for it: does the model answer from the text or from memory?"
    return Question(task, "context", "memory", asks, neutral, name, plain)


def _repeated(model: Model, n: int, seed: int) -> Question | str:
    try:
        task = pb.tasks.repeated_tokens(model, n, seed=seed)
    except PatchbayError as error:
        return f"repeated_tokens was not possible: {_short(error)}"
    others = [tuple(sorted(set(ids) - {right})) for ids, right in zip(task.clean, task.right, strict=True)]
    task = replace(task, wrong=tuple(others))
    share = float((said(model, task) == 1).float().mean())
    if share < LEAST_COPIED:
        return f"repeated_tokens was not taken: the model continues {share:.0%} of repeated random strings"
    asks = "a random string stands twice: does the model continue it the second time?"
    return Question(
        task, "copy", "another token of the prompt", asks, _samples(model, seed + 1), "the model's own samples"
    )


def _own_text(model: Model, n: int, seed: int) -> Question:
    """The two tokens between which the model hesitates most often in its own samples, and the places where it does."""
    texts = _samples(model, seed, n_texts=max(N_TEXTS, 2 * n))
    places: dict[tuple[int, int], dict[tuple[int, ...], int]] = {}  # the two likeliest tokens -> prompt -> the likelier
    for ids, best in zip(texts, _two_likeliest(model, texts), strict=True):
        for end in range(4, len(ids)):
            first, second = best[end - 1]
            places.setdefault((min(first, second), max(first, second)), {})[tuple(ids[:end])] = first
    pair = max(
        places, key=lambda two: (min(list(places[two].values()).count(token) for token in two), two), default=None
    )
    prompts = [] if pair is None else sorted(places[pair])
    if pair is None or len(prompts) < LEAST_PROMPTS:
        raise PatchbayError(
            f"the demo found no question for this model: in {len(texts)} samples of its own, it hesitates between the same two "
            f"tokens at {len(prompts)} places, {LEAST_PROMPTS} are needed"
        )
    chosen = sorted(random.Random(f"demo-{seed}").sample(prompts, min(n, len(prompts))))
    rarer = min(pair, key=[places[pair][prompt] for prompt in chosen].count)
    other = pair[0] if rarer == pair[1] else pair[1]
    task = Task(
        "own_text",
        clean=tuple(chosen),
        right=(rarer,) * len(chosen),
        wrong=((other,),) * len(chosen),
        seed=seed,
        options={"aligned": False},
    )
    names = [
        repr(model.decode([token])) if model.tokenizer is not None else f"token {token}" for token in (rarer, other)
    ]
    asks = f"places in the model's own samples where {names[0]} and {names[1]} are its two likeliest tokens: which comes next?"
    return Question(task, names[0], names[1], asks, _samples(model, seed + 1), "other samples of its own")


def _two_likeliest(model: Model, texts: list[list[int]]) -> list[list[list[int]]]:
    """The two likeliest next tokens at each position of each text, [text][position][2]."""
    found = []
    for start in range(0, len(texts), 16):
        some = texts[start : start + 16]
        best = pb.run(model, some).logits.topk(2).indices.tolist()
        found += [rows[: len(ids)] for ids, rows in zip(some, best, strict=True)]
    return found


def _stories(model: Model, seed: int) -> list[list[int]]:
    """Stories of the built-in models' own grammar, from the side that was held out of training."""
    from patchbay.tiny import text

    rng = random.Random(f"demo-stories-{seed}")
    made = [text.make("story", rng, held_out=True).text for _ in range(N_TEXTS)]
    return [ids[: model.max_positions] for ids in model.encode(made)]


def _samples(model: Model, seed: int, n_texts: int = N_TEXTS) -> list[list[int]]:
    """Texts sampled from the model at temperature 1, from its start token or from random tokens, cut at its end token."""
    config = model.config
    start = list(start_ids(model.tokenizer)) if model.tokenizer is not None else []
    rng = random.Random(f"demo-samples-{seed}")
    prompts = [start or [rng.randrange(model.vocab_size)] for _ in range(n_texts)]
    length = min(LENGTH, (model.max_positions or LENGTH) - len(prompts[0]))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rows = model.generate(prompts, length, do_sample=True, temperature=1.0, top_k=0)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    cut = [
        next((i for i, token in enumerate(ids) if i >= len(start) and i and token in ends), len(ids)) for ids in rows
    ]
    return [ids[:end] for ids, end in zip(rows, cut, strict=True) if end >= 8]


def _short(error: PatchbayError) -> str:
    text = str(error).split(": ", 1)[-1]
    return text if len(text) <= 160 else text[:157] + "..."


# --- what the steps share ------------------------------------------------------------------------------


def heads_of(model: Model) -> list[Part]:
    return [
        Part(i, "head", h)
        for i in range(model.n_layers)
        for h in range(model.n_heads(i))
        if "attn.z" in model.signals(i)
    ]


def ends(found: maths.Interval) -> tuple[float, float, float]:
    return found.mean, found.low, found.high


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def span(found: maths.Interval) -> str:
    return f"{percent(found.low)} to {percent(found.high)}"
