"""Train the small models that are shipped: `python -m patchbay.tiny.train NAME [--steps N | --minutes M] [--seed S] [--threads T]`.

Loss = sum_t w_t (-log p(x_t | x_<t)) / sum_t w_t over the tokens of packed documents of `text.py`, w_t being the weight
that the document gives to the token. AdamW, linear warm-up, cosine decay to zero. Two lessons: first random words that
repeat at random periods from random places on, from few words to all, which teaches to look back within hundreds of steps
(mixed in with the rest from the start it was not learned within 3,500); then all documents. Nothing is seen twice but the
facts. Weights are rounded to float16 once, at the end; every number written to `training.json` is measured after that
rounding, with the weights loaded as float32. Matrices are multiplied in bfloat16 where the processor has instructions for it.

The same name, seed, steps and thread count give the same weights on the same machine and versions; `--minutes` fits the
schedule to the clock instead and is not repeatable to the bit. Cost: about 11,000 tokens a second on one core.
"""

import argparse
import json
import math
import random
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from patchbay.tasks import words
from patchbay.tiny import text
from patchbay.tiny.forms import END_ID, MODELS, N_CONTEXT, ROUTER_BALANCE

WEIGHTS = Path(__file__).parent / "weights"
END, UNKNOWN = "<|endoftext|>", "<unk>"
BATCH = 16
LOOKING_BACK = ((60, 16, 32, 64, 600, 0.90), (None, 28, 20, 96, 400, 0.95))
"""Stages of the first lesson: (words, longest period, rows, tokens in a row, most steps, accuracy that ends the stage)."""
WORD = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]|\s"
Score = dict[str, float]


def vocabulary() -> list[str]:
    """Every token, most special first: each word of the text with its space, and without where a text can begin."""
    found = {f" {word}" for word in words.POOL}
    found |= {*words.NAMES, *words.NUMBERS, *words.LETTERS, *words.DAYS, *words.MONTHS, ".", ",", "?", "!", "\n", " "}
    stream = text.documents(0)
    for _ in range(20_000):
        found.update(re.findall(WORD, next(stream).text))
    return [END, UNKNOWN, *sorted(found)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level, with the space that precedes a word inside its token, so that decoding is plain joining."""
    tokens = vocabulary()
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(END, special=True), AddedToken(UNKNOWN, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, unk_token=UNKNOWN,
        model_max_length=N_CONTEXT, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def encode(pieces: Iterable[tuple[str, float]], ids: dict[str, int]) -> tuple[list[int], list[float]]:
    """Token ids and loss weights of a document's pieces; pieces begin and end between tokens."""
    token_ids, weights = [], []
    for piece, weight in pieces:
        found = [ids[token] for token in re.findall(WORD, piece)]
        token_ids += found
        weights += [weight] * len(found)
    return token_ids, weights


def rows(
    documents: Iterator[text.Document], ids: dict[str, int], rng: random.Random
) -> Iterator[tuple[list[int], list[float]]]:
    """Rows of N_CONTEXT + 1 tokens: whole documents with an end-of-text between; half of the rows also begin with one.

    Of eight waiting documents the oldest that fits comes next. As documents differ in length, they begin anywhere.
    """
    waiting = [encode(next(documents).pieces, ids) for _ in range(8)]
    while True:
        row_ids, row_weights = ([END_ID], [0.0]) if rng.random() < 0.5 else ([], [])
        while fitting := [i for i, (found, _) in enumerate(waiting) if len(row_ids) + len(found) <= N_CONTEXT]:
            token_ids, weights = waiting.pop(fitting[0])
            waiting.append(encode(next(documents).pieces, ids))
            row_ids, row_weights = row_ids + token_ids + [END_ID], row_weights + weights + [text.TEXT]
        n_empty = N_CONTEXT + 1 - len(row_ids)
        yield row_ids + [END_ID] * n_empty, row_weights + [0.0] * n_empty


def weighted_loss(logits: Tensor, token_ids: Tensor, weights: Tensor) -> Tensor:
    """Mean of -log p(next token) under the weights; logits [row, position, vocab] for all but the last position."""
    losses = cross_entropy(
        logits.float().flatten(0, 1), token_ids[:, 1:].flatten(), reduction="none"
    )  # [row * position]
    wanted = weights[:, 1:].flatten()
    return (losses * wanted).sum() / wanted.sum()


def _optimizer(model: PreTrainedModel, rate: float) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)


