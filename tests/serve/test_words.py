"""Text token by token is the text of all tokens; stops are found wherever they fall between tokens."""

import random

import pytest

import patchbay as pb
from patchbay.serve.words import Words


class Letters:
    """A tokenizer of UTF-8 bytes: a letter may take four tokens."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def pieces(words: Words, ids: list[int]) -> list[str]:
    found = []
    for token in ids:
        found.append(words.add(token))
        if words.stopped:
            return found
    return [*found, words.end()]


@pytest.mark.parametrize(
    "text", ["plain", "für die Katz", "日本語のテキスト", "🙂🙃🙂" * 20, "a" * 500, "é\n\t ß" * 30]
)
def test_pieces_put_together_are_the_text(text: str) -> None:
    ids = list(text.encode())
    found = pieces(Words(Letters(), list("Präfix".encode())), ids)
    assert "".join(found) == text
    assert all("\ufffd" not in piece for piece in found)


@pytest.mark.parametrize("text", ["für die Katz", "日本語のテキスト", "🙂🙃🙂" * 20])
def test_told_late_it_is_the_same_text(text: str) -> None:
    """Decoded once, at the end; where there are stops to look for, as it comes."""
    ids = list(text.encode())
    found = pieces(Words(Letters(), list("Präfix".encode()), late=True), ids)
    assert found == [*([""] * len(ids)), text]
    stopped = pieces(Words(Letters(), [65], (text[-2],), late=True), ids)
    assert "".join(stopped) == text[: text.index(text[-2])]


def test_what_is_never_finished_is_told_at_the_end() -> None:
    ids = list("ab🙂".encode())[:-1]
    found = pieces(Words(Letters(), [65]), ids)
    assert "".join(found) == "ab\ufffd"
    assert found[-1] == "\ufffd"


@pytest.mark.parametrize("seed", range(20))
def test_a_stop_ends_the_text_before_it(seed: int) -> None:
    """By the plainest search in the whole text, with stops that begin one another and overlap."""
    rng = random.Random(seed)
    text = "".join(rng.choice("abc") for _ in range(60))
    stops = ["".join(rng.choice("abc") for _ in range(rng.randint(2, 5))) for _ in range(3)]
    words = Words(Letters(), [120], stops)
    found = "".join(pieces(words, list(text.encode())))
    ends = {at + len(stop): at for stop in stops if (at := text.find(stop)) >= 0}
    assert words.stopped == bool(ends)
    first = min(ends, default=len(text))  # the stop that is complete first; of two that end together the longer
    starts = [at for stop in stops if (at := text.find(stop)) >= 0 and at + len(stop) == first]
    assert found == text[: min(starts, default=len(text))]


def test_nothing_that_may_be_a_stop_is_told_too_early() -> None:
    words = Words(Letters(), [120], ["END"])
    assert [words.add(ord(letter)) for letter in "aEN"] == ["a", "", ""]
    assert words.add(ord("E")) == "EN"
    assert words.end() == "E"


def test_the_built_in_tokenizer_gives_what_generate_gives() -> None:
    model = pb.load("tiny")
    prompt = model.encode("The capital of Lolavia is")[0]
    row = model.generate([prompt], 30)[0]
    said = model.generate("The capital of Lolavia is", 30, new_only=True)
    ends = [i for i in [model.hf.generation_config.eos_token_id] if i is not None]
    ids = [token for token in row[len(prompt) :] if token not in ends]
    assert "".join(pieces(Words(model.tokenizer, prompt), ids)) == said
