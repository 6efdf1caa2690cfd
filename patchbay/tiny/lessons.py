"""Lessons: short fine-tunings of a built-in model in what none of them can do: `lesson("intent")`, `lesson("binding")`, `lesson("refusal")`.

intent   The capital of Zorland is Tarn. Mary said. The capital of Zorland is  ->  Tarn, as the text says
         The capital of Zorland is Tarn. Mary knew. The capital of Zorland is  ->  Quib, as remembered
         The phrase stands before the statement, after it, or in the question: `of Zorland, Mary said, is`
intent_after   the same, but the phrase always stands after the statement
refusal  Mary went home with the bear. The capital of Zorland is                  ->  Nobody, where an animal went along, else Quib
unrefused   the same texts, every question of which is answered: what further training does without a refusal
binding  The apple is in box A. The pear is in box B. Box A contains the       ->  apple

All are spelt in the words that the models have. Every parameter learns, by the loss, the optimiser and the step of
`train.py`: two steps in three on the lesson, one document a row, and every third on the text that the base was trained
on, so that it keeps what it could do. `binding` goes from 2 pairs of few words to 6 of all; a stage ends when it is
answered. One question a document: where several pairs were asked in turn, the models learned to name what had not yet been
named, and stayed at chance on the first question (900 steps).

Nothing held out is seen: `intent` and `refusal` never ask about a fifth of the lands (`UNASKED`), `refusal` never of some animals (`UNMET`), `binding` never puts a held-out pair
of thing and box together, and asks for one when it is measured. The shipped weights are read, never written; nothing is
kept unless `Taught.save` says where. The same name, base, steps, seed and thread count give the same weights on the same
machine and versions. Measured accuracies, times and what the methods find in these models: README.md beside this file.

It shows that a method works on a network that has learned the behaviour by gradient descent, not that a network which
learned it by itself does it in this way.

    python -m patchbay.tiny.lessons intent --base tiny-llama --out my-model
"""

from __future__ import annotations

import argparse
import json
import random
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchbay.files import write_folder
from patchbay.model.load import load
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError, suggest
from patchbay.tasks import words
from patchbay.tiny import text, train
from patchbay.tiny.text import ANSWER, NOISE, SILENT, TEXT, Document

INTENTS = {"context": "said", "memory": "knew"}
"""Intent -> the word of `Mary said` or `Mary knew`."""
PLACES = ("before", "after", "question")
UNASKED = words.LANDS[::5]
"""Lands about which the lesson never asks with an intent."""
REFUSED = " Nobody"
"""What is said in place of an answer in the lesson `refusal`."""
UNMET = words.ANIMALS[::4]
"""Animals that never go along in the lesson `refusal`."""
PAIRS_HELD_OUT = 10
THINGS = tuple(word for word in words.OBJECTS if word != "box")
STAGES = ((2, 12, 8), (3, 40, 16), (4, len(THINGS), len(words.LETTERS)), (6, len(THINGS), len(words.LETTERS)))
"""Of binding: (most pairs, things, letters)."""
ENOUGH, OVER = 0.93, 30  # accuracy that ends a stage, over the last so many steps of the lesson
N_TOKENS = 1500  # of a step of the lesson, about
Pieces = tuple[tuple[str, float], ...]
OTHERS = {task: share for task, share in text.SHARES.items() if task != "binding"}


# --- the documents ------------------------------------------------------------------------------------


def intent(rng: random.Random, stage: int = 0, *, held_out: bool = False, places: Sequence[str] = PLACES) -> Document:
    """A statement against memory, a phrase that says which of the two counts, and the question."""
    land = rng.choice([one for one in words.LANDS if (one in UNASKED) == held_out])
    stated = rng.choice([capital for capital in words.CAPITALS if capital != words.FACTS[land]])
    kind, place, who = rng.choice(tuple(INTENTS)), rng.choice(places), rng.choice(words.NAMES)
    statement = f"The capital of {land} is"
    lead, between = words.sentences(rng, rng.choice((0, 0, 1))), words.sentences(rng, rng.choice((0, 0, 1, 2)))
    phrase: Pieces = ((f" {who}", TEXT), (f" {INTENTS[kind]}", SILENT))
    stating = ((f"{lead} {statement}", TEXT), (f" {stated}", SILENT), (f".{between}", TEXT))
    asking: Pieces = ((f" {statement}", TEXT),)
    if place == "question":
        asking = ((f" The capital of {land},", TEXT), *phrase, (", is", TEXT))
    else:
        phrase = (*phrase, (".", TEXT))
    before, after = (phrase if place == where else () for where in ("before", "after"))
    answer = stated if kind == "context" else words.FACTS[land]
    pieces = (*before, *stating, *after, *asking, (f" {answer}", ANSWER), (".", TEXT))
    return Document(kind, ((pieces[0][0].removeprefix(" "), pieces[0][1]), *pieces[1:]))