def train(
    name: str,
    *,
    seed: int = 0,
    steps: int | None = None,
    minutes: float | None = None,
    rate: float = 2e-3,
    report: int = 500,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, dict[str, Any]]:
    """Train one model for `steps` (repeatable) or `minutes`; returns it unrounded with its tokenizer and a record."""
    if (steps is None) == (minutes is None):
        raise ValueError(f"steps={steps}, minutes={minutes}; give exactly one of the two")
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    model = MODELS[name](len(tokenizer)).train()
    optimizer = _optimizer(model, rate)
    routed = name == "tiny-moe"
    start, step, recent = time.monotonic(), 0, []
    n_first = _look_back(model, optimizer, tokenizer, seed, rate, routed)
    stream = rows(text.documents(seed), tokenizer.get_vocab(), random.Random(seed))
    began = time.monotonic()
    while (done := step / steps if steps else (time.monotonic() - began) / (60 * (minutes or 1))) < 1:
        batch = [next(stream) for _ in range(BATCH)]
        token_ids, weights = (torch.tensor([row[i] for row in batch]) for i in (0, 1))  # [row, position]
        loss, _ = _step(model, optimizer, token_ids, weights, rate * 0.5 * (1 + math.cos(math.pi * done)), routed)
        recent.append(loss)
        step += 1
        if step % report == 0:
            print(_progress(model, tokenizer, step, time.monotonic() - start, recent[-report:]), flush=True)
    record = {"name": name, "seed": seed, "first_lesson_steps": n_first, "steps": step, "training_tokens": step * BATCH * N_CONTEXT,
              "learning_rate": rate, "seconds": round(time.monotonic() - start, 1), "threads": torch.get_num_threads()}  # fmt: skip
    return model.eval(), tokenizer, record


