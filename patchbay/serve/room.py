"""How much runs and waits at once, what has been done, and what could never run."""

from __future__ import annotations

from dataclasses import dataclass

from patchbay.errors import PatchbayError
from patchbay.model.model import Model
from patchbay.serve.guard import Refusal
from patchbay.serve.work import Work


@dataclass(frozen=True)
class Room:
    """How much runs and waits at once: `batch_tokens` columns in all, `rows` texts, `queue` requests in line, `chunk` prompt tokens a turn."""

    batch_tokens: int = 16_384
    rows: int = 64
    queue: int = 64
    chunk: int = 256

    def __post_init__(self) -> None:
        if min(self.batch_tokens, self.rows, self.queue, self.chunk) < 1:
            raise PatchbayError(f"{self}: each is one or more")


@dataclass
class Counts:
    """What has been done since the start."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    first_seconds: float = 0.0
    firsts: int = 0
    failures: int = 0


def check(work: Work, room: Room, model: Model) -> None:
    """Refuse what could never run."""
    longest, n, new = model.longest_prompt, len(work.ids), work.n_new
    if longest is not None and work.total > longest:
        message = (
            f"the prompt has {n} tokens and {new} new ones are asked, {work.total} in all; the model takes {longest}"
        )
        raise Refusal(400, message, about="max_tokens", code="context_length_exceeded")
    if work.cost > room.batch_tokens or work.n > room.rows:
        message = (
            f"{work.n} x ({n} prompt and {new} new tokens) = {work.cost}; this server holds {room.batch_tokens} "
            f"tokens in {room.rows} texts at once"
        )
        raise Refusal(400, message, about="max_tokens", code="context_length_exceeded")
    bad = next((token for token, _ in work.sampling.bias if token >= model.vocab_size), None)
    if bad is not None:
        raise Refusal(400, f"logit_bias names token {bad}; there are {model.vocab_size}", about="logit_bias")
