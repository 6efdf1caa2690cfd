"""How one row's next token is chosen from its logits: steps of transformers, penalties as OpenAI defines them, a stream of chance of its own.

penalties    z - presence * (count > 0) - frequency * count, over what was generated
steps        the model's own (its generation config's), then bias and penalties, then temperature, top_k, top_p, min_p, in this order
log p        of the model's own law under its knobs, before all of these
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from patchbay.decode._loop import draw
from patchbay.decode._samplers import THEIRS
from patchbay.errors import PatchbayError
from patchbay.model.model import Model
from patchbay.serve.asking import Sampling

SILENT = ("temperature", "top_k", "top_p", "min_p", "do_sample")  # of a generation config: what a request says itself
OWN = {
    "repetition_penalty": theirs.RepetitionPenaltyLogitsProcessor,
    "no_repeat_ngram_size": theirs.NoRepeatNGramLogitsProcessor,
}
"""Steps of a model's generation config that are made in every request, as `model.generate` makes them."""
UNDONE = ("bad_words_ids", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty",
          "min_length", "min_new_tokens", "suppress_tokens", "begin_suppress_tokens", "guidance_scale", "watermarking_config",
          "typical_p", "epsilon_cutoff", "eta_cutoff", "encoder_repetition_penalty")  # fmt: skip
NOTHING = {"guidance_scale": (1, 1.0), "typical_p": (1, 1.0), "epsilon_cutoff": (0, 0.0), "eta_cutoff": (0, 0.0), "min_length": (0,),
           "encoder_repetition_penalty": (1, 1.0), "min_new_tokens": (0,), "repetition_penalty": (1, 1.0), "no_repeat_ngram_size": (0,)}  # fmt: skip


def own_steps(model: Model) -> list[Any]:
    """The steps of a model's generation config. Raises PatchbayError for one that is not made here, by its name."""
    config = getattr(model.hf, "generation_config", None)

    def said(name: str) -> Any:
        value = getattr(config, name, None)
        return None if value is None or value in NOTHING.get(name, ()) else value

    for name in UNDONE:
        if said(name) is not None:
            raise PatchbayError(
                f"the model's generation config has {name}={said(name)!r}, which is not made here: set it to None "
                "(model.hf.generation_config), or generate in Python"
            )
    return [step(value) for name, step in OWN.items() if (value := said(name)) is not None]


class Chooser:
    """Chooses the tokens of one text. `chance`: where its draws come from, None where it makes none."""

    def __init__(self, sampling: Sampling, own: Sequence[Any], chance: torch.Generator | None) -> None:
        self.sampling, self.own, self.chance = sampling, list(own), chance
        self.counts: Counter[int] = Counter()
        steps = []
        if sampling.temperature not in (0, 1):
            steps.append(THEIRS["temperature"](float(sampling.temperature)))
        if sampling.top_k:
            steps.append(THEIRS["top_k"](sampling.top_k))
        if sampling.top_p < 1:
            steps.append(THEIRS["top_p"](max(sampling.top_p, 1e-9)))
        if sampling.min_p:
            steps.append(THEIRS["min_p"](sampling.min_p))
        self.steps = steps

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is taken, whatever stands before."""
        return self.sampling.greedy and not self.own

    def choose(self, ids: Sequence[int], logits: Tensor) -> int:
        """The next token of the text `ids`, from the logits [vocab] after it."""
        scores = logits[None]
        if self.own:
            text = torch.tensor([list(ids)], device=logits.device)
            for step in self.own:
                scores = step(text, scores)
        scores = self._biased(scores)
        if self.sampling.temperature == 0:
            token = int(scores.argmax())
        else:
            empty = torch.empty(1, 0, dtype=torch.long, device=logits.device)
            for step in self.steps:
                scores = step(empty, scores)
            assert self.chance is not None
            token = int(draw(scores, [self.chance])[0])
        self.counts[token] += 1
        return token

    def _biased(self, scores: Tensor) -> Tensor:
        given = self.sampling
        if not (given.bias or given.presence or given.frequency):
            return scores
        scores = scores.clone()
        for token, value in given.bias:
            scores[0, token] += value
        if given.presence or given.frequency:
            for token, count in self.counts.items():
                scores[0, token] -= given.presence + given.frequency * count
        return scores


@dataclass(frozen=True)
class Told:
    """One token as a client is told of it: its log-probability (None for the first of a prompt) and the likeliest in its place."""

    token: int
    logp: float | None
    top: tuple[tuple[int, float], ...] = ()


def told(logits: Tensor, tokens: Sequence[int], n_top: int) -> list[Told]:
    """What is told of tokens, each chosen from one row of logits [token, vocab]."""
    logp = torch.log_softmax(logits.float(), -1)
    own = logp.gather(1, torch.tensor(tokens, device=logp.device)[:, None])[:, 0].tolist()
    if not n_top:
        return [Told(token, value) for token, value in zip(tokens, own, strict=True)]
    top = logp.topk(min(n_top, logp.shape[-1]), -1)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [Told(t, v, tuple(zip(*pair, strict=True))) for t, v, pair in zip(tokens, own, pairs, strict=True)]
