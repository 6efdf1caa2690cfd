"""Speculative decoding: a cheap draft proposes several tokens, and the model checks them in one pass; the text is the model's own.

    draft x_1 .. x_g from q; keep x_i with chance min(1, p(x_i) / q(x_i)); at the first refusal draw from (p - q)+ / its sum

and after g kept ones one more, so that a pass gives 1 to g + 1 tokens. The law of the text is p for any draft; without a chain it is
greedy text, token for token (in half precision a tie may fall otherwise). With kept = K tokens the draft proposes from those alone, its
law made to sum to 1 there: p stays what it is, also where K misses the answer.

`agreed` is 1 where a token is the proposed one; its mean is the acceptance, 1 - TVD(p, q) along the text where a chain draws. Chances belong
to the seed, the prompt and the position, so that text and `agreed` do not depend on `ahead` or on the batch. A batch advances by what all
of its rows kept, and what one row kept beyond is proposed again: `passes` is what a text takes alone, `calls` what was run. `speedup` is
tau / (1 + ahead b_d / b_t), tau the tokens per pass alone and b the bytes of weights that a pass of each reads, the output rows of a trimmed
draft counted by their share: what a machine bound by memory gains. The rows are masked here, not cut.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding"; the kept vocabulary is that of Goel et al. 2025,
"VOCABTRIM: Vocabulary Pruning for Efficient Speculative Decoding in LLMs"; "lookup" is Saxena 2023, "Prompt Lookup Decoding".

It makes text cheaper, never better, and is slower than plain decoding where the draft is wrong or not much cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patchbay.decode._constrained import KINDS
from patchbay.decode._crops import croppable, refuse_states
from patchbay.decode._kept import kept as kept_tokens
from patchbay.decode._kept import read_kept
from patchbay.decode._loop import Call, Rows, asked, generators
from patchbay.decode._published import published
from patchbay.decode._result import Draft, as_result
from patchbay.decode._samplers import chain_of
from patchbay.decode._speculation import Drafter, LawOf, Lookup, Proposer, blocks, decided, law_of, proposed
from patchbay.decode._spoken import spoken
from patchbay.decode._voices import costs, own_edits
from patchbay.knobs.knob import Knob
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task

STATEFUL = ("mirostat", "xtc", *KINDS)  # steps that remember what was drawn
LONGEST = 3  # tokens of the text's end that are looked up


def decode(
    call: Call,
    *,
    draft: Any,
    ahead: int = 4,
    kept: Sequence[int] | str | None = None,
    chain: Sequence[str] | None = None,
    seed: int = 0,
    beside: Call | None = None,
) -> list[list[Draft]]:
    """The loop: drafts [prompt][0] of a call. `beside`: the draft's own call, where its cost is to be told."""
    if ahead < 1:
        raise PatchbayError(f"ahead={ahead}: one or more tokens are proposed for each pass")
    beside, sides = _voice(call, draft) if beside is None else (beside, _voice(call, draft)[1])
    law = law_of(call, _steps(call, chain))
    held = read_kept(kept, call.model)
    if held is not None and beside is None:
        raise PatchbayError(f"kept: draft={draft!r} proposes tokens of the text, and has no vocabulary to trim")
    refuse_states(call.model, "speculative")
    barred = None
    if held is not None:
        barred = torch.ones(call.model.vocab_size, dtype=torch.bool, device=call.model.device)
        barred[held] = False
    points = [
        torch.rand(call.n_new, 3, generator=one[0], dtype=torch.float64) for one in generators(seed, call.prompts)
    ]
    drafts = [[Draft()] for _ in call.prompts]
    for members in call.batches():
        with ExitStack() as stack:
            rows = stack.enter_context(croppable(call, members))
            voice: Proposer = Lookup(call.model.vocab_size, _longest(draft))
            if beside is not None:
                others = croppable(beside, members, sides=sides, side=[1] * len(members))
                voice = Drafter(stack.enter_context(others), law, barred)
            _continue(call, rows, voice, law, ahead, points, drafts, chain is not None)
    for [one] in drafts:
        counts = blocks(one.beside["agreed"], ahead, call.n_new)
        one.whole = {
            "passes": float(len(counts)),
            "accepted": float(sum(counts)),
            "per_pass": len(one.tokens) / len(counts),
        }
    return drafts


