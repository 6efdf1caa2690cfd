"""Novel word: a model learns one new word from a few sentences; in which other constructions does it then expect it?

    value = mean over frames of (gain(frame) - gain(twin)),    gain = score after learning - score before,
    score = mean log p of the tokens that follow the word in a frame

The word is a vector in place of an embedding, and nothing else is learned: AdamW without weight decay on the loss of the `learn` sentences, as
many `steps` as it takes, or where there are `valid` sentences as many as are best for those. It starts from N(mean, 1e-5 covariance) of other tokens'
embeddings, `draws` times. Frames show the word where learning did not; the twin of a frame is ungrammatical (its words in another order): what a
model gains there too it has learned of the words around, not of the construction. `null` is 0; p by sign flips over frames. With 0 steps all gains are 0.

Misra and Kim 2024, "Generating novel experimental hypotheses from language models: A case study on cross-dative generalization"; the twin is an
addition. Higher is better. The new row is one of the input alone: how likely the word itself is, is not learned and not scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchbay.edits.edit import Edit, add
from patchbay.measure._items import resolved, rows_of
from patchbay.measure._meter import reading
from patchbay.measure._runs import refuse_by_row, token_logprobs
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.model.tokens import tokenize
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port
from patchbay.signal.positions import Token

STAND_INS = ("gave", "saw", "told", "was", "it", "no", "so", "x", "q", "z", "j", "k", "b", "A", "B", "Q", "X", "Z")
OTHERS = 64  # tokens whose embeddings the new one is drawn from
SPREAD = 1e-5
NATS = "nats per token"
PLACE = Port("resid_in", 0)


class Frames(NamedTuple):
    """Sentences as ids, the stand-in's token where the new word is, and the place of its first in each."""

    rows: list[list[int]]
    first: list[int]


