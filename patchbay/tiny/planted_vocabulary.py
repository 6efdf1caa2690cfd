"""The 64 words of the planted models and their tokenizer: one token per word with its leading space, as in GPT-2.

`tokenizer.decode(tokenizer.encode(text)) == text` for every text made of these words; any other word becomes `<unk>`.
Nothing is prepended.
"""

from __future__ import annotations

import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<bos>", "<pad>", "<unk>")
BOS, PAD, UNK = range(3)


def _spaced(text: str) -> tuple[str, ...]:
    return tuple(f" {word}" for word in text.split())


CLASSES: dict[str, tuple[str, ...]] = {
    "name": _spaced("Mary John Anna Paul Emma Tom Kate Mark Lucy Sam Rose Max"),
    "object": _spaced("apple book cup door egg fish hat key"),
    "number": _spaced("one two three four five six seven eight nine ten"),
    "day": _spaced("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "month": _spaced("January February March April May June July August September October November December"),
    "other": (*_spaced("the and to a is has then gave"), ".", ",", ":", "\n"),
}
WORDS: tuple[str, ...] = (*SPECIAL, *(word for words in CLASSES.values() for word in words))
TOKEN_IDS: dict[str, int] = {word: i for i, word in enumerate(WORDS)}

WORD = re.compile(r"<\w+>| ?\w+|[^\w\s]|\n")


def ids(name: str) -> list[int]:
    """Token ids of one word class."""
    return [TOKEN_IDS[word] for word in CLASSES[name]]


def tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer, built in memory."""
    words = Tokenizer(models.WordLevel(TOKEN_IDS, unk_token=SPECIAL[UNK]))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(WORD.pattern), behavior="isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=SPECIAL[BOS],
        pad_token=SPECIAL[PAD],
        unk_token=SPECIAL[UNK],
    )
