"""Samples: what a model writes after a prompt, drawn with a generator of its own for every sample, and scored by an object.

    token = argmax over v of (log p(v) / temperature + g(v)),    g Gumbel noise of this sample and step

which draws from the softmax at that temperature, among the likeliest tokens that hold `top_p` of the probability. The noise follows
from seed, prompt, sample and step alone, so that neither other prompts, nor how many run at a time, nor a cache change a
sample; a prompt that comes twice is sampled anew. Penalties and bans of the model's generation config are left out. A sample ends at an end token; it is scored without its prompt and without special tokens.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from patchbay.measure._runs import refuse_by_row
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError

PLAIN: dict[str, Any] = {  # a generation config may change the law; none of it is meant here but for what ends a text
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "min_length": 0, "min_new_tokens": None, "bad_words_ids": None, "suppress_tokens": None, "begin_suppress_tokens": None,
    "sequence_bias": None, "forced_bos_token_id": None, "forced_eos_token_id": None, "exponential_decay_length_penalty": None,
    "watermarking_config": None,
}  # fmt: skip


class Scorer(Protocol):
    """One number for every text, and what a record says of it."""

    def __call__(self, texts: list[str]) -> Sequence[float]: ...

    def to_json(self) -> dict[str, Any]: ...


class Words:
    """Scores texts by words of a list, whole and in lower case: "any" (1 where one occurs), "rate" (their share of the words), "count".

    A list finds words, not what they are a sign of: `name` is what notes call it."""

    def __init__(self, words: Sequence[str], way: str = "any", name: str = "a word list") -> None:
        if way not in ("any", "rate", "count"):
            raise PatchbayError(f"way={way!r}; possible are any, rate, count")
        if isinstance(words, str) or not len(words):
            raise PatchbayError(f"a word list is some words, got {words!r:.60}")
        self.words, self.way, self.name = tuple(word.lower() for word in words), way, name

    def __call__(self, texts: list[str]) -> list[float]:
        listed, found = set(self.words), []
        for text in texts:
            said = re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())
            hits = sum(word in listed for word in said)
            found.append(
                float(hits > 0)
                if self.way == "any"
                else float(hits)
                if self.way == "count"
                else hits / max(1, len(said))
            )
        return found

    def to_json(self) -> dict[str, Any]:
        return {"words": list(self.words), "way": self.way, "name": self.name}

    @classmethod
    def of(cls, given: Any, way: str = "any") -> Any:
        """A scorer from what a call was given: one, a list of words, or a file of them, one a line."""
        if callable(given):
            return checked_scorer(given)
        if isinstance(given, str | Path):
            try:
                lines = Path(given).read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise PatchbayError(f"could not read the words of {given}: {error}") from error
            return cls([line.strip() for line in lines if line.strip()], way, str(given))
        return cls(list(given), way)


def checked_scorer(given: Any) -> Any:
    """A scorer that a record can hold: an object with `__call__` and `to_json`."""
    if not callable(getattr(given, "to_json", None)):
        name = getattr(given, "__name__", type(given).__name__)
        raise PatchbayError(
            f"a scorer is an object with __call__(texts) and to_json(), which a record can hold; {name} has no to_json"
        )
    return given


def scored(scorer: Any, texts: list[str]) -> Tensor:
    """One finite number for every text, [text]."""
    found = list(scorer(texts))
    if len(found) != len(texts):
        raise PatchbayError(f"the scorer gave {len(found)} numbers for {len(texts)} texts: one for each")
    values = torch.tensor([float(x) for x in found], dtype=torch.float64)
    if bool((~values.isfinite()).any()):
        at = int((~values.isfinite()).nonzero()[0])
        raise PatchbayError(f"the scorer gave {found[at]!r} for the text {texts[at]!r:.60}: a finite number is needed")
    return values


def samples(
    model: Model,
    prompts: Sequence[Any],
    n: int,
    *,
    max_new_tokens: int = 40,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    use_cache: bool = True,
) -> list[list[list[int]]]:
    """`n` samples of each prompt, [prompt][sample] the ids of its new tokens; prompts are texts or ids."""
    refuse_by_row(model)
    if n < 1 or max_new_tokens < 1 or not temperature > 0 or not 0 < top_p <= 1:
        raise PatchbayError(
            f"n={n} and max_new_tokens={max_new_tokens} (1 or more), temperature={temperature} (above 0), top_p={top_p} (in (0, 1])"
        )
    encoded = [list(ids) for ids in model.encode(list(prompts))]
    first = [
        n * sum(ids == other for other in encoded[:i]) for i, ids in enumerate(encoded)
    ]  # samples of that prompt before
    rows = sorted(((i, k) for i in range(len(encoded)) for k in range(n)), key=lambda row: (len(encoded[row[0]]), row))
    found: list[list[list[int]]] = [[[] for _ in range(n)] for _ in encoded]
    for some in _same_length(rows, encoded, batch_size):
        ids = [encoded[i] for i, _ in some]
        noise = Noise([_seed(seed, encoded[i], first[i] + k) for i, k in some], len(ids[0]), temperature, top_p)
        grown = model.generate(
            ids, max_new_tokens, do_sample=False, num_beams=1, use_cache=use_cache, logits_processor=[noise], **PLAIN
        )
        for (i, k), row in zip(some, grown, strict=True):
            found[i][k] = list(row[len(encoded[i]) :])
    return found


def texts_of(model: Model, rows: Sequence[Sequence[int]]) -> list[str]:
    """New tokens as text, without special ones."""
    tokenizer = model._need_tokenizer()
    return [str(tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in rows]


def _same_length(
    rows: Sequence[tuple[int, int]], encoded: Sequence[Sequence[int]], size: int
) -> list[list[tuple[int, int]]]:
    found: list[list[tuple[int, int]]] = []
    for row in rows:
        if found and len(found[-1]) < size and len(encoded[found[-1][0][0]]) == len(encoded[row[0]]):
            found[-1].append(row)
        else:
            found.append([row])
    return found


def _seed(seed: int, ids: Sequence[int], k: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{k}:{','.join(map(str, ids))}".encode()).digest()[:7], "big")


class Noise:
    """Scores plus Gumbel noise of each row's own, so that the highest one is a sample; for transformers' generate."""

    def __init__(self, seeds: Sequence[int], n_prompt: int, temperature: float, top_p: float) -> None:
        self.seeds, self.n_prompt, self.temperature, self.top_p = list(seeds), n_prompt, temperature, top_p

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.n_prompt
        scores = logits.double() / self.temperature
        if self.top_p < 1.0:
            ordered, order = scores.sort(-1, descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # mass of the likelier ones
            scores = scores.masked_fill(
                torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, before >= self.top_p), -torch.inf
            )
        width = logits.shape[-1]
        drawn = [
            torch.rand(width, generator=torch.Generator().manual_seed(seed + step * 1_000_003), dtype=torch.float64)
            for seed in self.seeds
        ]
        noise = -(-torch.stack(drawn).clamp_min(1e-300).log()).log()
        return scores + noise.to(scores.device)
