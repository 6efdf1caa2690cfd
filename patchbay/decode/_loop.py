"""The loop under every decoder: rows of one length continued together, with one cache, under edits that follow their prompts.

A `Call` is what was asked: prompts, how many new tokens, what ends a text, the edits in force; it counts passes and the token
positions that they were sent. `Rows` are prompts, or several drafts of each, that run as one batch. Rows may be repeated, moved and
dropped (`take`): tokens, cache and edits go with them. An edit of prompt 3 is made in every row of prompt 3 and in no other.

Exact: the logits of a row are those of one run over its text without a cache, under the same edits. Where a model's cache computes
something else, or its positions depend on the length, every pass runs the whole text instead.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from patchbay.edits.apply import for_prompts
from patchbay.edits.edit import Edit
from patchbay.jacks.arguments import cache_of, with_cache
from patchbay.jacks.hooks import innermost
from patchbay.jacks.session import Session
from patchbay.model import text
from patchbay.model.caches import cache_way, serves
from patchbay.model.generate import NEW_TOKENS, groups, refuse_no_numbers
from patchbay.model.model import Model
from patchbay.signal.port import PatchbayError, Port

Law = Callable[[Tensor, Tensor], Tensor]  # ids [row, position], logits [row, vocab] -> logits [row, vocab]


@dataclass
class Call:
    """What one call of a decoder was asked, and what it has cost so far in passes (`calls`) and token positions (`fed`).

    `law`: changes the logits that tokens are chosen from, as transformers' processors do. `stops`: says of ids [row, position]
    which rows have ended, beside those that end with one of `ends`.
    """

    model: Model
    prompts: list[list[int]]
    n_new: int
    ends: frozenset[int]
    batch_size: int
    edits: list[Edit]
    law: Law | None = None
    stops: Callable[[Tensor], Tensor] | None = None
    calls: int = 0
    fed: int = 0
    notes: list[str] = field(default_factory=list)

    def batches(self) -> Iterator[list[int]]:
        """Places of prompts that run together: of one length, at most `batch_size`."""
        for members in groups(self.prompts, False):
            yield from (members[at : at + self.batch_size] for at in range(0, len(members), self.batch_size))

    def rows(self, of: Sequence[int], **options: Any) -> Rows:
        """The prompts of these places as rows of one batch."""
        return Rows(self, of, **options)

    def beside(self, model: Model) -> Call:
        """The same prompts for a second model, under the edits in force there; it counts for itself."""
        refuse_other_vocabulary(self.model, model)
        check_length(model, self.prompts, self.n_new)
        model.check_mode()
        return replace(self, model=model, edits=model.active_edits(), calls=0, fed=0, law=None, stops=None, notes=[])

    def chosen_from(self, ids: Tensor, logits: Tensor) -> Tensor:
        """The logits that tokens are chosen from, [row, vocab] in float32."""
        logits = logits.float()
        return logits if self.law is None else self.law(ids, logits)

    def ended(self, ids: Tensor) -> Tensor:
        """Which rows end with their last token, bool [row]."""
        over = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        if self.ends:
            over = torch.isin(ids[:, -1], torch.tensor(sorted(self.ends), device=ids.device))
        return over if self.stops is None else over | self.stops(ids)


def asked(
    model: Model,
    prompts: Any,
    max_new_tokens: int = NEW_TOKENS,
    ends: Sequence[int] | None = None,
    batch_size: int = 16,
    *,
    endless: bool = False,
) -> Call:
    """A call as it was asked, checked before anything runs. `ends` None: the end tokens of the model's generation config. `endless`:
    texts may be longer than the model was made for."""
    model.check_mode()
    if not model.causal:
        raise PatchbayError(
            f"tokens of this {model.family.name} model see those after them: what a token was chosen from is not what a run over the "
            "finished text gives, and no log-probability is of both. model.generate(prompts) continues them"
        )
    encoded = ids_of(model, prompts) if endless else model.encode(prompts)
    if max_new_tokens < 1:
        raise PatchbayError(f"max_new_tokens={max_new_tokens}: one or more")
    if not endless:
        check_length(model, encoded, max_new_tokens)
    if ends is None:
        own = getattr(getattr(model.hf, "generation_config", None), "eos_token_id", None)
        ends = [] if own is None else torch.as_tensor(own).flatten().tolist()
    bad = next((token for token in ends if not 0 <= token < model.vocab_size), None)
    if bad is not None:
        raise PatchbayError(f"ends={list(ends)}: {bad} is no token, the vocabulary is 0..{model.vocab_size - 1}")
    return Call(model, encoded, max_new_tokens, frozenset(ends), batch_size, model.active_edits())


def refuse_too_many(call: Call, n: int, asked: str, together: int) -> None:
    """Refuse so many texts of each prompt, `asked` for by name, of so many prompts at a time, where the logits of one step are more than the device holds."""
    each = 4 * call.model.vocab_size * max(1, min(together, len(call.prompts)))
    room = memory_of(call.model.device)
    if n * each > room:
        raise PatchbayError(
            f"{asked}: the logits of one step alone take {n * each / 1e9:,.1f} GB of the {room / 1e9:,.1f} GB that this {call.model.device.type} has; up to {room // each:,} texts of each "
            f"prompt fit" + (", more with a smaller batch_size" if together > 1 and len(call.prompts) > 1 else "")
        )


def memory_of(device: torch.device) -> int:
    """Bytes that a device has in all."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def ids_of(model: Model, texts: Any) -> list[list[int]]:
    """Token ids of texts of any length."""
    return text.read(_Endless(model), texts).ids  # type: ignore[arg-type]