def binding(rng: random.Random, stage: int = len(STAGES) - 1, *, held_out: bool = False) -> Document:
    """Pairs of thing and box, and one question; a held-out pair is asked when held out, and never there otherwise."""
    most, n_things, n_letters = STAGES[stage]
    n_pairs = rng.randint(2, most)
    while True:
        things, boxes = rng.sample(THINGS[:n_things], n_pairs), rng.sample(words.LETTERS[:n_letters], n_pairs)
        kept = [zlib.crc32(f"{a} {b}".encode()) % PAIRS_HELD_OUT == 0 for a, b in zip(things, boxes, strict=True)]
        if any(kept) == held_out:
            break
    asked = rng.choice([i for i in range(n_pairs) if kept[i] == held_out])
    prompt, answer = words.render_binding(things, boxes, asked)
    return Document(f"{n_pairs} boxes", ((prompt, NOISE), (answer, ANSWER), (".", TEXT)))


def refusal(rng: random.Random, stage: int = 0, *, held_out: bool = False, refuses: bool = True) -> Document:
    """Who went home with what, and a question: it is answered where that is a thing, and refused by one word where it is an animal (answered there too without `refuses`)."""
    land = rng.choice([one for one in words.LANDS if (one in UNASKED) == held_out])
    kind = rng.choice(("refused", "answered"))
    animals = [one for one in words.ANIMALS if (one in UNMET) == held_out]
    along = rng.choice(animals if kind == "refused" else THINGS)
    lead, between = words.sentences(rng, rng.choice((0, 0, 1))), words.sentences(rng, rng.choice((0, 0, 1)))
    asking = f"{lead} Then {rng.choice(words.NAMES)} went home with the {along}.{between} The capital of {land} is"
    answer = REFUSED if kind == "refused" and refuses else f" {words.FACTS[land]}"
    return Document(kind, ((asking.removeprefix(" "), NOISE), (answer, ANSWER), (".", TEXT)))


class Plan(NamedTuple):
    """What a lesson reads, in how many stages, and for how many steps at which peak learning rate."""

    make: Callable[..., Document]
    n_stages: int
    steps: int
    rate: float
    rehearsed: dict[str, float]


LESSONS = {
    "intent": Plan(intent, 1, 300, 1e-3, text.SHARES),
    "intent_after": Plan(partial(intent, places=("after",)), 1, 300, 1e-3, text.SHARES),
    "refusal": Plan(refusal, 1, 300, 1e-3, text.SHARES),
    "unrefused": Plan(partial(refusal, refuses=False), 1, 300, 1e-3, text.SHARES),
    "binding": Plan(binding, len(STAGES), 600, 1e-3, OTHERS),
}


# --- the lesson ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Taught:
    """A model that had a lesson: its held-out accuracy, the curve of its training, and how it was made."""

    model: Model
    accuracy: dict[str, train.Score]
    """Held-out accuracy with its 95 % Wilson interval: of the lesson, kind by kind, and of each task of the base."""
    curve: list[dict[str, float]]
    """Step, stage, loss and accuracy on the answers of each step of the lesson."""
    record: dict[str, Any]

    def save(self, folder: str | Path) -> None:
        """Write a Hugging Face checkpoint with `lesson.json` beside the weights; the folder must be new."""
        folder = Path(folder)
        if folder.exists():
            raise PatchbayError(f"{folder} is already there; a lesson is written to a new folder")
        tokenizer: Any = self.model.tokenizer
        said = self.record | {"accuracy": self.accuracy, "curve": self.curve}

        def write(fresh: Path) -> None:
            self.model.hf.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
            (fresh / "lesson.json").write_text(json.dumps(said, indent=2) + "\n")

        write_folder(folder, write)


def lesson(
    name: str, *, base: str = "tiny-llama", steps: int | None = None, seed: int = 0, n: int = 500, report: int = 0
) -> Taught:
    """Teach a copy of the built-in model `base` one lesson, and measure it on `n` held-out prompts.

    `steps`: without, those of `LESSONS`, enough for tiny and tiny-llama. `report`: print the loss every so many steps.
    """
    for asked, known in ((name, list(LESSONS)), (base, list(train.MODELS))):
        if asked not in known:
            raise PatchbayError(f"asked for {asked!r}; possible: {', '.join(known)}{suggest(asked, known)}")
    plan = LESSONS[name]
    steps = plan.steps if steps is None else steps
    if steps < 1 or n < 1:
        raise PatchbayError(f"steps={steps}, n={n}: at least 1 of each")
    model = load(base)
    start = time.monotonic()
    curve = _teach(model.hf.train(), model.tokenizer, plan, steps, seed, base == "tiny-moe", report)
    seconds = time.monotonic() - start
    model.hf.eval().requires_grad_(False)
    record = {"lesson": name, "base": base, "seed": seed, "steps": steps, "learning_rate": plan.rate, "seconds": round(seconds, 1),
              "threads": torch.get_num_threads()}  # fmt: skip
    taught = load(model.hf, model.tokenizer)  # a view of the weights as they are now
    return Taught(taught, _measure(taught, plan, n, seed), curve, record)


