"""Navigate: several answers to one question, each round's first tokens away from what was explored, the rest decoded from the question.

    in context   the answers so far as a numbered list, 1. "a" 2. "b" 3. ", and the best tokens after it that were not tried
    push         q' = q - g P q at the last position, P the projector on the span of the explored tokens' keys (rows of the unembedding)

Each round takes `per_round` first tokens; each is forced after the question alone (with 1. " behind it, in context), and followed
greedily to the closing quote, or to the end of the text. So the list, or the push, moves the first token only. With g = 1 the explored
tokens' logits become 0 (not -infinity) plus any bias, and keys orthogonal to the span keep theirs; g = 0 is the plain ranking. `near` is
the largest cosine of a first token's key with those of earlier rounds. One pass to rank, and one a token for all answers of a round.

Peng, An and Shang 2024, "Correlation and Navigation in the Vocabulary Key Representation Space of Language Models", with 10 tokens a
round for 10 rounds, to a quote or 64 tokens. The push is ours, and no claim of that paper.

Lists help models that were trained on lists. What is far from the explored keys need not be right: compare with as many samples.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patchbay.decode._loop import Call, asked, check_length
from patchbay.decode._published import published
from patchbay.decode._result import Draft, as_result
from patchbay.decode._stepwise import Chosen, stepwise
from patchbay.edits.edit import Edit
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError, Port
from patchbay.tasks.task import Task

QUOTE = '"'


def decode(
    call: Call, *, push: float | None = None, per_round: int = 10, rounds: int = 10, texts: list[str] | None = None
) -> list[list[Draft]]:
    """The loop: drafts [prompt][answer] of a call, in the order in which they were explored. `texts`: the questions, for lists."""
    if per_round < 1 or rounds < 1 or per_round * rounds > call.model.vocab_size:
        raise PatchbayError(
            f"per_round={per_round}, rounds={rounds}: each one or more, and together at most the vocabulary's {call.model.vocab_size}"
        )
    if push is not None and not math.isfinite(push):
        raise PatchbayError(f"push={push}: a finite share, 1 for all of it")
    if push is None and texts is None:
        raise PatchbayError(
            "answers are listed in text: give questions as texts, to a model with a tokenizer, or push="
        )
    return [
        _one(call, i, push, per_round, rounds, None if texts is None else texts[i]) for i in range(len(call.prompts))
    ]


def _one(call: Call, place: int, push: float | None, per_round: int, rounds: int, text: str | None) -> list[Draft]:
    """The answers to one question."""
    found: list[Draft] = []
    keys = call.model.hf.get_output_embeddings().weight.detach()
    for number in range(rounds):
        tried = [one.tokens[0] for one in found]
        law = _ranking(call, place, push, found, keys, text)  # [vocab]
        first = _fresh(call.model, law, tried, per_round)
        new = _followed(call, place, first)
        logp = torch.log_softmax(law, -1)
        for one in new:
            one.score = float(logp[one.tokens[0]])
            one.whole["round"] = float(number + 1)
            if tried:
                one.whole["near"] = _nearest(keys, one.tokens[0], tried)
        found += new
    return found


def _ranking(call: Call, place: int, push: float | None, found: list[Draft], keys: Tensor, text: str | None) -> Tensor:
    """The logits that a round takes its first tokens from."""
    if push is None:
        assert text is not None
        [ids] = call.model.encode([listed(text, [answer_of(call.model, one.tokens) for one in found])])
        check_length(call.model, [ids], 1)
        apart = replace(call, prompts=[ids if at == place else own for at, own in enumerate(call.prompts)])
        with apart.rows([place]) as rows:
            logits = rows.run().last[0]
        call.calls, call.fed = apart.calls, apart.fed
        return logits
    away = [pushed(keys[[one.tokens[0] for one in found]], push)] if found else []
    with call.rows([place], sides=[away], side=[1]) as rows:
        return rows.run().last[0]


def pushed(keys: Tensor, g: float) -> Edit:
    """The edit that takes `g` of its part in the span of some keys [token, d_model] from the last state of a prompt."""
    basis = torch.linalg.svd(keys.double(), full_matrices=False)
    kept = basis.Vh[1e-6 * basis.S[0] < basis.S]  # [direction, d_model], orthonormal
    matrix = torch.eye(keys.shape[1], dtype=torch.float64, device=keys.device) - g * kept.T @ kept
    return Edit("project", Port("final_norm"), matrix.to(torch.float32), -1)


def listed(text: str, answers: list[str]) -> str:
    """The question with what was answered so far as a numbered list, open for the next."""
    said = "".join(f" {i}. {QUOTE}{answer}{QUOTE}" for i, answer in enumerate(answers, start=1))
    return f"{text}{said} {len(answers) + 1}. {QUOTE}"


def answer_of(model: Model, tokens: list[int]) -> str:
    return model.decode(tokens).split(QUOTE)[0].strip()


def _fresh(model: Model, law: Tensor, tried: list[int], n: int) -> list[int]:
    """The best tokens whose text was not tried; without a tokenizer, that were not tried."""
    seen = {_spelled(model, token) for token in tried} | {""}
    found: list[int] = []
    for token in law.argsort(dim=-1, descending=True, stable=True).tolist():
        word = _spelled(model, token)
        if word not in seen:
            seen.add(word)
            found.append(token)
        if len(found) == n:
            return found
    raise PatchbayError(f"{n} more first tokens were asked, and {len(found)} are left that were not tried")


def _spelled(model: Model, token: int) -> str:
    return str(token) if model.tokenizer is None else model.decode([token]).strip()


def _followed(call: Call, place: int, first: list[int]) -> list[Draft]:
    """Each first token forced after the question, and followed greedily."""
    drafts: list[list[Draft]] = [[] for _ in call.prompts]
    drafts[place] = [Draft() for _ in first]
    forced = torch.tensor(first)
    with call.rows([place] * len(first)) as rows:

        def choose(ids: Tensor, logits: Tensor, rest: Any) -> Chosen:
            started = ids.shape[1] > rows.start
            tokens = logits.argmax(-1) if started else forced.to(logits.device)
            return Chosen(tokens, torch.zeros(len(tokens)))

        def run(tokens: Tensor | None) -> tuple[Tensor, None]:
            return rows.run(tokens).last, None

        stepwise(call, rows, run, choose, drafts, list(range(len(first))))
    return drafts[place]


def _nearest(keys: Tensor, token: int, tried: list[int]) -> float:
    """The largest cosine of a token's key with those that were tried."""
    return float(torch.cosine_similarity(keys[token][None].float(), keys[tried].float(), dim=-1).max())