class _Endless:
    """A model whose prompts may have any length."""

    longest_prompt = None

    def __init__(self, model: Model) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def check_length(model: Model, prompts: Sequence[Sequence[int]], n_new: int) -> None:
    """Refuse texts that would grow past what the model takes."""
    longest = max(map(len, prompts))
    if model.longest_prompt is not None and longest + n_new > model.longest_prompt:
        raise PatchbayError(
            f"{n_new} new tokens asked after a prompt of {longest}: the model takes {model.longest_prompt} in all"
        )


def refuse_other_vocabulary(one: Model, other: Model) -> None:
    """Raise PatchbayError unless ids mean the same in both models."""
    if one.vocab_size != other.vocab_size:
        raise PatchbayError(
            f"two models of one vocabulary are needed: {one.source or 'the first'} has {one.vocab_size} tokens, "
            f"{other.source or 'the second'} {other.vocab_size}"
        )
    if one.tokenizer is None or other.tokenizer is None:
        return
    ours, theirs = one.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    apart = sorted(
        (ours.get(text, -1), text) for text in ours.keys() | theirs.keys() if ours.get(text) != theirs.get(text)
    )
    if apart:
        _, text = apart[0]
        raise PatchbayError(
            f"two models of one vocabulary are needed, and {len(apart)} tokens have other ids: {text!r} is {ours.get(text)} in "
            f"{one.source or 'the first'} and {theirs.get(text)} in {other.source or 'the second'}"
        )


@dataclass(frozen=True)
class Seen:
    """What a pass gave: the `logits` after each token that was kept [row, token, vocab], and what was tapped [row, token, ...]."""

    logits: Tensor
    taps: dict[Port, Tensor]

    @property
    def last(self) -> Tensor:
        """Logits after each row's last token [row, vocab]."""
        return self.logits[:, -1]