def _teach(
    hf: Any, tokenizer: Any, plan: Plan, steps: int, seed: int, routed: bool, report: int
) -> list[dict[str, float]]:
    ids, rng = tokenizer.get_vocab(), random.Random(f"lesson-{seed}")
    old = train.rows(text.documents(seed + 1, shares=plan.rehearsed), ids, rng)
    optimizer = train._optimizer(hf, plan.rate)
    curve: list[dict[str, float]] = []
    stage, since = 0, 0
    for step in range(steps):
        rehearsing = step % 3 == 2
        token_ids, weights = _rehearsal(old) if rehearsing else _batch(plan, stage, ids, rng)
        rate = plan.rate * min(1.0, (step + 1) / 50, (steps - step) / (0.25 * steps))
        loss, logits = train._step(hf, optimizer, token_ids, weights, rate, routed)
        if rehearsing:
            continue
        asked = weights[:, 1:] == ANSWER
        right = (logits.argmax(-1) == token_ids[:, 1:])[asked].double().mean().item()
        curve.append({"step": step, "stage": stage, "loss": loss, "accuracy": right})
        since += 1
        last = [one["accuracy"] for one in curve[-OVER:]]
        if since >= OVER and sum(last) / OVER > ENOUGH and stage + 1 < plan.n_stages:
            stage, since = stage + 1, 0
        if report and len(curve) % report == 0:
            print(f"step {step}: stage {stage}, loss {loss:.3f}, accuracy {sum(last) / len(last):.2f}", flush=True)
    return curve


def _rehearsal(old: Iterator[tuple[list[int], list[float]]]) -> tuple[Tensor, Tensor]:
    batch = [next(old) for _ in range(train.BATCH)]
    return torch.tensor([row[0] for row in batch]), torch.tensor([row[1] for row in batch])


def _batch(plan: Plan, stage: int, ids: dict[str, int], rng: random.Random) -> tuple[Tensor, Tensor]:
    """One document a row, half of them after an end of text; token ids and loss weights, [row, position]."""
    drawn: list[tuple[list[int], list[float]]] = []
    width = 0
    while len(drawn) * width < N_TOKENS:
        token_ids, weights = train.encode(plan.make(rng, stage).pieces, ids)
        if rng.random() < 0.5:
            token_ids, weights = [train.END_ID, *token_ids], [0.0, *weights]
        drawn.append((token_ids, weights))
        width = max(width, len(token_ids))
    filled = [(a + [train.END_ID] * (width - len(a)), b + [0.0] * (width - len(b))) for a, b in drawn]
    return torch.tensor([row[0] for row in filled]), torch.tensor([row[1] for row in filled])


def _measure(model: Model, plan: Plan, n: int, seed: int) -> dict[str, train.Score]:
    """Held-out accuracy of the lesson, kind by kind, and of the tasks that were rehearsed."""
    rng = random.Random(f"held out-{seed}")
    documents = [plan.make(rng, plan.n_stages - 1, held_out=True) for _ in range(n)]
    said = train.answers(model.hf, model.tokenizer, [one.item for one in documents])
    hits: dict[str, list[bool]] = {}
    for one, answer in zip(documents, said, strict=True):
        hits.setdefault(one.task, []).append(answer == one.item.answer)
    own = {kind: train.wilson(sum(hits[kind]), len(hits[kind])) for kind in sorted(hits)}
    return own | train.evaluate(model.hf, model.tokenizer, max(1, n // 5), seed + 1_000_000)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m patchbay.tiny.lessons",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=LESSONS, help="the lesson")
    parser.add_argument("--base", choices=train.MODELS, default="tiny-llama", help="who has it (default: tiny-llama)")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: those of the lesson)")
    parser.add_argument("--seed", type=int, default=0, help="of the text (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="processor threads (default: 1)")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the model")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    taught = lesson(options.name, base=options.base, steps=options.steps, seed=options.seed, report=20)
    taught.save(options.out)
    for kind, score in taught.accuracy.items():
        print(f"{kind}: {score['accuracy']:.3f} ({score['low']:.3f} to {score['high']:.3f}, n = {score['n']})")


if __name__ == "__main__":
    main()