def _continue(
    call: Call,
    rows: Rows,
    voice: Proposer,
    law: LawOf,
    ahead: int,
    points: list[Tensor],
    drafts: list[list[Draft]],
    drawn: bool,
) -> None:
    """Rows of one length, block by block, until each has ended."""
    text = rows.ids
    while len(rows.of):
        done = text.shape[1] - rows.start
        room = min(ahead, call.n_new - done - 1)
        chance = torch.stack([points[prompt][done : done + room + 1] for prompt in rows.of]).to(
            text.device
        )  # [row, position, 3]
        found = _block(rows, voice, law, text, room, chance)
        tokens, agreed, logp, logq = found
        counts = (agreed[:, :room] == 1).long().cumprod(1).sum(1) + 1  # tokens that each row may keep
        if int(counts.min()) <= room:
            counts = counts.clamp(max=room)  # the last position was not proposed for
        length = [_ends(call, text[row : row + 1], tokens[row, : int(n)]) for row, n in enumerate(counts.tolist())]
        over = [n is not None for n in length]
        steps = min((int(n) for n, ended in zip(counts, over, strict=True) if not ended), default=0)
        for row, prompt in enumerate(rows.of):
            own = drafts[prompt][0]
            for at in range(length[row] or steps):
                score = float((logq if drawn else logp)[row, at])
                own.add(
                    int(tokens[row, at]),
                    float(logp[row, at]),
                    score,
                    score if drawn else None,
                    agreed=float(agreed[row, at]),
                )
            own.finished = over[row]
        going = [row for row, ended in enumerate(over) if not ended]
        if not going or done + steps == call.n_new:
            return
        rows.drop(room + 1 - steps)
        voice.keep(text.shape[1] + steps - 1)
        text = torch.cat([text, tokens[:, :steps]], 1)[going]
        if len(going) < len(over):
            rows.take(going)
            voice.take(going)