class Rows:
    """Rows of one length: `ids` [row, position], `of` [row] the place of each one's prompt, `side` [row] under which of `sides`,
    edits of its own beside those of the call, a row stands (0: none). A context manager, since edits are on while it is open."""

    def __init__(
        self,
        call: Call,
        of: Sequence[int],
        *,
        taps: Sequence[Port] = (),
        sides: Sequence[Sequence[Edit]] = (),
        side: Sequence[int] | None = None,
    ) -> None:
        self.call, self.of, self.taps, self.sides = call, list(of), list(taps), sides
        self.side = list(side) if side is not None else [0] * len(self.of)
        self.ids = torch.tensor([call.prompts[i] for i in self.of], device=call.model.device)
        self.start = self.ids.shape[1]
        self.embeds: list[Tensor] = []  # of what followed the prompt and is no token, each [row, d_embed]
        self.cached = serves(call.model, self.start, self.start + call.n_new)
        self.cache: Any = None
        self.fresh: Any = None  # an empty cache to fill, where it is to be another than the model's own
        self._session: Session | None = None

    def __enter__(self) -> Rows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    # ---- passes ----

    @torch.no_grad()
    def run(self, tokens: Tensor | None = None, *, keep: int = 1) -> Seen:
        """One pass: of the prompts at first, then of one or more new `tokens` [row, token] (or [row]). The logits of the last `keep`
        tokens are kept; taps are of all tokens that are new."""
        n_new = self.ids.shape[1]
        if tokens is not None:
            tokens = tokens.to(self.ids.device).reshape(len(self.ids), -1)
            self.ids, n_new = torch.cat([self.ids, tokens], 1), tokens.shape[1]
        return self._pass({"input_ids": self.ids if self.cache is None else self.ids[:, -n_new:]}, n_new, keep)

    @torch.no_grad()
    def run_embedded(self, embeds: Tensor) -> Seen:
        """One pass of what is no token: one more embedding of each row [row, d_embed], such as a mixture of several."""
        self.ids = torch.cat([self.ids, self.ids.new_full((len(self.ids), 1), -1)], 1)  # no edit by token finds it
        self.embeds = [*self.embeds, embeds]
        if self.cache is not None:
            return self._pass({"inputs_embeds": embeds[:, None]}, 1, 1)
        prompts = self.call.model.hf.get_input_embeddings()(self.ids[:, : self.start])
        return self._pass({"inputs_embeds": torch.cat([prompts, torch.stack(self.embeds, 1)], 1)}, 1, 1)

    def _pass(self, sent: dict[str, Tensor], n_new: int, keep: int) -> Seen:
        [what] = sent.values()
        session = self._open()
        if self.cache is not None and session.where.watched:
            session.where.hold(self.cache, self.ids[:, :-n_new], self.start)
        options = self._options(what.shape[1], keep)
        if self.cache is None or cache_way(self.call.model) == "mask":
            options["attention_mask"] = torch.ones_like(self.ids)
        output = self.call.model.hf(**sent, **options)
        self.call.calls, self.call.fed = self.call.calls + 1, self.call.fed + what.shape[0] * what.shape[1]
        if self.cached:
            self.cache = cache_of(output)
        captured = {port: value[:, -n_new:] for port, value in session.captured.items()}
        logits = output.logits[:, -keep:].float()
        refuse_no_numbers(logits, self.of)
        return Seen(logits, captured)

    def _options(self, n_sent: int, keep: int) -> dict[str, Any]:
        options: dict[str, Any] = {"use_cache": self.cached}
        cache = self.cache if self.cache is not None else self.fresh
        if self.cached and cache is not None:
            options |= with_cache(self.call.model.hf, cache)
        elsewhere = [*self.taps, *(edit.port for edits in (self.call.edits, *self.sides) for edit in edits)]
        if n_sent > keep and not any(port.signal == "logits" for port in elsewhere):
            options["logits_to_keep"] = keep
        return options

    # ---- rows ----

    def take(self, rows: Sequence[int] | Tensor) -> None:
        """The rows become copies of these: repeated, moved or dropped, with their tokens, their cache and their edits."""
        index = torch.as_tensor(rows, device=self.ids.device)
        places = index.tolist()
        self.ids, self.embeds = self.ids[index], [one[index] for one in self.embeds]
        if self.cache is not None and places != list(range(len(self.of))):
            self.cache.reorder_cache(index)
        of, side = [self.of[i] for i in places], [self.side[i] for i in places]
        if (of, side) != (self.of, self.side):
            self.of, self.side = of, side
            self._close()  # other edits are due

    def again(self) -> Rows:
        """These rows as they are now, with a copy of their cache, to go on from apart and uncounted."""
        other = Rows(replace(self.call), self.of, taps=self.taps, sides=self.sides, side=self.side)
        other.ids, other.embeds, other.cache = self.ids, self.embeds, copy.deepcopy(self.cache)
        return other

    def drop(self, n: int) -> None:
        """The last `n` tokens leave every row and its cache, of rows of `_crops.py`; after every pass, also with 0."""
        self.ids = self.ids[:, : self.ids.shape[1] - n]
        if self.cache is not None:
            self.cache.crop(-n)

    def edits(self) -> list[Edit]:
        """The edits in force as they act on these rows."""
        call, width = self.call, self.start + self.call.n_new
        shares = (for_prompts(edit, self.of, len(call.prompts), width) for edit in call.edits)
        found = [share for share in shares if share is not None]
        for number, edits in enumerate(self.sides, start=1):
            rows = tuple(row for row, side in enumerate(self.side) if side == number)
            found += [replace(edit, rows=rows) for edit in edits if rows]
        return found

    def _open(self) -> Session:
        """The session of these rows, the innermost of its model: put on again where another has stood in between."""
        if self._session is not None:
            scope = innermost(self.call.model.hf)
            if scope is not None and scope.session is self._session:
                return self._session
            self._close()
        model = self.call.model
        self._session = Session(model, self.taps, self.edits(), whole=True, prompt_length=self.start)
        self._session.__enter__()
        self.attach(self._session)
        return self._session

    def attach(self, session: Session) -> None:
        """What else these rows put on their model, while that session lasts."""

    def _close(self) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            session.here.touched.clear()  # rows are not the prompts of an enclosing block
            session.__exit__(None, None, None)


