"""Meters: answers and pairs scored by us and by lm-evaluation-harness's own Hugging Face backend, and a survey beside its longest prompt.

"choices" is eight prompts of 40 to 70 words with four answers of three words each, "pairs" the 240 pairs of every 17th paradigm of BLiMP in
GPT-2's tokens (left out where ../shared is not at hand): the harness's backend against `measure.lm_eval`, batches of 16, the same
log-probabilities. A target of 0.67 is 1.5 times as fast. What pairs can gain is by count: of all 77,207 tokens that 4,020 pairs have,
30,785 stand in beginnings that some sentence before them has, 1.66 times as many as are run; the two sentences of each pair alone share 18,498, 1.32 times.
Without lm-eval these rows are left out. "survey" is a question with five choices in all 120 orders against its longest prompt run as often. Both
sides run the same numbers of prompts.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import patchbay as pb
from bench.clock import compare
from bench.report import Row, timed
from bench.shapes import SHARED, save_shapes
from patchbay.measure._answers import scores
from patchbay.measure.survey_answers import LABELS, written
from patchbay.model.run import run_rows

PARTS = ("choices", "pairs", "survey")
TARGETS = {"choices": 1 / 1.5, "pairs": 1 / 1.5, "survey": 1.3}
METHOD = __doc__.split("\n\n", 1)[1].replace("\n", " ").strip()
BATCH = 16


def rows(folder: Path, parts: tuple[str, ...], device: str, dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    """The section's rows."""
    for name, path in save_shapes(folder, dtype).items():
        model = pb.load(path, device=device, dtype=dtype)
        model = pb.load(model.hf, _words(model.vocab_size))
        for part in parts:
            yield from _survey(name, model, seconds) if part == "survey" else _harness(name, model, part, seconds)


def _words(n: int) -> Any:
    """A tokenizer whose tokens are words: w0, w1, ... and the marks of a question."""
    marks = ["<unk>", "</s>", *LABELS, *(f"{letter}." for letter in LABELS), "Question:", "Answer:"]
    vocab = {word: i for i, word in enumerate([*marks, *(f"w{i}" for i in range(n - len(marks)))])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", bos_token="</s>")


def _text(chance: random.Random, n: int) -> str:
    return " ".join(f"w{chance.randrange(10_000)}" for _ in range(n))


def _asked(part: str) -> list[tuple[str, str]]:
    """(context, continuation) of each request."""
    chance = random.Random(0)
    if part == "choices":
        prompts = [_text(chance, chance.randint(40, 70)) for _ in range(8)]
        return [(prompt, f" {_text(chance, 3)}") for prompt in prompts for _ in range(4)]
    return [("", sentence) for sentence in _sentences()]


def _sentences() -> list[str]:
    """Both sentences of 240 pairs of BLiMP, each of GPT-2's tokens a word of its own: w0, w1, ... in the order in which they first come."""
    path, spelled = SHARED / "data/blimp_60_per_paradigm.jsonl", SHARED / "tokenizers/gpt2"
    if not path.is_file() or not spelled.is_dir():
        print(f"no {path}: the rows of pairs are left out (set PATCHBAY_SHARED)")
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    chosen = list(dict.fromkeys(row["UID"] for row in rows))[::17]
    texts = [row[side] for row in rows if row["UID"] in chosen for side in ("sentence_good", "sentence_bad")]
    ids = AutoTokenizer.from_pretrained(spelled)(texts)["input_ids"]
    word = {token: f"w{i}" for i, token in enumerate(dict.fromkeys(token for each in ids for token in each))}
    return [" ".join(word[token] for token in each) for each in ids]


def _harness(name: str, model: pb.Model, part: str, seconds: float) -> Iterator[Row]:
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        from patchbay.measure.lm_eval import PatchbayLM
    except (ModuleNotFoundError, pb.PatchbayError) as error:
        print(f"{error}: the row of {part} is left out")
        return
    asked = [Instance(request_type="loglikelihood", doc={}, arguments=one, idx=0) for one in _asked(part)]
    if not asked:
        return
    theirs = HFLM(pretrained=model.hf, tokenizer=model.tokenizer, batch_size=BATCH, device=str(model.device))
    ours = PatchbayLM(model, batch_size=BATCH)
    both = [torch.tensor([value for value, _ in lm.loglikelihood(asked, disable_tqdm=True)]) for lm in (theirs, ours)]
    assert (both[0] - both[1]).abs().max() < 1e-3, "the two say the same"
    found = compare(
        lambda: theirs.loglikelihood(asked, disable_tqdm=True),
        lambda: ours.loglikelihood(asked, disable_tqdm=True),
        seconds=seconds, least=3, warm=1,
    )  # fmt: skip
    what = "choices (8 prompts, 4 answers)" if part == "choices" else "pairs (240 of BLiMP)"
    yield timed(f"{what}, beside the harness's backend", name, f"{len(asked)} requests", found, TARGETS[part])


def _survey(name: str, model: pb.Model, seconds: float) -> Iterator[Row]:
    chance = random.Random(0)
    question, choices = _text(chance, 12), [_text(chance, n) for n in (1, 2, 3, 4, 5)]
    prompts = [written(question, order) for order in itertools.permutations(choices)]
    labels = [[f" {LABELS[j]}" for j in range(5)]] * len(prompts)
    longest = max(model.encode(prompts), key=len)

    def alone() -> None:
        for at in range(0, len(prompts), BATCH):
            n = min(BATCH, len(prompts) - at)
            run_rows(model, [list(longest)] * n, [len(longest)] * n)

    found = compare(alone, lambda: scores(model, prompts, labels, batch_size=BATCH), seconds=seconds, least=3, warm=1)
    yield timed("a survey question in all 120 orders", name, f"120 x {len(longest)}", found, TARGETS["survey"])