@method(paper="misra2024")
def novel_word(
    model: Model,
    items: str | list[dict[str, Any]],
    *,
    steps: int = 40,
    rate: float = 0.01,
    draws: int = 3,
    stand_in: str | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """What a word learned from sentences gains in frames of another construction, beyond what their ungrammatical twins gain.

    `gain` [prompt] of frames, `gain_twin` [prompt], `gain_learned`, of the sentences learned; table `draws`, each start's numbers.

    `items`: rows with the field learn (a sentence), rows with valid, and rows with test and twin (a frame and its ungrammatical twin); {} stands for
    the word. `steps`: updates of the word's vector. `rate`: AdamW's learning rate. `draws`: starts that are averaged. `stand_in`: a word
    that is one token and occurs in no sentence, in whose place the new one stands; without, one is found.
    """
    rows, said = rows_of(resolved(model, items), (), ("learn", "valid", "test", "twin"))
    of = {name: [(str(row.values[name]), row.where) for row in rows if name in row.values] for name in ("learn", "valid", "test", "twin")}  # fmt: skip
    lonely = next((row for row in rows if ("test" in row.values) != ("twin" in row.values)), None)
    if lonely is not None or not of["learn"] or not of["test"] or steps < 0 or draws < 1:
        where = f"{lonely.where}: a test frame and its twin stand in one row; " if lonely is not None else ""
        raise PatchbayError(
            f"{where}{len(of['learn'])} sentences to learn from and {len(of['test'])} frames: one or more of each; steps={steps} (0 or more), draws={draws} (1 or more)"
        )
    bare = next(((text, where) for each in of.values() for text, where in each if "{}" not in text), None)
    if bare is not None:
        raise PatchbayError(f"{bare[1]}: {bare[0]!r} needs {{}} where the word stands")
    refuse_by_row(model)
    token, word = _stand_in(model, [text for each in of.values() for text, _ in each], stand_in)
    frames = {name: _frames(model, each, token, word) for name, each in of.items() if each}
    starts = _starts(model, token, frames["learn"].rows[0][:1], draws, seed)
    gains = {name: torch.zeros(len(frames[name].rows), dtype=torch.float64) for name in ("learn", "test", "twin")}
    table = []
    for draw, start in enumerate(starts):
        learned = _learn(model, frames, token, start, steps, rate)
        for name in gains:
            before, after = (_scores(model, frames[name], token, v, batch_size) for v in (start, learned))
            gains[name] += (after - before) / draws
            table.append({"draw": draw, "sentences": name, "gain": float((after - before).mean())})
    return reading(
        {"per_item": gains["test"] - gains["twin"]},
        NATS,
        better="higher",
        null_items=torch.zeros(len(gains["test"]), dtype=torch.float64),
        more={
            "gain": (gains["test"], ("prompt",), NATS),
            "gain_twin": (gains["twin"], ("prompt",), NATS),
            "gain_learned": (gains["learn"].mean(), (), NATS),
        },
        tables={"draws": table},
        notes=[
            *said,
            f"the new word stands in the place of {word!r}; one vector of {len(starts[0])} numbers is learned",
        ],
        seed=seed,
    )


def _stand_in(model: Model, texts: Sequence[str], given: str | None) -> tuple[int, str]:
    """A token that occurs in no sentence, and the word that it is in the middle of one."""
    tokenizer = model._need_tokenizer()
    seen = {token for ids in tokenize(tokenizer, [text.replace("{}", "") for text in texts]) for token in ids}
    for word in STAND_INS if given is None else (given,):
        token = tokenize(tokenizer, [f"a {word}"])[0][-1]
        if token in seen or model.decode([token]).strip() != word:
            continue
        rows = tokenize(tokenizer, [text.replace("{}", word) for text in texts])
        if all(len(_places(ids, token)) == text.count("{}") for ids, text in zip(rows, texts, strict=True)):
            return token, word
    raise PatchbayError(
        f"stand_in={given!r}: a word is needed that is one token inside these sentences and occurs in none of them"
    )


def _places(ids: Sequence[int], token: int) -> list[int]:
    return [at for at, one in enumerate(ids) if one == token]


def _frames(model: Model, texts: Sequence[tuple[str, str]], token: int, word: str) -> Frames:
    """Sentences as ids; refuses those in which nothing stands before the word, or follows it."""
    rows, first = [], []
    for text, where in texts:
        [ids] = model.encode([text.replace("{}", word)])
        at = _places(ids, token)[0]
        if not at or at + 1 >= len(ids):
            raise PatchbayError(f"{where}: {text!r} needs text before and after {{}}")
        rows.append(list(ids))
        first.append(at)
    return Frames(rows, first)


def _starts(model: Model, token: int, start: list[int], draws: int, seed: int) -> list[Tensor]:
    """What is added to the stand-in's embedding, so that it is a draw from N(mean, SPREAD covariance) of others', in the stream's units."""
    generator = torch.Generator().manual_seed(seed)
    others = torch.randperm(model.vocab_size, generator=generator)[:OTHERS].tolist()
    seen = run(model, [[*start, v] for v in (token, *others)], taps=[PLACE], logits="last")[PLACE][:, -1].double()
    rows = (seen[1:] - seen[:1]).cpu()  # [token, d_model]
    mean = rows.mean(0)
    noise = torch.randn(draws, len(rows), generator=generator, dtype=torch.float64)
    drawn = mean + (SPREAD / (len(rows) - 1)) ** 0.5 * noise @ (rows - mean)
    return list(drawn.to(model.dtype))


def _edit(value: Tensor, token: int) -> Edit:
    return add(PLACE, value, positions=Token(token))


def _learn(model: Model, frames: dict[str, Frames], token: int, start: Tensor, steps: int, rate: float) -> Tensor:
    """The vector after `steps` updates, or where there are sentences to validate on, the best of those on the way."""
    with torch.enable_grad():
        value = start.detach().clone().to(model.device).requires_grad_()
        optimizer = torch.optim.AdamW([value], lr=rate, weight_decay=0.0)
        best, kept = torch.inf, value.detach().clone()
        for _ in range(steps):
            value.grad = torch.autograd.grad(_loss(model, frames["learn"], token, value), value)[0]
            optimizer.step()
            if "valid" in frames:
                now = float(_loss(model, frames["valid"], token, value.detach(), grad=False))
                best, kept = (now, value.detach().clone()) if now < best else (best, kept)
        return kept if "valid" in frames else value.detach()


def _loss(model: Model, frames: Frames, token: int, value: Tensor, grad: bool = True) -> Tensor:
    """Mean -log p of the tokens after the word, in all sentences."""
    logits = run(model, frames.rows, edits=[_edit(value, token)], grad=grad).logits
    each = [
        logits[i, at : len(row) - 1].float().log_softmax(-1).gather(1, torch.tensor(row[at + 1 :], device=logits.device)[:, None])
        for i, (row, at) in enumerate(zip(frames.rows, frames.first, strict=True))
    ]  # fmt: skip
    return -torch.cat(each).mean()


def _scores(model: Model, frames: Frames, token: int, value: Tensor, batch_size: int) -> Tensor:
    """Mean log p of the tokens after the word, [frame]."""
    reads = [
        [(k, row[k + 1]) for k in range(at, len(row) - 1)] for row, at in zip(frames.rows, frames.first, strict=True)
    ]
    with model.edited(_edit(value, token)):
        found = token_logprobs(model, frames.rows, reads, batch_size=batch_size)
    return torch.stack([logp.mean() for logp in found])