def _step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    token_ids: Tensor,
    weights: Tensor,
    rate: float,
    routed: bool,
) -> tuple[float, Tensor]:
    """One update at this learning rate; returns the loss and the logits [row, position, vocab]."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    options = {"output_router_logits": True} if routed else {}
    with torch.autocast("cpu", torch.bfloat16, enabled=not routed and _multiplies_bfloat16()):
        output = model(input_ids=token_ids[:, :-1], use_cache=False, **options)
    loss = weighted_loss(output.logits, token_ids, weights)
    (loss + ROUTER_BALANCE * output.aux_loss if routed else loss).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), output.logits


def _multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it; without them it takes four times as long as float32."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def _look_back(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    rate: float,
    routed: bool,
) -> int:
    """The first lesson: rows of random words that repeat with a random period from a random place on. Returns its steps."""
    ids, generator = tokenizer.get_vocab(), torch.Generator().manual_seed(seed + 1)
    pool = torch.tensor([ids[f" {word}"] for word in words.POOL])
    pool = pool[torch.randperm(len(pool), generator=generator)]
    step = 0
    for n_words, longest, n_rows, n_tokens, most, enough in LOOKING_BACK:
        for i in range(most):
            period = torch.randint(4, longest, (n_rows, 1), generator=generator)
            drawn = pool[torch.randint(0, n_words or len(pool), (n_rows, n_tokens + 1), generator=generator)]
            place = torch.arange(n_tokens + 1) + torch.randint(0, longest, (n_rows, 1), generator=generator)
            token_ids = drawn.gather(1, place % period)  # [row, position]
            repeated = torch.arange(n_tokens + 1) >= period
            loss, logits = _step(
                model, optimizer, token_ids, repeated.float(), rate * min(1.0, (step + 1) / 100), routed
            )
            step += 1
            if i % 50 == 0:
                right = (logits.argmax(-1) == token_ids[:, 1:])[repeated[:, 1:]].float().mean().item()
                print(f"looking back, step {step}: loss {loss:.3f}, accuracy {right:.2f}", flush=True)
                if right > enough:
                    break
    return step


def _progress(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, step: int, seconds: float, losses: list[float]
) -> str:
    shares = " ".join(
        f"{task} {score['accuracy']:.2f}" for task, score in evaluate(model.eval(), tokenizer, 50, 1).items()
    )
    model.train()
    return f"step {step} {seconds:.0f} s loss {sum(losses) / len(losses):.3f} | {shares}"


def wilson(hits: int, n: int) -> Score:
    """Share of hits with its 95 % Wilson interval."""
    z = 1.959964
    share = hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return {"accuracy": share, "n": n, "low": max(0.0, centre - half), "high": min(1.0, centre + half)}


@torch.no_grad()
def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, items: list[words.Item]) -> list[str]:
    """The most likely token at every position of the answer, given the right tokens before it; items keep their order."""
    encoded = [tokenizer.encode(item.prompt + item.answer) for item in items]
    n_answer = [len(tokenizer.encode(item.answer)) for item in items]
    said = [""] * len(items)
    order = sorted(range(len(items)), key=lambda i: len(encoded[i]))
    for first in range(0, len(order), 64):
        chosen = order[first : first + 64]
        width = max(len(encoded[i]) for i in chosen)
        token_ids = torch.tensor([encoded[i] + [END_ID] * (width - len(encoded[i])) for i in chosen])
        best = model(input_ids=token_ids, use_cache=False).logits.argmax(-1)  # [prompt, position]
        for i, row in zip(chosen, best, strict=True):
            said[i] = tokenizer.decode(row[len(encoded[i]) - n_answer[i] - 1 : len(encoded[i]) - 1])
    return said


def held_out_items(task: str, n: int, seed: int) -> list[words.Item]:
    """`n` prompts of a task that never occur in training, each cut before its last answer."""
    rng = random.Random(f"{task}-{seed}")
    items: list[words.Item] = []
    while len(items) < n:
        document = text.make(task, rng, held_out=True)
        if any(weight == text.ANSWER for _, weight in document.pieces):
            items.append(document.item)
    return items


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, n: int, seed: int) -> dict[str, Score]:
    """Accuracy on `n` held-out prompts of every task, with 95 % Wilson intervals.

    A prompt counts when every token of its answer is the most likely one. `fact_bare` are the 80 memorised facts without
    context (seen in training). The contradictions have no right answer: `contradiction_context` and
    `contradiction_memory` are the shares of prompts answered with the stated and with the memorised capital.
    """
    scores = {}
    for task in text.TASKS:
        items = held_out_items(task, n, seed)
        said = answers(model, tokenizer, items)
        if task == "contradiction":
            stated = [item.prompt.split()[5].strip(".") for item in items]
            known = [words.FACTS[item.prompt.split()[3]] for item in items]
            scores["contradiction_context"] = wilson(sum(s == f" {w}" for s, w in zip(said, stated, strict=True)), n)
            scores["contradiction_memory"] = wilson(sum(s == f" {w}" for s, w in zip(said, known, strict=True)), n)
        else:
            scores[task] = wilson(sum(s == item.answer for s, item in zip(said, items, strict=True)), n)
    bare = [words.render_fact(land) for land in words.LANDS]
    said = answers(model, tokenizer, bare)
    scores["fact_bare"] = wilson(sum(s == item.answer for s, item in zip(said, bare, strict=True)), len(bare))
    return scores


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, n: int, seed: int) -> dict[str, float]:
    """Nats per token on `n` held-out documents: running text (weight TEXT) and answers (weight ANSWER)."""
    stream = text.documents(seed, held_out=True)
    ids = tokenizer.get_vocab()
    sums = {text.TEXT: [0.0, 0], text.ANSWER: [0.0, 0]}
    for _ in range(n):
        token_ids, weights = encode(next(stream).pieces, ids)
        logits = model(input_ids=torch.tensor([token_ids[:-1]]), use_cache=False).logits[0]  # [position, vocab]
        losses = cross_entropy(logits, torch.tensor(token_ids[1:]), reduction="none")
        for weight, total in sums.items():
            wanted = torch.tensor(weights[1:]) == weight
            total[0] += losses[wanted].sum().item()
            total[1] += int(wanted.sum())
    return {"text": sums[text.TEXT][0] / sums[text.TEXT][1], "answer": sums[text.ANSWER][0] / sums[text.ANSWER][1]}


def laundry_by_objects(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, n: int, seed: int
) -> dict[str, Score]:
    """Laundry accuracy for every number of listed objects; guessing one of the listed scores 1 / objects."""
    items = held_out_items("laundry", n, seed)
    hits: dict[int, list[bool]] = {}
    for item, said in zip(items, answers(model, tokenizer, items), strict=True):
        listed = item.prompt.split(".")[0].count(" the ")
        hits.setdefault(listed - 1, []).append(said == item.answer)
    return {str(count): wilson(sum(hits[count]), len(hits[count])) for count in sorted(hits)}


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any], folder: Path, *, n: int = 1000
) -> None:
    """Round to float16, measure, and write a folder that `from_pretrained` loads as float32."""
    model = model.half()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    measured = measure(model.float(), tokenizer, record["seed"], n)
    (folder / "training.json").write_text(json.dumps(record | measured, indent=2) + "\n")


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int, n: int) -> dict[str, Any]:
    """What `training.json` says about a model besides how it was trained, on held-out text of another seed."""
    seed += 1_000_000
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "evaluation": {"prompts_per_task": n, "documents": 2 * n, "seed": seed},
        "held_out_loss": held_out_loss(model, tokenizer, 2 * n, seed),
        "accuracy": evaluate(model, tokenizer, n, seed),
        "laundry_by_objects": laundry_by_objects(model, tokenizer, 2 * n, seed),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m patchbay.tiny.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=MODELS, help="which model to train")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--steps", type=int, help="optimiser steps; repeatable to the bit with the same seed and threads"
    )
    length.add_argument("--minutes", type=float, help="train by the clock instead (default: 25)")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and of the text (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="processor threads (default: 1)")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate (default: 0.002)")
    parser.add_argument("--out", type=Path, help="folder to write (default: weights/NAME beside this file)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    minutes = options.minutes or (None if options.steps else 25.0)
    model, tokenizer, record = train(
        options.name, seed=options.seed, steps=options.steps, minutes=minutes, rate=options.rate
    )
    folder = options.out or WEIGHTS / options.name
    save(model, tokenizer, record, folder)
    print((folder / "training.json").read_text())


if __name__ == "__main__":
    main()