def quotes(model: Model) -> list[int]:
    """The tokens that close a quote."""
    tokenizer = model._need_tokenizer()
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), model.vocab_size))))
    return [token for token, piece in enumerate(pieces) if piece is not None and QUOTE in piece]


@method(paper="peng2024")
def navigate(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    *,
    push: float | None = None,
    per_round: int = 10,
    rounds: int = 10,
    max_new_tokens: int = 20,
    ends: list[int] | None = None,
    batch_size: int = 16,
) -> Result:
    """The answers to each question in the order in which they were explored, with `score` the log-probability of the first token in the
    ranking that chose it, in nats.

    Beside it `round` [prompt, draft] and `near`; the first `logp` of an answer is that of its first token after the question alone. In
    context, questions are followed by 1. " and answers end at a quote too. The rest as every decoder returns it.

    `push`: how much of its part in the explored keys the state loses, 1 for all; without, answers are listed in the prompt. `per_round`:
    first tokens that a round takes. `rounds`: how many.
    """
    call, texts = asked(model, prompts, max_new_tokens, ends, batch_size), None
    if push is None:
        texts = _texts(prompts)
        call = asked(model, [listed(text, []) for text in texts], max_new_tokens, ends, batch_size)
        call.ends |= frozenset(quotes(model))
    drafts = decode(call, push=push, per_round=per_round, rounds=rounds, texts=texts)
    return as_result(call, drafts, units={"round": "number", "near": "cosine"})


def _texts(prompts: Any) -> list[str]:
    """Questions as texts; refuses ids."""
    found = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(found, list | tuple) or not all(isinstance(one, str) for one in found):
        raise PatchbayError(
            "answers are listed in text: give questions as texts, to a model with a tokenizer, or push="
        )
    return list(found)


published(navigate, decode)
