"""Rule adapter: three rules on the output, in place of a tuned model: end sooner, say nothing twice, avoid a few words.

    p(v) proportional to p_LM(v) exp(r(v)),  t the number of new tokens so far

r is the sum of .06 t for tokens that end a text, -penalty for every token that is in the text already, prompt included, and a constant for
a few tokens (`_rules.py`). As published the first rule stops after 250 tokens; `capped` keeps what it has reached. The likeliest token
is taken; `logq` is its log-probability under the law with the rules. One pass for a token.

With all rules off it is greedy decoding, bit for bit. The odds of two tokens change by exp(r_a - r_b), and nothing else does.

Hewitt et al. 2024, "Instruction Following without Instruction Tuning".

It does not make a model follow instructions that was not trained on text that holds them. For transformers the rules are a
LogitsProcessor, `pb.decode.rule_adapter.processor`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from patchbay.decode._loop import Call, asked
from patchbay.decode._published import published
from patchbay.decode._result import Draft, as_result
from patchbay.decode._rules import BIAS, PENALTY, Mode, Rules, by_text
from patchbay.decode._stepwise import Chosen, stepwise
from patchbay.model.model import Model
from patchbay.results.method import method
from patchbay.results.result import Result
from patchbay.signal.port import PatchbayError
from patchbay.tasks.task import Task


def decode(
    call: Call, *, eos: Mode = "as published", penalty: float = PENALTY, bias: dict[str, float] | None = None
) -> list[list[Draft]]:
    """The loop: drafts [prompt][0] of a call."""
    if eos not in ("as published", "capped", "off"):
        raise PatchbayError(f"eos={eos!r}: 'as published', 'capped' or 'off'")
    constants = _bias(call, bias)
    if not all(math.isfinite(one) for one in (penalty, *constants.values())):
        raise PatchbayError(f"penalty={penalty}, bias={bias}: finite numbers, which are added to logits")
    drafts = [[Draft()] for _ in call.prompts]
    for members in call.batches():
        start = len(call.prompts[members[0]])
        rules = Rules(start, sorted(call.ends), mode=eos, penalty=penalty, bias=constants)

        def choose(ids: Tensor, logits: Tensor, rest: Any, rules: Rules = rules) -> Chosen:
            law = torch.log_softmax(rules(ids, logits), -1)
            tokens = law.argmax(-1)
            said = law.gather(1, tokens[:, None])[:, 0]
            return Chosen(tokens, said, said)

        with call.rows(members) as rows:

            def run(tokens: Tensor | None, rows: Any = rows) -> tuple[Tensor, None]:
                return rows.run(tokens).last, None

            stepwise(call, rows, run, choose, drafts)
    return drafts


def _bias(call: Call, bias: dict[str, float] | None) -> dict[int, float]:
    """Constants by id. The published ones are left out where their texts are no tokens here, and the call notes it."""
    tokenizer = call.model.tokenizer
    if bias == {} or (bias is None and tokenizer is None):
        return {}
    if tokenizer is None:
        raise PatchbayError(
            "bias names tokens by their text, and this model came without a tokenizer: pb.load(model, tokenizer)"
        )
    if bias is not None:
        return by_text(tokenizer, bias)
    found = by_text(tokenizer, BIAS, missing=True)
    call.notes.append(
        f"{len(found)} of the {len(BIAS)} published constants are of single tokens here; the others are left out"
    )
    return found


@method(paper="hewitt2024")
def rule_adapter(
    model: Model,
    prompts: Task | list[str] | list[list[int]] | Any,
    *,
    eos: Mode = "as published",
    penalty: float = PENALTY,
    bias: dict[str, float] | None = None,
    max_new_tokens: int = 20,
    ends: list[int] | None = None,
    batch_size: int = 16,
) -> Result:
    """Each prompt continued greedily under the three rules, with `score` the sum of `logq` in nats.

    The rest as every decoder returns it.

    `eos`: how the end comes nearer: "as published" for 250 tokens, "capped" for good, or "off". `penalty`: what every token that is there
    already loses, in nats. `bias`: constants by a token's text; without, the published ones, {} for none.
    """
    call = asked(model, prompts, max_new_tokens, ends, batch_size)
    drafts = decode(call, eos=eos, penalty=penalty, bias=bias)
    return as_result(call, drafts)


published(rule_adapter, decode)
rule_adapter.processor = Rules  # type: ignore[attr-defined]
