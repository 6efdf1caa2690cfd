"""Beams in groups: the loop of beam search and of diverse beam search.

Of the prompts of a batch each has the same number of beams, as rows of one batch from the second token on. Groups choose one after
the other. A beam that ends leaves the batch and is kept with those of its group; others go on. A search ends before its last
token only where no living beam can come before the worst that is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchbay.decode._loop import Call, best, refuse_dead_end, refuse_too_many
from patchbay.decode._result import Draft
from patchbay.signal.port import PatchbayError

MOST = 4096  # beams; of a larger vocabulary as many as it has tokens


@dataclass
class Asked:
    """Beams of each prompt, in how many groups; `penalty`: what a token costs for each beam of an earlier group that chose it at this
    step; scores are divided by length to the power `length_penalty`."""

    beams: int
    groups: int = 1
    penalty: float = 0.0
    length_penalty: float = 0.0

    def check(self) -> None:
        if self.beams < 1:
            raise PatchbayError(f"beams={self.beams}: one or more")
        if self.groups < 1 or self.beams % self.groups:
            raise PatchbayError(f"groups={self.groups}: a number that divides the {self.beams} beams")
        if not (math.isfinite(self.penalty) and self.penalty >= 0):
            raise PatchbayError(f"penalty={self.penalty}: 0 or more")
        if not math.isfinite(self.length_penalty):
            raise PatchbayError(f"length_penalty={self.length_penalty}: a finite number")

    @property
    def width(self) -> int:
        return self.beams // self.groups

    def normal(self, score: float, length: int) -> float:
        return score / length**self.length_penalty


@dataclass
class Group:
    """What one prompt's group has kept: ended beams."""

    kept: list[Draft] = field(default_factory=list)

    def keep(self, draft: Draft, width: int) -> None:
        self.kept = sorted([*self.kept, draft], key=lambda one: -one.score)[:width]


def search(call: Call, how: Asked) -> list[list[Draft]]:
    """Drafts [prompt][beam], group by group, in each the best first."""
    how.check()
    most = max(MOST, call.model.vocab_size)
    if how.beams > most:
        raise PatchbayError(
            f"beams={how.beams}: up to {most:,}; the first step of a search has one text for each of {call.model.vocab_size:,} tokens"
        )
    refuse_too_many(call, how.beams, f"beams={how.beams}", call.batch_size)
    found: list[list[Draft]] = [[] for _ in call.prompts]
    for members in call.batches():
        for place, drafts in zip(members, _batch(call, members, how), strict=True):
            found[place] = drafts
    return found


def _batch(call: Call, members: list[int], how: Asked) -> list[list[Draft]]:
    """Prompts of one length. Beams are rows [prompt, beam] of `going` prompts; `logp` [row, token] is of each beam's tokens."""
    groups = [[Group() for _ in range(how.groups)] for _ in members]
    living: list[list[Draft]] = [[] for _ in members]
    going = list(range(len(members)))
    with call.rows(members) as rows:
        logits = rows.run().last.repeat_interleave(how.beams, 0)  # [row, vocab]
        rows.take(torch.arange(len(members)).repeat_interleave(how.beams))
        logp = logits.new_zeros(len(rows.of), 0)
        ledger = logits.new_full((len(members), how.beams), -math.inf)
        ledger[:, :: how.width] = 0.0  # one living beam of each group
        for step in range(call.n_new):
            plain = torch.log_softmax(logits, -1)
            law = (
                plain
                if call.law is None
                else torch.log_softmax(refuse_dead_end(call.chosen_from(rows.ids, logits)), -1)
            )
            last = step == call.n_new - 1
            chosen = _choose(call, how, law.unflatten(0, (len(going), -1)), ledger, last)
            ledger, parent, token, ended = chosen
            _keep_ended(rows.ids, logp, plain, ended, [groups[i] for i in going], rows.start, how)
            source = (parent + torch.arange(len(going), device=parent.device)[:, None] * how.beams).flatten()  # [row]
            logp = torch.cat([logp[source], plain[source].gather(1, token.flatten()[:, None])], 1)
            over = [last or _settled(ledger[at], groups[i], how, step + 1, call.n_new) for at, i in enumerate(going)]
            if any(over):
                text = torch.cat([rows.ids[source], token.flatten()[:, None]], 1)[:, rows.start :]
                for at, i in enumerate(going):
                    if over[at]:
                        living[i] = _drafts(call, text, logp, ledger, at, how)
            stay = [at for at, done in enumerate(over) if not done]
            if not stay:
                break
            going, ledger, token = [going[at] for at in stay], ledger[stay], token[stay]
            source, logp = (
                source.unflatten(0, (-1, how.beams))[stay].flatten(),
                logp.unflatten(0, (-1, how.beams))[stay].flatten(0, 1),
            )
            rows.take(source)
            logits = rows.run(token.flatten()).last
    return [_ranked(groups[i], living[i], how) for i in range(len(members))]


