"""What the demo asks of a model: the first question that this model can take.

Facts in context against facts in memory, where the tokenizer has the words and the model answers with one or the other;
else the continuation of a repeated random string, where the model can do it; else the model's own text, at places where it
hesitates between its two likeliest tokens. Says what was tried, and why it was not taken.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import patchbay as pb
from patchbay.model import Model
from patchbay.port import PatchbayError
from patchbay.task import Task, start_ids

LEAST_FACTS, LEAST_COPIED = 0.3, 0.2  # shares of prompts below which a question says nothing of this model
N_TEXTS, LENGTH = 40, 48


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
            return Question(**{**found.__dict__, "tried": tuple(tried)})
        tried.append(found)
    found = _own_text(model, n, seed)
    return Question(**{**found.__dict__, "tried": tuple(tried)})


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
    share = float((said(model, task) == 1).float().mean())
    if share < LEAST_COPIED:
        return f"repeated_tokens was not taken: the model continues {share:.0%} of repeated random strings"
    asks = "a random string stands twice: does the model continue it the second time?"
    return Question(task, "copy", "another token of the string", asks, _samples(model, seed + 1), "the model's own samples")


def _own_text(model: Model, n: int, seed: int) -> Question:
    """Beginnings of the model's own samples where its two likeliest next tokens are closest."""
    rng = random.Random(f"demo-{seed}")
    texts = _samples(model, seed, n_texts=n)
    starts = {tuple(ids[:end]) for ids in texts for end in rng.sample(range(4, len(ids)), min(3, max(0, len(ids) - 4)))}
    prompts = sorted(starts)
    if len(prompts) < 8:
        raise PatchbayError(f"the demo found no question for this model: its samples gave {len(prompts)} prompts, 8 are needed")
    logits = pb.run(model, [list(ids) for ids in prompts], logits="last", batch_size=64).last_logits
    values, tokens = logits.topk(2)  # [prompt, 2]
    closest = (values[:, 0] - values[:, 1]).argsort()[:n].sort().values.tolist()
    task = Task(
        "own_text",
        clean=tuple(prompts[i] for i in closest),
        right=tuple(tokens[closest, 0].tolist()),
        wrong=tuple((token,) for token in tokens[closest, 1].tolist()),
        seed=seed,
        options={"aligned": False},
    )
    asks = "places in the model's own samples where it hesitates: which of its two likeliest tokens comes next?"
    return Question(task, "first choice", "second choice", asks, _samples(model, seed + 1), "other samples of its own")


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
    cut = [next((i for i, token in enumerate(ids) if i >= len(start) and i and token in ends), len(ids)) for ids in rows]
    return [ids[:end] for ids, end in zip(rows, cut, strict=True) if end >= 8]


def _short(error: PatchbayError) -> str:
    text = str(error).split(": ", 1)[-1]
    return text if len(text) <= 160 else text[:157] + "..."
