"""Models to make tasks for: only what a task asks of one (tokenizer, vocab_size, max_positions)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from patchbay.tasks import words
from tests.shared import SHARED

WORD = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]|\s"


@dataclass
class Fake:
    tokenizer: Any
    vocab_size: int
    max_positions: int | None = None


def word_tokenizer(*, start: bool = False, end: bool = False, without: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Word-level, the space inside the token; `start` and `end` add <s> and </s> by default."""
    templates = [*words.SENTENCES, *words.INDIRECT_OBJECT, *(" ".join(pair) for pair in words.CHORES)]
    templates += [
        "On the list are still has to The secret of capital is Box contains box in boxes + = . , and",
        "a an A",
    ]
    plain = [re.sub(r"\{\w+\}", " ", text) for text in templates]
    found = {piece.strip() for text in (*plain, " ".join(words.POOL)) for piece in re.findall(WORD, text)} - {""}
    known = sorted({spaced for word in found - set(without) for spaced in (word, f" {word}")})
    ids = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", *known])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    template = f"{'<s> ' * start}$A{' </s>' * end}"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def stored(folder: str, max_positions: int) -> Fake:
    """A tokenizer from the shared checkpoints, or a skip that says where it was looked for."""
    if not (SHARED / folder).is_dir():
        pytest.skip(f"no {SHARED / folder}: set PATCHBAY_SHARED to the folder of shared checkpoints")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / folder)
    return Fake(tokenizer, len(tokenizer), max_positions)


@pytest.fixture(scope="session")
def plain() -> Fake:
    tokenizer = word_tokenizer()
    return Fake(tokenizer, len(tokenizer), 256)


@pytest.fixture(scope="session")
def wrapped() -> Fake:
    """A tokenizer that puts a start token in front and an end token behind by default."""
    tokenizer = word_tokenizer(start=True, end=True)
    return Fake(tokenizer, len(tokenizer), 256)


@pytest.fixture(scope="session")
def gpt2() -> Fake:
    return stored("tokenizers/gpt2", 1024)


@pytest.fixture(scope="session")
def stories() -> Fake:
    """512 sentencepiece-like tokens: few whole words, and digits and letters split from their space."""
    return stored("models/stories260K", 512)


@pytest.fixture(scope="session")
def characters() -> Fake:
    return stored("models/gpt2-char-tinystories-0.2m", 32)


@pytest.fixture(params=["plain", "wrapped", "gpt2"])
def model(request: pytest.FixtureRequest) -> Fake:
    """Each tokenizer that has the words of every task."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def make_tokenizer() -> Any:
    return word_tokenizer


@pytest.fixture
def make_model() -> type[Fake]:
    return Fake