Ended = list[tuple[int, int, int, int, float]]  # prompt at work, group, row of the beam, token, ledger


def _choose(call: Call, how: Asked, law: Tensor, ledger: Tensor, last: bool) -> tuple[Tensor, Tensor, Tensor, Ended]:
    """One step of all groups: the new ledger, which beam of its prompt each one continues, its token, all [prompt, beam]; and which end.

    `law` [prompt, beam, vocab]."""
    n, _, vocab = law.shape
    width = how.width
    new, parent, token = (
        torch.empty_like(ledger),
        torch.zeros_like(ledger, dtype=torch.long),
        torch.zeros_like(ledger, dtype=torch.long),
    )
    used = law.new_zeros(n, vocab)
    ended: Ended = []
    ends = torch.tensor(sorted(call.ends), device=law.device)
    for group in range(how.groups):
        mine = slice(group * width, (group + 1) * width)
        scores = ledger[:, mine, None] + law[:, mine]  # [prompt, beam, vocab]
        scores = scores - how.penalty * used[:, None] if how.penalty and group else scores
        flat = scores.flatten(1)
        if len(ends) and not last:
            places = best(flat, min((1 + len(ends)) * width, flat.shape[1]))
            places = _without_ends(places, flat, ends, vocab, width, group, how, ended)
        else:
            places = best(flat, min(width, flat.shape[1]))
        short = width - places.shape[1]
        new[:, mine] = torch.cat([flat.gather(1, places), flat.new_full((n, short), -math.inf)], 1)
        parent[:, mine] = torch.cat([places // vocab, places.new_zeros(n, short)], 1) + group * width
        token[:, mine] = torch.cat([places % vocab, places.new_zeros(n, short)], 1)
        if how.penalty:
            live = (new[:, mine] > -math.inf).to(used.dtype)
            used = used.scatter_add(1, token[:, mine], live)
    return new, parent, token, ended


def _without_ends(
    places: Tensor, flat: Tensor, ends: Tensor, vocab: int, width: int, group: int, how: Asked, ended: Ended
) -> Tensor:
    """The best `width` candidates of each prompt that go on; those of them that end, among the best `width`, are noted."""
    over = torch.isin(places % vocab, ends)
    for prompt, rank in over[:, :width].nonzero().tolist():
        place, score = int(places[prompt, rank]), float(flat[prompt, places[prompt, rank]])
        if score > -math.inf:
            ended.append((prompt, group, prompt * how.beams + group * width + place // vocab, place % vocab, score))
    order = over.long().sort(dim=1, stable=True).indices  # those that go on first, in their order
    return places.gather(1, order)[:, :width]


def _keep_ended(
    ids: Tensor, logp: Tensor, plain: Tensor, ended: Ended, groups: list[list[Group]], start: int, how: Asked
) -> None:
    for prompt, group, row, token, score in ended:
        tokens, said = [*ids[row, start:].tolist(), token], [*logp[row].tolist(), float(plain[row, token])]
        groups[prompt][group].keep(Draft(tokens, said, how.normal(score, len(tokens)), True), how.width)


def _settled(ledger: Tensor, groups: list[Group], how: Asked, length: int, longest: int) -> bool:
    """Whether no living beam [beam] of a prompt can still come before the worst that its group has kept."""
    at = longest if how.length_penalty > 0 else length  # where a sum that only falls looks best
    for number, group in enumerate(groups):
        living = float(ledger[number * how.width : (number + 1) * how.width].max())
        if living > -math.inf and (len(group.kept) < how.width or how.normal(living, at) > group.kept[-1].score):
            return False
    return True


def _drafts(call: Call, text: Tensor, logp: Tensor, ledger: Tensor, at: int, how: Asked) -> list[Draft]:
    """The beams of the prompt at work in place `at`, of which some may end with their last token; those that never lived have a score of -inf."""
    rows = range(at * how.beams, (at + 1) * how.beams)
    scores = [how.normal(score, text.shape[1]) for score in ledger[at].tolist()]
    texts = [text[row].tolist() for row in rows]
    return [
        Draft(tokens, logp[row].tolist(), score, tokens[-1] in call.ends)
        for row, tokens, score in zip(rows, texts, scores, strict=True)
    ]


def _ranked(groups: list[Group], living: list[Draft], how: Asked) -> list[Draft]:
    """Of each group the best `width` of what ended and what lives."""
    found = []
    for number, group in enumerate(groups):
        mine = [one for one in living[number * how.width : (number + 1) * how.width] if one.score > -math.inf]
        several = sorted([*group.kept, *mine], key=lambda one: -one.score)[: how.width]
        for one in several:
            one.whole["group"] = float(number)
        found += several
    return found
