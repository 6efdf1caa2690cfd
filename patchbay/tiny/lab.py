"""What small training experiments are made of: a network that a processor trains in seconds, and texts whose truth is known."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from patchbay.corpus.synthetic import repeats
from patchbay.model.load import load
from patchbay.model.model import Model
from patchbay.results.method import seeded
from patchbay.signal.port import PatchbayError
from patchbay.tiny import text

RELATION, FIRST, LETTERS = 1, 2, 32
FACT_VOCAB = FIRST + LETTERS
Fact = list[list[int]]
ALPHABET = "abcdefghijklmnopqrstuvwxyz ,."
__all__ = [
    "backcopies",
    "characters",
    "facts",
    "mentions",
    "phrases",
    "pieces",
    "read_one_way",
    "recalls",
    "repeats",
    "small",
]


def small(
    vocab: int,
    *,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    mlp: int = 128,
    positions: int = 128,
    tied: bool = False,
    seed: int = 0,
) -> Model:
    """A Llama of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        intermediate_size=mlp, max_position_embeddings=positions, bos_token_id=0, eos_token_id=0, pad_token_id=None, tie_word_embeddings=tied,
    )  # fmt: skip
    with seeded(seed):
        return load(LlamaForCausalLM(config))


def fitted(
    model: Model,
    loss: Callable[[Any, int], Tensor | None],
    steps: int,
    *,
    rate: float = 3e-3,
    of: Sequence[nn.Parameter] | None = None,
) -> Model:
    """The model after `steps_of` it, in evaluation mode, as a new view of the same weights."""
    steps_of(model.hf, loss, steps, rate=rate, of=of)
    return load(model.hf, model.tokenizer)


def steps_of(
    hf: Any,
    loss: Callable[[Any, int], Tensor | None],
    steps: int,
    *,
    rate: float = 3e-3,
    of: Sequence[nn.Parameter] | None = None,
) -> None:
    """So many steps of Adam on `loss(hf, step)`, in place; of these parameters alone, or of all that can be trained.

    The rate rises over the first 20 steps and falls to a tenth along the last three quarters. A loss of None ends the training.
    """
    hf.train()
    tuned = [one for one in hf.parameters() if one.requires_grad] if of is None else list(of)
    optimiser = torch.optim.Adam(tuned, lr=rate, betas=(0.9, 0.98), fused=True)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20, max(0.1, (steps - step) / (0.75 * steps)))
        found = loss(hf, step)
        if found is None:
            break
        for one, gradient in zip(tuned, torch.autograd.grad(found, tuned), strict=True):
            one.grad = gradient
        nn.utils.clip_grad_norm_(tuned, 1.0)
        optimiser.step()
    for one in tuned:
        one.grad = None
    hf.eval()


def facts(n: int, seed: int) -> list[Fact]:
    """Facts of two names of two tokens each, all names different, and the relation between them: [A, relation, B]."""
    if not 0 < 2 * n <= LETTERS**2:
        raise PatchbayError(
            f"n={n}: facts have names of their own, of two of {LETTERS} letters each: 1 to {LETTERS**2 // 2} facts"
        )
    rng = random.Random(f"facts {seed}")
    letters = range(FIRST, FACT_VOCAB)
    names = rng.sample([[a, b] for a in letters for b in letters], 2 * n)
    return [[names[2 * i], [RELATION], names[2 * i + 1]] for i in range(n)]


