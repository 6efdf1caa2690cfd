"""Ordinals: classes of words in order, as a model's own tokenizer has them, and what a model makes of a word alone.

Three effective embeddings of a word: `raw`, its row of the token embedding (with the family's scale, without
positions); `mlp0`, what the first layer's MLP adds for that row when attention adds nothing; `sum`, both. They are
made, and read by heads, in runs of single-token prompts, where a head can only attend to the word itself: what it
then writes is its OV circuit, whatever way the family stores its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchbay.edits import edit
from patchbay.find._direct import precise, spoken
from patchbay.model.model import Model
from patchbay.model.run import run
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.answers import answer_ids

UNITS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
ORDERS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
MONTHS = "January February March April May June July August September October November December"
CLASSES: dict[str, tuple[str, ...]] = {
    "numbers": tuple(map(str, range(201))),
    "number_words": (*UNITS.split(), "nineteen", "twenty"),
    "ordinals": tuple(ORDERS.split()),
    "days": tuple(DAYS.split()),
    "months": tuple(MONTHS.split()),
    "day_prefixes": tuple(day[:3] for day in DAYS.split()),
    "month_prefixes": tuple(month[:3] for month in MONTHS.split()),
    "letters": tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
}
WRAPPING = ("days", "months", "day_prefixes", "month_prefixes")  # the first word follows the last
FIRST = {"numbers": 0}  # the number of a class's first word, where it is not 1
PROBE = "The"
WAYS = ("raw", "mlp0", "sum")
Classes = Mapping[str, Sequence[str | int]]


@dataclass(frozen=True)
class OrdinalClass:
    """Words of one class that are single tokens, in order; `after[i]` is the place of i's successor among them, or -1."""

    name: str
    words: tuple[str, ...]
    ids: tuple[int, ...]
    numbers: tuple[int, ...]  # what each counts as: January is 1
    after: tuple[int, ...]
    dropped: tuple[str, ...]  # words that the tokenizer has not as one token


def ordinal_classes(model: Model, what: str, given: Classes | None) -> tuple[list[OrdinalClass], list[str]]:
    """The classes with at least two successions, and notes on the words and classes that were dropped."""
    listed: Classes = CLASSES if given is None else given
    if not listed:
        raise PatchbayError(f"{what}: no classes were given; leave classes out for {', '.join(CLASSES)}")
    if not isinstance(listed, Mapping) or not all(isinstance(words, (list, tuple, range)) for words in listed.values()):
        raise PatchbayError(
            f"{what}: classes map a name to its words in order, such as {{'days': ['Monday', 'Tuesday', ...]}}"
        )
    if model.tokenizer is None and any(isinstance(word, str) for words in listed.values() for word in words):
        raise PatchbayError(
            f"{what} looks words up and this model has no tokenizer: pb.load(model, tokenizer), or give classes of token ids in "
            "order, classes={'numbers': [15, 16, 17, ...]}"
        )
    every = [_class(model, name, words, what) for name, words in listed.items()]
    kept = [one for one in every if sum(at >= 0 for at in one.after) >= 2]
    if not kept:
        found = ", ".join(f"{one.name} {len(one.ids)} of {len(listed[one.name])}" for one in every)
        raise PatchbayError(
            f"{what}: no class has two successions among this tokenizer's single tokens (found {found}); "
            "give classes= of your own"
        )
    notes = []
    for one in every:
        gone = "left out: " if one not in kept else ""
        if one.dropped or gone:
            shown = ", ".join(one.dropped[:6]) + (f" and {len(one.dropped) - 6} more" if len(one.dropped) > 6 else "")
            notes.append(f"{one.name}: {gone}{len(one.ids)} single tokens; dropped {shown or 'nothing'}")
    return kept, notes


def _class(model: Model, name: str, words: Sequence[str | int], what: str) -> OrdinalClass:
    ids = _token_ids(model, list(words))
    outside = [token for token in ids if token is not None and not 0 <= token < model.vocab_size]
    if outside:
        raise PatchbayError(
            f"{what}: class {name!r} has token id {outside[0]}, the vocabulary is 0..{model.vocab_size - 1}"
        )
    places = [place for place, token in enumerate(ids) if token is not None]
    kept = [token for token in ids if token is not None]
    if len(set(kept)) < len(kept):
        raise PatchbayError(f"{what}: class {name!r} holds a token twice; an order needs each once")
    step = {place: at for at, place in enumerate(places)}
    n = len(words)
    after = [step.get((place + 1) % n if name in WRAPPING else place + 1, -1) for place in places]
    first = FIRST.get(name, 1)
    return OrdinalClass(
        name,
        tuple(str(words[place]) for place in places),
        tuple(kept),
        tuple(first + place for place in places),
        tuple(after),
        tuple(str(word) for word, token in zip(words, ids, strict=True) if token is None),
    )