def _block(
    rows: Rows, voice: Proposer, law: LawOf, text: Tensor, room: int, chance: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One pass of the model over `room` proposals: of each position [row, room + 1] the token, whether it is the proposed one (NaN: none
    was), its log-probability under the model and under the law. What follows a refusal in a row does not count."""
    laws, path = [], text
    for at in range(room):
        laws.append(voice.law(path).to(text.device))
        path = torch.cat([path, proposed(laws[-1], chance[:, at, 0])[:, None]], 1)
    guesses = path[:, text.shape[1] :]
    sent = path[:, rows.ids.shape[1] :].clamp(min=0)
    logits = rows.run(sent, keep=room + 1).logits if sent.shape[1] else rows.run(keep=1).logits
    tokens: list[Tensor] = []
    agreed: list[Tensor] = []
    logp: list[Tensor] = []
    logq: list[Tensor] = []
    for at in range(room + 1):
        before = path[:, : text.shape[1] + at].clamp(min=0)
        if at == room:  # of no use to a row that was refused before: those it proposes again
            kept = bool(torch.stack([torch.ones(len(text), device=text.device), *agreed]).eq(1).all())
            laws.append(voice.law(before).to(text.device) if kept else torch.zeros_like(laws[-1]))
            guess = proposed(laws[-1], chance[:, at, 0])
        else:
            guess = guesses[:, at]
        p = law(before, logits[:, at])
        token, same = decided(p, laws[at], guess, chance[:, at, 1:])
        tokens.append(token)
        agreed.append(same.double().masked_fill(guess < 0, torch.nan))
        logp.append(torch.log_softmax(logits[:, at], -1).gather(1, token[:, None])[:, 0])
        logq.append(p.log().gather(1, token[:, None])[:, 0])
    return torch.stack(tokens, 1), torch.stack(agreed, 1), torch.stack(logp, 1), torch.stack(logq, 1)


def _ends(call: Call, text: Tensor, tokens: Tensor) -> int | None:
    """After how many of its new tokens a text has ended; None where it goes on."""
    if not call.ends and call.stops is None:
        return None
    for at in range(len(tokens)):
        if bool(call.ended(torch.cat([text, tokens[None, : at + 1]], 1))[0]):
            return at + 1
    return None


# --- what was asked ---------------------------------------------------------------------------------------


def _steps(call: Call, chain: Sequence[str] | None) -> list[Any] | None:
    if chain is None:
        return None
    found = [spoken(text, "chain")[0] for text in chain]
    held = next((name for name in found if name in STATEFUL), None)
    if held is not None:
        raise PatchbayError(
            f"chain: {held} remembers what was drawn, and a draft that is refused cannot be taken from it; decode.samplers takes it"
        )
    return list(chain_of(chain, call)(torch.Generator()))


def _voice(call: Call, draft: Any) -> tuple[Call | None, list[list[Any]]]:
    """The call of the draft and the edits that it is under beside those in force; no call where the text is looked up."""
    if isinstance(draft, str):
        _longest(draft)
        return None, [[]]
    edits = own_edits(call, draft, "draft")
    if edits is None:
        beside = call.beside(draft)
        refuse_states(beside.model, "speculative, draft")
        return beside, [[]]
    return replace(call, calls=0, fed=0, law=None, stops=None, notes=[]), [edits]


def _longest(draft: Any) -> int:
    """How many tokens are looked up, of "lookup" or "lookup(5)"."""
    if not isinstance(draft, str):
        return LONGEST
    name, values, options = spoken(draft, "draft")
    n = values[0] if values else LONGEST
    if name != "lookup" or options or len(values) > 1 or not isinstance(n, int) or n < 1:
        raise PatchbayError(
            f"draft={draft!r}: a model, a knob, or 'lookup(n)', what followed the last n tokens before, n one or more"
        )
    return n


def bytes_read(model: Model, share: float = 1.0) -> float:
    """Bytes of weights that a pass reads: all but an input table of its own, of which it reads a row; `share` of the output rows."""
    table, head = model.hf.get_input_embeddings(), model.hf.get_output_embeddings()
    shared = head is not None and head.weight is table.weight
    whole = sum(one.numel() * one.element_size() for one in model.hf.parameters())
    whole -= 0 if shared else table.weight.numel() * table.weight.element_size()
    return whole - (0.0 if head is None else (1 - share) * head.weight.numel() * head.weight.element_size())


@method(paper="goel2025")
def speculative(
    model: Model,
    draft: Model | Knob | str,
    prompts: Task | list[str] | list[list[int]] | Any,
    *,
    ahead: int = 4,
    kept: list[int] | str | None = None,
    chain: list[str] | tuple[str, ...] | None = None,
    seed: int = 0,
    max_new_tokens: int = 20,
    batch_size: int = 16,
) -> Result:
    """Each prompt continued by the model's own law, with `agreed` [prompt, draft, position] 1 where a token is the one that was proposed.

    By text `passes`, `accepted` (proposals that those passes kept) and `per_pass` tokens; `speedup` predicted where weights are what a pass
    reads; `other_calls` and `other_fed` are what the draft cost. `score` is the sum of `logq` with a chain, else of `logp`, in nats. Texts
    end where the model's generation config says.

    `draft`: another model of the same vocabulary, a knob (the same model turned), or "lookup(3)": what followed the last three tokens
    before. `ahead`: tokens proposed for each pass. `kept`: tokens that the draft may propose, as ids or the file that
    `pb.decode.speculative.kept` writes. `chain`: steps before each draw, as `decode.samplers` takes them, () for the model's law; without, greedy.
    """
    call = asked(model, prompts, max_new_tokens, None, batch_size)
    beside = _voice(call, draft)[0]
    drafts = decode(call, draft=draft, ahead=ahead, kept=kept, chain=chain, seed=seed, beside=beside)
    held = read_kept(kept, model)
    share = 1.0 if held is None else len(held) / model.vocab_size
    cost = 0.0 if beside is None else bytes_read(beside.model, share) / bytes_read(model)
    whole = [one.whole for [one] in drafts]
    tau = sum(len(one.tokens) for [one] in drafts) / sum(one["passes"] for one in whole)
    units = {"agreed": "share of proposals", "passes": "passes", "accepted": "tokens", "per_pass": "tokens per pass"}
    scalars = {"speedup": (tau / (1 + ahead * cost), (), "times"), **costs([beside])}
    return as_result(call, drafts, units=units, scalars=scalars)


published(speculative, decode)
speculative.kept = kept_tokens  # type: ignore[attr-defined]