def read_one_way(known: list[Fact]) -> list[Fact]:
    """Documents of all facts as they stand, and of the first half the other way round, too; the rest is read one way alone."""
    return known + [fact[::-1] for fact in known[: len(known) // 2]]


def pieces(model: Model, n: int, seed: int, lengths: Sequence[int]) -> list[list[int]]:
    """Stretches of the stories of the grammar in the tokens of `model`, all different, each of a length drawn among `lengths`."""
    rng, tokenizer = random.Random(f"pieces {seed}"), model._need_tokenizer()
    found: dict[tuple[int, ...], None] = {}
    for _ in range(100 * n):
        ids = list(tokenizer(text.story(rng).text)["input_ids"])
        length = rng.choice(list(lengths))
        at = rng.randrange(max(1, len(ids) - length))
        if len(ids) >= length:
            found[tuple(ids[at : at + length])] = None
        if len(found) >= n:
            break
    return [list(ids) for ids in found]


def backcopies(
    n: int, seed: int, *, length: int = 32, vocab: int = 64, triggers: int = 3, share: float = 0.15
) -> list[list[int]]:
    """Bigram-backcopy: a start token 0, then a chain of fixed bigram chances; after a trigger comes the token before the trigger.

    Triggers are tokens 1..triggers and come by chance `share`; Guo et al. 2024 describe the task, on which sinks form.
    """
    rng = random.Random("bigrams")  # one language for every seed
    plain = range(1 + triggers, vocab)
    chances = {token: [rng.random() ** 4 for _ in plain] for token in plain}
    draw, found = random.Random(f"backcopies {seed}"), []
    for _ in range(n):
        ids = [0, draw.choice(plain)]
        while len(ids) < length:
            if ids[-1] <= triggers:
                ids.append(ids[-2])
            elif draw.random() < share and ids[-2] > 0:
                ids.append(draw.randint(1, triggers))
            else:
                ids.append(draw.choices(plain, chances[ids[-1]])[0])
        found.append(ids)
    return found


def mentions(n: int, seed: int, *, vocab: int = 64, length: int = 32) -> list[tuple[list[int], list[int]]]:
    """Texts of words that follow one another by the chances of one language, with two names of two tokens that are drawn for each text and come again.

    Words are the lower half of the tokens, names are of the upper. Beside the tokens: the places of second tokens of names that stood in the text before.
    """
    words = range(vocab // 2)
    language = random.Random("words")  # one for every seed
    chances = {word: [language.random() ** 6 for _ in words] for word in words}
    draw, found = random.Random(f"mentions {seed}"), []
    for _ in range(n):
        names = [draw.sample(range(vocab // 2, vocab), 2) for _ in range(2)]
        ids, places, known = [draw.choice(words)], list[int](), set[int]()
        last = ids[0]
        while len(ids) < length:
            if draw.random() < 0.25 and len(ids) < length - 1:
                which = draw.randrange(2)
                if which in known:
                    places.append(len(ids) + 1)
                known.add(which)
                ids += names[which]
            else:
                last = draw.choices(words, chances[last])[0]
                ids.append(last)
        found.append((ids, places))
    return found


def recalls(
    n: int, seed: int, *, pairs: int = 8, length: int = 32, keys: int = 16, values: int = 16, after: Sequence[int] = ()
) -> list[tuple[list[int], list[int]]]:
    """Associative recall: texts of a key and its value, over and over; which `pairs` keys a text has, and which value each of them, is drawn for that text.

    Keys are tokens 0..keys - 1, values the next ones. Behind every pair stand the tokens `after`. Beside the tokens: the places of values whose key stood in the text before.
    """
    draw, found = random.Random(f"recalls {seed}"), list[tuple[list[int], list[int]]]()
    for _ in range(n):
        value = {key: keys + draw.randrange(values) for key in draw.sample(range(keys), pairs)}
        ids, places, known = list[int](), list[int](), set[int]()
        while len(ids) + 2 <= length:
            key = draw.choice(list(value))
            if key in known:
                places.append(len(ids) + 1)
            known.add(key)
            ids += [key, value[key], *after]
        found.append((ids, places))
    return found


def characters(n: int, seed: int, length: int) -> list[list[int]]:
    """Stretches of the stories of the grammar in characters, as places in ALPHABET: small letters, a space, a comma and a full stop."""
    rng, found = random.Random(f"characters {seed}"), list[list[int]]()
    while len(found) < n:
        ids = [ALPHABET.index(one) for one in text.story(rng).text.lower() if one in ALPHABET]
        at = rng.randrange(max(1, len(ids) - length))
        if len(ids) >= length:
            found.append(ids[at : at + length])
    return found


def phrases(n: int, seed: int) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Sentences of eleven words of a grammar, behind a start token 0, and the first and last word (from 0) of every constituent of two words or more.

    A sentence is a noun phrase and a verb with another one; a noun phrase is an article (1, 2) and a noun (3..10), half of the time with a preposition of nouns (15, 16) and one more
    noun phrase behind; behind a verb (11..14) and its object stands, half of the time, a preposition of verbs (17, 18) and one more. So every sentence has one binary tree.
    """
    draw, found = random.Random(f"phrases {seed}"), list[tuple[list[int], list[tuple[int, int]]]]()
    while len(found) < n:
        ids, spans = list[int](), list[tuple[int, int]]()
        _noun_phrase(draw, ids, spans)
        verb = len(ids)
        ids.append(draw.randrange(11, 15))
        _noun_phrase(draw, ids, spans)
        spans.append((verb, len(ids) - 1))
        if draw.random() < 0.5:
            behind = len(ids)
            ids.append(draw.randrange(17, 19))
            _noun_phrase(draw, ids, spans)
            spans += [(behind, len(ids) - 1), (verb, len(ids) - 1)]
        if len(ids) == 11:
            found.append(([0, *ids], [*spans, (0, 10)]))
    return found


def _noun_phrase(draw: random.Random, ids: list[int], spans: list[tuple[int, int]]) -> None:
    first = len(ids)
    ids += [draw.randrange(1, 3), draw.randrange(3, 11)]
    spans.append((first, first + 1))
    if draw.random() < 0.5 and len(ids) < 11:
        ids.append(draw.randrange(15, 17))
        _noun_phrase(draw, ids, spans)
        spans += [(first + 2, len(ids) - 1), (first, len(ids) - 1)]