def _token_ids(model: Model, words: list[str | int]) -> list[int | None]:
    """The token of each word with its leading space, or where the tokenizer has more of them so, after a space."""
    spelled = [word for word in words if isinstance(word, str)]
    found: dict[str, int | None] = {}
    if spelled:
        tries = []
        for probe, space in ((PROBE, " "), (PROBE + " ", "")):
            ids = answer_ids(model.tokenizer, [(probe, space + word) for word in spelled])
            unknown = getattr(model.tokenizer, "unk_token_id", None)
            tries.append({word: _known(ids[probe, space + word], unknown) for word in spelled})
        found = max(tries, key=lambda one: sum(token is not None for token in one.values()))
    return [found[word] if isinstance(word, str) else int(word) for word in words]


def _known(token: int | None, unknown: int | None) -> int | None:
    return None if token == unknown else token


# --- a word alone -----------------------------------------------------------------------------------------


def effective_embeddings(model: Model, ids: Sequence[int], batch_size: int) -> dict[str, Tensor]:
    """raw, mlp0 and sum of each token, each [token, d_model]; raw alone where the first layer has no MLP."""
    prompts = [[token] for token in ids]
    if not any("attn.z" in model.signals(i) for i in range(model.n_layers)):
        model.require(Port("attn.z", 0))  # raises: no layer of this model has heads
    entered = run(model, prompts, taps=[Port("embed")], logits="last", batch_size=batch_size)[Port("embed")][:, 0]
    raw = _without_position(model, ids, entered)
    if "mlp.out" not in model.signals(0):
        return {"raw": raw}
    pieces = []
    for start in range(0, len(ids), batch_size):
        some = prompts[start : start + batch_size]
        edits = [
            edit.replace(Port("embed"), raw[start : start + batch_size, None].to(entered)),
            edit.zero(Port("attn.out", 0)),
        ]
        pieces.append(run(model, some, taps=[Port("mlp.out", 0)], edits=edits, logits="last")[Port("mlp.out", 0)])
    mlp0 = torch.cat(pieces)[:, 0]
    return {"raw": raw, "mlp0": mlp0, "sum": raw + mlp0}


def _without_position(model: Model, ids: Sequence[int], entered: Tensor) -> Tensor:
    """What enters the first layer [token, d_model] less what is the same for all tokens, when that is scale x row + constant.

    Where it is not (a norm or a projection stands behind the embedding) it is left as it entered.
    """
    rows = model.embed.weight.detach()[torch.tensor(list(ids), device=entered.device)]
    if rows.shape != entered.shape or len(ids) < 2:
        return entered
    a, b = precise(rows - rows.mean(0)), precise(entered - entered.mean(0))
    scale = float((a * b).sum() / (a * a).sum())
    linear = (scale * a - b).abs().max() <= 1e-3 * b.abs().max()
    return (scale * precise(rows)).to(entered) if bool(linear) else entered


def say(model: Model, layers: Mapping[int, Tensor], batch_size: int) -> dict[int, Tensor]:
    """What each head of a layer writes when the stream that enters that layer is [token, d_model]: [token, head, d_model].

    Passed on through the gains of the norm after attention and of the final norm, so that a dot product with an
    unembedding row is what it says to that token's logit, up to a positive factor.
    """
    n = len(next(iter(layers.values())))
    token = int(getattr(model.config, "pad_token_id", None) == 0)  # any but the pad token, at which transformers warns
    pieces: dict[int, list[Tensor]] = {i: [] for i in layers}
    for start in range(0, n, batch_size):
        stop = min(n, start + batch_size)
        edits = [edit.replace(Port("resid_in", i), x[start:stop, None]) for i, x in layers.items()]
        taps = [Port("attn.head_out", i) for i in layers]
        trace = run(model, [[token]] * (stop - start), taps=taps, edits=edits, logits="last")
        for i in layers:
            pieces[i].append(spoken(model, i, precise(trace[Port("attn.head_out", i)][:, 0])))
    return {i: torch.cat(pieces[i]) for i in layers}


def answers(model: Model, said: Tensor, classes: Sequence[OrdinalClass]) -> Tensor:
    """For what each token's heads say [token, head, d_model], the place in its class of the highest logit, [token, head].

    Tokens stand class after class; a logit is compared within the class alone.
    """
    found, start = [], 0
    for one in classes:
        rows = precise(model.unembed.weight[torch.tensor(one.ids)])  # [word, d_model]
        found.append((said[start : start + len(one.ids)] @ rows.T).argmax(-1))
        start += len(one.ids)
    return torch.cat(found)
