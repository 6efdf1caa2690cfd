"""The planted intent: one word says whether to answer from the text or from memory, and a direction carries it.

A name has a month of its own in memory; the text states another month; an intent word says which to answer. The mover in
layer 1 attends, from the last position, to the stated month or to the name, and copies the month or recalls the name's.

| funnelled | the intent word      | where the intent is read                                          | a one-direction knob |
|-----------|----------------------|-------------------------------------------------------------------|----------------------|
| True      | is the last token    | by the mover's queries, from a direction of the last stream       | at layer 0           |
| False     | stands at the start  | by the mover's keys: a layer-0 head wrote it at the stated month  | nowhere              |

In the second the last stream holds no intent before the answer itself is there, so swapping it whole gives the other
prompt's answer, not this prompt's other one.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from patchbay.tiny.planted_canvas import Canvas, Form, Sizes
from patchbay.tiny.planted_truth import Planted, record
from patchbay.tiny.planted_vocabulary import TOKEN_IDS, WORDS, ids

INTENTS = {"context": " then", "prior": " gave"}
ASK = ":"
SHARPNESS, COPY_STRENGTH, LOGIT_SCALE = 25.0, 2.0, 6.0


def context(*, form: Form = "gpt2", seed: int = 0, funnelled: bool = True, **sizes: Unpack[Sizes]) -> Planted:
    """Answer the stated month or the remembered one, as the intent word says.

    Truth: mover direction (funnelled: where the intent is) layer memory (name -> month, ids), and per prompt `prompts`,
    `twins` (the other intent), `answers`, `wrong` (the answer of the other intent), `intents`.
    """
    sizes.setdefault("n_layers", 3)
    canvas = Canvas(form, seed, **sizes)
    intent = canvas.take(1, protect=True)
    words, name, month, marker = canvas.take(canvas.n_vocab), canvas.take(1), canvas.take(1), canvas.take(1)
    written = canvas.take(1)
    names, months = ids("name"), ids("month")
    order = canvas.choose(len(months), len(months))
    memory = {names[i]: months[order[i]] for i in range(len(names))}
    sign = torch.zeros(canvas.n_vocab, 1)
    sign[TOKEN_IDS[INTENTS["context"]]], sign[TOKEN_IDS[INTENTS["prior"]]] = 1.0, -1.0
    canvas.embed(
        words + sign * intent + sign.abs() * marker + _flag(canvas, names) * name + _flag(canvas, months) * month
    )
    mover, slot = canvas.pick_head(1), canvas.slots(1)  # [1, d_head]
    v = torch.cat([words[months], words[names]]).T
    o = COPY_STRENGTH * torch.cat([words[months], words[[memory[one] for one in names]]])
    if funnelled:
        q, k = SHARPNESS * intent.T @ slot, (month - name).T @ slot
    else:
        q, k = SHARPNESS * month.T @ slot, marker.T @ slot
        canvas.set_head(0, canvas.pick_head(0), q=q, k=k, v=intent.T, o=written)
        q, k = SHARPNESS * canvas.one[:, None] * slot, (2.0 * (month + name) + written).T @ slot
    canvas.set_head(1, mover, q=q, k=k, v=v, o=o)
    canvas.unembed(LOGIT_SCALE * words)
    truth = _prompts(canvas, memory, funnelled)
    return record(
        canvas, "context", mover=f"L1.H{mover}", direction=intent[0].clone(), layer="L0", memory=memory, **truth
    )


def _flag(canvas: Canvas, token_ids: list[int]) -> Tensor:
    flag = torch.zeros(canvas.n_vocab, 1)
    flag[token_ids] = 1.0
    return flag


def _prompts(canvas: Canvas, memory: dict[int, int], funnelled: bool, n: int = 48) -> dict[str, list[str]]:
    """`n` texts with their twins, in turn of either intent; the name and the month stand at changing places."""
    rows: dict[str, list[str]] = {key: [] for key in ("prompts", "twins", "answers", "wrong", "intents")}
    fill, kinds = ids("object") + ids("number"), list(INTENTS)
    for i in range(n):
        who = list(memory)[i % len(memory)]
        stated = [month for month in memory.values() if month != memory[who]][canvas.choose(1, len(memory) - 1)[0]]
        around = [fill[at] for at in canvas.choose(4, len(fill))]
        place = canvas.choose(1, 4)[0]
        body = [*around[:place], who, stated, *around[place:]]
        own, other = (kinds[i % 2], kinds[1 - i % 2])
        for key, kind in (("prompts", own), ("twins", other)):
            asked = TOKEN_IDS[INTENTS[kind]]
            line = [*body, asked] if funnelled else [asked, *body, TOKEN_IDS[ASK]]
            rows[key].append("".join(WORDS[token] for token in line))
        answers = {"context": WORDS[stated], "prior": WORDS[memory[who]]}
        rows["answers"].append(answers[own])
        rows["wrong"].append(answers[other])
        rows["intents"].append(own)
    return rows