# --- choosing -------------------------------------------------------------------------------------------


def best(scores: Tensor, k: int) -> Tensor:
    """Places of the `k` largest of each row [row, k], largest first; of equal ones the lower place first."""
    if k == 1:
        return scores.argmax(-1, keepdim=True)
    top, places = scores.topk(k, -1)
    if bool(((scores >= top[:, -1:]).sum(-1) > k).any()):  # ties across the edge: topk takes any of them
        return scores.argsort(dim=-1, descending=True, stable=True)[:, :k]
    places, order = places.sort(-1)
    return places.gather(1, top.gather(1, order).argsort(dim=-1, descending=True, stable=True))


def generators(seed: int, prompts: Sequence[Sequence[int]], drafts: int = 1) -> list[list[torch.Generator]]:
    """A stream of chance for each draft of each prompt, which depends on the seed, the prompt and how often it came before in the
    call, so that a batch draws what its prompts draw one by one."""
    found: list[list[torch.Generator]] = []
    before: dict[tuple[int, ...], int] = {}
    for ids in map(tuple, prompts):
        before[ids] = before.get(ids, -1) + 1
        digests = (hashlib.sha256(repr((seed, ids, before[ids], draft)).encode()).digest() for draft in range(drafts))
        found.append([torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")) for digest in digests])
    return found


def refuse_dead_end(law: Tensor) -> Tensor:
    """A law [row, vocab] as logits or log-probabilities; raises PatchbayError where a row has no token left."""
    if not bool((law > -torch.inf).any(-1).all()):
        raise PatchbayError("no token is left to choose: processors, or steps of the chain, bar every one of them")
    return law


def draw(logq: Tensor, chance: Sequence[torch.Generator]) -> Tensor:
    """One token of each row from the law exp(`logq`) [row, vocab], by the inverse of its sum in double precision."""
    points = torch.cat([torch.rand(1, generator=one, dtype=torch.float64) for one in chance])
    return drawn_at(refuse_dead_end(logq).double().softmax(-1), points)


def drawn_at(law: Tensor, points: Tensor) -> Tensor:
    """The token of each row at which the sum of a law [row, vocab], of any mass, passes a point between 0 and 1 of it."""
    total = law.cumsum(-1)
    found = torch.searchsorted(total, points.to(total)[:, None] * total[:, -1:], right=True)
    return found.clamp(max=law.shape[-1] - 1)[:, 0]
