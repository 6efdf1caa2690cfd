"""Random twins that read text: one with a character for each token and a start token in front, one with pairs of characters and none."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

import patchbay as pb
from patchbay.tiny import twins

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:?!'\n"
PAIRS = [(" ", "t"), (" ", "a"), ("h", "e"), ("i", "n"), ("e", "r"), (" ", "A"), ("o", "n"), (" ", "s"), ("r", "e"), ("a", "t")]  # fmt: skip
MARKS = "()-@+"  # known too, after all others
NAMES = ("characters", "pairs")


def tokenizer(name: str, marks: str = MARKS) -> Any:
    """A tokenizer of at most 96 tokens."""
    known = {letter: i for i, letter in enumerate(["<unk>", "<s>", *LETTERS])}
    merges = [] if name == "characters" else PAIRS
    known |= {a + b: len(known) + i for i, (a, b) in enumerate(merges)}
    known |= {letter: len(known) + i for i, letter in enumerate(marks)}
    made = Tokenizer(models.BPE(known, merges, unk_token="<unk>"))
    made.decoder = decoders.Fuse()
    if name == "characters":
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", known["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")


@functools.cache
def reader(name: str = "characters", form: str = "llama", seed: int = 0) -> pb.Model:
    """A random twin behind one of the tokenizers."""
    return pb.load(twins.twin(form, seed=seed), tokenizer(name))


@functools.cache
def shared_model(name: str) -> pb.Model:
    """A small trained model that lies beside the checkout."""
    from tests.shared import SHARED

    return pb.load(str(SHARED / "models" / name))


def by_hand(model: pb.Model, row: Sequence[int], start: int) -> float:
    """log p of a row's tokens from `start` on, from Hugging Face's logits."""
    with torch.no_grad():
        logits = model.hf(torch.tensor([list(row)])).logits[0].double()
    return sum(float(logits[at].log_softmax(-1)[row[at + 1]]) for at in range(start - 1, len(row) - 1))


def p_of(model: pb.Model, row: Sequence[int], start: int) -> float:
    return math.exp(by_hand(model, row, start))
